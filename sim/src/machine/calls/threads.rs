//! The calls that a thread makes on its own: loads and stores, cp.async, atomics, fences.

use std::ffi::c_void;

use super::act::{act, execute, stop_if_fatal};
use crate::checks::access::Access;
use crate::checks::happens_before::Order;
use crate::checks::report::Kind;
use crate::checks::shadow::Mode;
use crate::instructions::atomics::{self, Atomic, Operation};
use crate::instructions::cp_async::Operands;
use crate::machine::context::ThreadContext;
use crate::machine::current::{suspend, with};

pub(super) unsafe extern "C" fn thread() -> *const ThreadContext {
    // SAFETY: see `super`.
    unsafe { with(|launch| launch.thread_mut().context) }
}

pub(super) unsafe extern "C" fn cp_async(
    destination: usize,
    source: usize,
    size: u32,
    valid: u32,
    site: *const c_void,
) {
    let operands = Operands {
        destination,
        source,
        size: size as usize,
        valid: valid as usize,
    };
    // SAFETY: see `super`.
    unsafe {
        let lands_early = with(|launch| launch.scheduler.one_in(4));
        act(site, |units, cx, site| {
            units.copies[cx.thread as usize].issue(cx, operands, lands_early, site);
        });
    }
}

pub(super) unsafe extern "C" fn cp_async_commit() {
    // SAFETY: see `super`.
    unsafe {
        with(|launch| launch.execute(|units, cx| units.copies[cx.thread as usize].commit()));
    }
}

pub(super) unsafe extern "C" fn cp_async_wait(newest_left: u32, site: *const c_void) {
    // SAFETY: see `super`.
    unsafe {
        act(site, |units, cx, site| {
            units.copies[cx.thread as usize].wait(cx, newest_left as usize, site);
        });
    }
}

pub(super) unsafe extern "C" fn atomic(
    operation: i32,
    address: usize,
    operand: u32,
    compare: u32,
    order: i32,
    scope: i32,
    site: *const c_void,
) -> u32 {
    let order = Order {
        acquire: order & 1 != 0,
        release: order & 2 != 0,
        device: scope != 0,
    };
    // SAFETY: see `super`.
    unsafe {
        let before = execute(site, |_, cx, site| {
            let Some(operation) = Operation::from_number(operation) else {
                let place = format!("operation {operation}");
                cx.refuse(Kind::Operand, "used an atomic", site, place);
                return 0;
            };
            let atomic = Atomic {
                operation,
                operand,
                compare,
                order,
            };
            atomic.execute(cx, address, site)
        });
        with(|launch| launch.step_back("an atomic operation", launch.site(site)));
        suspend();
        before
    }
}

pub(super) unsafe extern "C" fn fence(scope: i32) {
    // SAFETY: see `super`.
    unsafe { with(|launch| launch.execute(|_, cx| atomics::fence(cx, scope != 0))) }
}

pub(super) unsafe extern "C" fn yield_now(site: *const c_void) {
    // SAFETY: see `super`.
    unsafe {
        with(|launch| launch.step_back("a yield", launch.site(site)));
        suspend();
    }
}

pub(super) unsafe extern "C" fn trap(site: *const c_void) {
    // SAFETY: see `super`.
    unsafe {
        execute(site, |_, cx, site| {
            cx.refuse(Kind::Trap, "gave up", site, String::new())
        });
        suspend();
    }
}

/// The thread has used up the steps of its turn.
pub(super) unsafe extern "C" fn out_of_steps(site: *const c_void) {
    // SAFETY: see `super`.
    unsafe {
        with(|launch| launch.end_endless(launch.site(site)));
        suspend();
    }
}

/// A load or store of the kernel outside its own stack, before it happens.
pub(super) unsafe extern "C" fn access(
    address: usize,
    bytes: usize,
    is_write: i32,
    aligned: i32,
    site: *const c_void,
) {
    let (mode, action) = if is_write != 0 {
        (Mode::Write, "wrote")
    } else {
        (Mode::Read, "read")
    };
    let mut access = Access::new(address, bytes, mode, action);
    if aligned == 0 {
        access.alignment = 1;
    }
    // SAFETY: see `super`.
    unsafe {
        if !execute(site, |_, cx, site| cx.access(access, site)) {
            stop_if_fatal();
        }
    }
}
