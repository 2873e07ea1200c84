//! The compiled kernels in a context of the driver, and its streams.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use cudarc::driver::sys::{self, CUstream};
use cudarc::driver::{CudaContext, CudaStream, result};

use super::error::Error;
use super::launcher::{Kernels, Launch, Launcher};
use super::layout::DeviceLayout;
use super::params::{SegattnKernelInfo, SegattnTensorMap};
use super::registry::{Entry, File};
use super::tensor_map::BoxedTensor;
use crate::cuda::{self, Function, Module};

/// The driver stages copies from pageable host memory up to this size without waiting for the stream.
const COPY_BYTES: usize = 64 << 10;

/// The alignment that the driver needs of an image.
#[repr(C, align(64))]
struct Aligned<T: ?Sized>(T);

macro_rules! image {
    ($name:literal) => {{
        static IMAGE: &Aligned<[u8]> = &Aligned(*include_bytes!(concat!(
            env!("OUT_DIR"),
            "/",
            $name,
            ".fatbin"
        )));
        &IMAGE.0
    }};
}

/// The fat binary of a file, as `build.rs` left it.
fn image(file: File) -> &'static [u8] {
    match file {
        File::AttentionForward => image!("attention_forward"),
        File::AttentionForwardHopper => image!("attention_forward_hopper"),
        File::AttentionDecode => image!("attention_decode"),
        File::AttentionBackward => image!("attention_backward"),
        File::AttentionBackwardHopper => image!("attention_backward_hopper"),
        File::Adamw => image!("adamw"),
        File::Copy => image!("copy"),
        File::Embedding => image!("embedding"),
        File::Loss => image!("loss"),
        File::Norm => image!("norm"),
        File::Retrieval => image!("retrieval"),
        File::Rope => image!("rope"),
        File::Sampling => image!("sampling"),
        File::SinkLogits => image!("sink_logits"),
        File::Swiglu => image!("swiglu"),
    }
}

/// The compiled kernels in a context. A file and its entry points are loaded when a plan first needs them.
#[derive(Debug)]
pub struct DriverKernels {
    context: Arc<CudaContext>,
    multiprocessors: u32,
    hopper: bool,
    modules: [OnceLock<Arc<Module>>; File::ALL.len()],
    entries: Mutex<HashMap<&'static str, Arc<Function>>>,
    infos: Mutex<HashMap<&'static str, SegattnKernelInfo>>,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // The maps are consistent at any time, so a panic of another thread does no harm.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl DriverKernels {
    /// Kernels for a context: [`cuda::open`], or one of the caller's own.
    ///
    /// # Errors
    /// What the driver says.
    pub fn new(context: &Arc<CudaContext>) -> Result<Self, Error> {
        let info = cuda::DeviceInfo::of(context)?;
        Ok(DriverKernels {
            context: context.clone(),
            multiprocessors: info.multiprocessors,
            hopper: info.has_hopper_kernels(),
            modules: Default::default(),
            entries: Mutex::default(),
            infos: Mutex::default(),
        })
    }

    /// The context that they are loaded in.
    pub fn context(&self) -> &Arc<CudaContext> {
        &self.context
    }

    fn module(&self, file: File) -> Result<&Arc<Module>, Error> {
        let place = &self.modules[file as usize];
        if let Some(module) = place.get() {
            return Ok(module);
        }
        let module = Module::load(&self.context, file.stem(), image(file))?;
        if file.has_layout() {
            let layout: DeviceLayout = module.constant(&DeviceLayout::name(file))?;
            layout.check(file)?;
        }
        Ok(place.get_or_init(|| module))
    }

    /// Loads all files for this GPU that are not loaded yet, and says how long each took. Plans load what they need, so
    /// this is for finding out whether the driver takes all, or for having no delay later. The driver may leave the
    /// code of a kernel until its first launch, unless `CUDA_MODULE_LOADING=EAGER` is in the environment.
    ///
    /// # Errors
    /// What the driver says of the first file that it refuses.
    pub fn load_all(&self) -> Result<Vec<(File, Duration)>, Error> {
        let files = File::ALL.into_iter();
        let files = files.filter(|file| self.hopper || !file.is_for_hopper());
        let load = |file| {
            let started = Instant::now();
            self.module(file).map(|_| (file, started.elapsed()))
        };
        files.map(load).collect()
    }

    fn function(&self, entry: Entry) -> Result<Arc<Function>, Error> {
        if let Some(function) = locked(&self.entries).get(entry.name) {
            return Ok(function.clone());
        }
        let function = Arc::new(self.module(entry.file)?.function(entry.name)?);
        locked(&self.entries).insert(entry.name, function.clone());
        Ok(function)
    }

