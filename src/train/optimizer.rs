//! AdamW on plain f32 slices, with a global gradient norm whose bits do not depend on the number of threads.
//!
//! Decoupled weight decay (Loshchilov & Hutter 2019, algorithm 2), in the common form where the learning rate
//! multiplies the decay too. For gradient `g` (after clipping), update number `t` = 1, 2, ...:
//!
//! ```text
//! m <- beta1 m + (1 - beta1) g            v <- beta2 v + (1 - beta2) g^2
//! m^ = m / (1 - beta1^t)                  v^ = v / (1 - beta2^t)          bias correction
//! w <- w - lr * lr_scale * (m^ / (sqrt(v^) + eps) + weight_decay * w)     decay only where `decay`
//! ```
//!
//! Every element is computed alone and in f32 with scalars prepared in f64, so any split over threads gives the
//! same bits. Gradients are looked at before the first write: a step either happens wholly or not at all.

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::error::{Result, TrainError};

/// Largest usable magnitude of a gradient and of the global norm: above it `g^2` overflows f32, and a second
/// moment of infinity would freeze its weight for good.
pub const MAX_GRADIENT: f64 = 1e18;

/// Smallest value a learned gate above zero may take, see [`Constraint::Gate`].
pub const MIN_GATE: f32 = 1e-4;

/// Elements in one partial sum of the norm. Part of the result's definition: another number, other bits.
const NORM_CHUNK: usize = 4096;
/// Elements one task updates; of no influence on the result.
const UPDATE_CHUNK: usize = 1 << 15;

/// What an updated value must satisfy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Constraint {
    /// Nothing.
    #[default]
    None,
    /// A past gate: 0 stays 0 (the head does not read the past, and no gradient could bring it back), anything
    /// above 0 is kept at [`MIN_GATE`] or more, since the operation adds `ln gate` to the scores.
    Gate,
}

/// One parameter with its gradient and its two moments, all of one length.
#[derive(Debug)]
pub struct ParamSlice<'a> {
    /// Name for messages.
    pub name: &'a str,
    /// The weights, f32 master copy.
    pub values: &'a mut [f32],
    /// Gradient of the mean loss.
    pub grads: &'a [f32],
    /// First moment; zeros at the start.
    pub m: &'a mut [f32],
    /// Second moment; zeros at the start.
    pub v: &'a mut [f32],
    /// Whether weight decay applies, see [`decays`].
    pub decay: bool,
    /// Multiplies the learning rate; 1 for most.
    pub lr_scale: f32,
    /// What the values must satisfy after the update.
    pub constraint: Constraint,
}

/// Whether weight decay applies to the parameter `name` of this shape: to matrices, not to norms, biases and
/// gates (one dimension), and to the token embedding only if asked.
pub fn decays(name: &str, shape: &[usize], decay_embeddings: bool) -> bool {
    shape.len() >= 2 && (decay_embeddings || !name.contains("embed_tokens"))
}

/// Global norm of all gradients: `sqrt(sum g^2)`, summed in f64. Squares of f32 cannot overflow there, so the
/// norm is finite exactly if every gradient is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GradNorm(f64);

impl GradNorm {
    /// Norm over `grads`, in the order given. Partial sums cover fixed chunks and are added in fixed order.
    pub fn of(grads: &[&[f32]]) -> Self {
        let sums: Vec<Vec<f64>> = grads
            .par_iter()
            .map(|g| g.par_chunks(NORM_CHUNK).map(sum_of_squares).collect())
            .collect();
        Self(sums.iter().flatten().sum::<f64>().sqrt())
    }

    /// The norm.
    pub fn value(self) -> f64 {
        self.0
    }

    /// Factor that brings the norm down to `clip_norm`: `min(1, clip_norm / norm)`, and 1 without a limit.
    /// Never above the exact quotient, so the clipped norm does not exceed the limit by more than the rounding
    /// of the products.
    pub fn clip_factor(self, clip_norm: Option<f64>) -> f32 {
        match clip_norm {
            Some(limit) if self.0 > limit => (limit / self.0) as f32,
            _ => 1.0,
        }
    }
}

/// Eight interleaved sums so that the loop vectorises, added up in fixed order.
fn sum_of_squares(chunk: &[f32]) -> f64 {
    const LANES: usize = 8;
    let mut lanes = [0.0f64; LANES];
    let rows = chunk.chunks_exact(LANES);
    let rest = rows.remainder();
    for row in rows {
        for (lane, &g) in lanes.iter_mut().zip(row) {
            *lane += f64::from(g) * f64::from(g);
        }
    }
    for (lane, &g) in lanes.iter_mut().zip(rest) {
        *lane += f64::from(g) * f64::from(g);
    }
    lanes.iter().sum()
}

/// The optimizer's constants; its state (moments and `t`) belongs to the caller.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct AdamW {
    beta1: f64,
    beta2: f64,
    eps: f64,
    weight_decay: f64,
}

