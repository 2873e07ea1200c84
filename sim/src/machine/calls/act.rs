//! How a call of a kernel is carried out on the launch.

use std::ffi::c_void;

use crate::checks::symbols::Site;
use crate::instructions::context::Context;
use crate::instructions::units::Units;
use crate::machine::current::{suspend, with};

/// Executes something on the units of the running thread's block.
///
/// # Safety
/// As for every call of a kernel; `action` does not suspend.
#[inline]
pub(crate) unsafe fn execute<R>(
    site: *const c_void,
    action: impl FnOnce(&mut Units, &mut Context, Site) -> R,
) -> R {
    // SAFETY: the caller's promise.
    unsafe {
        with(|launch| {
            let site = launch.site(site);
            launch.execute(|units, cx| action(units, cx, site))
        })
    }
}

/// The same, and does not return to a kernel that must not go on.
///
/// # Safety
/// As for [`execute`].
pub(crate) unsafe fn act(site: *const c_void, action: impl FnOnce(&mut Units, &mut Context, Site)) {
    // SAFETY: the caller's promise.
    unsafe {
        execute(site, action);
        stop_if_fatal();
    }
}

/// Does not return to a kernel whose access must not happen; the launch ends instead.
///
/// # Safety
/// As for every call of a kernel.
pub(crate) unsafe fn stop_if_fatal() {
    // SAFETY: the caller's promise.
    unsafe {
        if with(|launch| launch.checker.stopped()) {
            suspend();
        }
    }
}
