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
}
