//! Driver of a dry run: it only counts memory, so a plan of the memory comes from the code of the real run.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::driver::{Driver, Gemm};
use crate::cuda::kernels::{Error, Kernels, Launch};
use crate::device::{DeviceError, OutOfMemory};

/// First address, so that no address is null.
const BASE: u64 = 1 << 20;
/// Size of an allocation when memory is unlimited.
const ENDLESS: usize = 1 << 50;

/// A GPU on which every call succeeds without work, and every downloaded f32 is 1.
///
/// [`Gpu::memory_use`](super::Gpu::memory_use) after a run is the argument of [`Gpu::reserve`](super::Gpu::reserve) for
/// the same run on a real GPU.
pub struct DryRun<K> {
    kernels: Arc<K>,
    bytes: Option<usize>,
    /// Bytes of device memory in use, and the next free address.
    taken: Mutex<(usize, u64)>,
}

impl<K> DryRun<K> {
    /// A GPU with `bytes` bytes of memory and these kernels; `None`: unlimited memory.
    pub fn new(kernels: Arc<K>, bytes: Option<usize>) -> Self {
        Self {
            kernels,
            bytes,
            taken: Mutex::new((0, BASE)),
        }
    }

    fn taken(&self) -> MutexGuard<'_, (usize, u64)> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn left(&self, taken: usize) -> usize {
        self.bytes.unwrap_or(usize::MAX).saturating_sub(taken)
    }
}

impl<K> fmt::Debug for DryRun<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DryRun({:?} bytes)", self.bytes)
    }
}

impl<K: Kernels + Send + Sync> Driver for DryRun<K> {
    type Kernels = K;
    type Graph = ();

    fn description(&self) -> String {
        "dry run".into()
    }

    fn kernels(&self) -> &K {
        &self.kernels
    }

    fn computes(&self) -> bool {
        false
    }

    fn region_bytes(&self) -> usize {
        // What is planned is reserved; beyond it nothing is taken in advance.
        self.bytes.map_or(ENDLESS, |_| 1)
    }

    fn allocate(&self, bytes: usize) -> Result<u64, DeviceError> {
        let (taken, address) = &mut *self.taken();
        let end = address.checked_add(bytes as u64);
        let end = end.filter(|_| bytes <= self.left(*taken));
        let end = end.ok_or_else(|| OutOfMemory::device(bytes))?;
        *taken += bytes;
        Ok(std::mem::replace(address, end))
    }

    unsafe fn free(&self, _: u64, bytes: usize) {
        self.taken().0 -= bytes;
    }

    fn allocate_host(&self, bytes: usize) -> Result<u64, DeviceError> {
        let (_, address) = &mut *self.taken();
        let end = address.checked_add(bytes as u64);
        let end = end.ok_or_else(|| OutOfMemory::pinned(bytes))?;
        Ok(std::mem::replace(address, end))
    }

    unsafe fn free_host(&self, _: u64, _: usize) {}

    fn free_memory(&self) -> Result<usize, Error> {
        let taken = self.taken().0;
        Ok(self.left(taken))
    }

    unsafe fn upload(&self, _: u64, _: &[u8]) -> Result<(), Error> {
        Ok(())
    }

    unsafe fn download(&self, _: u64, bytes: &mut [u8]) -> Result<(), Error> {
        // Gates that are read are open, norms are finite.
        let ones = 1f32.to_ne_bytes().into_iter().cycle();
        bytes
            .iter_mut()
            .zip(ones)
            .for_each(|(byte, one)| *byte = one);
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

    unsafe fn gemm(&self, _: &Gemm) -> Result<(), Error> {
        Ok(())
    }

    fn record(&self) -> Result<(), Error> {
        Ok(())
    }

    fn recorded(&self) -> Result<(), Error> {
        Ok(())
    }

    unsafe fn replay(&self, (): &()) -> Result<(), Error> {
        Ok(())
    }
}
