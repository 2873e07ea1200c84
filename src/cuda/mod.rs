//! NVIDIA's driver, loaded at run time: one program serves machines with and without a GPU.
//!
//! A thin layer over [cudarc](https://docs.rs/cudarc), whose contexts, streams and slices are used unchanged. It adds
//! errors that say what to do ([`Error`]), modules from embedded images (`Module`), launches whose one parameter is a
//! struct by value (`Function`), and the registry of the compiled kernels ([`kernels`]). Without the feature `cuda`
//! only the parts that need no driver are compiled.

#[cfg(feature = "cuda")]
mod device;
mod error;
pub mod kernels;
#[cfg(feature = "cuda")]
mod module;

#[cfg(feature = "cuda")]
pub use device::{
    DeviceInfo, KERNEL_ARCHITECTURES, KERNEL_ORIGIN, alloc, devices, driver_error, driver_version,
    open, toolkit,
};
pub use error::{Error, Version};
#[cfg(feature = "cuda")]
pub use module::{Function, Module};
