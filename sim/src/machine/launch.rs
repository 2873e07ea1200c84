//! One kernel launch: resident blocks, the random scheduler, and what its checks have found.

use std::cell::Cell;
use std::collections::HashMap;
use std::io;
use std::ptr;

use corosensei::{Coroutine, CoroutineResult};

use crate::checks::clock::Foreign;
use crate::checks::report::{Kind, RawParty, RawReport, ReportLog, Site};
use crate::checks::shadow::Readers;
use crate::instructions::bulk::{BulkCopy, COPY_SLOTS};
use crate::instructions::registers::Registers;
use crate::machine::block::{Block, actors};
use crate::machine::rng::Rng;
use crate::machine::stack::ThreadStack;
use crate::machine::thread::{Thread, ThreadContext};
use crate::memory::global::{GlobalMemory, Region};

/// Turns of spinning threads, with no other progress, after which a launch counts as stuck.
const SPIN_LIMIT: u64 = 1 << 20;

thread_local! {
    static CURRENT: Cell<*mut Launch> = const { Cell::new(ptr::null_mut()) };
}

/// What a launch did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Matrix products of one warp (mma.sync).
    pub products: u64,
    /// Block barriers completed.
    pub barriers: u64,
    /// Checked memory accesses.
    pub accesses: u64,
    /// Times a thread was given control.
    pub switches: u64,
}

/// A thread of a resident block.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct ThreadRef {
    pub slot: u16,
    pub thread: u16,
}

/// What to launch.
pub(crate) struct Shape {
    pub grid: [u32; 3],
    pub block: [u32; 3],
    pub shared_bytes: usize,
    pub resident: usize,
}

/// A running launch.
pub(crate) struct Launch {
    shape: Shape,
    pub checks: bool,
    pub rng: Rng,
    /// Prefer threads that became ready last, so that warps stay together: another family of schedules.
    sticky: bool,
    pub memory: GlobalMemory,
    pub blocks: Vec<Option<Block>>,
    ready: Vec<ThreadRef>,
    pub current: ThreadRef,
    pub log: ReportLog,
    pub stats: Stats,
    /// A report that makes going on pointless.
    pub fatal: bool,
    pub first_block: u32,
    next_block: u32,
    pub readers: Readers,
    /// What was published at the addresses of atomics, by address and block (0: to all).
    pub published: HashMap<(usize, u32), Foreign>,
    pub image_base: usize,
    /// Bulk copies that have been issued and not carried out.
    pub in_flight: Vec<BulkCopy>,
    spins: u64,
}

/// Runs `action` on the launch of this OS thread.
///
/// # Safety
/// A launch must be running on this OS thread, `action` must not suspend, and nothing else may hold a reference to it.
pub(crate) unsafe fn with<R>(action: impl FnOnce(&mut Launch) -> R) -> R {
    // SAFETY: `Launch::run` sets the pointer for as long as coroutines run; the rest is the caller's word.
    action(unsafe { &mut *CURRENT.get() })
}

/// Gives control back to the scheduler until somebody wakes the running thread.
///
/// # Safety
/// Called on a simulated thread's stack, with no value alive that has a destructor.
pub(crate) unsafe fn suspend() {
    // SAFETY: the yielder lives on the running coroutine's own stack.
    unsafe {
        let yielder = with(|launch| launch.thread_mut().yielder);
        (*yielder).suspend(());
    }
}

impl Launch {
    pub fn new(
        shape: Shape,
        checks: bool,
        seed: u64,
        memory: GlobalMemory,
        first_block: u32,
        image: usize,
    ) -> Launch {
        let mut rng = Rng::new(seed);
        let sticky = rng.below(2) == 0;
        Launch {
            shape,
            checks,
            rng,
            sticky,
            memory,
            blocks: Vec::new(),
            ready: Vec::new(),
            current: ThreadRef { slot: 0, thread: 0 },
            log: ReportLog::default(),
            stats: Stats::default(),
            fatal: false,
            first_block,
            next_block: first_block,
            readers: Readers::default(),
            published: HashMap::new(),
            image_base: image,
            in_flight: Vec::new(),
            spins: 0,
        }
    }

