//! Sink logits (docs/contract.md, section 2): attention's output times what the sink of a head leaves of it.
//!
//! A row and head is computed by itself. The gradient of a logit is summed in f64 over the rows of a span, in ascending
//! order.

use rayon::prelude::*;

use super::math::{exp, for_each_isa, sum_lanes};
use crate::isa::Isa;

/// Least number of elements per task.
const TASK: usize = 1 << 14;

/// Rows of heads, `stride` elements apart, with their log-sum-exp and the logits of the heads.
#[derive(Clone, Copy)]
pub(super) struct Sinks<'a> {
    /// `[heads]`.
    pub logits: &'a [f32],
    /// Elements of a head.
    pub dim: usize,
    /// Where the log-sum-exp of each row's first head is, and how far that of the next head is from it.
    pub places: &'a [[usize; 2]],
    pub lse: &'a [f32],
    pub out: &'a [f32],
    pub stride: usize,
}

impl<'a> Sinks<'a> {
    fn width(&self) -> usize {
        self.logits.len() * self.dim
    }

    fn min_rows(&self) -> usize {
        TASK.div_ceil(self.width().max(1))
    }

    /// Logit, log-sum-exp and output of the heads of a row.
    fn heads(&self, row: usize) -> impl Iterator<Item = (f32, f32, &'a [f32])> {
        let ([first, step], lse) = (self.places[row], self.lse);
        let out = self.out[row * self.stride..][..self.width()].chunks(self.dim);
        let heads = self.logits.iter().zip(out).enumerate();
        heads.map(move |(head, (logit, out))| (*logit, lse[first + head * step], out))
    }
}

/// What the sink leaves, and what it takes.
#[inline(always)]
fn shares(logit: f32, lse: f32) -> [f32; 2] {
    let e = exp(-(logit - lse).abs());
    let parts = if lse >= logit { [1.0, e] } else { [e, 1.0] };
    parts.map(|part| part / (1.0 + e))
}

/// `y = share * out`, rows of `y` as far apart as `stride`.
pub(super) fn forward(sinks: Sinks<'_>, y: &mut [f32], stride: usize) {
    let width = sinks.width();
    let rows = sinks.places.len();
    if rows * width == 0 {
        return;
    }
    let rows = y.par_chunks_mut(stride.max(width)).take(rows).enumerate();
    rows.with_min_len(sinks.min_rows()).for_each(|(row, y)| {
        let heads = y[..width].chunks_mut(sinks.dim).zip(sinks.heads(row));
        heads.for_each(|(y, (logit, lse, out))| {
            let [share, _] = shares(logit, lse);
            y.iter_mut().zip(out).for_each(|(y, out)| *y = share * out);
        });
    });
}

/// Gradients by the upstream `d_y`: `d_out`, and that of the log-sum-exp of all heads of a row after the other, which
/// is returned.
pub(super) fn backward(
    sinks: Sinks<'_>,
    (d_y, d_y_stride): (&[f32], usize),
    (d_out, stride): (&mut [f32], usize),
) -> Vec<f32> {
    let (isa, width, heads) = (Isa::best(), sinks.width(), sinks.logits.len());
    let rows = sinks.places.len();
    let mut d_lse = vec![0.0; rows * heads];
    if rows * width == 0 {
        return d_lse;
    }
    let all = d_out.par_chunks_mut(stride.max(width)).take(rows);
    let all = all.zip(d_lse.par_chunks_mut(heads)).enumerate();
    all.with_min_len(sinks.min_rows())
        .for_each(|(row, (d_out, d_lse))| {
            let d_y = d_y[row * d_y_stride..][..width].chunks(sinks.dim);
            let d = d_out[..width].chunks_mut(sinks.dim).zip(d_y).zip(d_lse);
            d.zip(sinks.heads(row))
                .for_each(|(((d_out, d_y), d_lse), head)| {
                    *d_lse = backward_head(isa, head, d_y, d_out);
                });
        });
    d_lse
}

for_each_isa! {
    fn backward_head(head: (f32, f32, &[f32]), d_y: &[f32], d_out: &mut [f32]) -> f32 {
        let (logit, lse, out) = head;
        let [share, rest] = shares(logit, lse);
        d_out.iter_mut().zip(d_y).for_each(|(d_out, d_y)| *d_out = share * d_y);
        share * rest * sum_lanes([d_y, out], |[d_y, out], sum| d_y.mul_add(out, sum))
    }
}

/// Brings the gradients of the log-sum-exp of `rows` rows, all heads of a row after the other, to the log-sum-exp's own
/// places, and sets `d_logits` to minus their sums.
pub(super) fn place(d_lse: &[f32], rows: usize, to: &mut [f32], d_logits: &mut [f32]) {
    let heads = d_logits.len();
    for (head, d_logit) in d_logits.iter_mut().enumerate() {
        let mut sum = 0.0;
        for (row, to) in to[head * rows..][..rows].iter_mut().enumerate() {
            *to = d_lse[row * heads + head];
            sum += f64::from(*to);
        }
        *d_logit = -sum as f32;
    }
}
