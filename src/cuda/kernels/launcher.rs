//! What planning needs to know of compiled kernels, and what it asks of a stream: two traits, so that plans run on
//! the driver and on the simulated GPU alike.

use super::error::Error;
use super::params::SegattnKernelInfo;
use super::registry::Entry;

// SAFETY: seven i32 and nothing between them, as the size says.
unsafe impl bytemuck::Zeroable for SegattnKernelInfo {}
// SAFETY: as above.
unsafe impl bytemuck::Pod for SegattnKernelInfo {}
const _: () = assert!(size_of::<SegattnKernelInfo>() == 7 * size_of::<i32>());

/// Kernels that are loaded on a device.
pub trait Kernels {
    /// The constant `<entry>_info`.
    ///
    /// # Errors
    /// Where the entry or its constant is missing.
    fn info(&self, entry: Entry) -> Result<SegattnKernelInfo, Error>;

    /// Loads an entry, so that launching it neither loads nor waits.
    ///
    /// # Errors
    /// Where the entry is missing.
    fn ready(&self, entry: Entry) -> Result<(), Error>;

    /// How many blocks of an entry the whole device holds at once; 0: a block needs more shared memory than there is.
    ///
    /// # Errors
    /// What the driver says.
    fn resident_blocks(&self, entry: Entry, info: &SegattnKernelInfo) -> Result<u32, Error>;

    /// Whether the kernels written for Hopper (sm_90a) are there and run on this device. They give the bits of the
    /// others in forward.
    fn hopper(&self) -> bool;
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
    /// May begin while the launch before it still runs: the kernel itself waits before it reads what that one wrote.
    pub overlaps: bool,
}

/// A stream: what is asked of it happens later, in order. No call waits for the device.
pub trait Launcher {
    /// Writes `bytes` to device memory. They are not read after the call returns.
    ///
    /// # Safety
    /// `[to, to + bytes.len())` is device memory that nothing else uses until this stream has passed.
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
    /// `P` is the entry's own struct, and everything it points to holds until this stream has passed.
    ///
    /// # Errors
    /// What the driver says; asynchronous errors of earlier work may be among it.
    unsafe fn launch<P: Copy>(&mut self, launch: &Launch, params: &P) -> Result<(), Error>;
}
