//! The pool of past keys and values of one sequence and layer.
//!
//! Each appended run adds a chunk, so growth copies nothing. Within a chunk the keys of a head are contiguous, so
//! that scoring streams them.

use std::ops::Range;

use super::{Buffer, Cpu, PackedMatrix, gemm};
use crate::device::shared::blocks::{gather, others};
use crate::device::shared::{pool_bits, selection};
use crate::device::{
    HostBlocks, PastHeads, PastPool, PoolBits, PoolShape, Probes, Result, Rows, RowsMut, Selection,
};

/// Keys and values before rotation.
#[derive(Debug, Default)]
pub struct Pool {
    heads: usize,
    pub(super) head_dim: usize,
    bits: PoolBits,
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
    fn new(_: &Cpu, shape: PoolShape) -> Self {
        Self {
            heads: shape.heads,
            head_dim: shape.head_dim,
            bits: shape.bits,
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
        let kv = |r, i| (&k.buffer[row(&k, r, i)], &v.buffer[row(&v, r, i)]);
        self.append_rows(rows, self.bits, kv)
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
        let kv = |row, i| (&k[at(row, i)], &v[at(row, i)]);
        self.append_rows(rows, PoolBits::Sixteen, kv)
    }

    fn select(
        &self,
        _: &Cpu,
        probes: &Probes<'_, Buffer>,
        selection: &Selection<'_>,
    ) -> Result<HostBlocks> {
        selection::check(probes, selection, [self.heads, self.tokens()])?;
        let heads = 0..self.heads;
        let best = heads.map(|head| self.selected(head, probes, selection));
        Ok(HostBlocks(best.collect()))
    }

    fn lowest(
        &self,
        _: &Cpu,
        probes: &Probes<'_, Buffer>,
        selection: &Selection<'_>,
    ) -> Result<HostBlocks> {
        selection::check_dropped(probes, selection, [self.heads, self.tokens()])?;
        let lowest = |head| self.lowest(head, probes, selection);
        Ok(HostBlocks((0..self.heads).map(lowest).collect()))
    }

    fn without(&self, _: &Cpu, dropped: &HostBlocks) -> Result<Self> {
        let (tokens, counts) = (self.len(), dropped.0.iter().map(Vec::len));
        let count = selection::dropped([self.heads, tokens], counts)?;
        let kept: Vec<Vec<usize>> = (dropped.0.iter())
            .map(|dropped| others(tokens, dropped).collect())
            .collect();
        let mut pool = Self {
            chunks: Vec::new(),
            ..*self
        };
        // What is held has been rounded.
        pool.append_rows(tokens - count, PoolBits::Sixteen, |row, head| {
            let [k, v] = self.token(head, kept[head][row]);
            (k, v)
        })?;
        Ok(pool)
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

    /// Appends `rows` tokens, rounded to `bits`; `kv` gives key and value of a row and pool head.
    fn append_rows<'a>(
        &mut self,
        rows: usize,
        bits: PoolBits,
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
            for (to, from) in [(to_k, from_k), (to_v, from_v)] {
                to.copy_from_slice(from);
                pool_bits::round(to, bits, |x| x as f32);
            }
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

    /// Products `[tokens, probes]` of the probes and the keys of some tokens. Each is one chain of additions, so it
    /// does not depend on how the pool is cut into chunks.
    pub(super) fn products(
        &self,
        head: usize,
        probes: &PackedMatrix,
        tokens: Range<usize>,
        products: &mut [f32],
    ) {
        let (dim, width, mut done) = (self.head_dim, probes.outputs(), 0);
        for (chunk, rows) in self.pieces(tokens) {
            let keys = &chunk.k[(head * chunk.room + rows.start) * dim..][..rows.len() * dim];
            let products = &mut products[done * width..][..rows.len() * width];
            gemm::linear(keys, dim, rows.len(), probes, products, width, false);
            done += rows.len();
        }
    }

    /// The chunks that hold these tokens, and which of their rows.
    fn pieces(&self, tokens: Range<usize>) -> impl Iterator<Item = (&Chunk, Range<usize>)> {
        let first = (self.chunks).partition_point(|chunk| chunk.first + chunk.rows <= tokens.start);
        let (chunks, end) = (self.chunks[first..].iter(), tokens.end);
        let within = chunks.take_while(move |chunk| chunk.first < end);
        within.map(move |chunk| {
            let row = |token: usize| token.saturating_sub(chunk.first).min(chunk.rows);
            (chunk, row(tokens.start)..row(tokens.end))
        })
    }
}
