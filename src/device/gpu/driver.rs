//! What the GPU device asks of a driver: memory, copies, launches and GEMMs, all on one
//! stream. Two exist: CUDA's (feature `cuda`), and the simulated GPU of the tests.

use std::fmt::Debug;

use crate::cuda::kernels::{Error, Kernels, Launch, Launcher};
use crate::device::{DeviceError, Kind};

/// A GPU and one stream on it: what is asked happens in order, later; only [`Driver::download`]
/// waits. A failed call leaves the next ones working unless its error says otherwise.
pub trait Driver: Debug + Send + Sync {
    /// The compiled kernels.
    type Kernels: Kernels;
    /// Calls that were recorded.
    type Graph: Debug + Send + Sync;

    /// One line for people.
    fn description(&self) -> String;

    /// The kernels that [`Driver::launch`] launches.
    fn kernels(&self) -> &Self::Kernels;

    /// Whether calls are carried out. If not, as in a dry run, what is read back means nothing.
    fn computes(&self) -> bool {
        true
    }

    /// Memory is asked for in pieces of at least this many bytes, which hold many buffers; 0: each buffer
    /// gets a piece of its own.
    fn region_bytes(&self) -> usize;

    /// Device memory, at a multiple of 256 bytes; contents arbitrary.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`], or what the driver says.
    fn allocate(&self, bytes: usize) -> Result<u64, DeviceError>;

    /// Gives memory back, once the stream has passed.
    ///
    /// # Safety
    /// `address` came from [`Driver::allocate`] with the same `bytes`, and nothing asked from now on uses it.
    unsafe fn free(&self, address: u64, bytes: usize);

    /// Host memory that kernels and copies use as they use the device's, at the same address, over the bus: at a
    /// multiple of 256 bytes; contents arbitrary.
    ///
    /// # Errors
    /// As [`Driver::allocate`].
    fn allocate_host(&self, bytes: usize) -> Result<u64, DeviceError>;

    /// Gives host memory back, once the stream has passed.
    ///
    /// # Safety
    /// As [`Driver::free`], of [`Driver::allocate_host`].
    unsafe fn free_host(&self, address: u64, bytes: usize);

    /// Bytes of device memory that nobody has taken.
    ///
    /// # Errors
    /// What the driver says.
    fn free_memory(&self) -> Result<usize, Error>;

    /// Writes `bytes` to device memory. They are not read after the call returns.
    ///
    /// # Safety
    /// `[to, to + bytes.len())` is memory that this driver allocated.
    ///
    /// # Errors
    /// What the driver says.
    unsafe fn upload(&self, to: u64, bytes: &[u8]) -> Result<(), Error>;

    /// Reads device memory, after everything asked before.
    ///
    /// # Safety
    /// `[from, from + bytes.len())` is memory that this driver allocated, and has been written.
    ///
    /// # Errors
    /// What the driver says; also of work asked before.
    unsafe fn download(&self, from: u64, bytes: &mut [u8]) -> Result<(), Error>;

    /// Sets bytes to zero.
    ///
    /// # Safety
    /// `[at, at + bytes)` is memory of this device.
    ///
    /// # Errors
    /// What the driver says.
    unsafe fn zero(&self, at: u64, bytes: usize) -> Result<(), Error>;

    /// Copies bytes on the device, to its host memory or from there; the ranges do not overlap.
    ///
    /// # Safety
    /// Both ranges are memory that this driver allocated.
    ///
    /// # Errors
    /// What the driver says.
    unsafe fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<(), Error>;

    /// Launches a kernel.
    ///
    /// # Safety
    /// `P` is the entry's params struct, its addresses are memory of this device as the kernel's contract says.
    ///
    /// # Errors
    /// What the driver says.
    unsafe fn launch<P: Copy>(&self, launch: &Launch, params: &P) -> Result<(), Error>;

    /// Computes a GEMM, see [`Gemm`].
    ///
    /// # Safety
    /// Its matrices are memory of this device, and `c` overlaps neither `a` nor `b`.
    ///
    /// # Errors
    /// What the driver says.
    unsafe fn gemm(&self, gemm: &Gemm) -> Result<(), Error>;

    /// From here on zeros, copies, launches and GEMMs are recorded instead of done, until [`Driver::recorded`].
    /// Uploads and downloads are refused meanwhile.
    ///
    /// # Errors
    /// What the driver says.
    fn record(&self) -> Result<(), Error>;

    /// Ends recording, also after an error.
    ///
    /// # Errors
    /// What the driver says, also of what was recorded.
    fn recorded(&self) -> Result<Self::Graph, Error>;

    /// Does what was recorded.
    ///
    /// # Safety
    /// As for the calls that were recorded.
    ///
    /// # Errors
    /// What the driver says.
    unsafe fn replay(&self, graph: &Self::Graph) -> Result<(), Error>;
}

/// `c = a b` with an [`Epilogue`], row-major: `a [m, k]` and `b [k, n]` in bf16, `c [m, n]`, sums in f32.
///
/// An element's bits depend on its row of `a`, its column of `b`, `n`, the layouts, the kind of `c` and the epilogue;
/// never on `m` or on which row it is.
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
        /// Where they begin.
        address: u64,
        /// Elements from one row to the next.
        stride: usize,
    },
}

/// An input of a GEMM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Operand {
    /// Where it begins.
    pub address: u64,
    /// Elements from one row in memory to the next.
    pub stride: usize,
    /// Whether memory holds it transposed.
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
