//! The launch that runs on this OS thread, and how a simulated thread gives control back to it.

use std::cell::Cell;
use std::io;
use std::ptr;

use super::launch::Launch;

thread_local! {
    static CURRENT: Cell<*mut Launch> = const { Cell::new(ptr::null_mut()) };
}

/// Runs every block of a launch to its end, or to a finding that stops it; each thread executes `body`.
pub(crate) fn run(launch: &mut Launch, body: &dyn Fn()) -> io::Result<()> {
    let launch: *mut Launch = launch;
    let outer = CURRENT.replace(launch);
    // SAFETY: the pointer is valid, and from here on the launch is used through it alone.
    let result = unsafe { Launch::run(launch, body) };
    CURRENT.set(outer);
    result
}

/// Runs `action` on the launch of this OS thread.
///
/// # Safety
/// A launch must be running on this OS thread, `action` must not suspend, and nothing else may hold a reference to it.
#[inline]
pub(crate) unsafe fn with<R>(action: impl FnOnce(&mut Launch) -> R) -> R {
    // SAFETY: `run` sets the pointer for as long as coroutines run; the rest is the caller's word.
    action(unsafe { &mut *CURRENT.get() })
}

/// Gives control back to the scheduler until somebody wakes the running thread.
///
/// # Safety
/// Called on a simulated thread's stack, with no value alive that has a destructor.
pub(crate) unsafe fn suspend() {
    // SAFETY: the context lives as long as its thread, and the yielder on the running coroutine's own stack.
    unsafe {
        let context = with(|launch| launch.thread_mut().context);
        (*(*context).yielder).suspend(());
    }
}
