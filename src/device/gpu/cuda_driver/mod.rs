//! [`Driver`] on NVIDIA's CUDA driver: kernels loaded at run time, GEMMs by cuBLASLt.

mod gemm;
mod host;
mod peak;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::{CudaStream, DriverError, result, sys};

use super::driver::{Driver, Gemm};
use crate::cuda::kernels::{DriverKernels, DriverStream, Error, Launch, Launcher};
use crate::cuda::{self, DeviceInfo, driver_error};
use crate::device::{DeviceError, OutOfMemory};

use gemm::CublasLt;
pub use gemm::{Choice, load_library};

/// Smallest size of an allocation from the driver.
const REGION_BYTES: usize = 256 << 20;

/// A GPU of this machine and one stream on it.
#[derive(Debug)]
pub struct Cuda {
    kernels: Arc<DriverKernels>,
    stream: Arc<CudaStream>,
    cublas: CublasLt,
    info: DeviceInfo,
    /// Whether calls are recorded.
    recording: AtomicBool,
}

/// Recorded calls, ready to be launched on the stream that they were recorded on.
#[derive(Debug)]
pub struct Graph {
    stream: Arc<CudaStream>,
    ready: Mutex<Ready>,
}

/// An executable graph. The driver does not lock it, so only one thread may use it at a time.
#[derive(Debug)]
struct Ready(sys::CUgraphExec);

// SAFETY: the driver ties it to a context, not to a thread.
unsafe impl Send for Ready {}

impl Drop for Graph {
    fn drop(&mut self) {
        let context = self.stream.context();
        context.record_err(context.bind_to_thread());
        // SAFETY: made by `recorded`, and gone after this; the driver keeps it until its last launch has ended.
        let ready = self.ready.get_mut().unwrap_or_else(PoisonError::into_inner);
        context.record_err(unsafe { result::graph::exec_destroy(ready.0) });
    }
}

impl Cuda {
    /// Opens GPU `ordinal`.
    ///
    /// # Errors
    /// No driver, no GPU, no cuBLASLt, or what the driver says.
    pub fn open(ordinal: usize, choice: Choice) -> Result<Self, Error> {
        let context = cuda::open(ordinal)?;
        let stream = context
            .new_stream()
            .map_err(|error| driver_error("making a stream", error))?;
        Ok(Self {
            info: DeviceInfo::of(&context)?,
            cublas: CublasLt::new(choice)?,
            kernels: Arc::new(DriverKernels::new(&context)?),
            stream,
            recording: AtomicBool::new(false),
        })
    }

    /// The stream, for events around work.
    pub fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    /// What the GPU is.
    pub fn info(&self) -> &DeviceInfo {
        &self.info
    }

    /// The kernels, for a [`DryRun`](super::DryRun) of what will run here.
    pub fn shared_kernels(&self) -> &Arc<DriverKernels> {
        &self.kernels
    }

    fn launcher(&self) -> Result<DriverStream<'_>, Error> {
        self.kernels.on(&self.stream)
    }

    /// Checks that no recording is active.
    fn at_once(&self, call: &'static str) -> Result<(), Error> {
        match self.recording.load(Ordering::Relaxed) {
            false => Ok(()),
            true => Err(Error::Recording { call }),
        }
    }

    fn bind(&self) -> Result<(), Error> {
        let bound = self.stream.context().bind_to_thread();
        bound.map_err(|error| driver_error("choosing the GPU", error).into())
    }
}

impl Driver for Cuda {
    type Kernels = DriverKernels;
    type Graph = Graph;

    fn description(&self) -> String {
        let DeviceInfo { name, memory, .. } = &self.info;
        let gib = *memory as f64 / f64::from(1 << 30);
        format!("{name} (bf16, {gib:.0} GiB)")
    }

    fn kernels(&self) -> &DriverKernels {
        &self.kernels
    }

    fn region_bytes(&self) -> usize {
        REGION_BYTES
    }

    fn allocate(&self, bytes: usize) -> Result<u64, DeviceError> {
        self.bind()?;
        // SAFETY: what is read was written before: the device's promise.
        let allocated = unsafe { result::malloc_sync(bytes) };
        allocated.map_err(|error| refused("allocating memory", error, OutOfMemory::device(bytes)))
    }

    unsafe fn free(&self, address: u64, _: usize) {
        let context = self.stream.context();
        context.record_err(context.bind_to_thread());
        // SAFETY: the caller's promise; the driver waits for the device first.
        context.record_err(unsafe { result::free_sync(address) });
    }

    fn allocate_host(&self, bytes: usize) -> Result<u64, DeviceError> {
        self.bind()?;
        // Host and device share addresses on every GPU that the kernels are compiled for.
        host::allocate(bytes).map_err(|error| match error {
            host::Refused::Full => OutOfMemory::pinned(bytes).into(),
            host::Refused::Driver(error) => {
                refused("pinning memory", error, OutOfMemory::pinned(bytes))
            }
        })
    }

