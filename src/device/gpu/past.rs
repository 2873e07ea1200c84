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
    Device, DeviceError, Fold, Kind, PastHeads, Pick, Probes, Purpose, Result, Rows, RowsMut,
};

/// Bytes that an element of a probe takes: three bf16 that add up to it.
const PROBE_BYTES: usize = 6;
/// Keys that a block of `pool_scores` takes at a time; whole blocks of the pool's.
const SCORED_KEYS: usize = 128;

/// Keys and values of one sequence and layer, bf16, before rotation.
#[derive(Debug)]
pub struct PastPool<D: Driver> {
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

impl<D: Driver> PastPool<D> {
    pub(super) fn new(heads: usize, head_dim: usize, run: usize) -> Self {
        Self {
            heads,
            head_dim,
            run,
            chunks: Vec::new(),
            tokens: 0,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.tokens
    }

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

/// Appends `rows` tokens, the `heads` named of rows of `[k, v]`.
pub(super) fn append<D: Driver>(
    gpu: &Gpu<D>,
    pool: &mut PastPool<D>,
    heads: &[usize],
    kv: [Rows<'_, Buffer<D>>; 2],
    rows: usize,
) -> Result<()> {
    let (token, dim) = (pool.tokens, pool.head_dim);
    pool.chunk(gpu, rows)?;
    let none = vec![0; heads.len()];
    let held = Held::new(gpu, pool, heads, &none, &none)?;
    let width = heads.iter().max().map_or(0, |head| (head + 1) * dim);
    let params = SegattnRetrievalParams {
        k: input(&kv[0], rows, width),
        v: input(&kv[1], rows, width),
        token: token as i64,
        rows: rows as i64,
        ..held.params(pool)
    };
    let threads = Grid::Threads(rows * heads.len() * dim / VECTOR);
    launch(
        gpu,
        entry(File::Retrieval, "pool_append_bf16"),
        threads,
        &params,
    )
}

/// Keys and values of whole runs.
pub(super) fn read<D: Driver>(
    gpu: &Gpu<D>,
    pool: &PastPool<D>,
    tokens: Range<usize>,
) -> Result<(Vec<f32>, Vec<f32>)> {
    let whole = |token: usize| token.is_multiple_of(pool.run);
    assert!(
        whole(tokens.start) && whole(tokens.end),
        "tokens are read a run at a time"
    );
    let (mut k, mut v) = (Vec::new(), Vec::new());
    for chunk in &pool.chunks[tokens.start / pool.run..tokens.end / pool.run] {
        k.extend(gpu.read(&chunk.k, 0..chunk.k.len)?);
        v.extend(gpu.read(&chunk.v, 0..chunk.v.len)?);
    }
    Ok((k, v))
}

/// Appends a run of what [`read`] gave.
pub(super) fn write<D: Driver>(
    gpu: &Gpu<D>,
    pool: &mut PastPool<D>,
    k: &[f32],
    v: &[f32],
) -> Result<()> {
    let chunk = pool.chunk(gpu, k.len() / pool.width())?;
    gpu.write(&mut chunk.k, 0, k)?;
    gpu.write(&mut chunk.v, 0, v)
}

/// Blocks that the heads of a pool have picked.
#[derive(Debug)]
pub struct Picks<D: Driver> {
    /// i32 `[head, most]`, ascending, and `[head]`: how many.
    blocks: Block<D>,
    counts: Block<D>,
    /// The counts again, which follow from lengths alone: the host need not ask.
    known: Vec<usize>,
    most: usize,
    block_len: usize,
}

impl<D: Driver> Picks<D> {
    /// Tokens of a head.
    pub(super) fn tokens(&self, head: usize) -> usize {
        self.known[head] * self.block_len
    }
}

/// Picks of these tokens.
pub(super) fn picks<D: Driver>(
    gpu: &Gpu<D>,
    tokens: &[Vec<usize>],
    block_len: usize,
) -> Result<Picks<D>> {
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
    Ok(Picks {
        blocks: gpu.upload(&blocks)?,
        counts: gpu.upload(&counts)?,
        known,
        most,
        block_len,
    })
}

/// The tokens that every head has picked.
pub(super) fn tokens<D: Driver>(gpu: &Gpu<D>, picks: &Picks<D>) -> Result<Vec<Vec<usize>>> {
    let mut blocks = vec![0i32; picks.known.len() * picks.most];
    if picks.known.iter().any(|n| *n > 0) {
        let bytes = bytemuck::cast_slice_mut(&mut blocks);
        // SAFETY: the block has that size; rows are written as far as they are known.
        unsafe { gpu.driver().download(picks.blocks.address, bytes)? };
    }
    let head = |(i, count): (usize, &usize)| {
        let row = &blocks[i * picks.most..][..*count];
        let first = row.iter().map(|b| *b as usize * picks.block_len);
        first.flat_map(|t| t..t + picks.block_len).collect()
    };
    Ok(picks.known.iter().enumerate().map(head).collect())
}

/// The best blocks of every head, without asking the host.
pub(super) fn pick<D: Driver>(
    gpu: &Gpu<D>,
    pool: &PastPool<D>,
    probes: &Probes<'_, Buffer<D>>,
    pick: &Pick<'_>,
) -> Result<Picks<D>> {
    let (heads, dim) = (pool.heads, pool.head_dim);
    let windows = (probes.rows - probes.window) / probes.stride + 1;
    let eligible = pick.eligible.iter().copied().max().unwrap_or(0);
    let blocks = eligible / pick.block_len;
    let known = pick
        .eligible
        .iter()
        .map(|n| pick.blocks.min(n / pick.block_len));
    let picks = Picks {
        blocks: gpu.block(heads * pick.blocks * size_of::<i32>())?,
        counts: gpu.block(heads * size_of::<i32>())?,
        known: known.collect(),
        most: pick.blocks,
        block_len: pick.block_len,
    };
    let q_width = pick
        .kv_heads
        .iter()
        .max()
        .map_or(0, |h| (h + 1) * probes.group * dim);
    let held = Held::new(gpu, pool, pick.kv_heads, pick.eligible, pick.eligible)?;
    let means = gpu.block(heads * probes.group * windows * dim * PROBE_BYTES)?;
    let scores = gpu.block((heads * blocks).max(1) * size_of::<f32>())?;
    let params = SegattnRetrievalParams {
        q: input(&probes.q, probes.rows, q_width),
        probes: pointer::<f32>(&means).cast_mut().cast(),
        scores: pointer::<f32>(&scores).cast_mut(),
        picks: pointer::<i32>(&picks.blocks).cast_mut(),
        pick_count: pointer::<i32>(&picks.counts).cast_mut(),
        score_pitch: blocks as i64,
        group: probes.group as i32,
        windows: windows as i32,
        window: probes.window as i32,
        stride: probes.stride as i32,
        block_len: pick.block_len as i32,
        blocks: blocks as i32,
        max_picks: pick.blocks as i32,
        ..held.params(pool)
    };
    let kernel = |name| entry(File::Retrieval, name);
    let threads = Grid::Threads(heads * probes.group * windows * dim / VECTOR);
    launch(gpu, kernel("pool_probes_bf16"), threads, &params)?;
    let items = blocks.div_ceil((SCORED_KEYS / pick.block_len).max(1));
    launch(
        gpu,
        kernel(scores_entry(dim)?),
        Grid::Blocks(heads * items),
        &params,
    )?;
    launch(gpu, kernel("pool_pick_f32"), Grid::Blocks(heads), &params)?;
    Ok(picks)
}

/// The picked tokens of every head, to rows: keys rotated.
pub(super) fn gather<D: Driver>(
    gpu: &Gpu<D>,
    pool: &PastPool<D>,
    picks: &Picks<D>,
    past: &PastHeads<'_>,
    (cos, sin): (&Buffer<D>, &Buffer<D>),
    [k, v]: [RowsMut<'_, Buffer<D>>; 2],
) -> Result<()> {
    let (heads, dim) = (pool.heads, pool.head_dim);
    let rows = (0..heads).map(|h| picks.tokens(h)).max().unwrap_or(0);
    if rows == 0 {
        return Ok(());
    }
    let width = past.kv_heads.iter().max().map_or(0, |h| (h + 1) * dim);
    let held = Held::new(gpu, pool, past.kv_heads, past.ends, past.ends)?;
    let params = SegattnRetrievalParams {
        k: output(&k, rows, width),
        v: output(&v, rows, width),
        picks: pointer::<i32>(&picks.blocks).cast_mut(),
        pick_count: pointer::<i32>(&picks.counts).cast_mut(),
        cos: exact(cos, 0, cos.len),
        sin: exact(sin, 0, sin.len),
        block_len: picks.block_len as i32,
        max_picks: picks.most as i32,
        ..held.params(pool)
    };
    let threads = Grid::Threads(heads * picks.most * picks.block_len * dim / (2 * VECTOR));
    launch(
        gpu,
        entry(File::Retrieval, "pool_gather_bf16"),
        threads,
        &params,
    )
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
        pool: &PastPool<D>,
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

    fn params(&self, pool: &PastPool<D>) -> SegattnRetrievalParams {
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
        let mut pool = gpu.pool(heads, dim, run).expect("a pool");
        for on_device in [[1, 1], [2, 2], [3, 2], [4, 1], [5, 0], [5, 0], [5, 0]] {
            append(&gpu, &mut pool, &[0, 1], [rows; 2], run).expect("a run");
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
