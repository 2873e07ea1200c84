//! The host side: compiling and loading kernels, buffers and launches, and the driver of the crate's GPU device.

pub mod driver;
pub mod gpu;
pub mod launcher;
pub mod module;
