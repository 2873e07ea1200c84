//! The crate's GPU device on a simulated GPU.

mod buffers;
mod common;
mod decode;
mod faults;
mod memory;
mod model;
mod pool;
mod safe_calls;