    /// A stream of the kernels' context, to run plans on.
    ///
    /// # Errors
    /// A stream of another context, or what the driver says.
    pub fn on<'a>(&'a self, stream: &'a CudaStream) -> Result<DriverStream<'a>, Error> {
        self.check_context("stream", stream.context())?;
        // SAFETY: the stream is of this context and outlives the borrow.
        unsafe { self.on_raw(stream.cu_stream()) }
    }

    /// A stream that cudarc does not own, for example that of another library.
    ///
    /// # Safety
    /// `stream` belongs to the kernels' context and outlives the returned value.
    ///
    /// # Errors
    /// What the driver says.
    pub unsafe fn on_raw(&self, stream: CUstream) -> Result<DriverStream<'_>, Error> {
        let bound = self.context.bind_to_thread();
        bound.map_err(|error| cuda::driver_error("choosing the GPU", error))?;
        Ok(DriverStream {
            kernels: self,
            stream,
        })
    }

    /// Refuses what belongs to another GPU.
    pub(crate) fn check_context(
        &self,
        argument: &'static str,
        context: &CudaContext,
    ) -> Result<(), Error> {
        if *context == *self.context {
            return Ok(());
        }
        Err(Error::Context {
            argument,
            expected: self.context.ordinal(),
            got: context.ordinal(),
        })
    }
}

impl Kernels for DriverKernels {
    fn info(&self, entry: Entry) -> Result<SegattnKernelInfo, Error> {
        if let Some(info) = locked(&self.infos).get(entry.name) {
            return Ok(*info);
        }
        let name = format!("{}_info", entry.name);
        let info: SegattnKernelInfo = self.module(entry.file)?.constant(&name)?;
        locked(&self.infos).insert(entry.name, info);
        Ok(info)
    }

    fn ready(&self, entry: Entry) -> Result<(), Error> {
        self.function(entry).map(|_| ())
    }

    fn resident_blocks(&self, entry: Entry, info: &SegattnKernelInfo) -> Result<u32, Error> {
        let (threads, shared_bytes) = (info.threads as u32, info.shared_bytes as u32);
        let function = self.function(entry)?;
        match function.blocks_per_multiprocessor(threads, shared_bytes) {
            Ok(blocks) => Ok(blocks * self.multiprocessors),
            Err(cuda::Error::SharedMemory { .. }) => Ok(0),
            Err(error) => Err(error.into()),
        }
    }

    fn hopper(&self) -> bool {
        self.hopper
    }

    fn tensor_map(&self, tensor: &BoxedTensor) -> Result<Option<SegattnTensorMap>, Error> {
        let mut map = SegattnTensorMap::NONE;
        const { assert!(size_of::<SegattnTensorMap>() == size_of::<sys::CUtensorMap>()) };
        // SAFETY: `map` has the size and alignment of a CUtensorMap; the arrays have as many elements as the rank says.
        let encoded = unsafe {
            sys::cuTensorMapEncodeTiled(
                (&raw mut map).cast(),
                sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_UINT16,
                5,
                tensor.data as usize as *mut _,
                tensor.dims.as_ptr().cast(),
                tensor.strides.as_ptr().cast(),
                tensor.box_dims.as_ptr(),
                [1; 5].as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        let encoded = encoded.result();
        encoded.map_err(|error| cuda::driver_error("describing a tensor to bulk copies", error))?;
        Ok(Some(map))
    }
}

/// A stream that plans run on, bound to the calling thread.
#[derive(Debug)]
pub struct DriverStream<'a> {
    kernels: &'a DriverKernels,
    stream: CUstream,
}

impl Launcher for DriverStream<'_> {
    unsafe fn upload(&mut self, to: u64, bytes: &[u8]) -> Result<(), Error> {
        for (i, part) in bytes.chunks(COPY_BYTES).enumerate() {
            let to = to + (i * COPY_BYTES) as u64;
            // SAFETY: the caller's promise; the driver has copied a pageable source when it returns.
            let copied = unsafe { result::memcpy_htod_async(to, part, self.stream) };
            copied.map_err(|error| cuda::driver_error("copying from the host", error))?;
        }
        Ok(())
    }

    unsafe fn zero(&mut self, at: u64, bytes: usize) -> Result<(), Error> {
        // SAFETY: the caller's promise.
        let set = unsafe { result::memset_d8_async(at, 0, bytes, self.stream) };
        Ok(set.map_err(|error| cuda::driver_error("setting a counter to zero", error))?)
    }

    unsafe fn launch<P: Copy>(&mut self, launch: &Launch, params: &P) -> Result<(), Error> {
        let Launch {
            entry,
            blocks,
            threads,
            shared_bytes,
            overlaps,
        } = *launch;
        let function = self.kernels.function(entry)?;
        // SAFETY: the caller's promise, and `on_raw`'s for the stream.
        Ok(unsafe {
            function.launch(self.stream, blocks, threads, shared_bytes, overlaps, params)
        }?)
    }
}
