//! The functions behind simulator.h, by name. Each looks up the launch, does its work there, and suspends the thread
//! where the instruction waits.
//!
//! SAFETY, for every function in this folder: it is called by a kernel, so on a simulated thread of the launch that
//! runs on this OS thread, and the pointers are those that simulator.h asks for. Nothing with a destructor is alive
//! where it suspends.

mod act;
mod collectives;
mod proxy;
mod threads;

use std::ffi::{CStr, c_void};

/// An entry of [`table`]: the name in simulator.h and the address of the function.
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
pub(crate) fn table() -> [Call; 41] {
    calls! {
        c"sim_thread_pointer" => threads::thread;
        c"sim_syncthreads_pointer" => collectives::syncthreads;
        c"sim_barrier_sync_pointer" => collectives::barrier_sync;
        c"sim_barrier_arrive_pointer" => collectives::barrier_arrive;
        c"sim_syncwarp_pointer" => collectives::syncwarp;
        c"sim_shuffle_pointer" => collectives::shuffle;
        c"sim_ballot_pointer" => collectives::ballot;
        c"sim_ldmatrix_pointer" => collectives::ldmatrix;
        c"sim_stmatrix_pointer" => collectives::stmatrix;
        c"sim_mma_m16n8k16_pointer" => collectives::mma;
        c"sim_cp_async_pointer" => threads::cp_async;
        c"sim_cp_async_commit_pointer" => threads::cp_async_commit;
        c"sim_cp_async_wait_pointer" => threads::cp_async_wait;
        c"sim_atomic_pointer" => threads::atomic;
        c"sim_fence_pointer" => threads::fence;
        c"sim_yield_pointer" => threads::yield_now;
        c"sim_trap_pointer" => threads::trap;
        c"sim_access_pointer" => threads::access;
        c"sim_out_of_steps_pointer" => threads::out_of_steps;
        c"sim_set_registers_pointer" => collectives::set_registers;
        c"sim_wgmma_fence_pointer" => collectives::wgmma_fence;
        c"sim_wgmma_pointer" => collectives::wgmma;
        c"sim_wgmma_commit_pointer" => collectives::wgmma_commit;
        c"sim_wgmma_wait_pointer" => collectives::wgmma_wait;
        c"sim_mbarrier_init_pointer" => proxy::mbarrier_init;
        c"sim_mbarrier_invalidate_pointer" => proxy::mbarrier_invalidate;
        c"sim_fence_mbarrier_init_pointer" => proxy::fence_mbarrier_init;
        c"sim_mbarrier_arrive_pointer" => proxy::mbarrier_arrive;
        c"sim_mbarrier_arrive_expect_tx_pointer" => proxy::mbarrier_arrive_expect_tx;
        c"sim_mbarrier_expect_tx_pointer" => proxy::mbarrier_expect_tx;
        c"sim_mbarrier_wait_pointer" => proxy::mbarrier_wait;
        c"sim_mbarrier_test_wait_pointer" => proxy::mbarrier_test_wait;
        c"sim_fence_proxy_async_pointer" => proxy::fence_proxy_async;
        c"sim_tma_load_pointer" => proxy::tma_load;
        c"sim_tma_store_pointer" => proxy::tma_store;
        c"sim_tma_reduce_add_pointer" => proxy::tma_reduce_add;
        c"sim_bulk_load_pointer" => proxy::bulk_load;
        c"sim_bulk_store_pointer" => proxy::bulk_store;
        c"sim_bulk_reduce_add_pointer" => proxy::bulk_reduce_add;
        c"sim_bulk_commit_pointer" => proxy::bulk_commit;
        c"sim_bulk_wait_pointer" => proxy::bulk_wait;
    }
}
