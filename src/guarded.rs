//! Calls of libraries that can panic on damaged input.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Calls a library. A panic is an error with its message, and prints nothing.
pub(crate) fn guarded<T>(call: impl FnOnce() -> T) -> Result<T, String> {
    silence_caught_panics();
    CAUGHT.set(true);
    let done = catch_unwind(AssertUnwindSafe(call));
    CAUGHT.set(false);
    done.map_err(|panic| {
        let message = panic.downcast_ref::<String>().cloned();
        let message = message.or_else(|| panic.downcast_ref::<&str>().map(|m| m.to_string()));
        message.unwrap_or_else(|| "the library failed".into())
    })
}

thread_local! {
    /// Whether a panic of this thread will be caught by [`guarded`].
    static CAUGHT: Cell<bool> = const { Cell::new(false) };
}

/// Puts a hook before the process's own that says nothing of panics which [`guarded`] catches.
fn silence_caught_panics() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        let others = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            if !CAUGHT.get() {
                others(panic);
            }
        }));
    });
}