    fn num_blocks(&self) -> u32 {
        self.shape.grid.iter().product()
    }

    /// Runs every block to its end, or to a report that stops the launch.
    pub fn run(&mut self, body: &dyn Fn()) -> io::Result<()> {
        let slots = self.shape.resident.min(self.num_blocks() as usize).max(1);
        let this: *mut Launch = self;
        let outer = CURRENT.replace(this);
        // SAFETY: `this` is valid and used only through short borrows from here on, never across a resume.
        let result = unsafe {
            let started = (*this).start(slots, body);
            started.and_then(|()| Self::schedule(this, body))
        };
        CURRENT.set(outer);
        self.end_threads();
        result
    }

    fn start(&mut self, slots: usize, body: &dyn Fn()) -> io::Result<()> {
        for slot in 0..slots {
            let shared = Region::new("shared memory", self.shape.shared_bytes, false)?;
            self.blocks.push(None);
            self.start_block(slot, shared, body)?;
        }
        Ok(())
    }

    /// Starts the next block, if there is one, in a slot of the machine.
    fn start_block(&mut self, slot: usize, mut shared: Region, body: &dyn Fn()) -> io::Result<()> {
        let linear = self.next_block - self.first_block;
        if linear >= self.num_blocks() {
            return Ok(());
        }
        shared.fill_with_nan();
        let count = self.shape.block.iter().product::<u32>() as usize;
        let mut threads = Vec::with_capacity(count);
        for thread in 0..count {
            let stack = ThreadStack::take()?;
            let context = stack.context();
            let (block_dim, grid_dim) = (self.shape.block, self.shape.grid);
            let values = ThreadContext {
                thread_idx: unravel(thread as u32, block_dim),
                block_idx: unravel(linear, grid_dim),
                block_dim,
                grid_dim,
                shared: shared.base as *mut u8,
            };
            // SAFETY: the context area of a stack that this thread now owns, aligned far beyond need.
            unsafe { context.write(values) };
            // SAFETY: the coroutine is ended in `finish_block` or `end_threads`, before `body` goes away.
            let coroutine = unsafe {
                Coroutine::with_stack_unchecked(stack, move |yielder, ()| {
                    with(|launch| launch.thread_mut().yielder = yielder);
                    body();
                })
            };
            threads.push(Thread::new(context, coroutine, thread, actors(count)));
            self.ready.push(ThreadRef {
                slot: slot as u16,
                thread: thread as u16,
            });
        }
        let (warps, serial) = (Block::warps(count), self.next_block);
        self.blocks[slot] = Some(Block {
            serial,
            threads,
            warps,
            barriers: Default::default(),
            shared,
            unfinished: count,
            mbarriers: Default::default(),
            registers: Registers::new(count),
            copies_issued: 0,
        });
        self.next_block += 1;
        Ok(())
    }

    /// Gives control to ready threads, one at a time, until none is left.
    ///
    /// # Safety
    /// `this` is valid, and the caller holds no reference to it.
    unsafe fn schedule(this: *mut Launch, body: &dyn Fn()) -> io::Result<()> {
        loop {
            // SAFETY: by contract; the borrow ends before the resume.
            let coroutine = unsafe { (*this).next_thread() };
            let Some(mut coroutine) = coroutine else {
                return Ok(());
            };
            let result = coroutine.resume(());
            // SAFETY: by contract; the coroutine has given up its borrows.
            let launch = unsafe { &mut *this };
            launch.thread_mut().body = Some(coroutine);
            if let CoroutineResult::Return(()) = result {
                launch.finish_thread(body)?;
            }
        }
    }

