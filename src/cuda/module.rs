//! Loading compiled kernels into a context, and launching them.

use std::ffi::{CString, c_void};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::sys::{
    self, CUfunction, CUfunction_attribute as Attribute, CUlaunchAttribute, CUlaunchAttributeID,
    CUlaunchAttributeValue, CUlaunchConfig, CUmodule, CUstream,
};
use cudarc::driver::{CudaContext, DriverError, result};

use super::device::{DeviceInfo, KERNEL_ARCHITECTURES, driver_error, driver_version, toolkit};
use super::error::Error;

/// Dynamic shared memory that a block may use without `allow_shared_bytes`.
const DEFAULT_SHARED_BYTES: u32 = 48 << 10;

/// First virtual architecture, as major * 10 + minor, whose kernels have the instruction that waits for the previous
/// kernel (`griddep_wait` of kernels/ptx.cuh).
const OVERLAP_VERSION: i32 = 90;

/// A fat binary that is loaded in a context.
#[derive(Debug)]
pub struct Module {
    name: &'static str,
    raw: CUmodule,
    context: Arc<CudaContext>,
}

// SAFETY: a module belongs to its context, which may be current on any thread. The driver synchronizes calls.
unsafe impl Send for Module {}
// SAFETY: as above.
unsafe impl Sync for Module {}

impl Drop for Module {
    fn drop(&mut self) {
        self.context.record_err(self.context.bind_to_thread());
        // SAFETY: each function holds a reference to the module, so none is left.
        let unloaded = unsafe { result::module::unload(self.raw) };
        self.context.record_err(unloaded);
    }
}

impl Module {
    /// Loads an image of this build's own kernels. `name` appears in errors.
    ///
    /// # Errors
    /// [`Error::NoKernelImage`], [`Error::DriverTooOld`], or an error of the driver.
    pub(crate) fn load(
        context: &Arc<CudaContext>,
        name: &'static str,
        image: &'static [u8],
    ) -> Result<Arc<Self>, Error> {
        let doing = || format!("loading {name}");
        bind(context, &doing())?;
        // SAFETY: the driver trusts the sizes in the image's header. The image is complete, as nvcc wrote it.
        match unsafe { result::module::load_data(image.as_ptr().cast()) } {
            Ok(raw) => Ok(Arc::new(Module {
                name,
                raw,
                context: context.clone(),
            })),
            Err(error) => Err(not_loaded(context, name, error)),
        }
    }

    /// The context in which it was loaded.
    pub fn context(&self) -> &Arc<CudaContext> {
        &self.context
    }

    /// Finds an `extern "C"` kernel.
    ///
    /// # Errors
    /// There is no kernel of this name, or an error of the driver.
    pub fn function(self: &Arc<Self>, name: &'static str) -> Result<Function, Error> {
        let doing = || format!("finding {name} in {}", self.name);
        bind(&self.context, &doing())?;
        let symbol = CString::new(name).unwrap_or_default();
        // SAFETY: the module is loaded.
        let raw = unsafe { result::module::get_function(self.raw, symbol) };
        let raw = raw.map_err(|error| driver_error(&doing(), error))?;
        let version = Attribute::CU_FUNC_ATTRIBUTE_PTX_VERSION;
        // SAFETY: the function is of a loaded module.
        let version = unsafe { result::function::get_function_attribute(raw, version) };
        Ok(Function {
            name,
            raw,
            can_overlap: version.map_err(|error| driver_error(&doing(), error))? >= OVERLAP_VERSION,
            shared_bytes: AtomicU32::new(DEFAULT_SHARED_BYTES),
            raising: Mutex::default(),
            module: self.clone(),
        })
    }

    /// Reads a global constant. The copy runs on its own stream; the call waits for it.
    ///
    /// # Errors
    /// There is no constant of this name and size, or an error of the driver.
    pub fn constant<T: bytemuck::AnyBitPattern + bytemuck::NoUninit>(
        &self,
        name: &str,
    ) -> Result<T, Error> {
        let doing = format!("reading {name} of {}", self.name);
        let said = |error| driver_error(&doing, error);
        bind(&self.context, &doing)?;
        let symbol = CString::new(name).unwrap_or_default();
        let mut value = [T::zeroed()];
        // SAFETY: the module is loaded. Source and destination have the size of the copy. The copy is complete after
        // the synchronization.
        unsafe {
            let (address, bytes) = result::module::get_global(self.raw, symbol).map_err(said)?;
            if bytes != size_of::<T>() {
                return Err(Error::Constant {
                    name: name.to_owned(),
                    expected: size_of::<T>(),
                    got: bytes,
                });
            }
            let stream = result::stream::create(result::stream::StreamKind::NonBlocking);
            let stream = stream.map_err(said)?;
            let to: &mut [u8] = bytemuck::cast_slice_mut(&mut value);
            let copied = result::memcpy_dtoh_async(to, address, stream)
                .and_then(|()| result::stream::synchronize(stream));
            let destroyed = result::stream::destroy(stream);
            copied.and(destroyed).map_err(said)?;
        }
        Ok(value[0])
    }
}

fn bind(context: &CudaContext, doing: &str) -> Result<(), Error> {
    context
        .bind_to_thread()
        .map_err(|error| driver_error(doing, error))
}

