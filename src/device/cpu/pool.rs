//! The pool of past keys and values of one sequence and layer, and retrieval from it.
//!
//! Each complete segment adds a chunk, so growth copies nothing. Within a chunk the keys of a head are contiguous, so
//! that scoring streams them.

use std::ops::Range;

use rayon::prelude::*;

use super::buffer::Scratch;
use super::{Buffer, Cpu, PackedMatrix, gemm};
use crate::device::shared::blocks::gather;
use crate::device::{HostBlocks, PastHeads, PastPool, Probes, Result, Rows, RowsMut, Selection};

/// Tokens scored by one task.
const SCORE_TOKENS: usize = 256;

/// Keys and values before rotation.
#[derive(Debug, Default)]
pub struct Pool {
    heads: usize,
    head_dim: usize,
    chunks: Vec<Chunk>,
}

/// Tokens `[first, first + rows)`, each tensor `[head, row, head_dim]`.
#[derive(Debug)]
struct Chunk {
    first: usize,
    rows: usize,
    k: Buffer,
    v: Buffer,
}

impl PastPool<Cpu> for Pool {
    fn new(_: &Cpu, heads: usize, head_dim: usize, _run: usize) -> Self {
        Self {
            heads,
            head_dim,
            chunks: Vec::new(),
        }
    }

    fn tokens(&self) -> usize {
        self.len()
    }

    fn append(
        &mut self,
        _: &Cpu,
        heads: &[usize],
        [k, v]: [Rows<'_, Buffer>; 2],
        rows: usize,
    ) -> Result<()> {
        let dim = self.head_dim;
        let row = |kv: &Rows<'_, Buffer>, row: usize, i: usize| {
            let at = kv.start + row * kv.stride + heads[i] * dim;
            at..at + dim
        };
        self.append_rows(rows, |r, i| {
            (&k.buffer[row(&k, r, i)], &v.buffer[row(&v, r, i)])
        })
    }

    fn truncate(&mut self, tokens: usize) {
        self.chunks.retain(|chunk| chunk.first < tokens);
    }

    fn read(&self, _: &Cpu, tokens: Range<usize>) -> Result<(Vec<f32>, Vec<f32>)> {
        Ok(self.contents(tokens))
    }

    fn write(&mut self, _: &Cpu, k: &[f32], v: &[f32]) -> Result<()> {
        let (heads, dim) = (self.heads, self.head_dim);
        let at = |row: usize, i: usize| (row * heads + i) * dim..(row * heads + i + 1) * dim;
        let rows = k.len() / (heads * dim);
        self.append_rows(rows, |row, i| (&k[at(row, i)], &v[at(row, i)]))
    }

    fn select(
        &self,
        _: &Cpu,
        probes: &Probes<'_, Buffer>,
        selection: &Selection<'_>,
    ) -> Result<HostBlocks> {
        let heads = 0..selection.kv_heads.len();
        let best = heads.map(|head| self.best_blocks(head, probes, selection));
        Ok(HostBlocks(best.collect()))
    }

    fn gather(
        &self,
        device: &Cpu,
        blocks: &HostBlocks,
        past: &PastHeads<'_>,
        tables: (&Buffer, &Buffer),
        kv: [RowsMut<'_, Buffer>; 2],
    ) -> Result<()> {
        let token = |head, token| self.token(head, token);
        gather(device, blocks, (past, self.head_dim), tables, kv, token)
    }
}

impl Pool {
    fn len(&self) -> usize {
        self.chunks.last().map_or(0, |c| c.first + c.rows)
    }

    /// Appends `rows` tokens; `kv` gives key and value of a row and pool head.
    fn append_rows<'a>(
        &mut self,
        rows: usize,
        kv: impl Fn(usize, usize) -> (&'a [f32], &'a [f32]),
    ) -> Result<()> {
        if rows == 0 {
            return Ok(());
        }
        let len = self.heads * rows * self.head_dim;
        let (mut k, mut v) = (Buffer::zeros(len)?, Buffer::zeros(len)?);
        let slots = k.chunks_mut(self.head_dim).zip(v.chunks_mut(self.head_dim));
        for (i, (to_k, to_v)) in slots.enumerate() {
            let (from_k, from_v) = kv(i % rows, i / rows);
            to_k.copy_from_slice(from_k);
            to_v.copy_from_slice(from_v);
        }
        let first = self.len();
        self.chunks.push(Chunk { first, rows, k, v });
        Ok(())
    }

