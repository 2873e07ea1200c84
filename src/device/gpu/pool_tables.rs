//! What a kernel is told of a pool: where its chunks lie, and the parameters of each head.

use std::ops::Range;

use super::bounds::{NONE, equal, int, pointer, product};
use super::memory::Block;
use super::pool::Pool;
use super::{Driver, Gpu};
use crate::cuda::kernels::layer_params::{
    SegattnPoolChunk, SegattnPoolHead, SegattnRetrievalParams,
};
use crate::device::Result;

/// Elements of the KV heads up to the last one named, of which there is one for each head of the pool.
pub(super) fn kv_width<D: Driver>(pool: &Pool<D>, kv_heads: &[usize]) -> Result<usize> {
    equal("KV heads of a pool", pool.heads, kv_heads.len())?;
    let last = kv_heads.iter().copied().max();
    let count = last.map_or(0, |head| head.saturating_add(1));
    product("KV heads and head_dim", &[count, pool.head_dim])
}

/// Tables of a call, in one upload: addresses of the chunks, then the parameters of each head.
pub(super) struct Tables<D: Driver> {
    block: Block<D>,
    chunks: usize,
}

impl<D: Driver> Tables<D> {
    pub(super) fn new(
        gpu: &Gpu<D>,
        pool: &Pool<D>,
        kv_heads: &[usize],
        eligible: &[Range<usize>],
        ends: &[usize],
    ) -> Result<Self> {
        let mut tables: Vec<[u64; 2]> = Vec::with_capacity(pool.chunks.len() + kv_heads.len());
        for chunk in &pool.chunks {
            tables.push([gpu.range(&chunk.k, 0, 0)?, gpu.range(&chunk.v, 0, 0)?]);
        }
        for ((head, eligible), end) in kv_heads.iter().zip(eligible).zip(ends) {
            let token = |n: usize| int("eligible tokens", n);
            tables.push(bytemuck::cast([
                int("KV head", *head)?,
                token(eligible.start)?,
                token(eligible.end)?,
                int("end of a head", *end)?,
            ]));
        }
        const {
            assert!(size_of::<SegattnPoolChunk>() == size_of::<[u64; 2]>());
            assert!(size_of::<SegattnPoolHead>() == size_of::<[i32; 4]>());
        }
        Ok(Self {
            block: gpu.upload(&tables)?,
            chunks: pool.chunks.len(),
        })
    }

    pub(super) fn params(&self, pool: &Pool<D>) -> Result<SegattnRetrievalParams> {
        let chunks = pointer::<SegattnPoolChunk>(&self.block);
        Ok(SegattnRetrievalParams {
            chunks,
            head: chunks.wrapping_add(self.chunks).cast(),
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
        })
    }
}
