//! One kernel launch: its resident blocks and their threads, run one at a time.

use std::ffi::c_void;
use std::io;

use corosensei::{Coroutine, CoroutineResult};

use super::block::Block;
use super::context::ThreadContext;
use super::limits::Limits;
use super::scheduler::{Scheduler, ThreadRef};
use super::stack::ThreadStack;
use super::stuck::{self, End};
use super::thread::{Body, Thread, Wait};
use crate::checks::actors::{Names, Who, unravel};
use crate::checks::checker::Checker;
use crate::checks::report::Kind;
use crate::checks::symbols::Site;
use crate::instructions::context::{Context, Stats};
use crate::instructions::units::Units;
use crate::memory::global::GlobalMemory;
use crate::memory::region::Region;

/// What to launch.
pub(crate) struct Shape {
    pub grid: [u32; 3],
    pub block: [u32; 3],
    pub shared_bytes: usize,
    /// Blocks that run at the same time.
    pub resident: usize,
    pub limits: Limits,
}

/// A running launch.
pub(crate) struct Launch {
    shape: Shape,
    pub memory: GlobalMemory,
    pub checker: Checker,
    pub stats: Stats,
    pub scheduler: Scheduler,
    pub blocks: Vec<Option<Block>>,
    pub current: ThreadRef,
    first_block: u32,
    next_block: u32,
    /// Threads of the running block that an instruction lets go on.
    woken: Vec<u16>,
}

impl Launch {
    /// A launch whose first block has the serial number `first_block`.
    pub fn new(
        shape: Shape,
        checks: bool,
        seed: u64,
        memory: GlobalMemory,
        first_block: u32,
    ) -> Launch {
        let names = Names {
            grid: shape.grid,
            block: shape.block,
            first_block,
        };
        Launch {
            shape,
            memory,
            checker: Checker::new(checks, names),
            stats: Stats::default(),
            scheduler: Scheduler::new(seed),
            blocks: Vec::new(),
            current: ThreadRef { slot: 0, thread: 0 },
            first_block,
            next_block: first_block,
            woken: Vec::new(),
        }
    }

    fn num_blocks(&self) -> u32 {
        self.shape.grid.iter().product()
    }

    /// Blocks started so far, in all launches.
    pub fn blocks_started(&self) -> u32 {
        self.next_block
    }

    /// Runs every block to its end, or to a finding that stops the launch.
    ///
    /// # Safety
    /// `this` is valid, is the current launch of this OS thread, and is used through no reference that the caller
    /// holds.
    pub unsafe fn run(this: *mut Launch, body: &dyn Fn()) -> io::Result<()> {
        // SAFETY: by contract; the borrows are short, and none lives across a resume.
        unsafe {
            let started = (*this).start(body);
            let result = started.and_then(|()| Self::schedule(this, body));
            (*this).end_threads();
            result
        }
    }

    fn start(&mut self, body: &dyn Fn()) -> io::Result<()> {
        let slots = self.shape.resident.min(self.num_blocks() as usize).max(1);
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
        let count = self.shape.block.iter().product::<u32>();
        let block_idx = unravel(linear, self.shape.grid);
        let mut threads = Vec::with_capacity(count as usize);
        for thread in 0..count {
            threads.push(self.start_thread(thread, block_idx, shared.base, body)?);
            self.scheduler.wake(ThreadRef {
                slot: slot as u16,
                thread: thread as u16,
            });
        }
        self.blocks[slot] = Some(Block::new(self.next_block, threads, shared));
        self.next_block += 1;
        Ok(())
    }

