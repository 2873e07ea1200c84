//! The functions behind simulator.h, by name. Each looks up the launch, does its work there, and suspends the
//! thread where the instruction waits.

use std::ffi::{CStr, c_void};

use crate::checks::report::{Kind, Site};
use crate::instructions::access::{Access, Mode};
use crate::instructions::atomics::{Operation, Order};
use crate::instructions::warp::{ALL, Op, Operands};
use crate::instructions::wgmma::Product;
use crate::machine::async_calls;
use crate::machine::launch::{suspend, with};
use crate::machine::thread::ThreadContext;

/// An entry of [`TABLE`]: the name in simulator.h and the address of the function.
pub(crate) struct Call {
    pub name: &'static CStr,
    pub function: *const c_void,
}

/// The names and addresses of functions, as table entries.
macro_rules! calls {
    ($($name:literal => $function:path;)*) => {
        [$(Call { name: $name, function: $function as *const c_void }),*]
    };
}

/// Everything a compiled kernel needs.
pub(crate) fn table() -> [Call; 40] {
    calls! {
        c"sim_thread_pointer" => thread;
        c"sim_syncthreads_pointer" => syncthreads;
        c"sim_barrier_sync_pointer" => barrier_sync;
        c"sim_barrier_arrive_pointer" => barrier_arrive;
        c"sim_syncwarp_pointer" => syncwarp;
        c"sim_shuffle_pointer" => shuffle;
        c"sim_ballot_pointer" => ballot;
        c"sim_ldmatrix_pointer" => ldmatrix;
        c"sim_stmatrix_pointer" => stmatrix;
        c"sim_mma_m16n8k16_pointer" => mma;
        c"sim_cp_async_pointer" => cp_async;
        c"sim_cp_async_commit_pointer" => cp_async_commit;
        c"sim_cp_async_wait_pointer" => cp_async_wait;
        c"sim_atomic_pointer" => atomic;
        c"sim_fence_pointer" => fence;
        c"sim_yield_pointer" => yield_now;
        c"sim_trap_pointer" => trap;
        c"sim_access_pointer" => access;
        c"sim_set_registers_pointer" => set_registers;
        c"sim_wgmma_fence_pointer" => wgmma_fence;
        c"sim_wgmma_pointer" => wgmma;
        c"sim_wgmma_commit_pointer" => wgmma_commit;
        c"sim_wgmma_wait_pointer" => wgmma_wait;
        c"sim_mbarrier_init_pointer" => async_calls::mbarrier_init;
        c"sim_mbarrier_invalidate_pointer" => async_calls::mbarrier_invalidate;
        c"sim_fence_mbarrier_init_pointer" => async_calls::fence_mbarrier_init;
        c"sim_mbarrier_arrive_pointer" => async_calls::mbarrier_arrive;
        c"sim_mbarrier_arrive_expect_tx_pointer" => async_calls::mbarrier_arrive_expect_tx;
        c"sim_mbarrier_expect_tx_pointer" => async_calls::mbarrier_expect_tx;
        c"sim_mbarrier_wait_pointer" => async_calls::mbarrier_wait;
        c"sim_mbarrier_test_wait_pointer" => async_calls::mbarrier_test_wait;
        c"sim_fence_proxy_async_pointer" => async_calls::fence_proxy_async;
        c"sim_tma_load_pointer" => async_calls::tma_load;
        c"sim_tma_store_pointer" => async_calls::tma_store;
        c"sim_tma_reduce_add_pointer" => async_calls::tma_reduce_add;
        c"sim_bulk_load_pointer" => async_calls::bulk_load;
        c"sim_bulk_store_pointer" => async_calls::bulk_store;
        c"sim_bulk_reduce_add_pointer" => async_calls::bulk_reduce_add;
        c"sim_bulk_commit_pointer" => async_calls::bulk_commit;
        c"sim_bulk_wait_pointer" => async_calls::bulk_wait;
    }
}

// SAFETY, for every function below: it is called by a kernel, so on a simulated thread of the launch that runs on
// this OS thread, and the pointers are those that simulator.h asks for. Nothing with a destructor is alive where
// it suspends.

/// Arrives at a collective and waits for it.
unsafe fn meet(op: Op, mask: u32, operands: &mut Operands, site: *const c_void) {
    // SAFETY: see above.
    unsafe {
        with(|launch| launch.arrive(op, mask, operands, launch.site(site)));
        suspend();
    }
}

unsafe extern "C" fn thread() -> *const ThreadContext {
    // SAFETY: see above.
    unsafe { with(|launch| launch.thread_mut().context) }
}

