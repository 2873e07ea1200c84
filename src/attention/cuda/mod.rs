//! Segment attention on NVIDIA GPUs: the host side of `kernels/attention_*.cu`.
//!
//! Two layers:
//!
//! - **Safe calls** on cudarc's slices: module `slices`, `examples/attention_slices.rs`; they need the feature `cuda`.
//! - **Plans** on device addresses, with strides and on any stream: `examples/attention_pointers.rs`. A [`ForwardPlan`]
//!   or [`BackwardPlan`] validates a [`Problem`](super::Problem) of [`Tensor`]s once, chooses the kernels, and computes
//!   the bytes of workspace. [`ForwardPlan::run`] then launches on a stream. It does not allocate and does not
//!   synchronize. The next call on the same stream can reuse the workspace.
//!
//! Plans do not depend on the driver. They read kernel metadata from [`Kernels`](crate::cuda::kernels::Kernels) and
//! launch through a [`Launcher`](crate::cuda::kernels::Launcher). NVIDIA's driver implements both, and so does the
//! simulated GPU of the tests.
//!
//! **Lengths and gates.** Host values are validated, and copied to the device in stream order with each call. Device
//! addresses are trusted: the host does not read them, and a length beyond its tensor reads out of bounds. The host
//! always knows which heads read the prior and the past.

mod backward;
mod error;
mod forward;
mod instances;
mod params;
#[cfg(feature = "cuda")]
pub mod slices;
mod stored;
mod tensor;
mod tensor_maps;
#[cfg(test)]
mod tests;
mod workspace;

pub use backward::BackwardPlan;
pub use error::Error;
pub use forward::{ForwardPlan, Phase};
pub use instances::Dtype;
pub use stored::Products;
pub use tensor::{DeviceSlice, Tensor};
