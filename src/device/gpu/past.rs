//! The pool of past keys and values: a chunk of memory for each segment that was appended; and retrieval from it.
//!
//! Chunks lie in device memory as far as its budget goes, keys before values, else in host memory that kernels read
//! over the bus. Kernels find them by address and know no difference.

use std::ops::Range;

use super::memory::{Block, Place};
use super::rows::{Grid, NONE, VECTOR, entry, exact, input, launch, output, pointer};
use super::{Buffer, Driver, Gpu, bytes_of};
use crate::cuda::kernels::layer_params::{
    SegattnPoolChunk, SegattnPoolHead, SegattnRetrievalParams,
};
use crate::cuda::kernels::{Error, File};
use crate::device::{
    Device, DeviceError, Fold, Kind, PastHeads, PastPool, Probes, Purpose, Result, Rows, RowsMut,
    SelectedBlocks, Selection,
};

/// Bytes that an element of a probe takes: three bf16 that add up to it.
const PROBE_BYTES: usize = 6;
/// Keys that a block of `pool_scores` takes at a time; whole blocks of the pool's.
const SCORED_KEYS: usize = 128;

/// Keys and values of one sequence and layer, bf16, before rotation.
#[derive(Debug)]
pub struct Pool<D: Driver> {
    heads: usize,
    head_dim: usize,
    /// Tokens of a chunk.
    run: usize,
    chunks: Vec<Chunk<D>>,
    tokens: usize,
}

/// Keys and values `[token, head, head_dim]` of `run` tokens.
#[derive(Debug)]
struct Chunk<D: Driver> {
    k: Buffer<D>,
    v: Buffer<D>,
}

impl<D: Driver> Pool<D> {
    /// Elements of a token's keys.
    fn width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// A new chunk of `rows` tokens.
    fn chunk(&mut self, gpu: &Gpu<D>, rows: usize) -> Result<&mut Chunk<D>> {
        assert_eq!(rows, self.run, "tokens come a run at a time");
        let out_of_memory = |error: DeviceError| error.wanted_for(Purpose::Pool);
        let chunk = Chunk {
            k: self.keys(gpu).map_err(out_of_memory)?,
            v: values(gpu, rows * self.width()).map_err(out_of_memory)?,
        };
        self.chunks.push(chunk);
        self.tokens += rows;
        Ok(self.chunks.last_mut().expect("just pushed"))
    }

    /// Room for the keys of a chunk. Where there is none left on the device, the oldest values there make it.
    fn keys(&mut self, gpu: &Gpu<D>) -> Result<Buffer<D>> {
        let len = self.run * self.width();
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
            gpu.copy(from, to, 1, len, Fold::Set)?;
            *oldest = moved;
        }
    }
}

/// Room for the values of a chunk.
fn values<D: Driver>(gpu: &Gpu<D>, len: usize) -> Result<Buffer<D>> {
    match lying(gpu, Place::Pool, len)? {
        Some(values) => Ok(values),
        None => in_host_memory(gpu, len),
    }
}

fn in_host_memory<D: Driver>(gpu: &Gpu<D>, len: usize) -> Result<Buffer<D>> {
    let buffer = lying(gpu, Place::Host, len)?;
    Ok(buffer.expect("host memory has no budget"))
}

/// A buffer in an arena, if its budget allows it.
fn lying<D: Driver>(gpu: &Gpu<D>, place: Place, len: usize) -> Result<Option<Buffer<D>>> {
    let block = gpu.memory.block(place, len * bytes_of(Kind::Activation))?;
    Ok(block.map(|block| Buffer {
        block: Some(block),
        kind: Kind::Activation,
        len,
        half_rows: false,
    }))
}

impl<D: Driver> PastPool<Gpu<D>> for Pool<D> {
    fn new(_: &Gpu<D>, heads: usize, head_dim: usize, run: usize) -> Self {
        Self {
            heads,
            head_dim,
            run,
            chunks: Vec::new(),
            tokens: 0,
        }
    }

    fn tokens(&self) -> usize {
        self.tokens
    }