impl AdamW {
    /// # Errors
    /// [`TrainError::Config`] for betas outside [0, 1), an eps that is not positive in f32, or a negative decay.
    pub fn new(betas: [f64; 2], eps: f64, weight_decay: f64) -> Result<Self> {
        if betas.iter().any(|b| !(0.0..1.0).contains(b)) {
            return Err(TrainError::config(
                "optimizer.betas",
                "two numbers in [0, 1)",
                format!("{betas:?}"),
            ));
        }
        if !(eps.is_finite() && eps as f32 > 0.0) {
            return Err(TrainError::config(
                "optimizer.eps",
                "a finite number > 0 (as f32)",
                eps,
            ));
        }
        if !(weight_decay.is_finite() && weight_decay >= 0.0) {
            return Err(TrainError::config(
                "optimizer.weight_decay",
                "a finite number >= 0",
                weight_decay,
            ));
        }
        Ok(Self {
            beta1: betas[0],
            beta2: betas[1],
            eps,
            weight_decay,
        })
    }

    /// One update. `lr`: learning rate of the step. `t`: number of this update, from 1, skipped steps not
    /// counted. `clip_factor`: multiplies the gradients, see [`GradNorm::clip_factor`].
    ///
    /// # Errors
    /// [`TrainError::Argument`] for lengths that differ or scalars out of range,
    /// [`TrainError::UnusableGradient`] for a gradient that is not finite. Nothing was changed then.
    pub fn step(
        &self,
        params: &mut [ParamSlice<'_>],
        lr: f64,
        t: u64,
        clip_factor: f32,
    ) -> Result<()> {
        validate(params, lr, t, clip_factor)?;
        let bias = |beta: f64| -(t as f64 * beta.ln()).exp_m1();
        let (bias1, bias2) = (bias(self.beta1), bias(self.beta2));
        params.par_iter_mut().for_each(|p| {
            let lr = lr * f64::from(p.lr_scale);
            let scalars = Scalars {
                clip: clip_factor,
                beta1: self.beta1 as f32,
                one_minus_beta1: (1.0 - self.beta1) as f32,
                beta2: self.beta2 as f32,
                one_minus_beta2: (1.0 - self.beta2) as f32,
                step_size: (lr / bias1) as f32,
                inv_sqrt_bias2: (1.0 / bias2.sqrt()) as f32,
                eps: self.eps as f32,
                keep: if p.decay {
                    (1.0 - lr * self.weight_decay) as f32
                } else {
                    1.0
                },
                constraint: p.constraint,
            };
            let values = p.values.par_chunks_mut(UPDATE_CHUNK);
            let grads = p.grads.par_chunks(UPDATE_CHUNK);
            let moments =
                p.m.par_chunks_mut(UPDATE_CHUNK)
                    .zip(p.v.par_chunks_mut(UPDATE_CHUNK));
            values
                .zip(grads)
                .zip(moments)
                .for_each(|((w, g), (m, v))| update(&scalars, w, g, m, v));
        });
        Ok(())
    }
}

struct Scalars {
    clip: f32,
    beta1: f32,
    one_minus_beta1: f32,
    beta2: f32,
    one_minus_beta2: f32,
    step_size: f32,
    inv_sqrt_bias2: f32,
    eps: f32,
    keep: f32,
    constraint: Constraint,
}

fn update(s: &Scalars, values: &mut [f32], grads: &[f32], m: &mut [f32], v: &mut [f32]) {
    for (((w, &g), m), v) in values.iter_mut().zip(grads).zip(m).zip(v) {
        let g = g * s.clip;
        *m = s.beta1 * *m + s.one_minus_beta1 * g;
        *v = s.beta2 * *v + s.one_minus_beta2 * (g * g);
        let next = s.keep * *w - s.step_size * (*m / (v.sqrt() * s.inv_sqrt_bias2 + s.eps));
        *w = match s.constraint {
            Constraint::None => next,
            Constraint::Gate if *w == 0.0 => 0.0,
            Constraint::Gate => next.max(MIN_GATE),
        };
    }
}

fn validate(params: &[ParamSlice<'_>], lr: f64, t: u64, clip_factor: f32) -> Result<()> {
    if !(lr.is_finite() && lr >= 0.0) {
        return Err(TrainError::argument("lr", "a finite number >= 0", lr));
    }
    if t == 0 {
        return Err(TrainError::argument(
            "t",
            "the number of this update, from 1",
            t,
        ));
    }
    if !(0.0..=1.0).contains(&clip_factor) {
        return Err(TrainError::argument(
            "clip_factor",
            "a number in [0, 1]",
            clip_factor,
        ));
    }
    for p in params {
        let len = p.values.len();
        for (part, got) in [("grads", p.grads.len()), ("m", p.m.len()), ("v", p.v.len())] {
            if got != len {
                return Err(TrainError::argument(
                    format!("{part} of `{}`", p.name),
                    format!("{len} elements"),
                    got,
                ));
            }
        }
        if !(p.lr_scale.is_finite() && p.lr_scale >= 0.0) {
            return Err(TrainError::argument(
                format!("lr_scale of `{}`", p.name),
                "a finite number >= 0",
                p.lr_scale,
            ));
        }
    }
    params
        .par_iter()
        .try_for_each(|p| match first_unusable(p.grads) {
            Some(index) => Err(TrainError::UnusableGradient {
                tensor: p.name.to_owned(),
                index,
                value: p.grads[index],
            }),
            None => Ok(()),
        })
}

fn first_unusable(grads: &[f32]) -> Option<usize> {
    grads
        .par_iter()
        .with_min_len(UPDATE_CHUNK)
        .position_first(|g| g.is_nan() || g.abs() > MAX_GRADIENT as f32)
}
