//! The CPU device: [`Cpu`], and its arithmetic as plain `f32` functions on slices.
//!
//! The contract of everything here: an output element never depends on how many rows there are, on
//! its neighbours, on the number of threads or on the instruction set. GEMMs
//! ([`gemm`]) compute each element as one chain of fused multiply-adds in ascending order of the
//! summed index; row-wise reductions use a fixed number of lanes added up in a fixed order.
//!
//! Slices shorter than the shape given with them are a caller's bug and panic; whoever owns the
//! tensors validates once before it calls in here.

mod adamw;
mod attend;
mod buffer;
mod device;
pub mod gemm;
mod idle;
mod kernel;
mod math;
mod packed;
mod pool;
pub mod rows;

pub use buffer::Buffer;
pub use idle::release_memory;
pub use packed::PackedMatrix;
pub use pool::Pool;

/// The CPU in f32, all cores, its widest vectors.
#[derive(Debug, Default, Clone, Copy)]
pub struct Cpu;