    /// Picks a ready thread at random and makes it the running one.
    fn next_thread(&mut self) -> Option<crate::machine::thread::Body> {
        while !self.in_flight.is_empty() && (self.ready.is_empty() || self.rng.below(32) == 0) {
            let index = self.rng.below(self.in_flight.len());
            self.land_bulk_copy(index);
        }
        if self.spins > SPIN_LIMIT || (self.ready.is_empty() && !self.fatal) {
            self.report_stuck();
            return None;
        }
        if self.fatal {
            return None;
        }
        let count = self.ready.len();
        let window = if self.sticky && self.rng.below(16) != 0 {
            count.min(32)
        } else {
            count
        };
        let index = count - 1 - self.rng.below(window);
        self.current = self.ready.swap_remove(index);
        self.stats.switches += 1;
        if self.rng.below(16) == 0 {
            self.thread_mut().copies.land_one();
        }
        let thread = self.thread_mut();
        thread.wait = None;
        thread.body.take()
    }

    fn finish_thread(&mut self, body: &dyn Fn()) -> io::Result<()> {
        let ThreadRef { slot, thread } = self.current;
        self.spins = 0;
        if let (true, Some(site)) = (self.checks, self.thread_mut().copies.unfinished()) {
            let place = "which nobody waited for before the thread ended".to_string();
            self.report_by(Kind::Leak, thread, "issued cp.async", site, place);
        }
        self.thread_mut().finished = true;
        self.leave_warp(thread as usize);
        self.block_mut().unfinished -= 1;
        let last = self.block().unfinished == 0;
        if last {
            self.check_copies_at_end();
            self.check_mbarriers_at_end();
            self.check_wgmma_at_end();
            self.check_registers_at_end();
        }
        if last && let Some(mut block) = self.blocks[slot as usize].take() {
            block.threads.iter_mut().for_each(Thread::end);
            self.start_block(slot as usize, block.shared, body)?;
        }
        Ok(())
    }

    fn end_threads(&mut self) {
        self.blocks
            .iter_mut()
            .flatten()
            .flat_map(|block| &mut block.threads)
            .for_each(Thread::end);
    }

    /// Makes a thread of the running block ready.
    pub fn wake(&mut self, thread: u16) {
        self.spins = 0;
        self.ready.push(ThreadRef {
            slot: self.current.slot,
            thread,
        });
    }

    /// The running thread stays ready but lets others go first.
    pub fn step_back(&mut self) {
        self.spins += 1;
        self.ready.push(self.current);
    }

    /// The running thread's block.
    pub fn block(&self) -> &Block {
        self.blocks[self.current.slot as usize]
            .as_ref()
            .expect("the running block is resident")
    }

    /// The running thread's block.
    pub fn block_mut(&mut self) -> &mut Block {
        self.blocks[self.current.slot as usize]
            .as_mut()
            .expect("the running block is resident")
    }

    /// The running thread.
    pub fn thread_mut(&mut self) -> &mut Thread {
        let thread = self.current.thread as usize;
        &mut self.block_mut().threads[thread]
    }

    /// Blocks started so far, in all launches.
    pub fn blocks_started(&self) -> u32 {
        self.next_block
    }

    /// A thread of a block of this launch, in words.
    pub fn who(&self, serial: u32, thread: u16) -> String {
        let threads = self.shape.block.iter().product::<u32>() as usize;
        let agent = (thread as usize).checked_sub(threads);
        let [x, y, z] = unravel(u32::from(thread), self.shape.block);
        let [i, j, k] = unravel(serial.wrapping_sub(self.first_block), self.shape.grid);
        match agent {
            None => format!("thread ({x},{y},{z}) of block ({i},{j},{k})"),
            Some(slot) if slot < COPY_SLOTS => format!("a bulk copy of block ({i},{j},{k})"),
            Some(agent) => format!(
                "wgmma of warp {} of block ({i},{j},{k})",
                agent - COPY_SLOTS
            ),
        }
    }

