//! NVIDIA's driver, loaded at run time: one program serves machines with and without a GPU.
//!
//! A thin layer over [cudarc](https://docs.rs/cudarc), whose contexts, streams and slices are used as they are. What
//! it adds: errors that say what to do ([`Error`]), modules from embedded images (`Module`), and launches whose one
//! parameter is a struct by value (`Function`). On it stands [`kernels`], the registry of the compiled kernels. Without
//! the feature `cuda` there are only [`Error`] and what of [`kernels`] needs no driver.

#[cfg(feature = "cuda")]
mod device;
mod error;
pub mod kernels;
#[cfg(feature = "cuda")]
mod module;

#[cfg(feature = "cuda")]
pub use device::{
    DeviceInfo, KERNEL_ARCHITECTURES, alloc, devices, driver_error, driver_version, open,
};
pub use error::{Error, Version};
#[cfg(feature = "cuda")]
pub use module::{Function, Module};
