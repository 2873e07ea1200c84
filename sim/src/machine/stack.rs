//! Stacks of simulated threads: aligned to their size, so that a hook can tell with one comparison whether an
//! address is the running thread's own, and with the thread's context at the top.

use std::cell::RefCell;
use std::io;

use corosensei::stack::{Stack, StackPointer};

use super::context::ThreadContext;
use crate::memory::Mapping;

/// Address space of one stack, and its alignment; only touched pages are paid for.
pub(crate) const STACK_BYTES: usize = 128 << 10;
/// Kept free at the top for the thread's context.
pub(crate) const CONTEXT_BYTES: usize = 256;

/// One thread's stack.
pub(crate) struct ThreadStack {
    limit: usize,
    _mapping: Mapping,
}

thread_local! {
    static UNUSED: RefCell<Vec<ThreadStack>> = const { RefCell::new(Vec::new()) };
}

impl ThreadStack {
    /// A stack, reused if possible.
    pub fn take() -> io::Result<ThreadStack> {
        if let Some(stack) = UNUSED.with_borrow_mut(Vec::pop) {
            return Ok(stack);
        }
        let mapping = Mapping::new(2 * STACK_BYTES)?;
        let limit = (mapping.base() as usize).next_multiple_of(STACK_BYTES);
        // SAFETY: the first page of the aligned half lies inside the mapping, which nothing uses yet.
        let guarded = unsafe { libc::mprotect(limit as *mut libc::c_void, 4096, libc::PROT_NONE) };
        if guarded != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(ThreadStack {
            limit,
            _mapping: mapping,
        })
    }

    /// Keeps the stack for another thread.
    pub fn give_back(self) {
        UNUSED.with_borrow_mut(|unused| unused.push(self));
    }

    /// Where the thread's context is kept.
    pub fn context(&self) -> *mut ThreadContext {
        (self.limit + STACK_BYTES - CONTEXT_BYTES) as *mut ThreadContext
    }
}

// SAFETY: base and limit enclose memory that the mapping owns, at least MIN_STACK_SIZE of it, both aligned far
// beyond STACK_ALIGNMENT, and the lowest page is inaccessible.
unsafe impl Stack for ThreadStack {
    fn base(&self) -> StackPointer {
        StackPointer::new(self.context() as usize).expect("mappings are not at address 0")
    }

    fn limit(&self) -> StackPointer {
        StackPointer::new(self.limit).expect("mappings are not at address 0")
    }
}
