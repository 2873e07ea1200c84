//! The compiled kernels of `kernels/`: which there are ([`File`], [`Entry`]), how each is launched ([`Kernels`]), and
//! on what ([`Launcher`]).
//!
//! Nothing here knows what a kernel computes. [`crate::attention`] and [`crate::device`] name the entries and fill the
//! params structs. With feature `cuda` there is `DriverKernels`, which loads the kernels on NVIDIA's driver;
//! [`KernelMetadata`] describes them where no GPU is needed.

mod error;
mod launcher;
pub mod layer_params;
mod layout;
#[cfg(feature = "cuda")]
mod loaded;
mod metadata;
pub(crate) mod params;
mod registry;
mod tensor_map;

pub use error::Error;
pub use launcher::{Kernels, Launch, Launcher};
pub use layout::DeviceLayout;
#[cfg(feature = "cuda")]
pub use loaded::{DriverKernels, DriverStream};
pub use metadata::KernelMetadata;
pub use params::{SegattnKernelInfo, SegattnTensorMap};
pub use registry::{Entry, File};
pub use tensor_map::BoxedTensor;
