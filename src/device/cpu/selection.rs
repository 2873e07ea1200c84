//! Retrieval from a pool, by both rules of docs/contract.md, section 2.

use std::cmp::Ordering;
use std::ops::Range;

use rayon::prelude::*;

use super::buffer::Scratch;
use super::math::{self, for_each_isa};
use super::pool::Pool;
use super::{Buffer, PackedMatrix};
use crate::device::shared::selection::{around, window_begin};
use crate::device::{Probes, Selection, SelectionRule};
use crate::isa::Isa;

/// Tokens scored by one task.
const SCORE_TOKENS: usize = 256;
/// Tokens of a tile of the softmax's sums. Tiles are counted from token 0, so that the order of a sum depends on
/// positions alone.
const SUM_TOKENS: usize = 128;

impl Pool {
    /// The tokens that one head selects, in order of position.
    pub(super) fn selected(
        &self,
        head: usize,
        probes: &Probes<'_, Buffer>,
        selection: &Selection<'_>,
    ) -> Vec<usize> {
        let first = selection.kv_heads[head] * probes.group;
        let q_heads = first..first + probes.group;
        match selection.rule {
            SelectionRule::Blocks {
                block_len,
                probe_window,
                probe_stride,
            } => {
                let means = || self.means(probes, q_heads, [probe_window, probe_stride]);
                self.best_blocks(head, means, selection, block_len)
            }
            SelectionRule::Windows {
                window_len,
                window_before,
            } => {
                let queries = || self.queries(probes, q_heads);
                self.best_windows(head, queries, selection, [window_len, window_before])
            }
        }
    }

    fn best_blocks(
        &self,
        head: usize,
        probes: impl FnOnce() -> PackedMatrix,
        selection: &Selection<'_>,
        block_len: usize,
    ) -> Vec<usize> {
        let blocks = selection.blocks(head, block_len);
        let tokens = blocks.start * block_len..blocks.end * block_len;
        let count = (selection.rows / block_len).min(blocks.len());
        if count == blocks.len() {
            return tokens.collect();
        }
        let scores = self.block_scores(head, &probes(), tokens, block_len);
        whole_blocks(blocks.start, highest(&scores, count), block_len)
    }

    /// The scores of whole blocks.
    fn block_scores(
        &self,
        head: usize,
        probes: &PackedMatrix,
        tokens: Range<usize>,
        block_len: usize,
    ) -> Vec<f32> {
        let scores = self.scores(head, probes, tokens, largest);
        scores.chunks(block_len).map(largest).collect()
    }

    fn best_windows(
        &self,
        head: usize,
        probes: impl FnOnce() -> PackedMatrix,
        selection: &Selection<'_>,
        window: [usize; 2],
    ) -> Vec<usize> {
        let eligible = selection.eligible[head].clone();
        let count = selection.rows.min(eligible.len());
        if count == eligible.len() {
            return eligible.collect();
        }
        let scores = self.shares(head, &probes(), eligible.clone(), selection);
        let mut order = highest(&scores, count);
        order.sort_unstable_by(|a, b| better(&scores, *a, *b));
        let taken = windows(&order, eligible.len(), window);
        let tokens = eligible.zip(taken);
        tokens
            .filter_map(|(token, taken)| taken.then_some(token))
            .collect()
    }

    /// For each token the logarithm of its largest share.
    fn shares(
        &self,
        head: usize,
        probes: &PackedMatrix,
        tokens: Range<usize>,
        selection: &Selection<'_>,
    ) -> Vec<f32> {
        let scale = selection.scale(self.head_dim);
        let lse = self.log_sums(head, probes, tokens.clone(), scale);
        let share = |products: &[f32]| {
            let logs = products
                .iter()
                .zip(&lse)
                .map(|(x, lse)| finite(*x, scale) - lse);
            logs.fold(f32::NEG_INFINITY, f32::max)
        };
        self.scores(head, probes, tokens, share)
    }

    /// The tokens that one head drops, in order of position.
    pub(super) fn lowest(
        &self,
        head: usize,
        probes: &Probes<'_, Buffer>,
        selection: &Selection<'_>,
    ) -> Vec<usize> {
        let block_len = selection.rule.block_len();
        let (blocks, count) = (
            selection.blocks(head, block_len),
            selection.rows / block_len,
        );
        let tokens = blocks.start * block_len..blocks.end * block_len;
        if count == 0 || count == blocks.len() {
            return tokens.take(count * block_len).collect();
        }
        let first = selection.kv_heads[head] * probes.group;
        let q_heads = first..first + probes.group;
        let scores = match selection.rule {
            SelectionRule::Blocks {
                probe_window,
                probe_stride,
                ..
            } => {
                let means = self.means(probes, q_heads, [probe_window, probe_stride]);
                self.block_scores(head, &means, tokens, block_len)
            }
            SelectionRule::Windows {
                window_len,
                window_before,
            } => {
                let shares = self.shares(head, &self.queries(probes, q_heads), tokens, selection);
                let window = [window_len, window_before];
                let best = |token| largest(&shares[around(token, shares.len(), window)]);
                (0..shares.len()).into_par_iter().map(best).collect()
            }
        };
        let lowness: Vec<f32> = scores.iter().map(|score| -score).collect();
        whole_blocks(blocks.start, highest(&lowness, count), block_len)
    }

