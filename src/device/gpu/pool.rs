//! The pool of past keys and values, in chunks of memory that are filled one after the other.
//!
//! Chunks are in device memory up to its budget, keys before values. The others are in pinned host memory, which
//! kernels read over the bus. Kernels address both in the same way.

use std::ops::Range;

use super::bounds::product;
use super::memory::Arena;
use super::{Buffer, Driver, Gpu, bytes_of};
use crate::device::{
    Accumulate, Device, DeviceError, Kind, OutOfMemory, PoolBits, Purpose, Result, Rows, RowsMut,
};

/// Elements of a group, which share a step where a pool has fewer than 16 bits.
const GROUP: usize = 32;

/// Keys and values of one sequence and layer, before rotation.
#[derive(Debug)]
pub struct Pool<D: Driver> {
    pub(super) heads: usize,
    pub(super) head_dim: usize,
    /// Tokens that a chunk has memory for, at least 1.
    pub(super) run: usize,
    /// Tokens of the pool. Only the last chunk may have fewer than `run`.
    pub(super) tokens: usize,
    /// What is kept of an element.
    pub(super) bits: PoolBits,
    pub(super) chunks: Vec<Chunk<D>>,
}

/// Keys and values of at most `run` tokens, as `kernels/pool.cuh` has them; below 16 bits a buffer is that many bytes
/// and no numbers.
#[derive(Debug)]
pub(super) struct Chunk<D: Driver> {
    pub k: Buffer<D>,
    pub v: Buffer<D>,
}

impl<D: Driver> Pool<D> {
    /// Length of a chunk's keys, in numbers of 16 bits.
    pub(super) fn chunk_len(&self) -> Result<usize> {
        let of_token = match self.bits {
            PoolBits::Sixteen => self.head_dim,
            bits if self.head_dim.is_multiple_of(GROUP) => {
                self.head_dim * bits.count() / 16 + self.head_dim / GROUP
            }
            _ => {
                let what = "head_dim of a pool of fewer than 16 bits";
                let expected = format!("a multiple of {GROUP}");
                return Err(DeviceError::argument(what, expected, self.head_dim));
            }
        };
        product(
            "tokens, heads and head_dim of a pool",
            &[self.run, self.heads, of_token],
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
            if let Some(keys) = allocate_in(gpu, Arena::Pool, len)? {
                return Ok(keys);
            }
            let mut values = self.chunks.iter_mut().map(|chunk| &mut chunk.v);
            let Some(oldest) = values.find(|v| v.arena() == Some(Arena::Pool)) else {
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

    /// Adds `rows` tokens, which `fill` writes. If that fails, none are added.
    pub(super) fn extend(
        &mut self,
        gpu: &Gpu<D>,
        rows: usize,
        fill: impl FnOnce(&mut Self) -> Result<()>,
    ) -> Result<()> {
        let before = self.tokens;
        let Some(tokens) = before.checked_add(rows) else {
            return Err(DeviceError::argument("tokens", "a number in usize", rows));
        };
        let add = || {
            while self.chunks.len() < tokens.div_ceil(self.run) {
                let chunk = self.chunk(gpu)?;
                self.chunks.push(chunk);
            }
            self.tokens = tokens;
            fill(self)
        };
        let added = add();
        if added.is_err() {
            self.keep(before);
        }
        added
    }

    /// Drops all tokens but the first ones, and the memory of chunks without any.
    pub(super) fn keep(&mut self, tokens: usize) {
        self.tokens = self.tokens.min(tokens);
        self.chunks.truncate(self.tokens.div_ceil(self.run));
    }

    /// The parts of chunks that hold these tokens: number of the chunk, and which of its tokens.
    pub(super) fn pieces(
        &self,
        tokens: Range<usize>,
    ) -> impl Iterator<Item = (usize, Range<usize>)> + use<D> {
        let run = self.run;
        let chunks = tokens.start / run..tokens.end.div_ceil(run);
        chunks.map(move |chunk| {
            let within = |token: usize| token.saturating_sub(chunk * run).min(run);
            (chunk, within(tokens.start)..within(tokens.end))
        })
    }
}

/// Memory for the values of a chunk.
fn values<D: Driver>(gpu: &Gpu<D>, len: usize) -> Result<Buffer<D>> {
    match allocate_in(gpu, Arena::Pool, len)? {
        Some(values) => Ok(values),
        None => in_host_memory(gpu, len),
    }
}

fn in_host_memory<D: Driver>(gpu: &Gpu<D>, len: usize) -> Result<Buffer<D>> {
    let buffer = allocate_in(gpu, Arena::Host, len)?;
    // Host memory has no budget: it is the number of bytes that is beyond all memory.
    buffer.ok_or_else(|| OutOfMemory::pinned(len).into())
}

/// A buffer in an arena, if its budget allows it.
fn allocate_in<D: Driver>(gpu: &Gpu<D>, arena: Arena, len: usize) -> Result<Option<Buffer<D>>> {
    let bytes = product("bytes of a pool", &[len, bytes_of(Kind::Activation)])?;
    let block = gpu.memory.block(arena, bytes)?;
    Ok(block.map(|block| Buffer {
        block: Some(block),
        kind: Kind::Activation,
        len,
        half_rows: false,
    }))
}
