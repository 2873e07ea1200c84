//! Segment attention on NVIDIA GPUs: the host side of `kernels/attention_*.cu`.
//!
//! A [`Problem`](super::Problem) of [`Tensor`]s names device memory; [`ForwardPlan`] and [`BackwardPlan`] validate it
//! once, choose the kernels and say how many bytes of workspace they need; [`ForwardPlan::run`] puts the work on a
//! stream. Nothing is allocated, nothing waits, and the workspace may be used again by the next call on the same
//! stream.
//!
//! Planning knows no driver: it asks [`Kernels`](crate::cuda::kernels::Kernels) what was compiled and hands its
//! launches to a [`Launcher`](crate::cuda::kernels::Launcher). With feature `cuda` there is `DriverKernels`, which is
//! both on NVIDIA's driver, loaded at run time ([`crate::cuda`]), and has safe calls on cudarc's slices (module
//! `slices`, `examples/attention_slices.rs`). Plans themselves take addresses, with strides and on any stream
//! (`examples/attention_pointers.rs`).
//!
//! **Lengths and gates.** Those given as host values are validated and travel with the call, into the workspace and
//! in stream order. Those given as device addresses are trusted: nobody reads them back, and a length beyond its
//! tensor reads foreign memory. Whether a head reads the prior or the past is always known to the host.

mod backward;
mod error;
mod forward;
mod instances;
mod params;
#[cfg(feature = "cuda")]
pub mod slices;
mod tensor;
#[cfg(test)]
mod tests;
mod workspace;

pub use backward::BackwardPlan;
pub use error::Error;
pub use forward::{ForwardPlan, Phase};
pub use instances::Dtype;
pub use tensor::{DeviceSlice, Tensor};
