//! All instructions of a block with the state that they keep between threads: what the machine executes.

use super::barrier::{self, Barriers};
use super::bulk::{self, BulkCopies, Direction};
use super::collective::{Arrival, Meeting, Op, Operands, Warp};
use super::context::Context;
use super::cp_async::ThreadCopies;
use super::mbarrier::Mbarriers;
use super::registers::Registers;
use super::tensor_map::{Chunk, TensorMap};
use super::wgmma::TensorCore;
use super::{lanes, mma};
use crate::checks::report::Kind;
use crate::checks::shadow::Mode;
use crate::checks::symbols::Site;

/// The units of a block.
pub(crate) struct Units {
    warps: Vec<Warp>,
    /// By warp.
    tensor_cores: Vec<TensorCore>,
    barriers: Barriers,
    registers: Registers,
    pub mbarriers: Mbarriers,
    pub bulk: BulkCopies,
    /// cp.async, by thread.
    pub copies: Vec<ThreadCopies>,
}

/// A thread that waits in vain: for another thread, or for something said in words.
pub(crate) struct Stuck {
    pub waiting: u16,
    pub missing: Option<u16>,
    pub what: String,
}

impl Units {
    /// The units of a block of so many threads.
    pub fn new(threads: usize) -> Units {
        let warps = Warp::of_block(threads);
        Units {
            tensor_cores: warps.iter().map(|_| TensorCore::default()).collect(),
            warps,
            barriers: Barriers::default(),
            registers: Registers::new(threads),
            mbarriers: Mbarriers::default(),
            bulk: BulkCopies::new(threads),
            copies: (0..threads).map(|_| ThreadCopies::default()).collect(),
        }
    }

    /// The running lane arrives at a collective; it must be suspended afterwards.
    pub fn arrive(
        &mut self,
        cx: &mut Context,
        op: Op,
        mask: u32,
        operands: *mut Operands,
        site: Site,
    ) {
        let (index, lane) = (cx.thread as usize / 32, cx.thread as usize % 32);
        let warp = &mut self.warps[index];
        let mask = if op.aligned() { warp.lanes } else { mask };
        if mask & (1 << lane) == 0 {
            let place = format!("with mask {mask:#010x}, which lacks its own lane {lane}");
            return cx.refuse(Kind::Divergence, op.name(), site, place);
        }
        let complete = warp.arrive(Arrival {
            lane,
            op,
            mask,
            operands,
            site,
        });
        if let Some((meeting, missing)) = complete {
            self.complete(cx, index, &meeting, missing);
        }
    }

    /// The running thread has ended.
    pub fn thread_ended(&mut self, cx: &mut Context) {
        let thread = cx.thread as usize;
        self.copies[thread].check_at_end(cx);
        for (meeting, missing) in self.warps[thread / 32].leave(thread % 32) {
            self.complete(cx, thread / 32, &meeting, missing);
        }
    }

    /// Every thread of the block has ended: reports what is left over.
    pub fn block_ended(&mut self, cx: &mut Context) {
        self.bulk.check_at_end(cx);
        self.mbarriers.check_at_end(cx);
        for (warp, core) in self.tensor_cores.iter().enumerate() {
            core.check_at_end(cx, warp);
        }
        self.registers.check_at_end(cx);
    }

    /// Carries a collective out that lacks no lane but those of a mask, which have ended.
    fn complete(&mut self, cx: &mut Context, warp: usize, meeting: &Meeting, missing: u32) {
        if missing != 0 && meeting.op != Op::SyncWarp {
            let (thread, site) = meeting.first(warp);
            let mask = meeting.mask;
            let place =
                format!("with mask {mask:#010x}, of which lanes {missing:#010x} have ended");
            cx.report_by(Kind::Divergence, thread, meeting.op.name(), site, place);
        }
        check_same_place(cx, warp, meeting);
        if self.carry_out(cx, warp, meeting) {
            meeting.threads(warp).for_each(|thread| cx.wake(thread));
        }
    }

