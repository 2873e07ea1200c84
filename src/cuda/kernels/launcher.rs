//! Two traits that NVIDIA's driver and the simulated GPU implement: kernel metadata, and launches on a stream.

use super::error::Error;
use super::params::{SegattnKernelInfo, SegattnTensorMap};
use super::registry::Entry;
use super::tensor_map::BoxedTensor;

// SAFETY: seven i32 and nothing between them, as the size says.
unsafe impl bytemuck::Zeroable for SegattnKernelInfo {}
// SAFETY: as above.
unsafe impl bytemuck::Pod for SegattnKernelInfo {}
const _: () = assert!(size_of::<SegattnKernelInfo>() == 7 * size_of::<i32>());

/// The compiled kernels of a device: their metadata, and whether they are loaded.
pub trait Kernels {
    /// Kernel metadata: the constant `<entry>_info`.
    ///
    /// # Errors
    /// Where the entry or its constant is missing.
    fn info(&self, entry: Entry) -> Result<SegattnKernelInfo, Error>;

    /// Loads an entry point now, so that its launch does not.
    ///
    /// # Errors
    /// Where the entry is missing.
    fn ready(&self, entry: Entry) -> Result<(), Error>;

    /// How many blocks of an entry point the whole device runs at once; 0 if a block needs more shared memory than the
    /// device has.
    ///
    /// # Errors
    /// What the driver says.
    fn resident_blocks(&self, entry: Entry, info: &SegattnKernelInfo) -> Result<u32, Error>;

    /// Whether the kernels for Hopper (sm_90a) were compiled and run on this device. Their forward has the bits of the
    /// other kernels.
    fn hopper(&self) -> bool;

    /// The tensor map by which kernels for Hopper copy boxes of a tensor that [is
    /// mappable](BoxedTensor::is_mappable); `None` if they have to copy it otherwise. No memory is read.
    ///
    /// # Errors
    /// What the driver says.
    fn tensor_map(&self, tensor: &BoxedTensor) -> Result<Option<SegattnTensorMap>, Error>;
}

/// One kernel launch: a grid of `blocks` x 1 x 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Launch {
    /// The kernel.
    pub entry: Entry,
    /// Blocks of the grid, at least 1.
    pub blocks: u32,
    /// Threads of a block.
    pub threads: u32,
    /// Dynamic shared memory of a block, bytes.
    pub shared_bytes: u32,
    /// Whether it can begin while the launch before it still runs (programmatic dependent launch): the kernel itself
    /// waits before it reads results of that launch.
    pub overlaps: bool,
}

/// A stream. Calls are asynchronous and run in stream order.
pub trait Launcher {
    /// Writes `bytes` to device memory. They are not read after the call returns.
    ///
    /// # Safety
    /// `[to, to + bytes.len())` is device memory that nothing else uses until the stream has run the copy.
    ///
    /// # Errors
    /// What the driver says.
    unsafe fn upload(&mut self, to: u64, bytes: &[u8]) -> Result<(), Error>;

    /// Sets `bytes` bytes of device memory, a multiple of 4 at a multiple of 4, to zero.
    ///
    /// # Safety
    /// As [`upload`](Self::upload).
    ///
    /// # Errors
    /// What the driver says.
    unsafe fn zero(&mut self, at: u64, bytes: usize) -> Result<(), Error>;

    /// Launches a kernel whose one parameter is `params`, by value.
    ///
    /// # Safety
    /// `P` is the entry point's params struct, and the memory that it points to stays valid until the stream has run
    /// the kernel.
    ///
    /// # Errors
    /// What the driver says, which can be an asynchronous error of earlier work.
    unsafe fn launch<P: Copy>(&mut self, launch: &Launch, params: &P) -> Result<(), Error>;
}
