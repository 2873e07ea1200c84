//! The CPU device: [`Cpu`], and its arithmetic as plain `f32` functions on slices.
//!
//! **Bits.** An output element does not depend on the number of rows, on other rows, on the number of threads or on the
//! instruction set (docs/contract.md, section 4). GEMMs ([`gemm`]) compute each element as one chain of fused
//! multiply-adds in ascending order of k. Row-wise reductions use a fixed number of lanes, added in a fixed order.
//!
//! A slice shorter than its shape is a bug of the caller and panics. The owner of the tensors validates them once.

mod adamw;
mod attend;
mod buffer;
mod device;
pub mod divergence;
mod element;
pub mod gemm;
mod idle;
mod kernel;
mod math;
mod packed;
mod pool;
pub mod rows;
mod selection;
mod sinks;

pub use buffer::Buffer;
pub use idle::release_memory;
pub use packed::PackedMatrix;
pub use pool::Pool;

/// The CPU in f32, all cores, its widest vectors.
#[derive(Debug, Default, Clone, Copy)]
pub struct Cpu;