unsafe extern "C" fn syncthreads(site: *const c_void) {
    // SAFETY: see above.
    unsafe {
        let count = with(|launch| launch.block().threads.len() as u32);
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

unsafe extern "C" fn barrier_sync(id: u32, count: u32, site: *const c_void) {
    // SAFETY: see above.
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

unsafe extern "C" fn barrier_arrive(id: u32, count: u32, site: *const c_void) {
    // SAFETY: see above.
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

unsafe extern "C" fn syncwarp(mask: u32, site: *const c_void) {
    // SAFETY: see above.
    unsafe { meet(Op::SyncWarp, mask, &mut Operands::None, site) }
}

unsafe extern "C" fn shuffle(mask: u32, value: u32, source: u32, site: *const c_void) -> u32 {
    let mut operands = Operands::Shuffle {
        value,
        source,
        result: 0,
    };
    // SAFETY: see above.
    unsafe { meet(Op::Shuffle, mask, &mut operands, site) };
    match operands {
        Operands::Shuffle { result, .. } => result,
        _ => 0,
    }
}

unsafe extern "C" fn ballot(mask: u32, predicate: i32, site: *const c_void) -> u32 {
    let mut operands = Operands::Ballot {
        predicate: predicate != 0,
        result: 0,
    };
    // SAFETY: see above.
    unsafe { meet(Op::Ballot, mask, &mut operands, site) };
    match operands {
        Operands::Ballot { result, .. } => result,
        _ => 0,
    }
}

unsafe extern "C" fn ldmatrix(
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
    // SAFETY: see above.
    unsafe { meet(op, ALL, &mut Operands::Matrix { registers: r, row }, site) }
}

unsafe extern "C" fn stmatrix(
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
    // SAFETY: see above.
    unsafe { meet(op, ALL, &mut Operands::Matrix { registers: r, row }, site) }
}

unsafe extern "C" fn mma(
    d: *mut f32,
    a: *const u32,
    b: *const u32,
    is_bf16: i32,
    site: *const c_void,
) {
    // SAFETY: see above.
    unsafe {
        meet(
            Op::Mma { bf16: is_bf16 != 0 },
            ALL,
            &mut Operands::Mma { d, a, b },
            site,
        )
    }
}

unsafe extern "C" fn set_registers(each: u32, take: i32, site: *const c_void) {
    let op = Op::Registers {
        each,
        take: take != 0,
    };
    // SAFETY: see above.
    unsafe {
        meet(op, ALL, &mut Operands::None, site);
        stop_if_fatal();
    }
}

unsafe extern "C" fn wgmma_fence(site: *const c_void) {
    // SAFETY: see above.
    unsafe { meet(Op::WgmmaFence, ALL, &mut Operands::None, site) }
}

unsafe extern "C" fn wgmma(
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
    // SAFETY: see above.
    unsafe { meet(Op::Wgmma(product), ALL, &mut Operands::Wgmma { d, a }, site) }
}

unsafe extern "C" fn wgmma_commit(site: *const c_void) {
    // SAFETY: see above.
    unsafe { meet(Op::WgmmaCommit, ALL, &mut Operands::None, site) }
}

unsafe extern "C" fn wgmma_wait(newest_left: u32, site: *const c_void) {
    // SAFETY: see above.
    unsafe {
        meet(
            Op::WgmmaWait { newest_left },
            ALL,
            &mut Operands::None,
            site,
        )
    }
}

unsafe extern "C" fn cp_async(
    destination: usize,
    source: usize,
    size: u32,
    valid: u32,
    site: *const c_void,
) {
    // SAFETY: see above.
    unsafe {
        with(|launch| launch.cp_async(destination, source, size, valid, launch.site(site)));
        stop_if_fatal();
    }
}

unsafe extern "C" fn cp_async_commit() {
    // SAFETY: see above.
    unsafe { with(|launch| launch.cp_async_commit()) }
}

unsafe extern "C" fn cp_async_wait(newest_left: u32, site: *const c_void) {
    // SAFETY: see above.
    unsafe {
        with(|launch| launch.cp_async_wait(newest_left as usize, launch.site(site)));
        stop_if_fatal();
    }
}

unsafe extern "C" fn atomic(
    operation: i32,
    address: usize,
    operand: u32,
    compare: u32,
    order: i32,
    scope: i32,
    site: *const c_void,
) -> u32 {
    // SAFETY: see above.
    unsafe {
        let before = with(|launch| {
            let site = launch.site(site);
            let Some(operation) = Operation::from_number(operation) else {
                launch.report(
                    Kind::Operand,
                    "used an atomic",
                    site,
                    format!("operation {operation}"),
                );
                return 0;
            };
            let order = Order {
                acquire: order & 1 != 0,
                release: order & 2 != 0,
                device: scope != 0,
            };
            let before = launch.atomic(operation, address, operand, compare, order, site);
            launch.step_back();
            before
        });
        suspend();
        before
    }
}

unsafe extern "C" fn fence(scope: i32) {
    // SAFETY: see above.
    unsafe { with(|launch| launch.fence(scope != 0)) }
}

unsafe extern "C" fn yield_now() {
    // SAFETY: see above.
    unsafe {
        with(|launch| launch.step_back());
        suspend();
    }
}

unsafe extern "C" fn trap(site: *const c_void) {
    // SAFETY: see above.
    unsafe {
        with(|launch| {
            launch.report(Kind::Trap, "gave up", launch.site(site), String::new());
            launch.fatal = true;
        });
        suspend();
    }
}

/// A load or store of the kernel outside its own stack, before it happens.
unsafe extern "C" fn access(
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
    // SAFETY: see above.
    unsafe {
        with(|launch| launch.access(access, launch.site(site)));
        stop_if_fatal();
    }
}

/// Does not return to a kernel whose access must not happen; the launch ends instead.
pub(crate) unsafe fn stop_if_fatal() {
    // SAFETY: see above.
    unsafe {
        if with(|launch| launch.fatal) {
            suspend();
        }
    }
}

impl crate::machine::launch::Launch {
    /// The place in the kernel of a code address.
    pub fn site(&self, address: *const c_void) -> Site {
        Site((address as usize).wrapping_sub(self.image_base) as u32)
    }
}
