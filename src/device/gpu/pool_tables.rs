//! What kernels of retrieval are told: where the chunks of pools lie, the parameters of their heads, and the calls.

use std::ops::Range;

use super::bounds::{NONE, equal, int, pointer, product};
use super::memory::Block;
use super::pool::Pool;
use super::rows::{Grid, entry, launch};
use super::{Driver, Gpu};
use crate::cuda::kernels::layer_params::{
    SegattnPoolChunk, SegattnPoolHead, SegattnRetrievalCalls, SegattnRetrievalParams,
};
use crate::cuda::kernels::{File, Kernels};
use crate::device::Result;

/// Elements of the KV heads up to the last one named, of which there is one for each head of the pool.
pub(super) fn kv_width<D: Driver>(pool: &Pool<D>, kv_heads: &[usize]) -> Result<usize> {
    equal("KV heads of a pool", pool.heads, kv_heads.len())?;
    let last = kv_heads.iter().copied().max();
    let count = last.map_or(0, |head| head.saturating_add(1));
    product("KV heads and head_dim", &[count, pool.head_dim])
}

/// The pool of a call, and its heads.
pub(super) struct PoolCall<'a, D: Driver> {
    pub pool: &'a Pool<D>,
    pub kv_heads: &'a [usize],
    /// What each head may select; empty where nothing is selected.
    pub eligible: &'a [Range<usize>],
    /// Rows of the angle tables behind the last selected token of each head; empty where nothing is gathered.
    pub ends: &'a [usize],
}

/// Tables of some calls, in one upload: for each the addresses of the chunks, then the parameters of each head.
pub(super) struct Tables<D: Driver> {
    block: Block<D>,
    /// The first row of each call's chunks, and of its heads.
    first: Vec<[usize; 2]>,
}

impl<D: Driver> Tables<D> {
    pub(super) fn new(gpu: &Gpu<D>, calls: &[PoolCall<'_, D>]) -> Result<Self> {
        let (mut rows, mut first) = (Vec::<[u64; 2]>::new(), Vec::with_capacity(calls.len()));
        for call in calls {
            let chunks = rows.len();
            for chunk in &call.pool.chunks {
                rows.push([gpu.range(&chunk.k, 0, 0)?, gpu.range(&chunk.v, 0, 0)?]);
            }
            first.push([chunks, rows.len()]);
            for (i, head) in call.kv_heads.iter().enumerate() {
                let eligible = call.eligible.get(i).cloned().unwrap_or_default();
                let end = call.ends.get(i).copied().unwrap_or_default();
                let token = |n: usize| int("eligible tokens", n);
                rows.push(bytemuck::cast([
                    int("KV head", *head)?,
                    token(eligible.start)?,
                    token(eligible.end)?,
                    int("end of a head", end)?,
                ]));
            }
        }
        const {
            assert!(size_of::<SegattnPoolChunk>() == size_of::<[u64; 2]>());
            assert!(size_of::<SegattnPoolHead>() == size_of::<[i32; 4]>());
        }
        Ok(Self {
            block: gpu.upload(&rows)?,
            first,
        })
    }

    /// The parameters of a call, which has this pool.
    pub(super) fn params(&self, call: usize, pool: &Pool<D>) -> Result<SegattnRetrievalParams> {
        let rows = pointer::<SegattnPoolChunk>(&self.block);
        let [chunks, heads] = self.first[call].map(|row| rows.wrapping_add(row));
        Ok(SegattnRetrievalParams {
            chunks,
            head: heads.cast(),
            q: NONE,
            k: NONE,
            v: NONE,
            probes: std::ptr::null_mut(),
            sums: std::ptr::null_mut(),
            lse: std::ptr::null_mut(),
            scores: std::ptr::null_mut(),
            best: std::ptr::null_mut(),
            selected: std::ptr::null_mut(),
            selected_count: std::ptr::null_mut(),
            unwanted: std::ptr::null_mut(),
            kept: std::ptr::null(),
            past_len: std::ptr::null_mut(),
            cos: std::ptr::null(),
            sin: std::ptr::null(),
            first_token: 0,
            chunk_tokens: pool.run as i64,
            token: 0,
            rows: 0,
            score_pitch: 0,
            heads: int("heads", pool.heads)?,
            head_dim: int("head_dim", pool.head_dim)?,
            group: 0,
            windows: 0,
            window: 0,
            stride: 0,
            first_query: 0,
            query_capacity: 1,
            block_len: 0,
            first_block: 0,
            blocks: 0,
            max_selected: 0,
            tiles: 0,
            window_len: 0,
            window_before: 0,
            scale_log2: 0.0,
            bits: pool.bits.count() as i32,
            padding: 0,
        })
    }
}

/// Calls that do not depend on each other, in one upload.
pub(super) struct Calls<'a, D: Driver> {
    gpu: &'a Gpu<D>,
    block: Block<D>,
    count: usize,
}

impl<'a, D: Driver> Calls<'a, D> {
    pub(super) fn new(gpu: &'a Gpu<D>, calls: &[SegattnRetrievalParams]) -> Result<Self> {
        // 14 addresses, three more with their strides, five numbers of 8 bytes, 18 of 4: nothing between them.
        const { assert!(size_of::<SegattnRetrievalParams>() == 25 * 8 + 18 * 4) };
        // SAFETY: the struct has no padding, so every byte is initialised.
        let bytes: &[u8] =
            unsafe { std::slice::from_raw_parts(calls.as_ptr().cast(), size_of_val(calls)) };
        Ok(Self {
            gpu,
            block: gpu.upload(bytes)?,
            count: calls.len(),
        })
    }

    /// Launches a kernel for all of them. `grid`: what the largest call needs.
    pub(super) fn launch(&self, name: &'static str, grid: Grid) -> Result<()> {
        let (gpu, entry) = (self.gpu, entry(File::Retrieval, name));
        let own = gpu.driver().kernels().info(entry)?.threads as usize;
        let [blocks, threads] = grid.size(own)?;
        let params = SegattnRetrievalCalls {
            calls: pointer(&self.block),
            blocks: blocks as i64,
        };
        let all = product("blocks of a grid", &[self.count, blocks])?;
        launch(gpu, entry, Grid::Sized(all, threads), &params)
    }
}
