//! The machine that executes kernels: coroutines as threads, resident blocks, a random scheduler, and the functions
//! that kernels call.
//!
//! [`launch::Launch`] is a running launch. It hands instructions to the units of the running block and knows neither
//! what they do nor what is checked.

mod block;
pub mod calls;
mod context;
pub mod current;
pub mod launch;
pub mod limits;
mod rng;
mod scheduler;
pub mod stack;
mod stuck;
mod thread;