    /// Executes the operation. False if the lanes must go on waiting.
    fn carry_out(&mut self, cx: &mut Context, warp: usize, meeting: &Meeting) -> bool {
        match meeting.op {
            Op::SyncWarp => lanes::sync(cx, warp, meeting.arrived),
            Op::Shuffle => lanes::shuffle(cx, warp, meeting),
            Op::Ballot => lanes::ballot(meeting),
            Op::LoadMatrix { count, transpose } => {
                lanes::matrix(cx, warp, meeting, count, transpose, Mode::Read)
            }
            Op::StoreMatrix { count, transpose } => {
                lanes::matrix(cx, warp, meeting, count, transpose, Mode::Write)
            }
            Op::Mma { bf16 } => {
                cx.stats.products += 1;
                // SAFETY: aligned, so all 32 lanes wait in calls with Mma operands, whose registers live.
                unsafe { mma::m16n8k16(&meeting.operands, bf16) };
            }
            Op::Wgmma(product) => self.tensor_cores[warp].product(cx, warp, product, meeting),
            Op::WgmmaFence => self.tensor_cores[warp].fence(),
            Op::WgmmaCommit => self.tensor_cores[warp].commit(),
            Op::WgmmaWait { newest_left } => {
                self.tensor_cores[warp].wait(cx, warp, newest_left, meeting);
            }
            Op::Registers { each, take } => {
                return self.registers.set(cx, warp, each, take, meeting);
            }
            Op::Barrier { id, count, wait } => {
                let at = barrier::Arrival { id, count, wait };
                let threads: Vec<u16> = meeting.threads(warp).collect();
                self.barriers
                    .arrive(cx, at, &threads, meeting.first(warp).1);
                return !wait;
            }
        }
        true
    }

    /// cp.async.bulk.tensor by the running thread.
    pub fn tensor_copy(
        &mut self,
        cx: &mut Context,
        shared: usize,
        (map, at): (&TensorMap, &[i32]),
        direction: Direction,
        site: Site,
    ) {
        if let Some(chunks) = bulk::tensor_chunks(cx, shared, map, at, direction, site) {
            self.issue(cx, chunks, direction, site);
        }
    }

    /// cp.async.bulk of plain bytes by the running thread.
    pub fn plain_copy(
        &mut self,
        cx: &mut Context,
        shared: usize,
        (global, bytes): (usize, u32),
        direction: Direction,
        site: Site,
    ) {
        if let Some(chunks) = bulk::plain_chunks(cx, shared, global, bytes, site) {
            self.issue(cx, chunks, direction, site);
        }
    }

    fn issue(&mut self, cx: &mut Context, chunks: Vec<Chunk>, direction: Direction, site: Site) {
        if let Direction::Load { barrier } = direction
            && !self.mbarriers.usable_by_copies(cx, barrier, site)
        {
            return;
        }
        self.bulk.issue(cx, chunks, direction, site);
    }

    /// Carries out one of the bulk copies in flight.
    pub fn land_bulk_copy(&mut self, cx: &mut Context, index: usize) {
        if let Some(load) = self.bulk.land(cx, index) {
            self.mbarriers
                .deliver(cx, load.barrier, load.bytes, &load.clock);
        }
    }

    /// Who waits for whom when nothing can go on.
    pub fn stuck(&self) -> Vec<Stuck> {
        let for_thread = |(waiting, missing)| Stuck {
            waiting,
            missing,
            what: String::new(),
        };
        let in_words = |(waiting, what)| Stuck {
            waiting,
            missing: None,
            what,
        };
        let warps = self.warps.iter().enumerate().flat_map(|(index, warp)| {
            let thread = move |lane: u32| (index * 32) as u16 + lane as u16;
            let lanes = warp.stuck();
            lanes.map(move |(waiting, missing)| (thread(waiting), Some(thread(missing))))
        });
        let barriers = self.barriers.stuck(self.copies.len());
        let mut stuck: Vec<Stuck> = warps.chain(barriers).map(for_thread).collect();
        stuck.extend(self.registers.stuck().into_iter().map(in_words));
        stuck.extend(self.mbarriers.stuck().map(in_words));
        stuck
    }
}

/// Lanes at different lines of one `.aligned` instruction have diverged.
fn check_same_place(cx: &mut Context, warp: usize, meeting: &Meeting) {
    let first = meeting.first(warp);
    let mut threads = meeting.threads(warp);
    let other = threads.find(|&thread| meeting.sites[thread as usize % 32] != first.1);
    if let (true, true, Some(other)) = (cx.checker.enabled(), meeting.op.aligned(), other) {
        let other = (other, meeting.sites[other as usize % 32]);
        cx.report_divergence(meeting.op.name(), other, first);
    }
}
