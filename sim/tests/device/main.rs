//! The crate's GPU device on a simulated GPU.

mod buffers;
mod common;
mod memory;
mod model;
mod pool;
