//! The crate's GPU device on a simulated GPU.

mod buffers;
mod common;
mod decode;
mod memory;
mod model;
mod pool;
