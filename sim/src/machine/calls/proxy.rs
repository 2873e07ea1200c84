//! The calls that belong to mbarriers and to the async proxy: bulk copies and proxy fences.

use std::ffi::c_void;

use super::act::{act, execute, stop_if_fatal};
use crate::instructions::bulk::Direction;
use crate::instructions::mbarrier::Arrival;
use crate::instructions::tensor_map::TensorMap;
use crate::machine::current::{suspend, with};

pub(super) unsafe extern "C" fn mbarrier_init(barrier: usize, count: u32, site: *const c_void) {
    // SAFETY: see `super`.
    unsafe {
        act(site, |units, cx, site| {
            units.mbarriers.init(cx, barrier, count, site)
        })
    }
}

pub(super) unsafe extern "C" fn mbarrier_invalidate(barrier: usize, site: *const c_void) {
    // SAFETY: see `super`.
    unsafe {
        act(site, |units, cx, site| {
            units.mbarriers.invalidate(cx, barrier, site)
        })
    }
}

pub(super) unsafe extern "C" fn fence_mbarrier_init() {
    // SAFETY: see `super`.
    unsafe { with(|launch| launch.execute(|units, cx| units.mbarriers.fence_init(cx))) }
}

unsafe fn arrive(barrier: usize, arrival: Arrival, site: *const c_void) {
    // SAFETY: see `super`.
    unsafe {
        act(site, |units, cx, site| {
            units.mbarriers.arrive(cx, barrier, arrival, site)
        })
    }
}

pub(super) unsafe extern "C" fn mbarrier_arrive(barrier: usize, count: u32, site: *const c_void) {
    let arrival = Arrival {
        count,
        expected_bytes: 0,
    };
    // SAFETY: see `super`.
    unsafe { arrive(barrier, arrival, site) }
}

pub(super) unsafe extern "C" fn mbarrier_arrive_expect_tx(
    barrier: usize,
    bytes: u32,
    site: *const c_void,
) {
    let arrival = Arrival {
        count: 1,
        expected_bytes: bytes,
    };
    // SAFETY: see `super`.
    unsafe { arrive(barrier, arrival, site) }
}

pub(super) unsafe extern "C" fn mbarrier_expect_tx(
    barrier: usize,
    bytes: u32,
    site: *const c_void,
) {
    let arrival = Arrival {
        count: 0,
        expected_bytes: bytes,
    };
    // SAFETY: see `super`.
    unsafe { arrive(barrier, arrival, site) }
}

/// Whether the phase of that parity has completed.
unsafe fn test(barrier: usize, parity: u32, site: *const c_void) -> bool {
    // SAFETY: see `super`.
    unsafe {
        execute(site, |units, cx, site| {
            units.mbarriers.test(cx, barrier, parity, site)
        })
    }
}

pub(super) unsafe extern "C" fn mbarrier_wait(barrier: usize, parity: u32, site: *const c_void) {
    // SAFETY: see `super`.
    unsafe {
        while !test(barrier, parity, site) {
            with(|launch| {
                let site = launch.site(site);
                launch.wait_in("an mbarrier wait", site);
                launch.execute(|units, cx| units.mbarriers.enqueue(cx, barrier));
            });
            suspend();
        }
        stop_if_fatal();
    }
}

pub(super) unsafe extern "C" fn mbarrier_test_wait(
    barrier: usize,
    parity: u32,
    site: *const c_void,
) -> i32 {
    // SAFETY: see `super`.
    unsafe {
        with(|launch| launch.step_back("an mbarrier test", launch.site(site)));
        suspend();
        i32::from(test(barrier, parity, site))
    }
}

pub(super) unsafe extern "C" fn fence_proxy_async(_space: i32) {
    // SAFETY: see `super`.
    unsafe { with(|launch| launch.execute(|_, cx| cx.own_clocks().now.fence_proxy())) }
}

/// A tensor copy of the running thread.
unsafe fn tensor(
    shared: usize,
    map: *const TensorMap,
    at: *const i32,
    direction: Direction,
    site: *const c_void,
) {
    // SAFETY: see `super`; a map is followed by as many coordinates as it has dimensions.
    unsafe {
        let map = &*map;
        let at = std::slice::from_raw_parts(at, map.rank());
        act(site, |units, cx, site| {
            units.tensor_copy(cx, shared, (map, at), direction, site)
        });
    }
}

pub(super) unsafe extern "C" fn tma_load(
    shared: usize,
    map: *const TensorMap,
    at: *const i32,
    barrier: usize,
    site: *const c_void,
) {
    // SAFETY: see `super`.
    unsafe { tensor(shared, map, at, Direction::Load { barrier }, site) }
}

pub(super) unsafe extern "C" fn tma_store(
    map: *const TensorMap,
    at: *const i32,
    shared: usize,
    site: *const c_void,
) {
    // SAFETY: see `super`.
    unsafe { tensor(shared, map, at, Direction::Store, site) }
}

pub(super) unsafe extern "C" fn tma_reduce_add(
    map: *const TensorMap,
    at: *const i32,
    shared: usize,
    site: *const c_void,
) {
    // SAFETY: see `super`.
    unsafe { tensor(shared, map, at, Direction::ReduceAdd, site) }
}

/// A copy of plain bytes by the running thread.
unsafe fn plain(
    shared: usize,
    global: usize,
    bytes: u32,
    direction: Direction,
    site: *const c_void,
) {
    // SAFETY: see `super`.
    unsafe {
        act(site, |units, cx, site| {
            units.plain_copy(cx, shared, (global, bytes), direction, site)
        })
    }
}

pub(super) unsafe extern "C" fn bulk_load(
    shared: usize,
    global: usize,
    bytes: u32,
    barrier: usize,
    site: *const c_void,
) {
    // SAFETY: see `super`.
    unsafe { plain(shared, global, bytes, Direction::Load { barrier }, site) }
}

pub(super) unsafe extern "C" fn bulk_store(
    global: usize,
    shared: usize,
    bytes: u32,
    site: *const c_void,
) {
    // SAFETY: see `super`.
    unsafe { plain(shared, global, bytes, Direction::Store, site) }
}

pub(super) unsafe extern "C" fn bulk_reduce_add(
    global: usize,
    shared: usize,
    bytes: u32,
    site: *const c_void,
) {
    // SAFETY: see `super`.
    unsafe { plain(shared, global, bytes, Direction::ReduceAdd, site) }
}

pub(super) unsafe extern "C" fn bulk_commit() {
    // SAFETY: see `super`.
    unsafe { with(|launch| launch.execute(|units, cx| units.bulk.commit(cx))) }
}

pub(super) unsafe extern "C" fn bulk_wait(newest_left: u32, read: i32, site: *const c_void) {
    // SAFETY: see `super`.
    unsafe {
        act(site, |units, cx, _| {
            units.bulk.wait(cx, newest_left as usize, read != 0)
        })
    }
}
