//! AdamW on the CPU, with a global gradient norm whose bits do not depend on the number of threads.
//!
//! Decoupled weight decay (Loshchilov & Hutter 2019, algorithm 2). The learning rate multiplies the decay too.
//! For gradient `g` after clipping and update number `t` = 1, 2, ...:
//!
//! ```text
//! m <- beta1 m + (1 - beta1) g            v <- beta2 v + (1 - beta2) g^2
//! m^ = m / (1 - beta1^t)                  v^ = v / (1 - beta2^t)
//! w <- w - lr (m^ / (sqrt(v^) + eps) + weight_decay w)
//! ```
//!
//! Elements are independent. They are computed in f32, with scalars computed in f64.

use std::ops::Range;

use rayon::prelude::*;

use super::Buffer;
use crate::device::{AdamW, GradTensor, Update};

/// Elements of one partial sum of the norm. It defines the order of the sum, and with it the bits.
pub(super) const NORM_CHUNK: usize = 4096;
/// Elements that one task updates; does not affect the result.
const UPDATE_CHUNK: usize = 1 << 15;

pub(super) fn step(
    tensors: &mut [GradTensor<'_, Buffer>],
    squares: &[f64],
    update: &AdamW,
) -> Update {
    let grad_norm = squares.iter().sum::<f64>().sqrt();
    let applied = grad_norm.is_finite() && !update.only_measure;
    if applied {
        let clip = match update.clip_norm {
            Some(limit) if grad_norm > limit => limit / grad_norm,
            _ => 1.0,
        };
        let changed = tensors.par_iter_mut().filter(|t| t.lr_scale != 0.0);
        changed.for_each(|t| apply(t, &Scalars::new(t, update, clip)));
    }
    Update { grad_norm, applied }
}

/// `sum g^2` of each chunk in f64, where squares of f32 cannot overflow. All are finite if and only if every gradient
/// is.
pub(super) fn chunk_squares(grads: &[(&Buffer, Range<usize>)]) -> Vec<f64> {
    let sums = |(grads, range): &(&Buffer, Range<usize>)| -> Vec<f64> {
        let chunks = grads[range.clone()].par_chunks(NORM_CHUNK);
        chunks.map(squares).collect()
    };
    let sums: Vec<Vec<f64>> = grads.par_iter().map(sums).collect();
    sums.into_iter().flatten().collect()
}

/// Eight interleaved sums, so that the loop is vectorized, added in a fixed order.
fn squares(chunk: &[f32]) -> f64 {
    let mut lanes = [0f64; 8];
    let (rows, rest) = chunk.as_chunks::<8>();
    for row in rows.iter().map(|row| &row[..]).chain([rest]) {
        for (lane, g) in lanes.iter_mut().zip(row) {
            *lane += f64::from(*g) * f64::from(*g);
        }
    }
    lanes.iter().sum()
}

/// Scalars of the update of one tensor.
struct Scalars {
    clip: f32,
    betas: [f32; 2],
    rest: [f32; 2],
    step: f32,
    root: f32,
    eps: f32,
    keep: f32,
    floor: Option<f32>,
}

impl Scalars {
    fn new(tensor: &GradTensor<'_, Buffer>, update: &AdamW, clip: f64) -> Self {
        // 1 - beta^t without cancellation at small t.
        let bias = |beta: f64| -(update.step as f64 * beta.ln()).exp_m1();
        let [b1, b2] = update.betas;
        let lr = update.lr * tensor.lr_scale;
        let decay = if tensor.decay {
            lr * update.weight_decay
        } else {
            0.0
        };
        Self {
            clip: clip as f32,
            betas: [b1 as f32, b2 as f32],
            rest: [(1.0 - b1) as f32, (1.0 - b2) as f32],
            step: (lr / bias(b1)) as f32,
            root: (1.0 / bias(b2).sqrt()) as f32,
            eps: update.eps as f32,
            keep: (1.0 - decay) as f32,
            floor: tensor.floor.map(|f| f as f32),
        }
    }
}

fn apply(t: &mut GradTensor<'_, Buffer>, s: &Scalars) {
    let state =
        t.m.par_chunks_mut(UPDATE_CHUNK)
            .zip(t.v.par_chunks_mut(UPDATE_CHUNK));
    t.values[t.range.clone()]
        .par_chunks_mut(UPDATE_CHUNK)
        .zip(t.grads[t.range.clone()].par_chunks(UPDATE_CHUNK))
        .zip(state)
        .for_each(|((values, grads), (m, v))| apply_chunk(s, values, grads, m, v));
}

fn apply_chunk(s: &Scalars, values: &mut [f32], grads: &[f32], m: &mut [f32], v: &mut [f32]) {
    for (((w, g), m), v) in values.iter_mut().zip(grads).zip(m).zip(v) {
        let g = g * s.clip;
        *m = s.betas[0] * *m + s.rest[0] * g;
        *v = s.betas[1] * *v + s.rest[1] * (g * g);
        let next = s.keep * *w - s.step * (*m / (v.sqrt() * s.root + s.eps));
        *w = match s.floor {
            None => next,
            Some(floor) if *w > 0.0 => next.max(floor),
            Some(_) => *w,
        };
    }
}