    fn truncate(&mut self, tokens: usize) {
        self.chunks.truncate(tokens / self.run);
        self.tokens = self.chunks.len() * self.run;
    }

    fn append(
        &mut self,
        gpu: &Gpu<D>,
        heads: &[usize],
        kv: [Rows<'_, Buffer<D>>; 2],
        rows: usize,
    ) -> Result<()> {
        let (token, dim) = (self.tokens, self.head_dim);
        self.chunk(gpu, rows)?;
        let none = vec![0; heads.len()];
        let held = Held::new(gpu, self, heads, &none, &none)?;
        let width = heads.iter().max().map_or(0, |head| (head + 1) * dim);
        let params = SegattnRetrievalParams {
            k: input(&kv[0], rows, width),
            v: input(&kv[1], rows, width),
            token: token as i64,
            rows: rows as i64,
            ..held.params(self)
        };
        let threads = Grid::Threads(rows * heads.len() * dim / VECTOR);
        launch(
            gpu,
            entry(File::Retrieval, "pool_append_bf16"),
            threads,
            &params,
        )
    }

    fn read(&self, gpu: &Gpu<D>, tokens: Range<usize>) -> Result<(Vec<f32>, Vec<f32>)> {
        let whole = |token: usize| token.is_multiple_of(self.run);
        assert!(
            whole(tokens.start) && whole(tokens.end),
            "tokens are read a run at a time"
        );
        let (mut k, mut v) = (Vec::new(), Vec::new());
        for chunk in &self.chunks[tokens.start / self.run..tokens.end / self.run] {
            k.extend(gpu.read(&chunk.k, 0..chunk.k.len)?);
            v.extend(gpu.read(&chunk.v, 0..chunk.v.len)?);
        }
        Ok((k, v))
    }

    fn write(&mut self, gpu: &Gpu<D>, k: &[f32], v: &[f32]) -> Result<()> {
        let chunk = self.chunk(gpu, k.len() / self.width())?;
        gpu.write(&mut chunk.k, 0, k)?;
        gpu.write(&mut chunk.v, 0, v)
    }

    fn select(
        &self,
        gpu: &Gpu<D>,
        probes: &Probes<'_, Buffer<D>>,
        selection: &Selection<'_>,
    ) -> Result<Blocks<D>> {
        let (heads, dim) = (self.heads, self.head_dim);
        let windows = (probes.rows - probes.window) / probes.stride + 1;
        let eligible = selection.eligible.iter().copied().max().unwrap_or(0);
        let blocks = eligible / selection.block_len;
        let known = selection
            .eligible
            .iter()
            .map(|n| selection.blocks.min(n / selection.block_len));
        let selected = Blocks {
            blocks: gpu.block(heads * selection.blocks * size_of::<i32>())?,
            counts: gpu.block(heads * size_of::<i32>())?,
            known: known.collect(),
            most: selection.blocks,
            block_len: selection.block_len,
        };
        let q_width = selection
            .kv_heads
            .iter()
            .max()
            .map_or(0, |h| (h + 1) * probes.group * dim);
        let held = Held::new(
            gpu,
            self,
            selection.kv_heads,
            selection.eligible,
            selection.eligible,
        )?;
        let means = gpu.block(heads * probes.group * windows * dim * PROBE_BYTES)?;
        let scores = gpu.block((heads * blocks).max(1) * size_of::<f32>())?;
        let params = SegattnRetrievalParams {
            q: input(&probes.q, probes.rows, q_width),
            probes: pointer::<f32>(&means).cast_mut().cast(),
            scores: pointer::<f32>(&scores).cast_mut(),
            picks: pointer::<i32>(&selected.blocks).cast_mut(),
            pick_count: pointer::<i32>(&selected.counts).cast_mut(),
            score_pitch: blocks as i64,
            group: probes.group as i32,
            windows: windows as i32,
            window: probes.window as i32,
            stride: probes.stride as i32,
            block_len: selection.block_len as i32,
            blocks: blocks as i32,
            max_picks: selection.blocks as i32,
            ..held.params(self)
        };
        let kernel = |name| entry(File::Retrieval, name);
        let threads = Grid::Threads(heads * probes.group * windows * dim / VECTOR);
        launch(gpu, kernel("pool_probes_bf16"), threads, &params)?;
        let items = blocks.div_ceil((SCORED_KEYS / selection.block_len).max(1));
        launch(
            gpu,
            kernel(scores_entry(dim)?),
            Grid::Blocks(heads * items),
            &params,
        )?;
        launch(gpu, kernel("pool_pick_f32"), Grid::Blocks(heads), &params)?;
        Ok(selected)
    }

    fn gather(
        &self,
        gpu: &Gpu<D>,
        selected: &Blocks<D>,
        past: &PastHeads<'_>,
        (cos, sin): (&Buffer<D>, &Buffer<D>),
        [k, v]: [RowsMut<'_, Buffer<D>>; 2],
    ) -> Result<()> {
        let (heads, dim) = (self.heads, self.head_dim);
        let rows = (0..heads).map(|h| selected.count(h)).max().unwrap_or(0);
        if rows == 0 {
            return Ok(());
        }
        let width = past.kv_heads.iter().max().map_or(0, |h| (h + 1) * dim);
        let held = Held::new(gpu, self, past.kv_heads, past.ends, past.ends)?;
        let params = SegattnRetrievalParams {
            k: output(&k, rows, width),
            v: output(&v, rows, width),
            picks: pointer::<i32>(&selected.blocks).cast_mut(),
            pick_count: pointer::<i32>(&selected.counts).cast_mut(),
            cos: exact(cos, 0, cos.len),
            sin: exact(sin, 0, sin.len),
            block_len: selected.block_len as i32,
            max_picks: selected.most as i32,
            ..held.params(self)
        };
        let threads =
            Grid::Threads(heads * selected.most * selected.block_len * dim / (2 * VECTOR));
        launch(
            gpu,
            entry(File::Retrieval, "pool_gather_bf16"),
            threads,
            &params,
        )
    }
}

/// Blocks that the heads of a pool have selected.
#[derive(Debug)]
pub struct Blocks<D: Driver> {
    /// i32 `[head, most]`, ascending, and `[head]`: how many.
    blocks: Block<D>,
    counts: Block<D>,
    /// The counts again, which follow from lengths alone: the host need not ask.
    known: Vec<usize>,
    most: usize,
    block_len: usize,
}

impl<D: Driver> SelectedBlocks<Gpu<D>> for Blocks<D> {
    fn count(&self, head: usize) -> usize {
        self.known[head] * self.block_len
    }

    fn new(gpu: &Gpu<D>, tokens: &[Vec<usize>], block_len: usize) -> Result<Self> {
        let known: Vec<usize> = tokens.iter().map(|t| t.len() / block_len).collect();
        let most = known.iter().copied().max().unwrap_or(0);
        let mut blocks = vec![0i32; tokens.len() * most];
        for (row, tokens) in blocks.chunks_mut(most.max(1)).zip(tokens) {
            let first = tokens.iter().step_by(block_len);
            row.iter_mut()
                .zip(first)
                .for_each(|(b, t)| *b = (t / block_len) as i32);
        }
        let counts: Vec<i32> = known.iter().map(|n| *n as i32).collect();
        Ok(Self {
            blocks: gpu.upload(&blocks)?,
            counts: gpu.upload(&counts)?,
            known,
            most,
            block_len,
        })
    }

    fn tokens(&self, gpu: &Gpu<D>) -> Result<Vec<Vec<usize>>> {
        let mut blocks = vec![0i32; self.known.len() * self.most];
        if self.known.iter().any(|n| *n > 0) {
            let bytes = bytemuck::cast_slice_mut(&mut blocks);
            // SAFETY: the block has that size; rows are written as far as they are known.
            unsafe { gpu.driver().download(self.blocks.address, bytes)? };
        }
        let head = |(i, count): (usize, &usize)| {
            let row = &blocks[i * self.most..][..*count];
            let first = row.iter().map(|b| *b as usize * self.block_len);
            first.flat_map(|t| t..t + self.block_len).collect()
        };
        Ok(self.known.iter().enumerate().map(head).collect())
    }
}

fn scores_entry(head_dim: usize) -> Result<&'static str> {
    match head_dim {
        32 => Ok("pool_scores_bf16_d32"),
        64 => Ok("pool_scores_bf16_d64"),
        96 => Ok("pool_scores_bf16_d96"),
        128 => Ok("pool_scores_bf16_d128"),
        256 => Ok("pool_scores_bf16_d256"),
        head_dim => Err(Error::NoKernel {
            dtype: "bf16".into(),
            head_dim,
            supported: "bf16 with head_dim 32, 64, 96, 128, 256".into(),
        }
        .into()),
    }
}

/// The tables that a call reads: where the chunks lie, and what is said of each head.
struct Held<D: Driver> {
    chunks: Block<D>,
    heads: Block<D>,
}

impl<D: Driver> Held<D> {
    fn new(
        gpu: &Gpu<D>,
        pool: &Pool<D>,
        kv_heads: &[usize],
        eligible: &[usize],
        ends: &[usize],
    ) -> Result<Self> {
        let address = |chunk: &Chunk<D>| [chunk.k.address(0), chunk.v.address(0)];
        let chunks: Vec<[u64; 2]> = pool.chunks.iter().map(address).collect();
        let heads: Vec<[i32; 3]> = (kv_heads.iter().zip(eligible).zip(ends))
            .map(|((head, eligible), end)| [*head as i32, *eligible as i32, *end as i32])
            .collect();
        const {
            assert!(size_of::<SegattnPoolChunk>() == size_of::<[u64; 2]>());
            assert!(size_of::<SegattnPoolHead>() == size_of::<[i32; 3]>());
        }
        Ok(Self {
            chunks: gpu.upload(&chunks)?,
            heads: gpu.upload(&heads)?,
        })
    }

