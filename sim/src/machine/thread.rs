//! One CUDA thread: a stackful coroutine, and what it is waiting for.

use corosensei::Coroutine;

use super::context::ThreadContext;
use super::stack::ThreadStack;
use crate::checks::symbols::Site;

/// A thread's coroutine.
pub(crate) type Body = Coroutine<(), (), (), ThreadStack>;

/// What a suspended thread waits for.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Wait {
    pub what: &'static str,
    pub site: Site,
    /// It polls, and so is always ready.
    pub spins: bool,
}

/// One CUDA thread.
pub(crate) struct Thread {
    pub context: *mut ThreadContext,
    /// Absent while the thread runs.
    pub body: Option<Body>,
    pub wait: Option<Wait>,
    pub finished: bool,
}

impl Thread {
    /// A thread that has not begun.
    pub fn new(context: *mut ThreadContext, body: Body) -> Thread {
        Thread {
            context,
            body: Some(body),
            wait: None,
            finished: false,
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