    unsafe fn free_host(&self, address: u64, bytes: usize) {
        let context = self.stream.context();
        context.record_err(context.bind_to_thread());
        // Work that was asked for may still use it.
        context.record_err(context.synchronize());
        // SAFETY: the caller's promise.
        context.record_err(unsafe { host::free(address, bytes) });
    }

    fn free_memory(&self) -> Result<usize, Error> {
        self.bind()?;
        let (free, _) = result::mem_get_info()
            .map_err(|error| driver_error("asking for free memory", error))?;
        Ok(free)
    }

    unsafe fn upload(&self, to: u64, bytes: &[u8]) -> Result<(), Error> {
        self.at_once("upload")?;
        // SAFETY: the caller's promise, here and below.
        unsafe { self.launcher()?.upload(to, bytes) }
    }

    unsafe fn download(&self, from: u64, bytes: &mut [u8]) -> Result<(), Error> {
        self.at_once("download")?;
        self.bind()?;
        let stream = self.stream.cu_stream();
        // SAFETY: as above; the stream is waited for before `bytes` is anybody else's again.
        let copied = unsafe {
            result::memcpy_dtoh_async(bytes, from, stream)
                .and_then(|()| result::stream::synchronize(stream))
        };
        copied.map_err(|error| driver_error("reading back", error).into())
    }

    unsafe fn zero(&self, at: u64, bytes: usize) -> Result<(), Error> {
        // SAFETY: as above.
        unsafe { self.launcher()?.zero(at, bytes) }
    }

    unsafe fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<(), Error> {
        self.bind()?;
        // SAFETY: as above. Either end may be host memory.
        let copied =
            unsafe { sys::cuMemcpyAsync(to, from, bytes, self.stream.cu_stream()) }.result();
        copied.map_err(|error| driver_error("copying on the GPU", error).into())
    }

    unsafe fn launch<P: Copy>(&self, launch: &Launch, params: &P) -> Result<(), Error> {
        // SAFETY: as above.
        unsafe { self.launcher()?.launch(launch, params) }
    }

    unsafe fn gemm(&self, gemm: &Gemm) -> Result<(), Error> {
        self.bind()?;
        // SAFETY: as above; the stream is of the current context.
        unsafe { self.cublas.run(self.stream.cu_stream(), gemm) }.map_err(Into::into)
    }

    fn record(&self) -> Result<(), Error> {
        self.at_once("record")?;
        self.bind()?;
        // Memory may be asked for meanwhile: relaxed.
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: the stream is of this context.
        unsafe { result::stream::begin_capture(self.stream.cu_stream(), mode) }
            .map_err(|error| driver_error("beginning to record", error))?;
        self.recording.store(true, Ordering::Relaxed);
        Ok(())
    }

    fn recorded(&self) -> Result<Graph, Error> {
        self.recording.store(false, Ordering::Relaxed);
        // The capture has to end whatever happens, or every later call would be captured.
        let bound = self.bind();
        // SAFETY: the stream is of this context; the graph is used by nobody but `instantiate`.
        let ready = unsafe {
            let graph = result::stream::end_capture(self.stream.cu_stream())
                .map_err(|error| driver_error("recording", error))?;
            let ready = result::graph::instantiate(graph, sys::CUgraphInstantiate_flags(0));
            self.stream
                .context()
                .record_err(result::graph::destroy(graph));
            ready.map_err(|error| driver_error("making a graph", error))?
        };
        let graph = Graph {
            stream: self.stream.clone(),
            ready: Mutex::new(Ready(ready)),
        };
        bound.map(|()| graph)
    }

    unsafe fn replay(&self, graph: &Graph) -> Result<(), Error> {
        self.at_once("replay")?;
        self.bind()?;
        if !Arc::ptr_eq(&graph.stream, &self.stream) {
            return Err(Error::Context {
                argument: "graph",
                expected: self.stream.context().ordinal(),
                got: graph.stream.context().ordinal(),
            });
        }
        let ready = graph.ready.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the caller's promise; the graph was recorded on this stream, and no other thread uses it meanwhile.
        unsafe { result::graph::launch(ready.0, self.stream.cu_stream()) }
            .map_err(|error| driver_error("launching a graph", error).into())
    }
}

/// The error of an allocation.
fn refused(doing: &str, error: DriverError, out: OutOfMemory) -> DeviceError {
    match driver_error(doing, error) {
        cuda::Error::OutOfMemory { .. } => out.into(),
        error => Error::from(error).into(),
    }
}

/// The error of a call of a library that counts its own way.
fn failed(call: &str, code: u32, name: String) -> cuda::Error {
    cuda::Error::Driver {
        doing: call.to_owned(),
        code,
        text: "no more is known".into(),
        name,
        remedy: "see `segattn doctor`; if it finds no fault of the machine, please report this as a bug",
    }
}