/// Why the driver refused an image.
fn not_loaded(context: &CudaContext, name: &str, error: DriverError) -> Error {
    // No binary for the GPU, or PTX of a later version.
    const NO_BINARY: u32 = 209;
    const LATER_PTX: u32 = 222;
    match error.0 as u32 {
        NO_BINARY => match DeviceInfo::of(context) {
            Ok(info) => Error::NoKernelImage {
                gpu: info.name,
                architecture: format!("{}{}", info.architecture.0, info.architecture.1),
                image: name.to_owned(),
                compiled: KERNEL_ARCHITECTURES.to_owned(),
            },
            Err(error) => error,
        },
        LATER_PTX => match driver_version() {
            Ok(driver) => Error::DriverTooOld {
                driver,
                toolkit: toolkit(),
            },
            Err(error) => error,
        },
        _ => driver_error(&format!("loading {name}"), error),
    }
}

/// A kernel in a loaded module.
#[derive(Debug)]
pub struct Function {
    name: &'static str,
    raw: CUfunction,
    /// Whether it was compiled with the instruction that waits for the previous kernel.
    can_overlap: bool,
    /// Dynamic shared memory that it may be launched with. It is only raised, and only under the lock `raising`.
    shared_bytes: AtomicU32,
    raising: Mutex<()>,
    module: Arc<Module>,
}

// SAFETY: as `Module`.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Sync for Function {}

impl Function {
    /// Allows launches with this much dynamic shared memory per block.
    ///
    /// # Errors
    /// [`Error::SharedMemory`], or an error of the driver.
    pub fn allow_shared_bytes(&self, bytes: u32) -> Result<(), Error> {
        let allowed = || bytes <= self.shared_bytes.load(Ordering::Acquire);
        if allowed() {
            return Ok(());
        }
        // Without the lock a thread that asks for less could set the limit after one that asks for more.
        let _raising = self.raising.lock().unwrap_or_else(PoisonError::into_inner);
        if allowed() {
            return Ok(());
        }
        let doing = format!("shared memory of {}", self.name);
        bind(&self.module.context, &doing)?;
        let which = Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: the function is of a loaded module.
        let set =
            unsafe { result::function::set_function_attribute(self.raw, which, bytes as i32) };
        if let Err(error) = set {
            let info = DeviceInfo::of(&self.module.context)?;
            if bytes as usize > info.shared_bytes {
                return Err(Error::SharedMemory {
                    kernel: self.name.to_owned(),
                    expected: bytes as usize,
                    got: info.shared_bytes,
                });
            }
            return Err(driver_error(&doing, error));
        }
        self.shared_bytes.store(bytes, Ordering::Release);
        Ok(())
    }

    /// How many of its blocks a multiprocessor runs at once.
    ///
    /// # Errors
    /// As [`allow_shared_bytes`](Self::allow_shared_bytes).
    pub fn blocks_per_multiprocessor(&self, threads: u32, shared_bytes: u32) -> Result<u32, Error> {
        self.allow_shared_bytes(shared_bytes)?;
        let doing = || format!("asking the occupancy of {}", self.name);
        bind(&self.module.context, &doing())?;
        // SAFETY: as above.
        let blocks = unsafe {
            result::occupancy::max_active_block_per_multiprocessor(
                self.raw,
                threads as i32,
                shared_bytes as usize,
            )
        };
        let blocks = blocks.map_err(|error| driver_error(&doing(), error))?;
        Ok(blocks.max(0) as u32)
    }

    /// Launches `blocks` x 1 x 1 blocks of `threads` x 1 x 1 threads. `params` is the only parameter and is passed by
    /// value. With `overlaps` the kernel may start before the previous one has finished, on GPUs with programmatic
    /// dependent launch.
    ///
    /// # Safety
    /// `stream` is a stream of the module's context. `P` is the kernel's params struct, and the memory that it points
    /// to stays valid until the stream has run the kernel. In a kernel that is launched with `overlaps`, every block
    /// waits for the previous kernel itself.
    ///
    /// # Errors
    /// As [`allow_shared_bytes`](Self::allow_shared_bytes). The driver may also report errors of earlier work here.
    pub unsafe fn launch<P: Copy>(
        &self,
        stream: CUstream,
        blocks: u32,
        threads: u32,
        shared_bytes: u32,
        overlaps: bool,
        params: &P,
    ) -> Result<(), Error> {
        self.allow_shared_bytes(shared_bytes)?;
        let mut overlap = CUlaunchAttribute {
            id: CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: CUlaunchAttributeValue {
                programmaticStreamSerializationAllowed: 1,
            },
        };
        let config = CUlaunchConfig {
            gridDimX: blocks,
            gridDimY: 1,
            gridDimZ: 1,
            blockDimX: threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: shared_bytes,
            hStream: stream,
            attrs: &mut overlap,
            numAttrs: u32::from(overlaps && self.can_overlap),
        };
        let mut params = [std::ptr::from_ref(params).cast_mut().cast::<c_void>()];
        // SAFETY: guaranteed by the caller. The driver copies config and params before it returns.
        let launched = unsafe {
            let (params, extra) = (params.as_mut_ptr(), std::ptr::null_mut());
            sys::cuLaunchKernelEx(&config, self.raw, params, extra).result()
        };
        launched.map_err(|error| driver_error(&format!("launching {}", self.name), error))
    }
}
