//! The pool of past keys and values in f64, and retrieval written out plainly.

use std::ops::Range;

use super::{Buf, Reference, dot};
use crate::device::shared::blocks::gather;
use crate::device::{HostBlocks, PastHeads, PastPool, Probes, Result, Rows, RowsMut, Selection};

/// Keys and values `[token, head, head_dim]`.
#[derive(Debug, Clone)]
pub struct Pool {
    heads: usize,
    head_dim: usize,
    k: Vec<f64>,
    v: Vec<f64>,
}

impl Pool {
    /// Key and value of a token.
    fn token(&self, head: usize, token: usize) -> [&[f64]; 2] {
        let at = (token * self.heads + head) * self.head_dim;
        [&self.k, &self.v].map(|x| &x[at..at + self.head_dim])
    }
}

impl PastPool<Reference> for Pool {
    fn new(_: &Reference, heads: usize, head_dim: usize, _run: usize) -> Self {
        Self {
            heads,
            head_dim,
            k: Vec::new(),
            v: Vec::new(),
        }
    }

    fn tokens(&self) -> usize {
        self.k.len() / (self.heads * self.head_dim)
    }

    fn append(
        &mut self,
        _: &Reference,
        heads: &[usize],
        [k, v]: [Rows<'_, Buf>; 2],
        rows: usize,
    ) -> Result<()> {
        for r in 0..rows {
            for head in heads {
                let column = head * self.head_dim;
                self.k
                    .extend_from_slice(k.column(column).row(r, self.head_dim));
                self.v
                    .extend_from_slice(v.column(column).row(r, self.head_dim));
            }
        }
        Ok(())
    }

    fn truncate(&mut self, tokens: usize) {
        let len = tokens * self.heads * self.head_dim;
        self.k.truncate(len);
        self.v.truncate(len);
    }

    fn read(&self, _: &Reference, tokens: Range<usize>) -> Result<(Vec<f32>, Vec<f32>)> {
        let width = self.heads * self.head_dim;
        let range = tokens.start * width..tokens.end * width;
        let narrow = |x: &Buf| x[range.clone()].iter().map(|x| *x as f32).collect();
        Ok((narrow(&self.k), narrow(&self.v)))
    }

    fn write(&mut self, _: &Reference, k: &[f32], v: &[f32]) -> Result<()> {
        self.k.extend(k.iter().copied().map(f64::from));
        self.v.extend(v.iter().copied().map(f64::from));
        Ok(())
    }

    fn select(
        &self,
        _: &Reference,
        probes: &Probes<'_, Buf>,
        selection: &Selection<'_>,
    ) -> Result<HostBlocks> {
        let heads = 0..selection.kv_heads.len();
        let best = heads.map(|head| best_blocks(self, head, probes, selection));
        Ok(HostBlocks(best.collect()))
    }

    fn gather(
        &self,
        device: &Reference,
        blocks: &HostBlocks,
        past: &PastHeads<'_>,
        tables: (&Buf, &Buf),
        kv: [RowsMut<'_, Buf>; 2],
    ) -> Result<()> {
        let token = |head, token| self.token(head, token);
        gather(device, blocks, (past, self.head_dim), tables, kv, token)
    }
}

/// The tokens of the best blocks of one head of a pool.
fn best_blocks(
    pool: &Pool,
    head: usize,
    probes: &Probes<'_, Buf>,
    selection: &Selection<'_>,
) -> Vec<usize> {
    let dim = pool.head_dim;
    let mut queries: Vec<Vec<f64>> = Vec::new();
    let first_q = selection.kv_heads[head] * probes.group;
    for q_head in first_q..first_q + probes.group {
        let mut first = 0;
        while first + probes.window <= probes.rows {
            let mut mean = vec![0.0; dim];
            for r in first..first + probes.window {
                let q = probes.q.column(q_head * dim).row(r, dim);
                mean.iter_mut()
                    .zip(q)
                    .for_each(|(m, q)| *m += q / probes.window as f64);
            }
            queries.push(mean);
            first += probes.stride;
        }
    }
    let score = |token: usize| {
        let k = &pool.k[(token * pool.heads + head) * dim..][..dim];
        queries
            .iter()
            .map(|q| dot(q, k))
            .fold(f64::NEG_INFINITY, f64::max)
    };
    let blocks = selection.eligible[head] / selection.block_len;
    let scores: Vec<f64> = (0..blocks)
        .map(|b| {
            (b * selection.block_len..(b + 1) * selection.block_len)
                .map(score)
                .fold(f64::NEG_INFINITY, f64::max)
        })
        .collect();
    let mut order: Vec<usize> = (0..blocks).collect();
    order.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]).then(a.cmp(b)));
    order.truncate(selection.blocks);
    order.sort_unstable();
    order
        .iter()
        .flat_map(|b| b * selection.block_len..(b + 1) * selection.block_len)
        .collect()
}
