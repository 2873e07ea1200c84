//! What a kernel knows of the thread that runs it.

use corosensei::Yielder;

/// What kernels read through `threadIdx` and friends; `SimThread` in simulator.h mirrors the beginning.
#[repr(C)]
pub(crate) struct ThreadContext {
    pub thread_idx: [u32; 3],
    pub block_idx: [u32; 3],
    pub block_dim: [u32; 3],
    pub grid_dim: [u32; 3],
    pub shared: *mut u8,
    /// The handle through which the thread gives up control; set when it starts. Not for kernels.
    pub yielder: *const Yielder<(), ()>,
    /// Steps that the thread may still execute in its turn; every one counts it down (bridge.c).
    pub steps_left: i64,
}

/// Where bridge.c finds the count.
const _: () = assert!(std::mem::offset_of!(ThreadContext, steps_left) == 64);
