//! Collectives of a warp: lanes arrive one by one, the last one carries the operation out for all.

use crate::checks::report::{Kind, Site};
use crate::instructions::access::{Access, Mode};
use crate::instructions::mma;
use crate::instructions::wgmma::{Product, Wgmma};
use crate::machine::launch::Launch;

/// Lanes of a full warp.
pub(crate) const ALL: u32 = u32::MAX;

/// What a warp's lanes do together.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Op {
    SyncWarp,
    Shuffle,
    Ballot,
    LoadMatrix {
        count: u8,
        transpose: bool,
    },
    StoreMatrix {
        count: u8,
        transpose: bool,
    },
    Mma {
        bf16: bool,
    },
    Wgmma(Product),
    WgmmaFence,
    WgmmaCommit,
    WgmmaWait {
        newest_left: u32,
    },
    Barrier {
        id: u32,
        count: u32,
        wait: bool,
    },
    /// setmaxnreg to so many registers a thread.
    Registers {
        each: u32,
        take: bool,
    },
}

impl Op {
    /// The instruction, for reports.
    pub fn name(self) -> &'static str {
        match self {
            Op::SyncWarp => "__syncwarp",
            Op::Shuffle => "shuffle",
            Op::Ballot => "ballot",
            Op::LoadMatrix { .. } => "ldmatrix",
            Op::StoreMatrix { .. } => "stmatrix",
            Op::Mma { .. } => "mma.sync",
            Op::Wgmma(_) => "wgmma",
            Op::WgmmaFence => "wgmma.fence",
            Op::WgmmaCommit => "wgmma.commit_group",
            Op::WgmmaWait { .. } => "wgmma.wait_group",
            Op::Barrier {
                wait: true, id: 0, ..
            } => "__syncthreads",
            Op::Barrier { wait: true, .. } => "bar.sync",
            Op::Barrier { .. } => "bar.arrive",
            Op::Registers { take: true, .. } => "setmaxnreg.inc",
            Op::Registers { .. } => "setmaxnreg.dec",
        }
    }

    /// `.aligned` instructions: every lane of the warp must execute the very same one.
    fn aligned(self) -> bool {
        !matches!(self, Op::SyncWarp | Op::Shuffle | Op::Ballot)
    }
}

/// Operands of one lane; they live in the lane's suspended call.
pub(crate) enum Operands {
    None,
    Shuffle {
        value: u32,
        source: u32,
        result: u32,
    },
    Ballot {
        predicate: bool,
        result: u32,
    },
    Matrix {
        registers: *mut u32,
        row: usize,
    },
    Wgmma {
        d: *mut f32,
        a: *const u32,
    },
    Mma {
        d: *mut f32,
        a: *const u32,
        b: *const u32,
    },
}

/// A collective some lanes of which have arrived.
pub(crate) struct Meeting {
    pub op: Op,
    pub mask: u32,
    pub arrived: u32,
    pub operands: [*mut Operands; 32],
    pub sites: [Site; 32],
}

/// A warp of a block: its pending collectives.
#[derive(Default)]
pub(crate) struct Warp {
    pub meetings: Vec<Meeting>,
    pub wgmma: Wgmma,
    /// Lanes that exist.
    pub lanes: u32,
    /// Lanes that have not ended.
    pub live: u32,
}

impl Launch {
    /// The running lane arrives at a collective; it must be suspended afterwards.
    pub fn arrive(&mut self, op: Op, mask: u32, operands: *mut Operands, site: Site) {
        let thread = self.current.thread as usize;
        let (index, lane) = (thread / 32, thread % 32);
        let bit = 1u32 << lane;
        let mask = if op.aligned() {
            self.block().warps[index].lanes
        } else {
            mask
        };
        self.thread_mut().wait = Some(crate::machine::thread::Wait {
            what: op.name(),
            site,
        });
        if mask & bit == 0 {
            let place = format!("with mask {mask:#010x}, which lacks its own lane {lane}");
            self.report(Kind::Divergence, op.name(), site, place);
            self.fatal = true;
            return;
        }
        let warp = &mut self.block_mut().warps[index];
        let open = |m: &Meeting| m.op == op && m.mask == mask && m.arrived & bit == 0;
        let position = warp.meetings.iter().position(open).unwrap_or_else(|| {
            let (operands, sites) = ([std::ptr::null_mut(); 32], [Site::default(); 32]);
            warp.meetings.push(Meeting {
                op,
                mask,
                arrived: 0,
                operands,
                sites,
            });
            warp.meetings.len() - 1
        });
        let meeting = &mut warp.meetings[position];
        meeting.arrived |= bit;
        meeting.operands[lane] = operands;
        meeting.sites[lane] = site;
        self.complete_meeting(index, position);
    }

