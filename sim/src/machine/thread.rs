//! One CUDA thread: a stackful coroutine, what it knows, and what it is waiting for.

use corosensei::{Coroutine, Yielder};

use crate::checks::clock::Clock;
use crate::checks::report::Site;
use crate::instructions::bulk::ThreadBulk;
use crate::instructions::cp_async::ThreadCopies;
use crate::machine::stack::ThreadStack;

/// What kernels read through `threadIdx` and friends; mirrored by `SimThread` in simulator.h.
#[repr(C)]
pub(crate) struct ThreadContext {
    pub thread_idx: [u32; 3],
    pub block_idx: [u32; 3],
    pub block_dim: [u32; 3],
    pub grid_dim: [u32; 3],
    pub shared: *mut u8,
}

/// A thread's coroutine.
pub(crate) type Body = Coroutine<(), (), (), ThreadStack>;

/// What a suspended thread waits for.
#[derive(Clone, Copy)]
pub(crate) struct Wait {
    pub what: &'static str,
    pub site: Site,
}

/// One CUDA thread.
pub(crate) struct Thread {
    pub context: *const ThreadContext,
    /// Absent while the thread runs.
    pub body: Option<Body>,
    /// The handle through which the thread gives up control; set when it starts.
    pub yielder: *const Yielder<(), ()>,
    pub clock: Clock,
    /// What the thread's relaxed loads saw; a fence makes it known.
    pub loaded: Clock,
    /// What the thread knew at its last fence; its relaxed stores publish it.
    pub fenced: Option<Clock>,
    pub wait: Option<Wait>,
    pub finished: bool,
    pub copies: ThreadCopies,
    pub bulk: ThreadBulk,
}

impl Thread {
    /// A thread with actor index `id` in a block of `actors` actors.
    pub fn new(context: *const ThreadContext, body: Body, id: usize, actors: usize) -> Thread {
        let mut clock = Clock::new(actors);
        clock.local[id] = 1;
        Thread {
            context,
            body: Some(body),
            yielder: std::ptr::null(),
            clock,
            loaded: Clock::new(actors),
            fenced: None,
            wait: None,
            finished: false,
            copies: ThreadCopies::default(),
            bulk: ThreadBulk::default(),
        }
    }

    /// Ends the thread where it stands and keeps its stack for another.
    pub fn end(&mut self) {
        let Some(mut body) = self.body.take() else {
            return;
        };
        if !body.done() {
            // SAFETY: the frames on the stack are the kernel's, which own nothing, and those of the simulator's
            // entry points, which hold no value with a destructor while they are suspended.
            unsafe { body.force_reset() };
        }
        body.into_stack().give_back();
    }
}
