//! The pool of past keys and values, with one chunk of memory for each appended segment.
//!
//! Chunks are in device memory up to its budget, keys before values. The others are in pinned host memory, which
//! kernels read over the bus. Kernels address both in the same way.

use super::bounds::product;
use super::memory::Place;
use super::{Buffer, Driver, Gpu, bytes_of};
use crate::device::{
    Accumulate, Device, DeviceError, Kind, OutOfMemory, Purpose, Result, Rows, RowsMut,
};

/// Keys and values of one sequence and layer, bf16, before rotation.
#[derive(Debug)]
pub struct Pool<D: Driver> {
    pub(super) heads: usize,
    pub(super) head_dim: usize,
    /// Tokens of a chunk.
    pub(super) run: usize,
    pub(super) chunks: Vec<Chunk<D>>,
}

/// Keys and values `[token, head, head_dim]` of `run` tokens.
#[derive(Debug)]
pub(super) struct Chunk<D: Driver> {
    pub k: Buffer<D>,
    pub v: Buffer<D>,
}

impl<D: Driver> Pool<D> {
    /// Elements of a chunk's keys.
    pub(super) fn chunk_len(&self) -> Result<usize> {
        product(
            "tokens, heads and head_dim of a pool",
            &[self.run, self.heads, self.head_dim],
        )
    }

    /// Memory for the next chunk.
    fn chunk(&mut self, gpu: &Gpu<D>) -> Result<Chunk<D>> {
        let len = self.chunk_len()?;
        let short = |error: DeviceError| error.wanted_for(Purpose::Pool);
        Ok(Chunk {
            k: self.keys(gpu, len).map_err(short)?,
            v: values(gpu, len).map_err(short)?,
        })
    }

    /// Memory for the keys of a chunk. If the device has none left, the oldest values move to host memory.
    fn keys(&mut self, gpu: &Gpu<D>, len: usize) -> Result<Buffer<D>> {
        loop {
            if let Some(keys) = lying(gpu, Place::Pool, len)? {
                return Ok(keys);
            }
            let mut values = self.chunks.iter_mut().map(|chunk| &mut chunk.v);
            let Some(oldest) = values.find(|v| v.place() == Some(Place::Pool)) else {
                return in_host_memory(gpu, len);
            };
            let mut moved = in_host_memory(gpu, len)?;
            let (from, to) = (
                Rows::packed(oldest, 0, len),
                RowsMut::packed(&mut moved, 0, len),
            );
            gpu.copy(from, to, 1, len, Accumulate::No)?;
            *oldest = moved;
        }
    }

    /// Adds a chunk that `fill` writes. If `fill` fails, no chunk is added.
    pub(super) fn push(
        &mut self,
        gpu: &Gpu<D>,
        fill: impl FnOnce(&mut Self) -> Result<()>,
    ) -> Result<()> {
        let chunk = self.chunk(gpu)?;
        self.chunks.push(chunk);
        let filled = fill(self);
        if filled.is_err() {
            self.chunks.pop();
        }
        filled
    }
}

/// Memory for the values of a chunk.
fn values<D: Driver>(gpu: &Gpu<D>, len: usize) -> Result<Buffer<D>> {
    match lying(gpu, Place::Pool, len)? {
        Some(values) => Ok(values),
        None => in_host_memory(gpu, len),
    }
}

fn in_host_memory<D: Driver>(gpu: &Gpu<D>, len: usize) -> Result<Buffer<D>> {
    let buffer = lying(gpu, Place::Host, len)?;
    // Host memory has no budget: it is the number of bytes that is beyond all memory.
    buffer.ok_or_else(|| OutOfMemory::pinned(len).into())
}

/// A buffer in an arena, if its budget allows it.
fn lying<D: Driver>(gpu: &Gpu<D>, place: Place, len: usize) -> Result<Option<Buffer<D>>> {
    let bytes = product("bytes of a pool", &[len, bytes_of(Kind::Activation)])?;
    let block = gpu.memory.block(place, bytes)?;
    Ok(block.map(|block| Buffer {
        block: Some(block),
        kind: Kind::Activation,
        len,
        half_rows: false,
    }))
}