    /// Query `t` of a query head.
    fn query<'a>(&self, probes: &Probes<'a, Buffer>, q_head: usize, t: usize) -> &'a [f32] {
        let q = probes.q;
        let at = q.start + probes.row(t) * q.stride + q_head * self.head_dim;
        &q.buffer[at..at + self.head_dim]
    }

    /// The queries of some heads, as the weight of a GEMM.
    fn queries(&self, probes: &Probes<'_, Buffer>, q_heads: Range<usize>) -> PackedMatrix {
        let query = |q_head| (0..probes.rows).flat_map(move |t| self.query(probes, q_head, t));
        let queries: Vec<f32> = q_heads.flat_map(query).copied().collect();
        PackedMatrix::pack(
            &queries,
            queries.len() / self.head_dim,
            self.head_dim,
            false,
        )
    }

    /// The means over windows of these queries.
    fn means(
        &self,
        probes: &Probes<'_, Buffer>,
        q_heads: Range<usize>,
        [window, stride]: [usize; 2],
    ) -> PackedMatrix {
        let (dim, window) = (self.head_dim, window.min(probes.rows));
        let mut means = Vec::new();
        for q_head in q_heads {
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

    /// The score of each token, made of its products with all probes.
    fn scores(
        &self,
        head: usize,
        probes: &PackedMatrix,
        tokens: Range<usize>,
        score: impl Fn(&[f32]) -> f32 + Sync,
    ) -> Vec<f32> {
        let width = probes.outputs();
        let mut all = vec![0f32; tokens.len()];
        let tasks = all.par_chunks_mut(SCORE_TOKENS).enumerate();
        tasks.for_each(|(task, scores)| {
            let first = tokens.start + task * SCORE_TOKENS;
            let mut products = Scratch::take(scores.len() * width);
            self.products(head, probes, first..first + scores.len(), &mut products);
            let rows = scores.iter_mut().zip(products.chunks(width));
            rows.for_each(|(to, products)| *to = score(products));
        });
        all
    }

    /// For each probe ln of the sum of e^(scale product) over the tokens.
    fn log_sums(
        &self,
        head: usize,
        probes: &PackedMatrix,
        tokens: Range<usize>,
        scale: f32,
    ) -> Vec<f32> {
        let width = probes.outputs();
        let tiles = tokens.start / SUM_TOKENS..tokens.end.div_ceil(SUM_TOKENS);
        let tile = |tile: usize| {
            let first = tokens.start.max(tile * SUM_TOKENS);
            let end = tokens.end.min((tile + 1) * SUM_TOKENS);
            let mut products = Scratch::take((end - first) * width);
            self.products(head, probes, first..end, &mut products);
            let (mut max, mut sum) = (vec![f32::NEG_INFINITY; width], vec![0.0; width]);
            sum_exponentials(Isa::best(), &mut products, scale, &mut max, &mut sum);
            (max, sum)
        };
        let partial: Vec<(Vec<f32>, Vec<f32>)> = tiles.into_par_iter().map(tile).collect();
        let lse = |probe: usize| {
            let max = partial
                .iter()
                .fold(f32::NEG_INFINITY, |m, (max, _)| m.max(max[probe]));
            let terms = partial
                .iter()
                .map(|(m, sum)| sum[probe] * math::exp(m[probe] - max));
            max + terms.sum::<f32>().ln()
        };
        (0..width).map(lse).collect()
    }
}

/// scale * product. One that overflows becomes the largest finite number, and a sum of infinities of both signs the
/// least one, so that nothing that follows is infinite.
#[allow(clippy::manual_clamp, reason = "clamp keeps NaN")]
#[inline(always)]
fn finite(product: f32, scale: f32) -> f32 {
    (scale * product).max(-f32::MAX).min(f32::MAX)
}

for_each_isa! {
    /// Makes products [`finite`]; of each column x of their rows the maximum, and the sum of e^(x - maximum).
    fn sum_exponentials(products: &mut [f32], scale: f32, max: &mut [f32], sum: &mut [f32]) {
        for row in products.chunks_mut(max.len()) {
            for (x, max) in row.iter_mut().zip(max.iter_mut()) {
                *x = finite(*x, scale);
                *max = max.max(*x);
            }
        }
        for row in products.chunks(max.len()) {
            for ((x, max), sum) in row.iter().zip(max.iter()).zip(sum.iter_mut()) {
                *sum += math::exp(*x - *max);
            }
        }
    }
}

fn largest(scores: &[f32]) -> f32 {
    scores.iter().copied().fold(f32::NEG_INFINITY, f32::max)
}

/// The tokens of blocks, which are counted from block `first`, in order of position.
fn whole_blocks(first: usize, mut blocks: Vec<usize>, block_len: usize) -> Vec<usize> {
    blocks.sort_unstable();
    let tokens = blocks.into_iter().map(|block| (first + block) * block_len);
    tokens.flat_map(|token| token..token + block_len).collect()
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

/// Which of `len` tokens are in windows around the best ones: as many as `best` has, which are the best, best first.
///
/// `window`: its length, and the tokens of a whole one before its best. No other token can be a window's best: each of
/// `best` is in a window once it has been looked at, so before the last of them the windows have fewer tokens than
/// wanted.
fn windows(best: &[usize], len: usize, window: [usize; 2]) -> Vec<bool> {
    let mut taken = vec![false; len];
    let mut left = best.len();
    for &best in best {
        if taken[best] || left == 0 {
            continue;
        }
        let width = window[0].min(left);
        let first = window_begin(best, width, len, window);
        let before = taken[first..best].iter().rposition(|taken| *taken);
        let behind = taken[best..first + width].iter().position(|taken| *taken);
        let begin = before.map_or(first, |at| first + at + 1);
        let end = behind.map_or(first + width, |at| best + at);
        taken[begin..end].fill(true);
        left -= end - begin;
    }
    taken
}
