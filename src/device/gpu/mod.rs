//! The GPU device: [`Gpu`], over any [`Driver`].
//!
//! Activations and the weights that GEMMs read are bf16. Statistics of rows, logits, gradients of weights and the state
//! of the optimizer are f32 ([`Kind`]). Calls are asynchronous, in order, on one stream. Only reads to the host wait.
//!
//! The kernels are those of `kernels/`. Attention calls use the plans of [`crate::attention::cuda`]. The driver decides
//! whether they run on a GPU or on the simulated GPU of the tests.

mod attend;
mod bounds;
#[cfg(feature = "cuda")]
pub mod cuda_driver;
mod device;
mod driver;
mod dry_run;
mod gemm;
mod head_norms;
mod loss;
mod memory;
mod norms;
mod optimizer;
mod past_pool;
mod plan;
mod pool;
mod pool_tables;
mod record;
mod retrieval;
mod rotation;
mod rows;
mod sample;
mod selection;
mod sinks;
mod step;

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

pub use driver::{Driver, Epilogue, Gemm, Operand};
pub use dry_run::DryRun;
pub use memory::{Held, MemoryUse};
pub use plan::{MemoryPlan, PoolPlacement};
pub use pool::Pool;
pub use record::Recording;
pub use retrieval::Blocks;
pub use sample::Samplers;
pub use step::Step;

use super::{Kind, OutOfMemory, Result};
use memory::{Arena, Block, Memory};

/// A GPU. Clones are the same device.
#[derive(Debug)]
pub struct Gpu<D: Driver> {
    memory: Arc<Memory<D>>,
}

impl<D: Driver> Clone for Gpu<D> {
    fn clone(&self) -> Self {
        Self {
            memory: self.memory.clone(),
        }
    }
}

impl<D: Driver> Gpu<D> {
    /// A device on this driver. It allocates memory on demand.
    pub fn new(driver: D) -> Self {
        Self {
            memory: Arc::new(Memory::new(driver)),
        }
    }

    /// Allocates device memory for later buffers and pools at once: as much as `planned`, the memory use of a
    /// [`DryRun`]. Pinned host memory is allocated as pools grow.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`](super::DeviceError::OutOfMemory), or what the driver says.
    pub fn reserve(&self, planned: &MemoryUse) -> Result<()> {
        self.memory.reserve(planned)
    }

    /// Limits the device memory of all pools together to `bytes` bytes. By default pools use all there is. The rest of
    /// the pools is in pinned host memory, which kernels read over the bus. Retrieval reads all keys but only the
    /// selected values, so keys have priority on the device. Results do not depend on where the memory is.
    pub fn limit_pool(&self, bytes: usize) {
        self.memory.limit_pool(bytes);
    }

    /// Resets [`Held::peak`] to the current use.
    pub fn reset_peaks(&self) {
        self.memory.reset_peaks();
    }

    /// Memory use of the device.
    pub fn memory_use(&self) -> MemoryUse {
        self.memory.memory_use()
    }

    /// The driver.
    pub fn driver(&self) -> &D {
        &self.memory.driver
    }

    /// Address of elements of a buffer of f32, for libraries that move device memory. It is valid as long as the
    /// buffer.
    ///
    /// # Errors
    /// [`DeviceError::Argument`](super::DeviceError::Argument) for a buffer of another kind or of another device, and
    /// for elements that it does not have.
    pub fn exact_address(&self, buffer: &Buffer<D>, range: Range<usize>) -> Result<u64> {
        Ok(self.exact(buffer, range.start, range.len())? as usize as u64)
    }

    /// Address and number of the bytes of a buffer of any kind, as [`Gpu::exact_address`].
    ///
    /// # Errors
    /// [`DeviceError::Argument`](super::DeviceError::Argument) for a buffer of another device.
    pub fn bytes_of(&self, buffer: &Buffer<D>) -> Result<(u64, usize)> {
        let bytes = buffer.len * bytes_of(buffer.kind);
        Ok((self.range(buffer, 0, buffer.len)?, bytes))
    }

    fn block(&self, bytes: usize) -> Result<Block<D>> {
        let block = self.memory.block(Arena::Buffers, bytes)?;
        // Buffers have no budget: it is the number of bytes that is beyond all memory.
        block.ok_or_else(|| OutOfMemory::device(bytes).into())
    }

    /// A block of device memory with these values.
    fn upload<T: bytemuck::NoUninit>(&self, values: &[T]) -> Result<Block<D>> {
        let bytes: &[u8] = bytemuck::cast_slice(values);
        let block = self.block(bytes.len())?;
        // SAFETY: the block is that large and nobody else's.
        unsafe { self.driver().upload(block.address(), bytes)? };
        Ok(block)
    }
}

/// Bytes of an element.
const fn bytes_of(kind: Kind) -> usize {
    match kind {
        Kind::Activation => 2,
        Kind::Exact => 4,
    }
}

/// An array on the device: bf16 for activations, f32 otherwise.
pub struct Buffer<D: Driver> {
    /// `None` for an empty buffer.
    block: Option<Block<D>>,
    kind: Kind,
    len: usize,
    /// Whether its rows of f32 logits were overwritten by their gradient: bf16, in the first half of each row.
    half_rows: bool,
}

impl<D: Driver> Buffer<D> {
    /// Arena of its memory.
    fn arena(&self) -> Option<Arena> {
        self.block.as_ref().map(Block::arena)
    }
}

impl<D: Driver> fmt::Debug for Buffer<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buffer({} elements, {:?})", self.len, self.kind)
    }
}

/// A weight `[out, in]` in bf16.
pub struct Matrix<D: Driver> {
    block: Block<D>,
    out: usize,
    inner: usize,
}

impl<D: Driver> fmt::Debug for Matrix<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Matrix({} x {})", self.out, self.inner)
    }
}
