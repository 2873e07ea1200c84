//! The GPU device: [`Gpu`], over any [`Driver`].
//!
//! Activations and the GEMMs' copies of weights are bf16; statistics of rows, logits, gradients of weights and
//! whatever the optimizer holds are f32 ([`Kind`]). Work is put on one stream, in order; nothing waits but reading back
//! to the host.
//!
//! The kernels are those of `kernels/`, the attention calls the plans of [`crate::attention::cuda`]. With CUDA's driver
//! they run on a GPU, with the simulated one in tests, and nothing here knows which.

mod attend;
mod bounds;
#[cfg(feature = "cuda")]
pub mod cuda_driver;
mod device;
mod driver;
mod dry_run;
mod memory;
mod optimizer;
mod plan;
mod pool;
mod record;
mod retrieval;
mod rows;
mod sample;
mod step;

use std::fmt;
use std::sync::Arc;

pub use driver::{Driver, Epilogue, Gemm, Operand};
pub use dry_run::DryRun;
pub use memory::{Held, MemoryUse};
pub use plan::{MemoryPlan, PoolPlace};
pub use pool::Pool;
pub use record::Recording;
pub use retrieval::Blocks;
pub use sample::Samplers;
pub use step::Step;

use super::{Kind, OutOfMemory, Result};
use memory::{Block, Memory, Place};

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
    /// A device on this driver, which takes memory as it is needed.
    pub fn new(driver: D) -> Self {
        Self {
            memory: Arc::new(Memory::new(driver)),
        }
    }

    /// Takes device memory at once, which later buffers and pools lie in: as much as `planned`, the use of a
    /// [`DryRun`], says that they need. Pinned host memory is taken as pools grow.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`](super::DeviceError::OutOfMemory), or what the driver says.
    pub fn reserve(&self, planned: &MemoryUse) -> Result<()> {
        self.memory.reserve(planned)
    }

    /// From now on pools take at most `bytes` bytes of device memory, all sequences and layers together; at first, as
    /// much as there is. What does not fit lies in pinned host memory, which kernels read over the bus: each
    /// retrieval reads all keys but only the chosen values, so keys come first. No bit depends on where anything lies.
    pub fn limit_pool(&self, bytes: usize) {
        self.memory.limit_pool(bytes);
    }

    /// Counts [`Held::peak`] from now on.
    pub fn reset_peaks(&self) {
        self.memory.reset_peaks();
    }

    /// What its memory holds.
    pub fn memory_use(&self) -> MemoryUse {
        self.memory.memory_use()
    }

    /// The driver.
    pub fn driver(&self) -> &D {
        &self.memory.driver
    }

    fn block(&self, bytes: usize) -> Result<Block<D>> {
        let block = self.memory.block(Place::Buffers, bytes)?;
        // Buffers have no budget: it is the number of bytes that is beyond all memory.
        block.ok_or_else(|| OutOfMemory::device(bytes).into())
    }

    /// Memory that holds these values, until it is dropped.
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

/// Numbers on the device: bf16 for activations, f32 otherwise.
pub struct Buffer<D: Driver> {
    /// None where there are no elements.
    block: Option<Block<D>>,
    kind: Kind,
    len: usize,
    /// Rows of f32 logits whose gradient has taken their place: bf16, in the first half of each row.
    half_rows: bool,
}

impl<D: Driver> Buffer<D> {
    /// Which arena it lies in.
    fn place(&self) -> Option<Place> {
        self.block.as_ref().map(Block::place)
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
