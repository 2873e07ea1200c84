//! The calls that the lanes of a warp make together.

use std::ffi::c_void;

use super::act::stop_if_fatal;
use crate::instructions::collective::{ALL, Op, Operands, Product};
use crate::machine::current::{suspend, with};

/// Arrives at a collective and waits for it.
unsafe fn meet(op: Op, mask: u32, operands: &mut Operands, site: *const c_void) {
    // SAFETY: see `super`.
    unsafe {
        with(|launch| {
            let site = launch.site(site);
            launch.wait_in(op.name(), site);
            launch.execute(|units, cx| units.arrive(cx, op, mask, operands, site));
        });
        suspend();
    }
}

pub(super) unsafe extern "C" fn syncthreads(site: *const c_void) {
    // SAFETY: see `super`.
    unsafe {
        let count = with(|launch| launch.block_mut().actors.threads() as u32);
        meet(
            Op::Barrier {
                id: 0,
                count,
                wait: true,
            },
            ALL,
            &mut Operands::None,
            site,
        );
    }
}

pub(super) unsafe extern "C" fn barrier_sync(id: u32, count: u32, site: *const c_void) {
    // SAFETY: see `super`.
    unsafe {
        meet(
            Op::Barrier {
                id,
                count,
                wait: true,
            },
            ALL,
            &mut Operands::None,
            site,
        )
    }
}

pub(super) unsafe extern "C" fn barrier_arrive(id: u32, count: u32, site: *const c_void) {
    // SAFETY: see `super`.
    unsafe {
        meet(
            Op::Barrier {
                id,
                count,
                wait: false,
            },
            ALL,
            &mut Operands::None,
            site,
        )
    }
}

pub(super) unsafe extern "C" fn syncwarp(mask: u32, site: *const c_void) {
    // SAFETY: see `super`.
    unsafe { meet(Op::SyncWarp, mask, &mut Operands::None, site) }
}

pub(super) unsafe extern "C" fn shuffle(
    mask: u32,
    value: u32,
    source: u32,
    site: *const c_void,
) -> u32 {
    let mut operands = Operands::Shuffle {
        value,
        source,
        result: 0,
    };
    // SAFETY: see `super`.
    unsafe { meet(Op::Shuffle, mask, &mut operands, site) };
    match operands {
        Operands::Shuffle { result, .. } => result,
        _ => 0,
    }
}

pub(super) unsafe extern "C" fn ballot(mask: u32, predicate: i32, site: *const c_void) -> u32 {
    let mut operands = Operands::Ballot {
        predicate: predicate != 0,
        result: 0,
    };
    // SAFETY: see `super`.
    unsafe { meet(Op::Ballot, mask, &mut operands, site) };
    match operands {
        Operands::Ballot { result, .. } => result,
        _ => 0,
    }
}

pub(super) unsafe extern "C" fn ldmatrix(
    r: *mut u32,
    count: i32,
    transpose: i32,
    row: usize,
    site: *const c_void,
) {
    let op = Op::LoadMatrix {
        count: count as u8,
        transpose: transpose != 0,
    };
    // SAFETY: see `super`.
    unsafe { meet(op, ALL, &mut Operands::Matrix { registers: r, row }, site) }
}

pub(super) unsafe extern "C" fn stmatrix(
    r: *mut u32,
    count: i32,
    transpose: i32,
    row: usize,
    site: *const c_void,
) {
    let op = Op::StoreMatrix {
        count: count as u8,
        transpose: transpose != 0,
    };
    // SAFETY: see `super`.
    unsafe { meet(op, ALL, &mut Operands::Matrix { registers: r, row }, site) }
}

pub(super) unsafe extern "C" fn mma(
    d: *mut f32,
    a: *const u32,
    b: *const u32,
    is_bf16: i32,
    site: *const c_void,
) {
    // SAFETY: see `super`.
    unsafe {
        meet(
            Op::Mma { bf16: is_bf16 != 0 },
            ALL,
            &mut Operands::Mma { d, a, b },
            site,
        )
    }
}

pub(super) unsafe extern "C" fn set_registers(each: u32, take: i32, site: *const c_void) {
    let op = Op::Registers {
        each,
        take: take != 0,
    };
    // SAFETY: see `super`.
    unsafe {
        meet(op, ALL, &mut Operands::None, site);
        stop_if_fatal();
    }
}

pub(super) unsafe extern "C" fn wgmma_fence(site: *const c_void) {
    // SAFETY: see `super`.
    unsafe { meet(Op::WgmmaFence, ALL, &mut Operands::None, site) }
}

pub(super) unsafe extern "C" fn wgmma(
    d: *mut f32,
    n: i32,
    a: *const u32,
    a_descriptor: u64,
    b_descriptor: u64,
    flags: i32,
    site: *const c_void,
) {
    let (a_in_registers, n, flags) = (!a.is_null(), n as u32, flags as u32);
    let product = Product {
        n,
        flags,
        a_in_registers,
        a: a_descriptor,
        b: b_descriptor,
    };
    // SAFETY: see `super`.
    unsafe { meet(Op::Wgmma(product), ALL, &mut Operands::Wgmma { d, a }, site) }
}

pub(super) unsafe extern "C" fn wgmma_commit(site: *const c_void) {
    // SAFETY: see `super`.
    unsafe { meet(Op::WgmmaCommit, ALL, &mut Operands::None, site) }
}

pub(super) unsafe extern "C" fn wgmma_wait(newest_left: u32, site: *const c_void) {
    // SAFETY: see `super`.
    unsafe {
        meet(
            Op::WgmmaWait { newest_left },
            ALL,
            &mut Operands::None,
            site,
        )
    }
}
