//! The pool of past keys and values in f64, and retrieval written out plainly.

use std::ops::Range;

use super::{Buf, Reference, dot};
use crate::device::shared::blocks::{gather, others};
use crate::device::shared::{pool_bits, selection};
use crate::device::{
    HostBlocks, PastHeads, PastPool, PoolBits, PoolShape, Probes, Result, Rows, RowsMut, Selection,
    SelectionRule,
};

/// Keys and values `[token, head, head_dim]`.
#[derive(Debug, Clone)]
pub struct Pool {
    heads: usize,
    head_dim: usize,
    bits: PoolBits,
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
    fn new(_: &Reference, shape: PoolShape) -> Self {
        Self {
            heads: shape.heads,
            head_dim: shape.head_dim,
            bits: shape.bits,
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
                for (own, given) in [(&mut self.k, &k), (&mut self.v, &v)] {
                    let first = own.len();
                    own.extend_from_slice(given.column(column).row(r, self.head_dim));
                    pool_bits::round(&mut own[first..], self.bits, |x| x);
                }
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
        selection::check(probes, selection, [self.heads, self.tokens()])?;
        let heads = 0..self.heads;
        let best = heads.map(|head| match selection.rule {
            SelectionRule::Blocks {
                block_len,
                probe_window,
                probe_stride,
            } => {
                let queries = means(self, head, probes, selection, [probe_window, probe_stride]);
                best_blocks(self, head, &queries, selection, block_len)
            }
            SelectionRule::Windows {
                window_len,
                window_before,
            } => {
                let queries = queries(self, head, probes, selection).concat();
                let eligible = selection.eligible[head].clone();
                let scores = shares(self, head, &queries, eligible.clone(), selection);
                let taken = windows(&scores, selection.rows, [window_len, window_before]);
                eligible
                    .zip(taken)
                    .filter_map(|(t, taken)| taken.then_some(t))
                    .collect()
            }
        });
        Ok(HostBlocks(best.collect()))
    }

    fn lowest(
        &self,
        _: &Reference,
        probes: &Probes<'_, Buf>,
        selection: &Selection<'_>,
    ) -> Result<HostBlocks> {
        selection::check_dropped(probes, selection, [self.heads, self.tokens()])?;
        let block_len = selection.rule.block_len();
        let lowest = |head| {
            let (first, scores) = kept_by(self, head, probes, selection);
            let mut order: Vec<usize> = (0..scores.len()).collect();
            order.sort_by(|a, b| scores[*a].total_cmp(&scores[*b]).then(a.cmp(b)));
            order.truncate(selection.rows / block_len);
            order.sort_unstable();
            let blocks = order.into_iter().map(|block| (first + block) * block_len);
            blocks.flat_map(|token| token..token + block_len).collect()
        };
        Ok(HostBlocks((0..self.heads).map(lowest).collect()))
    }

    fn without(&self, _: &Reference, dropped: &HostBlocks) -> Result<Self> {
        let (tokens, counts) = (self.tokens(), dropped.0.iter().map(Vec::len));
        let count = selection::dropped([self.heads, tokens], counts)?;
        let kept = |tokens_of| others(tokens, tokens_of).collect::<Vec<_>>();
        let kept: Vec<Vec<usize>> = dropped.0.iter().map(|d| kept(d)).collect();
        let (mut k, mut v) = (Vec::new(), Vec::new());
        for i in 0..tokens - count {
            for (head, kept) in kept.iter().enumerate() {
                let [own_k, own_v] = self.token(head, kept[i]);
                k.extend_from_slice(own_k);
                v.extend_from_slice(own_v);
            }
        }
        Ok(Self { k, v, ..*self })
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

/// The queries of a KV head's group, `[query, head_dim]` of each query head.
fn queries(
    pool: &Pool,
    head: usize,
    probes: &Probes<'_, Buf>,
    selection: &Selection<'_>,
) -> Vec<Vec<Vec<f64>>> {
    let dim = pool.head_dim;
    let first = selection.kv_heads[head] * probes.group;
    let query = |q_head: usize, t| {
        probes
            .q
            .column(q_head * dim)
            .row(probes.row(t), dim)
            .to_vec()
    };
    let q_heads = first..first + probes.group;
    q_heads
        .map(|q_head| (0..probes.rows).map(|t| query(q_head, t)).collect())
        .collect()
}

/// The probes of the first rule: means over windows of queries.
fn means(
    pool: &Pool,
    head: usize,
    probes: &Probes<'_, Buf>,
    selection: &Selection<'_>,
    [window, stride]: [usize; 2],
) -> Vec<Vec<f64>> {
    let window = window.min(probes.rows);
    let mut means = Vec::new();
    for queries in queries(pool, head, probes, selection) {
        for queries in queries.windows(window).step_by(stride) {
            let mut mean = vec![0.0; pool.head_dim];
            for q in queries {
                let terms = mean.iter_mut().zip(q);
                terms.for_each(|(m, q)| *m += q / window as f64);
            }
            means.push(mean);
        }
    }
    means
}

/// By what one head of a pool drops its blocks: the number of the first that is eligible, and the score of each.
fn kept_by(
    pool: &Pool,
    head: usize,
    probes: &Probes<'_, Buf>,
    selection: &Selection<'_>,
) -> (usize, Vec<f64>) {
    match selection.rule {
        SelectionRule::Blocks {
            block_len,
            probe_window,
            probe_stride,
        } => {
            let queries = means(pool, head, probes, selection, [probe_window, probe_stride]);
            let scores = block_scores(pool, head, &queries, selection, block_len);
            (selection.blocks(head, block_len).start, scores)
        }
        SelectionRule::Windows {
            window_len,
            window_before,
        } => {
            let queries = queries(pool, head, probes, selection).concat();
            let eligible = selection.eligible[head].clone();
            let scores = shares(pool, head, &queries, eligible.clone(), selection);
            let window = [window_len, window_before];
            let best = |token| {
                let around = selection::around(token, scores.len(), window);
                scores[around]
                    .iter()
                    .copied()
                    .fold(f64::NEG_INFINITY, f64::max)
            };
            (eligible.start, (0..scores.len()).map(best).collect())
        }
    }
}

/// The scores of the eligible blocks of one head of a pool.
fn block_scores(
    pool: &Pool,
    head: usize,
    probes: &[Vec<f64>],
    selection: &Selection<'_>,
    block_len: usize,
) -> Vec<f64> {
    let largest = |scores: &mut dyn Iterator<Item = f64>| scores.fold(f64::NEG_INFINITY, f64::max);
    let score = |token: usize| {
        let [k, _] = pool.token(head, token);
        largest(&mut probes.iter().map(|q| dot(q, k)))
    };
    let tokens = |block: usize| block * block_len..(block + 1) * block_len;
    let blocks = selection.blocks(head, block_len);
    blocks
        .map(|block| largest(&mut tokens(block).map(score)))
        .collect()
}

/// The tokens of the best blocks of one head of a pool.
fn best_blocks(
    pool: &Pool,
    head: usize,
    probes: &[Vec<f64>],
    selection: &Selection<'_>,
    block_len: usize,
) -> Vec<usize> {
    let scores = block_scores(pool, head, probes, selection, block_len);
    let tokens = |block: usize| block * block_len..(block + 1) * block_len;
    let mut order: Vec<(usize, f64)> = selection.blocks(head, block_len).zip(scores).collect();
    order.sort_by(|(a, x), (b, y)| y.total_cmp(x).then(a.cmp(b)));
    order.truncate(selection.rows / block_len);
    order.sort_by_key(|(block, _)| *block);
    order
        .into_iter()
        .flat_map(|(block, _)| tokens(block))
        .collect()
}

/// For each eligible token the logarithm of its largest share: of its weight in a probe's softmax over all of them.
fn shares(
    pool: &Pool,
    head: usize,
    probes: &[Vec<f64>],
    eligible: Range<usize>,
    selection: &Selection<'_>,
) -> Vec<f64> {
    let scale = (selection.scale).map_or((pool.head_dim as f64).sqrt().recip(), f64::from);
    let mut shares = vec![f64::NEG_INFINITY; eligible.len()];
    for probe in probes {
        let score = |token| scale * dot(probe, pool.token(head, token)[0]);
        let scores: Vec<f64> = eligible.clone().map(score).collect();
        let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let lse = max + scores.iter().map(|s| (s - max).exp()).sum::<f64>().ln();
        let terms = shares.iter_mut().zip(&scores);
        terms.for_each(|(share, score)| *share = share.max(score - lse));
    }
    shares
}

/// Which tokens are in windows around the best ones: `rows` of them, or all. `window`: its length, and the tokens of a
/// whole one before its best.
fn windows(scores: &[f64], rows: usize, window: [usize; 2]) -> Vec<bool> {
    let mut taken = vec![false; scores.len()];
    let mut left = rows.min(scores.len());
    while left > 0 {
        let open = (0..scores.len()).filter(|t| !taken[*t]);
        // Of equal scores the last is the maximum, so the tokens are taken from the end.
        let best = open.rev().max_by(|a, b| scores[*a].total_cmp(&scores[*b]));
        let Some(best) = best else { break };
        let width = window[0].min(left);
        let first = selection::window_begin(best, width, scores.len(), window);
        let begin = (first..best)
            .rev()
            .find(|t| taken[*t])
            .map_or(first, |t| t + 1);
        let end = (best..first + width)
            .find(|t| taken[*t])
            .unwrap_or(first + width);
        taken[begin..end].fill(true);
        left -= end - begin;
    }
    taken
}
