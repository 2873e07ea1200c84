//! Collectives of a warp: lanes arrive one by one, and when the last one has arrived the operation is carried out for
//! all of them.

use crate::checks::symbols::Site;

/// Lanes of a full warp.
pub(crate) const ALL: u32 = u32::MAX;

/// The shape and operands of one wgmma, the same in all lanes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Product {
    pub n: u32,
    /// Flags of sim_wgmma; see simulator.h.
    pub flags: u32,
    pub a_in_registers: bool,
    /// Descriptors of the operands in shared memory.
    pub a: u64,
    pub b: u64,
}

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
    pub fn aligned(self) -> bool {
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

impl Meeting {
    /// The first lane that has arrived, as a thread of its block, and where it is.
    pub fn first(&self, warp: usize) -> (u16, Site) {
        let lane = self.arrived.trailing_zeros() as usize;
        ((warp * 32 + lane) as u16, self.sites[lane])
    }

    /// The threads that have arrived.
    pub fn threads(&self, warp: usize) -> impl Iterator<Item = u16> + use<> {
        lanes(self.arrived).map(move |lane| (warp * 32 + lane) as u16)
    }
}

/// A warp of a block: its pending collectives.
pub(crate) struct Warp {
    meetings: Vec<Meeting>,
    /// Lanes that exist.
    pub lanes: u32,
    /// Lanes that have not ended.
    live: u32,
}

/// One lane at a collective.
pub(crate) struct Arrival {
    pub lane: usize,
    pub op: Op,
    pub mask: u32,
    pub operands: *mut Operands,
    pub site: Site,
}

impl Warp {
    /// A warp of the lanes of a mask.
    pub fn new(lanes: u32) -> Warp {
        Warp {
            meetings: Vec::new(),
            lanes,
            live: lanes,
        }
    }

    /// The warps of a block of `threads` threads, the last one perhaps not full.
    pub fn of_block(threads: usize) -> Vec<Warp> {
        let lanes = |warp: usize| match threads - warp * 32 {
            left if left >= 32 => ALL,
            left => (1 << left) - 1,
        };
        let warps = 0..threads.div_ceil(32);
        warps.map(|warp| Warp::new(lanes(warp))).collect()
    }

    /// A lane arrives; the collective, if it was the last one missing, and the lanes that have ended without arriving.
    pub fn arrive(&mut self, arrival: Arrival) -> Option<(Meeting, u32)> {
        let Arrival { op, mask, lane, .. } = arrival;
        let bit = 1 << lane;
        let open = |m: &Meeting| m.op == op && m.mask == mask && m.arrived & bit == 0;
        let position = self.meetings.iter().position(open).unwrap_or_else(|| {
            self.meetings.push(Meeting {
                op,
                mask,
                arrived: 0,
                operands: [std::ptr::null_mut(); 32],
                sites: [Site::default(); 32],
            });
            self.meetings.len() - 1
        });
        let meeting = &mut self.meetings[position];
        meeting.arrived |= bit;
        meeting.operands[lane] = arrival.operands;
        meeting.sites[lane] = arrival.site;
        self.take_complete(position)
    }

    /// A lane has ended: the collectives that waited for it alone go on without it.
    pub fn leave(&mut self, lane: usize) -> Vec<(Meeting, u32)> {
        self.live &= !(1 << lane);
        let mut complete = Vec::new();
        let mut position = 0;
        while position < self.meetings.len() {
            match self.take_complete(position) {
                Some(found) => complete.push(found),
                None => position += 1,
            }
        }
        complete
    }

    /// The collective if every live lane of its mask has arrived; one of all lanes never completes without one of them.
    fn take_complete(&mut self, position: usize) -> Option<(Meeting, u32)> {
        let meeting = &self.meetings[position];
        let missing = meeting.mask & self.lanes & !meeting.arrived;
        if missing & self.live != 0 || (missing != 0 && meeting.op.aligned()) {
            return None;
        }
        Some((self.meetings.swap_remove(position), missing))
    }

    /// A lane that waits and one it waits for, of every pending collective.
    pub fn stuck(&self) -> impl Iterator<Item = (u32, u32)> {
        self.meetings.iter().map(|meeting| {
            let missing = meeting.mask & !meeting.arrived;
            (meeting.arrived.trailing_zeros(), missing.trailing_zeros())
        })
    }
}

/// The lanes of a mask.
pub(crate) fn lanes(mask: u32) -> impl Iterator<Item = usize> + Clone {
    (0..32).filter(move |lane| mask >> lane & 1 != 0)
}