    /// Key and value of a token.
    fn token(&self, head: usize, token: usize) -> [&[f32]; 2] {
        let chunk = &self.chunks[self.chunks.partition_point(|c| c.first <= token) - 1];
        let at = (head * chunk.rows + token - chunk.first) * self.head_dim;
        let range = at..at + self.head_dim;
        [&chunk.k[range.clone()], &chunk.v[range]]
    }

    /// Keys, then values, each `[token, head, head_dim]`.
    fn contents(&self, tokens: Range<usize>) -> (Vec<f32>, Vec<f32>) {
        let len = tokens.len() * self.heads * self.head_dim;
        let (mut k, mut v) = (Vec::with_capacity(len), Vec::with_capacity(len));
        for token in tokens {
            for head in 0..self.heads {
                let [from_k, from_v] = self.token(head, token);
                k.extend_from_slice(from_k);
                v.extend_from_slice(from_v);
            }
        }
        (k, v)
    }

    /// The tokens of the best blocks of one head, in order of position. A token's score is one product chain, so it
    /// does not depend on how the pool is cut into chunks.
    fn best_blocks(
        &self,
        head: usize,
        probes: &Probes<'_, Buffer>,
        selection: &Selection<'_>,
    ) -> Vec<usize> {
        let blocks = selection.eligible[head] / selection.block_len;
        let count = selection.blocks.min(blocks);
        if count == blocks {
            return (0..blocks * selection.block_len).collect();
        }
        let first = selection.kv_heads[head] * probes.group;
        let probes = self.probes(probes, first..first + probes.group);
        let scores = self.block_scores(head, &probes, selection.block_len, blocks);
        let better = |a: &usize, b: &usize| scores[*b].total_cmp(&scores[*a]).then(a.cmp(b));
        let mut order: Vec<usize> = (0..blocks).collect();
        if count > 0 {
            order.select_nth_unstable_by(count - 1, better);
        }
        order.truncate(count);
        order.sort_unstable();
        let tokens = |block: usize| block * selection.block_len..(block + 1) * selection.block_len;
        order.into_iter().flat_map(tokens).collect()
    }

    /// The means of the windows, as the weight of a GEMM.
    fn probes(&self, probes: &Probes<'_, Buffer>, q_heads: Range<usize>) -> PackedMatrix {
        let (dim, q) = (self.head_dim, probes.q);
        let mut means = Vec::new();
        for q_head in q_heads {
            let windows = (0..).map(|i| i * probes.stride);
            for first in windows.take_while(|first| first + probes.window <= probes.rows) {
                let mut mean = vec![0f32; dim];
                for r in first..first + probes.window {
                    let at = q.start + r * q.stride + q_head * dim;
                    let row = &q.buffer[at..at + dim];
                    mean.iter_mut().zip(row).for_each(|(m, q)| *m += q);
                }
                means.extend(mean.iter().map(|m| m / probes.window as f32));
            }
        }
        PackedMatrix::pack(&means, means.len() / dim, dim, false)
    }

    /// For each block the largest product of a probe and a key of its tokens.
    fn block_scores(
        &self,
        head: usize,
        probes: &PackedMatrix,
        block_len: usize,
        blocks: usize,
    ) -> Vec<f32> {
        let (dim, width, end) = (self.head_dim, probes.outputs(), blocks * block_len);
        let mut best = vec![f32::NEG_INFINITY; end];
        for chunk in &self.chunks {
            let rows = chunk.rows.min(end.saturating_sub(chunk.first));
            let keys = &chunk.k[head * chunk.rows * dim..][..rows * dim];
            let best = &mut best[chunk.first.min(end)..][..rows];
            best.par_chunks_mut(SCORE_TOKENS)
                .zip(keys.par_chunks(SCORE_TOKENS * dim))
                .for_each(|(best, keys)| {
                    let mut scores = Scratch::take(best.len() * width);
                    gemm::linear(keys, dim, best.len(), probes, &mut scores, width, false);
                    for (best, scores) in best.iter_mut().zip(scores.chunks(width)) {
                        *best = scores.iter().copied().fold(*best, f32::max);
                    }
                });
        }
        let largest = |tokens: &[f32]| tokens.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        best.chunks(block_len).map(largest).collect()
    }
}
