//! The functions behind simulator.h that belong to mbarriers and bulk copies; see `calls` for the others.

use std::ffi::c_void;

use crate::checks::report::Site;
use crate::instructions::bulk::Direction;
use crate::instructions::mbarrier::Arrival;
use crate::instructions::tensor_map::TensorMap;
use crate::machine::calls::stop_if_fatal;
use crate::machine::launch::{Launch, suspend, with};

// SAFETY, for every function below: it is called by a kernel, so on a simulated thread of the launch that runs on
// this OS thread, and the pointers are those that simulator.h asks for. Nothing with a destructor is alive where
// it suspends.

/// Does something on the launch, and does not return to a kernel that must not go on.
unsafe fn act(site: *const c_void, action: impl FnOnce(&mut Launch, Site)) {
    // SAFETY: see above.
    unsafe {
        with(|launch| action(launch, launch.site(site)));
        stop_if_fatal();
    }
}

pub(crate) unsafe extern "C" fn mbarrier_init(barrier: usize, count: u32, site: *const c_void) {
    // SAFETY: see above.
    unsafe {
        act(site, |launch, site| {
            launch.mbarrier_init(barrier, count, site)
        })
    }
}

pub(crate) unsafe extern "C" fn mbarrier_invalidate(barrier: usize, site: *const c_void) {
    // SAFETY: see above.
    unsafe {
        act(site, |launch, site| {
            launch.mbarrier_invalidate(barrier, site)
        })
    }
}

pub(crate) unsafe extern "C" fn fence_mbarrier_init() {
    // SAFETY: see above.
    unsafe { with(Launch::fence_mbarrier_init) }
}

pub(crate) unsafe extern "C" fn mbarrier_arrive(barrier: usize, count: u32, site: *const c_void) {
    let arrival = Arrival {
        count,
        expected_bytes: 0,
    };
    // SAFETY: see above.
    unsafe {
        act(site, |launch, site| {
            launch.mbarrier_arrive(barrier, arrival, site)
        })
    }
}

pub(crate) unsafe extern "C" fn mbarrier_arrive_expect_tx(
    barrier: usize,
    bytes: u32,
    site: *const c_void,
) {
    let arrival = Arrival {
        count: 1,
        expected_bytes: bytes,
    };
    // SAFETY: see above.
    unsafe {
        act(site, |launch, site| {
            launch.mbarrier_arrive(barrier, arrival, site)
        })
    }
}

pub(crate) unsafe extern "C" fn mbarrier_expect_tx(
    barrier: usize,
    bytes: u32,
    site: *const c_void,
) {
    let arrival = Arrival {
        count: 0,
        expected_bytes: bytes,
    };
    // SAFETY: see above.
    unsafe {
        act(site, |launch, site| {
            launch.mbarrier_arrive(barrier, arrival, site)
        })
    }
}

pub(crate) unsafe extern "C" fn mbarrier_wait(barrier: usize, parity: u32, site: *const c_void) {
    // SAFETY: see above.
    unsafe {
        while !with(|launch| launch.mbarrier_test(barrier, parity, launch.site(site))) {
            with(|launch| launch.mbarrier_enqueue(barrier, launch.site(site)));
            suspend();
        }
        stop_if_fatal();
    }
}

pub(crate) unsafe extern "C" fn mbarrier_test_wait(
    barrier: usize,
    parity: u32,
    site: *const c_void,
) -> i32 {
    // SAFETY: see above.
    unsafe {
        with(Launch::step_back);
        suspend();
        i32::from(with(|launch| {
            launch.mbarrier_test(barrier, parity, launch.site(site))
        }))
    }
}

pub(crate) unsafe extern "C" fn fence_proxy_async(_space: i32) {
    // SAFETY: see above.
    unsafe { with(|launch| launch.thread_mut().clock.fence_proxy()) }
}

/// A tensor copy of the running thread.
unsafe fn tensor(
    shared: usize,
    map: *const TensorMap,
    at: *const i32,
    direction: Direction,
    site: *const c_void,
) {
    // SAFETY: see above; a map is followed by as many coordinates as it has dimensions.
    unsafe {
        let map = &*map;
        let at = std::slice::from_raw_parts(at, map.rank());
        act(site, |launch, site| {
            launch.tensor_copy(shared, map, at, direction, site)
        });
    }
}

pub(crate) unsafe extern "C" fn tma_load(
    shared: usize,
    map: *const TensorMap,
    at: *const i32,
    barrier: usize,
    site: *const c_void,
) {
    // SAFETY: see above.
    unsafe { tensor(shared, map, at, Direction::Load { barrier }, site) }
}

pub(crate) unsafe extern "C" fn tma_store(
    map: *const TensorMap,
    at: *const i32,
    shared: usize,
    site: *const c_void,
) {
    // SAFETY: see above.
    unsafe { tensor(shared, map, at, Direction::Store, site) }
}

pub(crate) unsafe extern "C" fn tma_reduce_add(
    map: *const TensorMap,
    at: *const i32,
    shared: usize,
    site: *const c_void,
) {
    // SAFETY: see above.
    unsafe { tensor(shared, map, at, Direction::ReduceAdd, site) }
}

pub(crate) unsafe extern "C" fn bulk_load(
    shared: usize,
    global: usize,
    bytes: u32,
    barrier: usize,
    site: *const c_void,
) {
    let direction = Direction::Load { barrier };
    // SAFETY: see above.
    unsafe {
        act(site, |launch, site| {
            launch.bulk_copy(shared, global, bytes, direction, site)
        })
    }
}

pub(crate) unsafe extern "C" fn bulk_store(
    global: usize,
    shared: usize,
    bytes: u32,
    site: *const c_void,
) {
    // SAFETY: see above.
    unsafe {
        act(site, |launch, site| {
            launch.bulk_copy(shared, global, bytes, Direction::Store, site)
        })
    }
}

pub(crate) unsafe extern "C" fn bulk_reduce_add(
    global: usize,
    shared: usize,
    bytes: u32,
    site: *const c_void,
) {
    // SAFETY: see above.
    unsafe {
        act(site, |launch, site| {
            launch.bulk_copy(shared, global, bytes, Direction::ReduceAdd, site)
        })
    }
}

pub(crate) unsafe extern "C" fn bulk_commit() {
    // SAFETY: see above.
    unsafe { with(Launch::bulk_commit) }
}

pub(crate) unsafe extern "C" fn bulk_wait(newest_left: u32, read: i32, site: *const c_void) {
    // SAFETY: see above.
    unsafe {
        act(site, |launch, _| {
            launch.bulk_wait(newest_left as usize, read != 0)
        })
    }
}
