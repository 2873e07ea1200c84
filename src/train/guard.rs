//! Decides, before anything is touched, whether a step's gradients may reach the weights.
//!
//! A step whose loss or gradient norm is not usable is skipped. As an option so is a spike: a loss or norm more
//! than `z_score` standard deviations above the mean of the last applied steps (the idea is llm.c's). Skipped
//! steps are counted, never enter the statistics, and too many of them stop the run; a lasting change of level
//! therefore ends the run with a message instead of silently ending the learning.

use std::collections::VecDeque;
use std::fmt;

use serde::{Deserialize, Serialize};

use super::error::{Result, TrainError};
use super::optimizer::MAX_GRADIENT;

/// When to skip and when to give up.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GuardConfig {
    /// Skip steps this many standard deviations above the mean; `None` looks for non-finite values only.
    pub z_score: Option<f64>,
    /// Number of applied steps the mean is over. No spike is seen before that many have been applied.
    pub window: usize,
    /// Stop when more than this many of the last `skip_horizon` steps were skipped.
    pub max_skipped: usize,
    /// Number of steps over which skipped ones are counted against `max_skipped`.
    pub skip_horizon: u64,
}

impl Default for GuardConfig {
    fn default() -> Self {
        Self {
            z_score: None,
            window: 128,
            max_skipped: 10,
            skip_horizon: 1000,
        }
    }
}

/// Why a step must not reach the weights.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "reason", rename_all = "snake_case")]
pub enum SkipReason {
    /// The loss is NaN or infinite.
    NonFiniteLoss,
    /// A gradient is NaN, infinite, or so large that its square is no f32.
    NonFiniteGradient,
    /// The loss is far above the recent ones.
    LossSpike {
        /// How many standard deviations above the mean.
        z: f64,
    },
    /// The gradient norm is far above the recent ones.
    GradientSpike {
        /// How many standard deviations above the mean.
        z: f64,
    },
}

impl fmt::Display for SkipReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NonFiniteLoss => write!(f, "the loss is not finite"),
            Self::NonFiniteGradient => write!(f, "a gradient is not finite"),
            Self::LossSpike { z } => write!(
                f,
                "the loss is {z:.1} standard deviations above the recent mean"
            ),
            Self::GradientSpike { z } => {
                write!(
                    f,
                    "the gradient norm is {z:.1} standard deviations above the recent mean"
                )
            }
        }
    }
}

/// What to do with a step.
#[derive(Clone, Debug, PartialEq)]
pub enum Verdict {
    /// Apply the update.
    Apply,
    /// Leave weights and optimizer as they are and go on with the next step.
    Skip(SkipReason),
    /// Leave everything as it is, save, and end the run: too many steps were skipped, this one included.
    Stop(SkipReason),
}

/// The guard with its statistics. Serialisable: a restored one decides exactly as the original would.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Guard {
    config: GuardConfig,
    losses: VecDeque<f64>,
    norms: VecDeque<f64>,
    recent_skips: VecDeque<u64>,
    skipped_total: u64,
}

impl Guard {
    /// A guard that has seen nothing.
    ///
    /// # Errors
    /// [`TrainError::Config`] for a window below 2, a horizon of 0, or a z-score that is not positive.
    pub fn new(config: GuardConfig) -> Result<Self> {
        if let Some(z) = config.z_score
            && !(z.is_finite() && z > 0.0)
        {
            return Err(TrainError::config(
                "guard.z_score",
                "a finite number > 0",
                z,
            ));
        }
        if config.window < 2 {
            return Err(TrainError::config(
                "guard.window",
                "at least 2",
                config.window,
            ));
        }
        if config.skip_horizon == 0 {
            return Err(TrainError::config(
                "guard.skip_horizon",
                "at least 1",
                config.skip_horizon,
            ));
        }
        Ok(Self {
            config,
            losses: VecDeque::new(),
            norms: VecDeque::new(),
            recent_skips: VecDeque::new(),
            skipped_total: 0,
        })
    }

    /// The same statistics under other settings; of a shorter window the newest values.
    ///
    /// # Errors
    /// As [`Guard::new`].
    pub fn reconfigured(mut self, config: GuardConfig) -> Result<Self> {
        Self::new(config.clone())?;
        for window in [&mut self.losses, &mut self.norms] {
            let surplus = window.len().saturating_sub(config.window);
            window.drain(..surplus);
        }
        self.config = config;
        Ok(self)
    }

    /// Decides about step `step` (counted from 0, skipped ones included; call it once a step, in order).
    ///
    /// `loss`: mean over the step's tokens. `grad_norm`: global norm before clipping.
    pub fn decide(&mut self, step: u64, loss: f64, grad_norm: f64) -> Verdict {
        let Some(reason) = self.objection(loss, grad_norm) else {
            push_bounded(&mut self.losses, loss, self.config.window);
            push_bounded(&mut self.norms, grad_norm, self.config.window);
            return Verdict::Apply;
        };
        self.skipped_total += 1;
        self.recent_skips.push_back(step);
        let horizon = self.config.skip_horizon;
        while self
            .recent_skips
            .front()
            .is_some_and(|&old| step.saturating_sub(old) >= horizon)
        {
            self.recent_skips.pop_front();
        }
        if self.recent_skips.len() > self.config.max_skipped {
            Verdict::Stop(reason)
        } else {
            Verdict::Skip(reason)
        }
    }

    /// Number of steps skipped since the run began.
    pub fn skipped_total(&self) -> u64 {
        self.skipped_total
    }

    /// Settings in use.
    pub fn config(&self) -> &GuardConfig {
        &self.config
    }

    fn objection(&self, loss: f64, grad_norm: f64) -> Option<SkipReason> {
        if !loss.is_finite() {
            return Some(SkipReason::NonFiniteLoss);
        }
        if grad_norm.is_nan() || grad_norm > MAX_GRADIENT {
            return Some(SkipReason::NonFiniteGradient);
        }
        let limit = self.config.z_score?;
        if self.losses.len() < self.config.window {
            return None;
        }
        let z = standard_score(&self.losses, loss);
        if z > limit {
            return Some(SkipReason::LossSpike { z });
        }
        let z = standard_score(&self.norms, grad_norm);
        (z > limit).then_some(SkipReason::GradientSpike { z })
    }
}

fn push_bounded(window: &mut VecDeque<f64>, value: f64, len: usize) {
    if window.len() == len {
        window.pop_front();
    }
    window.push_back(value);
}

/// How far `value` is above the mean, in standard deviations. Summed afresh each time, oldest first: a running
/// sum would drift, and would not come back to the bit from a saved window. The floor on the deviation keeps
/// rounding noise around a constant from counting as a spike.
fn standard_score(window: &VecDeque<f64>, value: f64) -> f64 {
    let len = window.len() as f64;
    let mean = window.iter().sum::<f64>() / len;
    let variance = window.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / len;
    let deviation = variance
        .sqrt()
        .max(1e-6 * mean.abs())
        .max(f64::MIN_POSITIVE);
    (value - mean) / deviation
}
