//! The pool of past keys and values of one sequence and layer, and retrieval from it.
//!
//! Each appended run adds a chunk, so growth copies nothing. Within a chunk the keys of a head are contiguous, so
//! that scoring streams them.

use std::cmp::Ordering;
use std::ops::Range;

use rayon::prelude::*;

use super::buffer::Scratch;
use super::{Buffer, Cpu, PackedMatrix, gemm};
use crate::device::shared::blocks::gather;
use crate::device::shared::selection;
use crate::device::{
    HostBlocks, PastHeads, PastPool, Probes, Result, Rows, RowsMut, Selection, SelectionRule,
};

/// Tokens scored by one task.
const SCORE_TOKENS: usize = 256;

/// Keys and values before rotation.
#[derive(Debug, Default)]
pub struct Pool {
    heads: usize,
    head_dim: usize,
    chunks: Vec<Chunk>,
}

/// Tokens `[first, first + rows)`, each tensor `[head, room, head_dim]`.
#[derive(Debug)]
struct Chunk {
    first: usize,
    rows: usize,
    /// Rows that there is memory for: more than `rows` where the pool was cut.
    room: usize,
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
        if let Some(last) = self.chunks.last_mut() {
            last.rows = last.rows.min(tokens - last.first);
        }
    }

    fn read(&self, _: &Cpu, tokens: Range<usize>) -> Result<(Vec<f32>, Vec<f32>)> {
        Ok(self.contents(tokens))
    }

    fn write(&mut self, _: &Cpu, k: &[f32], v: &[f32]) -> Result<()> {
        let (heads, dim) = (self.heads, self.head_dim);
        let at = |row: usize, i: usize| (row * heads + i) * dim..(row * heads + i + 1) * dim;
        let rows = k.len() / (heads * dim).max(1);
        self.append_rows(rows, |row, i| (&k[at(row, i)], &v[at(row, i)]))
    }

    fn select(
        &self,
        _: &Cpu,
        probes: &Probes<'_, Buffer>,
        selection: &Selection<'_>,
    ) -> Result<HostBlocks> {
        selection::check(probes, selection, [self.heads, self.tokens()])?;
        let heads = 0..self.heads;
        let best = heads.map(|head| match selection.rule {
            SelectionRule::Blocks {
                block_len,
                probe_window,
                probe_stride,
            } => {
                let means = || self.means(head, probes, selection, [probe_window, probe_stride]);
                self.best_blocks(head, means, selection, block_len)
            }
        });
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
        let room = rows;
        self.chunks.push(Chunk {
            first,
            rows,
            room,
            k,
            v,
        });
        Ok(())
    }

    /// Key and value of a token.
    fn token(&self, head: usize, token: usize) -> [&[f32]; 2] {
        let chunk = &self.chunks[self.chunks.partition_point(|c| c.first <= token) - 1];
        let at = (head * chunk.room + token - chunk.first) * self.head_dim;
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
        probes: impl FnOnce() -> PackedMatrix,
        selection: &Selection<'_>,
        block_len: usize,
    ) -> Vec<usize> {
        let blocks = selection.blocks(head, block_len);
        let count = (selection.rows / block_len).min(blocks.len());
        if count == blocks.len() {
            return (blocks.start * block_len..blocks.end * block_len).collect();
        }
        let tokens = |block: usize| block * block_len..(block + 1) * block_len;
        let scored = blocks.start * block_len..blocks.end * block_len;
        let scores = self.products(head, &probes(), scored, |_, products| {
            products.iter().copied().fold(f32::NEG_INFINITY, f32::max)
        });
        let largest = |tokens: &[f32]| tokens.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let scores: Vec<f32> = scores.chunks(block_len).map(largest).collect();
        let mut order = highest(&scores, count);
        order.sort_unstable();
        let blocks = order.into_iter().map(|block| blocks.start + block);
        blocks.flat_map(tokens).collect()
    }

    /// Query `t` of a query head.
    fn query<'a>(&self, probes: &Probes<'a, Buffer>, q_head: usize, t: usize) -> &'a [f32] {
        let q = probes.q;
        let at = q.start + probes.row(t) * q.stride + q_head * self.head_dim;
        &q.buffer[at..at + self.head_dim]
    }

    /// The means of the windows of a head's queries, as the weight of a GEMM.
    fn means(
        &self,
        head: usize,
        probes: &Probes<'_, Buffer>,
        selection: &Selection<'_>,
        [window, stride]: [usize; 2],
    ) -> PackedMatrix {
        let (dim, window) = (self.head_dim, window.min(probes.rows));
        let first = selection.kv_heads[head] * probes.group;
        let mut means = Vec::new();
        for q_head in first..first + probes.group {
            for first in (0..=probes.rows - window).step_by(stride) {
                let mut mean = vec![0f32; dim];
                for t in first..first + window {
                    let row = self.query(probes, q_head, t);
                    mean.iter_mut().zip(row).for_each(|(m, q)| *m += q);
                }
                means.extend(mean.iter().map(|m| m / window as f32));
            }
        }
        PackedMatrix::pack(&means, means.len() / dim, dim, false)
    }

    /// `score(token, products)` of each of the tokens, where the products are those of all probes and its key.
    fn products(
        &self,
        head: usize,
        probes: &PackedMatrix,
        tokens: Range<usize>,
        score: impl Fn(usize, &[f32]) -> f32 + Sync,
    ) -> Vec<f32> {
        let (dim, width) = (self.head_dim, probes.outputs());
        let mut all = vec![0f32; tokens.len()];
        let mut rest = all.as_mut_slice();
        for (chunk, rows) in self.pieces(tokens.clone()) {
            let at = (head * chunk.room + rows.start) * dim;
            let keys = &chunk.k[at..][..rows.len() * dim];
            let first = chunk.first + rows.start;
            let (own, later) = std::mem::take(&mut rest).split_at_mut(rows.len());
            rest = later;
            own.par_chunks_mut(SCORE_TOKENS)
                .zip(keys.par_chunks(SCORE_TOKENS * dim))
                .enumerate()
                .for_each(|(i, (scores, keys))| {
                    let mut products = Scratch::take(scores.len() * width);
                    gemm::linear(keys, dim, scores.len(), probes, &mut products, width, false);
                    let first = first + i * SCORE_TOKENS;
                    let rows = scores.iter_mut().zip(products.chunks(width));
                    for (row, (to, products)) in rows.enumerate() {
                        *to = score(first + row, products);
                    }
                });
        }
        all
    }

    /// The chunks that hold these tokens, and which of their rows.
    fn pieces(&self, tokens: Range<usize>) -> impl Iterator<Item = (&Chunk, Range<usize>)> {
        self.chunks.iter().filter_map(move |chunk| {
            let row = |token: usize| token.saturating_sub(chunk.first).min(chunk.rows);
            let rows = row(tokens.start)..row(tokens.end);
            (!rows.is_empty()).then_some((chunk, rows))
        })
    }
}

/// Indices of the `count` highest scores in no order, ties to the earlier.
fn highest(scores: &[f32], count: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    if 0 < count && count < order.len() {
        order.select_nth_unstable_by(count - 1, |a, b| better(scores, *a, *b));
    }
    order.truncate(count);
    order
}

/// The order of indices by falling score, ties by index.
fn better(scores: &[f32], a: usize, b: usize) -> Ordering {
    scores[b].total_cmp(&scores[a]).then(a.cmp(&b))
}