    /// A lane has ended: collectives that waited for it alone go on without it.
    pub fn leave_warp(&mut self, thread: usize) {
        let index = thread / 32;
        self.block_mut().warps[index].live &= !(1 << (thread % 32));
        let mut position = 0;
        while position < self.block().warps[index].meetings.len() {
            if !self.complete_meeting(index, position) {
                position += 1;
            }
        }
    }

    /// Carries the collective out if every live lane of its mask has arrived.
    fn complete_meeting(&mut self, warp_index: usize, position: usize) -> bool {
        let warp = &mut self.block_mut().warps[warp_index];
        let meeting = &warp.meetings[position];
        let missing = meeting.mask & warp.lanes & !meeting.arrived;
        if missing & warp.live != 0 || (missing != 0 && meeting.op.aligned()) {
            return false;
        }
        let meeting = warp.meetings.swap_remove(position);
        if missing != 0 && meeting.op != Op::SyncWarp {
            let first = meeting.arrived.trailing_zeros() as usize;
            let place = format!(
                "with mask {:#010x}, of which lanes {missing:#010x} have ended",
                meeting.mask
            );
            let thread = (warp_index * 32 + first) as u16;
            self.report_by(
                Kind::Divergence,
                thread,
                meeting.op.name(),
                meeting.sites[first],
                place,
            );
        }
        self.check_same_place(warp_index, &meeting);
        let wake = self.carry_out(warp_index, &meeting);
        if wake {
            lanes(meeting.arrived).for_each(|lane| self.wake((warp_index * 32 + lane) as u16));
        }
        true
    }

    /// Lanes at different lines of one `.aligned` instruction have diverged.
    fn check_same_place(&mut self, warp: usize, meeting: &Meeting) {
        let first = meeting.arrived.trailing_zeros() as usize;
        let other =
            lanes(meeting.arrived).find(|&lane| meeting.sites[lane] != meeting.sites[first]);
        if let (true, true, Some(other)) = (self.checks, meeting.op.aligned(), other) {
            let party = |lane: usize| ((warp * 32 + lane) as u16, meeting.sites[lane]);
            self.report_divergence(meeting.op.name(), party(other), party(first));
        }
    }

    /// Executes the operation. False if the lanes must go on waiting.
    fn carry_out(&mut self, warp: usize, meeting: &Meeting) -> bool {
        match meeting.op {
            Op::SyncWarp => self.join_lanes(warp, meeting.arrived),
            Op::Shuffle => self.shuffle(warp, meeting),
            Op::Ballot => ballot(meeting),
            Op::LoadMatrix { count, transpose } => {
                self.matrix(warp, meeting, count, transpose, Mode::Read)
            }
            Op::StoreMatrix { count, transpose } => {
                self.matrix(warp, meeting, count, transpose, Mode::Write)
            }
            Op::Mma { bf16 } => {
                self.stats.products += 1;
                // SAFETY: aligned, so all 32 lanes wait in calls with Mma operands, whose registers live.
                unsafe { mma::m16n8k16(&meeting.operands, bf16) };
            }
            Op::Wgmma(product) => self.wgmma(warp, product, meeting),
            Op::WgmmaFence => self.wgmma_fence(warp),
            Op::WgmmaCommit => self.wgmma_commit(warp),
            Op::Registers { each, take } => {
                return self.set_registers(warp, each, take, meeting);
            }
            Op::WgmmaWait { newest_left } => self.wgmma_wait(warp, newest_left, meeting),
            Op::Barrier { id, count, wait } => {
                let threads = lanes(meeting.arrived).map(|lane| (warp * 32 + lane) as u16);
                let site = meeting.sites[meeting.arrived.trailing_zeros() as usize];
                self.arrive_at_barrier(id, count, wait, &threads.collect::<Vec<_>>(), site);
                return !wait;
            }
        }
        true
    }

