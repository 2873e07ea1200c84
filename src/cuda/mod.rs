//! NVIDIA's driver, loaded at run time: one program serves machines with and without a GPU.
//!
//! A thin layer over [cudarc](https://docs.rs/cudarc), whose contexts, streams and slices are used as they are. What
//! it adds: errors that say what to do ([`Error`]), modules from embedded images (`Module`), and launches whose one
//! parameter is a struct by value (`Function`). Only [`Error`] is there without the feature `cuda`.

#[cfg(feature = "cuda")]
mod device;
mod error;
#[cfg(feature = "cuda")]
mod module;

#[cfg(feature = "cuda")]
pub use device::{
    DeviceInfo, KERNEL_ARCHITECTURES, alloc, devices, driver_error, driver_version, open,
};
pub use error::{Error, Version};
#[cfg(feature = "cuda")]
pub use module::{Function, Module};
