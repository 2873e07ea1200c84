//! GPUs: finding them, opening one, and allocating memory on it.

use std::ffi::CStr;
use std::sync::Arc;

use cudarc::driver::sys::{self, CUdevice_attribute as Attribute};
use cudarc::driver::{CudaContext, CudaSlice, CudaStream, DeviceRepr, DriverError, result};

use super::error::{Error, Version};

/// The architectures that the kernels were compiled for, such as "sm_80, sm_90, PTX 80".
pub const KERNEL_ARCHITECTURES: &str = env!("SEGATTN_KERNEL_ARCHS");

/// Where the kernels' images came from: "prebuilt", or "compiled by the build: " and the files.
pub const KERNEL_ORIGIN: &str = env!("SEGATTN_KERNEL_ORIGIN");

/// The CUDA version that compiled the kernels: the driver must know it, or a later one of the same major number.
pub fn toolkit() -> Version {
    Version(env!("SEGATTN_NVCC_VERSION").parse().unwrap_or(0))
}

/// Properties of a GPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Its name, such as "NVIDIA H200".
    pub name: String,
    /// Compute capability, such as (9, 0).
    pub architecture: (i32, i32),
    /// Memory in bytes.
    pub memory: usize,
    /// Number of multiprocessors.
    pub multiprocessors: u32,
    /// Shared memory that a block may use, in bytes.
    pub shared_bytes: usize,
}

/// The error of a failed driver call. `doing` says what the call was for, such as "loading the weights".
pub fn driver_error(doing: &str, DriverError(code): DriverError) -> Error {
    let error = DriverError(code);
    let text = |said: Result<&CStr, DriverError>| {
        said.map_or("?".to_owned(), |said| said.to_string_lossy().into_owned())
    };
    let said = (text(error.error_name()), text(error.error_string()));
    Error::from_code(code as u32, doing, said, || {
        result::mem_get_info().unwrap_or_default()
    })
}

/// Loads the driver's library; a program that links it would not have started without it.
fn load() -> Result<(), Error> {
    #[cfg(not(feature = "linked-driver"))]
    // SAFETY: loading the library only runs its constructors.
    if !unsafe { sys::is_culib_present() } {
        return Err(Error::NoDriver);
    }
    Ok(())
}

fn start() -> Result<(), Error> {
    load()?;
    result::init().map_err(|error| driver_error("starting the driver", error))
}

/// The CUDA version of the driver.
///
/// # Errors
/// [`Error::NoDriver`].
pub fn driver_version() -> Result<Version, Error> {
    load()?;
    let mut version = 0;
    // SAFETY: the pointer is to an int.
    let code = unsafe { sys::cuDriverGetVersion(&mut version) };
    code.result()
        .map_err(|error| driver_error("asking the driver's version", error))?;
    Ok(Version(version))
}

/// All GPUs that the driver lists. None of them is opened.
///
/// # Errors
/// [`Error::NoDriver`], [`Error::NoDevice`], or an error of the driver.
pub fn devices() -> Result<Vec<DeviceInfo>, Error> {
    start()?;
    let count =
        result::device::get_count().map_err(|error| driver_error("counting GPUs", error))?;
    (0..count).map(info).collect()
}

fn info(ordinal: i32) -> Result<DeviceInfo, Error> {
    let device = |error| driver_error("asking what the GPU is", error);
    let raw = result::device::get(ordinal).map_err(device)?;
    // SAFETY: the driver returned this device.
    let attribute = |which| unsafe { result::device::get_attribute(raw, which) }.map_err(device);
    Ok(DeviceInfo {
        name: result::device::get_name(raw).map_err(device)?,
        architecture: (
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
        // SAFETY: as above.
        memory: unsafe { result::device::total_mem(raw) }.map_err(device)?,
        multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as u32,
        shared_bytes: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?
            as usize,
    })
}

impl DeviceInfo {
    /// Whether this is a Hopper GPU and the build has kernels that only Hopper can run (sm_90a).
    pub fn has_hopper_kernels(&self) -> bool {
        self.architecture == (9, 0) && KERNEL_ARCHITECTURES.split(", ").any(|arch| arch == "sm_90")
    }

    /// The properties of the GPU of a context.
    ///
    /// # Errors
    /// An error of the driver.
    pub fn of(context: &CudaContext) -> Result<DeviceInfo, Error> {
        info(context.ordinal() as i32)
    }
}

/// Opens GPU `ordinal`. The context is the primary one, which other libraries in the process share.
///
/// # Errors
/// There is no driver, no GPU or no GPU of this number; the driver is older than the toolkit that compiled the
/// kernels; or an error of the driver.
pub fn open(ordinal: usize) -> Result<Arc<CudaContext>, Error> {
    let driver = driver_version()?;
    if driver.0 / 1000 < toolkit().0 / 1000 {
        return Err(Error::DriverTooOld {
            driver,
            toolkit: toolkit(),
        });
    }
    let count = devices()?.len();
    if ordinal >= count {
        return Err(Error::Ordinal { ordinal, count });
    }
    CudaContext::new(ordinal).map_err(|error| driver_error("opening the GPU", error))
}

/// Allocates uninitialized memory in the order of a stream.
///
/// # Errors
/// [`Error::OutOfMemory`], or an error of the driver.
///
/// # Safety
/// Every element is written before it is read.
pub unsafe fn alloc<T: DeviceRepr>(
    stream: &Arc<CudaStream>,
    len: usize,
) -> Result<CudaSlice<T>, Error> {
    let bytes = len.saturating_mul(size_of::<T>());
    let doing = || format!("allocating {bytes} bytes");
    if bytes > isize::MAX as usize {
        let (free, total) = result::mem_get_info().unwrap_or_default();
        return Err(Error::OutOfMemory {
            doing: doing(),
            free,
            total,
        });
    }
    // SAFETY: the caller's promise.
    unsafe { stream.alloc(len) }.map_err(|error| driver_error(&doing(), error))
}
