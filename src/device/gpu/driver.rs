//! Interface of the GPU device to a driver: memory, copies, launches and GEMMs, all on one stream.
//!
//! Implementations are CUDA's driver (feature `cuda`), the dry run, and the simulated GPU of the tests.

use std::fmt::Debug;

use crate::cuda::kernels::{Error, Kernels, Launch, Launcher};
use crate::device::{DeviceError, Kind};

/// A GPU and one stream on it. Calls are asynchronous, in stream order; only [`Driver::download`] waits. After a failed
/// call later calls work, unless its error says otherwise.
pub trait Driver: Debug + Send + Sync {
    /// The compiled kernels.
    type Kernels: Kernels;
    /// Recorded calls.
    type Graph: Debug + Send + Sync;

    /// One-line description of the GPU, for display.
    fn description(&self) -> String;

    /// The kernels that [`Driver::launch`] launches.
    fn kernels(&self) -> &Self::Kernels;

    /// Whether calls are executed. If not, as in a dry run, downloaded values are meaningless.
    fn computes(&self) -> bool {
        true
    }

    /// Smallest size of an allocation, in bytes; many buffers share one. 0: every buffer has its own allocation.
    fn region_bytes(&self) -> usize;

    /// Device memory, at a multiple of 256 bytes; contents arbitrary.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`], or an error of the driver.
    fn allocate(&self, bytes: usize) -> Result<u64, DeviceError>;

    /// Frees memory, in stream order.
    ///
    /// # Safety
    /// `address` came from [`Driver::allocate`] with the same `bytes`, and no later call uses it.
    unsafe fn free(&self, address: u64, bytes: usize);

    /// Pinned host memory that kernels and copies access over the bus at the same address. It begins at a multiple of
    /// 256 bytes; contents arbitrary.
    ///
    /// # Errors
    /// As [`Driver::allocate`].
    fn allocate_host(&self, bytes: usize) -> Result<u64, DeviceError>;

    /// Frees pinned host memory, in stream order.
    ///
    /// # Safety
    /// As [`Driver::free`], of [`Driver::allocate_host`].
    unsafe fn free_host(&self, address: u64, bytes: usize);

    /// Bytes of free device memory.
    ///
    /// # Errors
    /// Errors of the driver.
    fn free_memory(&self) -> Result<usize, Error>;

    /// Writes `bytes` to device memory. `bytes` are not read after the call returns.
    ///
    /// # Safety
    /// `[to, to + bytes.len())` is memory that this driver allocated.
    ///
    /// # Errors
    /// Errors of the driver.
    unsafe fn upload(&self, to: u64, bytes: &[u8]) -> Result<(), Error>;

    /// Reads device memory after all earlier calls on the stream.
    ///
    /// # Safety
    /// `[from, from + bytes.len())` is memory that this driver allocated, and has been written.
    ///
    /// # Errors
    /// Errors of the driver, also of earlier asynchronous calls.
    unsafe fn download(&self, from: u64, bytes: &mut [u8]) -> Result<(), Error>;

    /// Sets bytes to zero.
    ///
    /// # Safety
    /// `[at, at + bytes)` is memory of this device.
    ///
    /// # Errors
    /// Errors of the driver.
    unsafe fn zero(&self, at: u64, bytes: usize) -> Result<(), Error>;

    /// Copies bytes between device memory and pinned host memory, or within either. The ranges do not overlap.
    ///
    /// # Safety
    /// Both ranges are memory that this driver allocated.
    ///
    /// # Errors
    /// Errors of the driver.
    unsafe fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<(), Error>;

    /// Launches a kernel.
    ///
    /// # Safety
    /// `P` is the params struct of the kernel's entry. Its addresses are memory of this device, as the kernel requires.
    ///
    /// # Errors
    /// Errors of the driver.
    unsafe fn launch<P: Copy>(&self, launch: &Launch, params: &P) -> Result<(), Error>;

    /// Computes a GEMM, see [`Gemm`].
    ///
    /// # Safety
    /// Its matrices are memory of this device, and `c` overlaps neither `a` nor `b`.
    ///
    /// # Errors
    /// Errors of the driver.
    unsafe fn gemm(&self, gemm: &Gemm) -> Result<(), Error>;

    /// Begins recording. Until [`Driver::recorded`], zeros, copies, launches and GEMMs are recorded, not executed.
    /// Uploads and downloads are refused meanwhile.
    ///
    /// # Errors
    /// Errors of the driver.
    fn record(&self) -> Result<(), Error>;

    /// Ends recording, also after an error.
    ///
    /// # Errors
    /// Errors of the driver, also of recorded calls.
    fn recorded(&self) -> Result<Self::Graph, Error>;

    /// Executes the recorded calls.
    ///
    /// # Safety
    /// As for the calls that were recorded.
    ///
    /// # Errors
    /// Errors of the driver.
    unsafe fn replay(&self, graph: &Self::Graph) -> Result<(), Error>;
}

/// `c = a b` with an [`Epilogue`], row-major: `a [m, k]` and `b [k, n]` in bf16, `c [m, n]`, sums in f32.
///
/// The bits of an element depend on its row of `a`, its column of `b`, `n`, the layouts, the kind of `c` and the
/// epilogue. They do not depend on `m` or on the index of the row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gemm {
    /// Rows of `a` and `c`.
    pub m: usize,
    /// Columns of `b` and `c`.
    pub n: usize,
    /// Length of the sums.
    pub k: usize,
    /// The left matrix.
    pub a: Operand,
    /// The right matrix.
    pub b: Operand,
    /// Address of the result.
    pub c: u64,
    /// Elements from one row of `c` to the next.
    pub c_stride: usize,
    /// f32 or bf16.
    pub c_kind: Kind,
    /// Applied to the f32 sums before they are rounded.
    pub epilogue: Epilogue,
}

/// What a GEMM does with its sums before it stores them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Epilogue {
    /// `c = a b`.
    Store,
    /// `c += a b`.
    Accumulate,
    /// `c = a b + rows`, where `rows` have the kind of `c` and do not overlap it.
    AddRows {
        /// Address of their first element.
        address: u64,
        /// Elements from one row to the next.
        stride: usize,
    },
}

/// An input of a GEMM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Operand {
    /// Address of its first element.
    pub address: u64,
    /// Elements from one row in memory to the next.
    pub stride: usize,
    /// Whether it is stored transposed.
    pub transposed: bool,
}

/// A driver's stream, for plans of the attention operation.
pub(super) struct Stream<'a, D>(pub &'a D);

impl<D: Driver> Launcher for Stream<'_, D> {
    unsafe fn upload(&mut self, to: u64, bytes: &[u8]) -> Result<(), Error> {
        // SAFETY: the caller's promise, here and below.
        unsafe { self.0.upload(to, bytes) }
    }

    unsafe fn zero(&mut self, at: u64, bytes: usize) -> Result<(), Error> {
        // SAFETY: as above.
        unsafe { self.0.zero(at, bytes) }
    }

    unsafe fn launch<P: Copy>(&mut self, launch: &Launch, params: &P) -> Result<(), Error> {
        // SAFETY: as above.
        unsafe { self.0.launch(launch, params) }
    }
}
