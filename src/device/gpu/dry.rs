//! A driver that does nothing but count memory: what a run will need is known before it starts, from the code that
//! will make it.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::driver::{Driver, Product};
use crate::attention::cuda::{Error, Kernels, Launch};
use crate::device::DeviceError;

/// Where its memory begins: no address is null.
const BASE: u64 = 1 << 20;

/// A GPU of some memory on which every call succeeds at once and every number read back is 0.
///
/// [`MemoryUse::high_water`](super::MemoryUse::high_water) after a run is what [`Gpu::reserve`](super::Gpu::reserve)
/// needs for the same run on a real one.
pub struct DryRun<K> {
    kernels: Arc<K>,
    bytes: usize,
    taken: AtomicBool,
}

impl<K> DryRun<K> {
    /// A GPU of `bytes` bytes that would launch these kernels; `None`: of as much as there are addresses.
    pub fn new(kernels: Arc<K>, bytes: Option<usize>) -> Self {
        Self {
            kernels,
            bytes: bytes.unwrap_or(1 << 50),
            taken: AtomicBool::new(false),
        }
    }
}

impl<K> fmt::Debug for DryRun<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DryRun({} bytes)", self.bytes)
    }
}

impl<K: Kernels + Send + Sync> Driver for DryRun<K> {
    type Kernels = K;

    fn description(&self) -> String {
        "dry run".into()
    }

    fn kernels(&self) -> &K {
        &self.kernels
    }

    fn region_bytes(&self) -> usize {
        self.bytes
    }

    fn allocate(&self, bytes: usize) -> Result<u64, DeviceError> {
        // One region is all that there is.
        if bytes > self.bytes || self.taken.swap(true, Ordering::Relaxed) {
            return Err(DeviceError::OutOfMemory { bytes });
        }
        Ok(BASE)
    }

    unsafe fn free(&self, _: u64, _: usize) {}

    unsafe fn upload(&self, _: u64, _: &[u8]) -> Result<(), Error> {
        Ok(())
    }

    unsafe fn download(&self, _: u64, bytes: &mut [u8]) -> Result<(), Error> {
        bytes.fill(0);
        Ok(())
    }

    unsafe fn zero(&self, _: u64, _: usize) -> Result<(), Error> {
        Ok(())
    }

    unsafe fn copy(&self, _: u64, _: u64, _: usize) -> Result<(), Error> {
        Ok(())
    }

    unsafe fn launch<P: Copy>(&self, _: &Launch, _: &P) -> Result<(), Error> {
        Ok(())
    }

    unsafe fn product(&self, _: &Product) -> Result<(), Error> {
        Ok(())
    }
}
