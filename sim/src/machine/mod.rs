//! The machine that executes kernels: coroutines as threads, resident blocks, the scheduler, the calls of kernels.

pub mod async_calls;
pub mod block;
pub mod calls;
pub mod launch;
pub mod rng;
pub mod stack;
pub mod thread;