    /// __syncwarp orders memory among the lanes.
    fn join_lanes(&mut self, warp: usize, mask: u32) {
        if !self.checks {
            return;
        }
        let threads = &mut self.block_mut().threads[warp * 32..];
        let mut joined = threads[mask.trailing_zeros() as usize].clock.clone();
        lanes(mask).for_each(|lane| joined.join(&threads[lane].clock));
        for lane in lanes(mask) {
            threads[lane].clock.clone_from(&joined);
            threads[lane].clock.local[warp * 32 + lane] += 1;
        }
    }

    fn shuffle(&mut self, warp: usize, meeting: &Meeting) {
        for lane in lanes(meeting.arrived) {
            let mine = meeting.operands[lane];
            // SAFETY: the lane waits in its call to sim_shuffle, where its operands live.
            let from = match unsafe { &*mine } {
                Operands::Shuffle { source, .. } => (*source & 31) as usize,
                _ => continue,
            };
            let mut value = ALL;
            if meeting.arrived & (1 << from) == 0 {
                let who = (warp * 32 + lane) as u16;
                let place = format!(
                    "from lane {from}, which is not among the lanes {:#010x}",
                    meeting.arrived
                );
                self.report_by(Kind::Divergence, who, "shuffle", meeting.sites[lane], place);
            } else if let Operands::Shuffle { value: theirs, .. } =
                unsafe { &*meeting.operands[from] }
            {
                // SAFETY of the read: the source lane has arrived, so it waits in its own call to sim_shuffle.
                value = *theirs;
            }
            // SAFETY: as above; no other reference is held.
            if let Operands::Shuffle { result, .. } = unsafe { &mut *mine } {
                *result = value;
            }
        }
    }

    /// ldmatrix and stmatrix: 8x8 matrices of 16-bit elements, matrix i's rows at the addresses of lanes 8i..8i+8.
    fn matrix(&mut self, warp: usize, meeting: &Meeting, count: u8, transpose: bool, mode: Mode) {
        let mut rows = [0usize; 32];
        let mut registers = [std::ptr::null_mut::<u32>(); 32];
        for lane in 0..32 {
            // SAFETY: aligned, so all 32 lanes wait in calls whose operands live.
            if let Operands::Matrix { registers: r, row } = unsafe { &*meeting.operands[lane] } {
                (rows[lane], registers[lane]) = (*row, *r);
            }
        }
        let back = self.current;
        for (lane, &row) in rows.iter().enumerate().take(count as usize * 8) {
            self.current.thread = (warp * 32 + lane) as u16;
            let access = Access {
                alignment: 16,
                ..Access::new(row, 16, mode, meeting.op.name())
            };
            let site = meeting.sites[lane];
            if self.is_shared(row) {
                self.access(access, site);
            } else {
                self.report(
                    Kind::OutOfBounds,
                    meeting.op.name(),
                    site,
                    self.describe(row),
                );
                self.fatal = true;
            }
        }
        self.current = back;
        if !self.fatal {
            // SAFETY: every row lies in shared memory (or checks are off, as on hardware); registers live.
            unsafe {
                mma::move_matrices(
                    &rows,
                    &registers,
                    count as usize,
                    transpose,
                    mode == Mode::Read,
                )
            };
        }
    }
}

fn ballot(meeting: &Meeting) {
    let mut votes = 0u32;
    for round in 0..2 {
        for lane in lanes(meeting.arrived) {
            // SAFETY: the lane waits in its call to sim_ballot, where its operands live; one reference at a time.
            if let Operands::Ballot { predicate, result } = unsafe { &mut *meeting.operands[lane] }
            {
                match round {
                    0 => votes |= u32::from(*predicate) << lane,
                    _ => *result = votes,
                }
            }
        }
    }
}

/// The lanes of a mask.
pub(crate) fn lanes(mask: u32) -> impl Iterator<Item = usize> + Clone {
    (0..32).filter(move |lane| mask >> lane & 1 != 0)
}