    /// A thread or agent of the running block as a side of a report.
    pub fn party_of(&self, thread: u16, action: &str, site: Site) -> RawParty {
        RawParty {
            who: self.who(self.block().serial, thread),
            action: action.to_string(),
            site,
        }
    }

    /// Reports something the running thread did.
    pub fn report(&mut self, kind: Kind, action: &str, site: Site, place: String) {
        self.report_by(kind, self.current.thread, action, site, place);
    }

    /// Reports something a thread of the running block did.
    pub fn report_by(&mut self, kind: Kind, thread: u16, action: &str, site: Site, place: String) {
        let party = self.party_of(thread, action, site);
        self.log.add(RawReport {
            kind,
            party,
            place,
            other: None,
            unless_same_line: false,
        });
    }

    /// Reports two threads at different places that should have been at one.
    pub fn report_divergence(&mut self, what: &str, party: (u16, Site), other: (u16, Site)) {
        let party = self.party_of(party.0, &format!("reached {what}"), party.1);
        let other = Some(self.party_of(other.0, &format!("was at another {what}"), other.1));
        let place = String::new();
        self.log.add(RawReport {
            kind: Kind::Divergence,
            party,
            place,
            other,
            unless_same_line: true,
        });
    }

    /// Reports who waits for whom when nothing can go on.
    fn report_stuck(&mut self) {
        for slot in 0..self.blocks.len() {
            self.current.slot = slot as u16;
            if self.blocks[slot].is_some() {
                self.report_stuck_block();
            }
        }
    }

    fn report_stuck_block(&mut self) {
        let told = self.report_waits_for_registers();
        let block = self.block();
        let mut pairs: Vec<(u16, Option<u16>)> = Vec::new();
        for (warp, meetings) in block
            .warps
            .iter()
            .enumerate()
            .flat_map(|(i, w)| w.meetings.iter().map(move |m| (i, m)))
        {
            let missing = (meetings.mask & !meetings.arrived).trailing_zeros();
            let first = (warp * 32) as u16 + meetings.arrived.trailing_zeros() as u16;
            pairs.push((first, Some((warp * 32) as u16 + missing as u16)));
        }
        for barrier in block.barriers.iter().filter(|barrier| barrier.arrived > 0) {
            let missing =
                (0..block.threads.len() as u16).find(|thread| !barrier.waiting.contains(thread));
            pairs.extend(barrier.waiting.first().map(|&waiting| (waiting, missing)));
        }
        if pairs.is_empty() && !told {
            let stuck = (0..block.threads.len()).find(|&thread| !block.threads[thread].finished);
            pairs.extend(stuck.map(|thread| (thread as u16, None)));
        }
        for (waiting, missing) in pairs {
            self.report_stuck_pair(waiting, missing);
        }
    }

    fn report_stuck_pair(&mut self, waiting: u16, missing: Option<u16>) {
        let threads = &self.block().threads;
        let describe = |thread: u16| match (
            &threads[thread as usize].wait,
            threads[thread as usize].finished,
        ) {
            (_, true) => ("has ended".to_string(), Site::default()),
            (Some(wait), false) => (format!("waits for ever in {}", wait.what), wait.site),
            (None, false) => ("spins for ever".to_string(), Site::default()),
        };
        let (action, site) = describe(waiting);
        let party = self.party_of(waiting, &action, site);
        let other = missing.map(|thread| {
            let (action, site) = describe(thread);
            self.party_of(thread, &action, site)
        });
        let kind = if other.is_some() {
            Kind::Divergence
        } else {
            Kind::Deadlock
        };
        self.log.add(RawReport {
            kind,
            party,
            place: String::new(),
            other,
            unless_same_line: false,
        });
    }
}

/// Index in three dimensions of the `linear`-th element, the first dimension fastest.
fn unravel(linear: u32, dims: [u32; 3]) -> [u32; 3] {
    let [x, y, _] = dims.map(|dim| dim.max(1));
    [linear % x, linear / x % y, linear / x / y]
}