    fn start_thread(
        &self,
        thread: u32,
        block_idx: [u32; 3],
        shared: usize,
        body: &dyn Fn(),
    ) -> io::Result<Thread> {
        let stack = ThreadStack::take()?;
        let context = stack.context();
        let values = ThreadContext {
            thread_idx: unravel(thread, self.shape.block),
            block_idx,
            block_dim: self.shape.block,
            grid_dim: self.shape.grid,
            shared: shared as *mut u8,
            yielder: std::ptr::null(),
            steps_left: 0,
        };
        // SAFETY: the context area of a stack that this thread now owns, aligned far beyond need.
        unsafe { context.write(values) };
        // SAFETY: the coroutine is ended in `finish_thread` or `end_threads`, before `body` goes away; its context lies
        // on its own stack.
        let coroutine = unsafe {
            Coroutine::with_stack_unchecked(stack, move |yielder, ()| {
                (*context).yielder = yielder;
                body();
            })
        };
        Ok(Thread::new(context, coroutine))
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
            launch.count_steps();
            if let CoroutineResult::Return(()) = result {
                launch.finish_thread(body)?;
            }
        }
    }

    /// Picks a ready thread at random and makes it the running one.
    fn next_thread(&mut self) -> Option<Body> {
        self.land_bulk_copies();
        if self.checker.stopped() {
            return None;
        }
        if self.scheduler.spins() > self.shape.limits.idle_turns || self.scheduler.is_idle() {
            stuck::report(&self.blocks, &mut self.checker, End::Stuck);
            return None;
        }
        if self.stats.steps >= self.shape.limits.total_steps {
            let site = self.thread_mut().wait.map(|wait| wait.site);
            self.end_endless(site.unwrap_or_default());
            return None;
        }
        self.current = self.scheduler.pick()?;
        self.stats.switches += 1;
        if self.scheduler.one_in(16) {
            self.execute(|units, cx| units.copies[cx.thread as usize].land_one());
        }
        let steps = self.turn_limit() as i64;
        let thread = self.thread_mut();
        thread.wait = None;
        // SAFETY: the context lives as long as its thread, which does not run now.
        unsafe { (*thread.context).steps_left = steps };
        thread.body.take()
    }

    /// Steps that a thread may execute in its next turn.
    fn turn_limit(&self) -> u64 {
        let Limits {
            turn_steps,
            total_steps,
            ..
        } = self.shape.limits;
        turn_steps.min(total_steps.saturating_sub(self.stats.steps))
    }

    /// Adds the turn that has ended to the launch's steps.
    fn count_steps(&mut self) {
        let limit = self.turn_limit();
        // SAFETY: the context lives as long as its thread, which does not run now.
        let left = unsafe { (*self.thread_mut().context).steps_left };
        self.stats.steps += Limits::STEPS_OF_A_TURN + limit.saturating_sub(left.max(0) as u64);
    }

    /// The running thread has gone past a limit: the launch ends, with a report of what everyone is doing.
    pub fn end_endless(&mut self, site: Site) {
        let Limits {
            turn_steps,
            total_steps,
            ..
        } = self.shape.limits;
        let turn = self.turn_limit() == turn_steps;
        let action = match turn {
            true => format!("neither waited nor ended in {turn_steps} steps"),
            false => format!("was running when the launch had taken {total_steps} steps"),
        };
        let who = Who {
            serial: self.block_mut().serial,
            id: self.current.thread,
        };
        let side = (who, &*action, site);
        self.checker.report(Kind::Endless, side, String::new());
        self.checker.stop();
        stuck::report(&self.blocks, &mut self.checker, End::Limit);
    }

    /// Carries out bulk copies now and then, and all of them while no thread is ready.
    fn land_bulk_copies(&mut self) {
        loop {
            let in_flight = |block: &Block| block.units.bulk.in_flight();
            let count: usize = self.blocks.iter().flatten().map(in_flight).sum();
            if count == 0 || !(self.scheduler.is_idle() || self.scheduler.one_in(32)) {
                return;
            }
            let mut index = self.scheduler.below(count);
            for slot in 0..self.blocks.len() {
                let here = self.blocks[slot].as_ref().map_or(0, in_flight);
                if index < here {
                    self.current = ThreadRef {
                        slot: slot as u16,
                        thread: 0,
                    };
                    self.execute(|units, cx| units.land_bulk_copy(cx, index));
                    break;
                }
                index -= here;
            }
        }
    }

    fn finish_thread(&mut self, body: &dyn Fn()) -> io::Result<()> {
        let ThreadRef { slot, thread } = self.current;
        self.scheduler.progress();
        self.execute(Units::thread_ended);
        let block = self.block_mut();
        block.threads[thread as usize].finished = true;
        block.unfinished -= 1;
        if block.unfinished > 0 {
            return Ok(());
        }
        self.execute(Units::block_ended);
        if let Some(mut block) = self.blocks[slot as usize].take() {
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

    /// Runs `action` on the units of the running thread's block, and wakes whom it lets go on.
    #[inline]
    pub fn execute<R>(&mut self, action: impl FnOnce(&mut Units, &mut Context) -> R) -> R {
        let ThreadRef { slot, thread } = self.current;
        let block = self.blocks[slot as usize]
            .as_mut()
            .expect("the running block is resident");
        let mut context = Context {
            serial: block.serial,
            thread,
            actors: block.actors,
            shared: &mut block.shared,
            global: &mut self.memory,
            clocks: &mut block.clocks,
            checker: &mut self.checker,
            stats: &mut self.stats,
            woken: &mut self.woken,
        };
        let result = action(&mut block.units, &mut context);
        for thread in self.woken.drain(..) {
            self.scheduler.wake(ThreadRef { slot, thread });
        }
        result
    }

    /// The running thread, about to be suspended, polls: it stays ready but lets others go first.
    pub fn step_back(&mut self, what: &'static str, site: Site) {
        self.thread_mut().wait = Some(Wait {
            what,
            site,
            spins: true,
        });
        self.scheduler.step_back(self.current);
    }

    /// Notes what the running thread, about to be suspended, waits for.
    pub fn wait_in(&mut self, what: &'static str, site: Site) {
        self.thread_mut().wait = Some(Wait {
            what,
            site,
            spins: false,
        });
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

    /// The place in the kernel of a code address.
    #[inline]
    pub fn site(&self, address: *const c_void) -> Site {
        Site((address as usize).wrapping_sub(self.memory.image) as u32)
    }
}