    fn params(&self, pool: &Pool<D>) -> SegattnRetrievalParams {
        SegattnRetrievalParams {
            chunks: pointer(&self.chunks),
            head: pointer(&self.heads),
            q: NONE,
            k: NONE,
            v: NONE,
            probes: std::ptr::null_mut(),
            scores: std::ptr::null_mut(),
            picks: std::ptr::null_mut(),
            pick_count: std::ptr::null_mut(),
            past_len: std::ptr::null_mut(),
            cos: std::ptr::null(),
            sin: std::ptr::null(),
            first_token: 0,
            chunk_tokens: pool.run as i64,
            token: 0,
            rows: 0,
            score_pitch: 0,
            heads: pool.heads as i32,
            head_dim: pool.head_dim as i32,
            group: 0,
            windows: 0,
            window: 0,
            stride: 0,
            block_len: 0,
            first_block: 0,
            blocks: 0,
            max_picks: 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::DryRun;
    use super::*;
    use crate::cuda::kernels::KernelMetadata;

    #[test]
    fn keys_stay_on_the_device_longest() {
        let kernels = KernelMetadata {
            multiprocessors: 1,
            hopper: false,
        };
        let gpu = Gpu::new(DryRun::new(Arc::new(kernels), None));
        let (heads, dim, run) = (2, 32, 8);
        let width = heads * dim;
        gpu.limit_pool(5 * run * width * bytes_of(Kind::Activation));
        let rows = gpu.empty(Kind::Activation, run * width).expect("rows");
        let rows = Rows::packed(&rows, 0, width);
        let mut pool = Pool::new(&gpu, heads, dim, run);
        for on_device in [[1, 1], [2, 2], [3, 2], [4, 1], [5, 0], [5, 0], [5, 0]] {
            pool.append(&gpu, &[0, 1], [rows; 2], run).expect("a run");
            let here = |buffer: &Buffer<_>| usize::from(buffer.place() == Some(Place::Pool));
            let count = |f: fn(&Chunk<_>) -> &Buffer<_>| pool.chunks.iter().map(f).map(here).sum();
            let (keys, values): (usize, usize) = (count(|c| &c.k), count(|c| &c.v));
            assert_eq!([keys, values], on_device);
            // The oldest keys are those that stay.
            let keys = pool.chunks.iter().map(|c| here(&c.k));
            assert!(keys.is_sorted_by(|a, b| a >= b));
        }
    }
}
