//! The learning rate as a pure function of the step's index: linear warm-up, then constant, cosine, or
//! warm-up-stable-decay.
//!
//! **Skipped steps.** A step that the guard skips still counts: the next one has the next index, the next data
//! and the next learning rate. So the learning rate and the data of step `i` never depend on what happened
//! before, and a resumed run needs nothing but the index. (The optimizer's own count `t`, used for bias
//! correction, counts applied updates only, because a skipped step leaves the moments alone.)

use serde::{Deserialize, Serialize};

use super::error::{Result, TrainError};

/// Shape of the learning rate after the warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ScheduleKind {
    /// Stays at the peak.
    Constant,
    /// Half a cosine from the peak to the minimum (Loshchilov & Hutter 2017, SGDR, without restarts).
    Cosine,
    /// Stays at the peak, then falls to the minimum over the last `decay_steps` with the shape `1 - sqrt(x)`
    /// (Hägele et al. 2024).
    Wsd,
}

/// A learning-rate schedule; [`Schedule::lr`] is all there is to it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Schedule {
    kind: ScheduleKind,
    peak_lr: f64,
    min_lr_ratio: f64,
    warmup_steps: u64,
    decay_start: u64,
    decay_steps: u64,
}

impl Schedule {
    /// A schedule for a run of `steps` steps.
    ///
    /// `decay_steps`: how long the fall from peak to minimum takes. `None` means all steps after the warm-up for
    /// cosine, and the last fifth of the run for wsd. A cosine starts falling after the warm-up, wsd so that it
    /// is through at the end of the run; past its fall each stays at `peak_lr * min_lr_ratio`.
    ///
    /// # Errors
    /// [`TrainError::Config`] where a number is out of range or the phases do not fit into `steps`.
    pub fn new(
        kind: ScheduleKind,
        peak_lr: f64,
        steps: u64,
        warmup_steps: u64,
        decay_steps: Option<u64>,
        min_lr_ratio: f64,
    ) -> Result<Self> {
        if !(peak_lr.is_finite() && peak_lr >= 0.0) {
            return Err(TrainError::config(
                "schedule.lr",
                "a finite number >= 0",
                peak_lr,
            ));
        }
        if !(0.0..=1.0).contains(&min_lr_ratio) {
            return Err(TrainError::config(
                "schedule.min_lr_ratio",
                "a number in [0, 1]",
                min_lr_ratio,
            ));
        }
        if warmup_steps > steps {
            return Err(TrainError::config(
                "schedule.warmup_steps",
                format!("at most `steps` = {steps}"),
                warmup_steps,
            ));
        }
        let after_warmup = steps - warmup_steps;
        let decay_steps = match (kind, decay_steps) {
            (ScheduleKind::Constant, _) => 0,
            (_, Some(given)) if given > after_warmup => {
                return Err(TrainError::config(
                    "schedule.decay_steps",
                    format!("at most the {after_warmup} steps after the warm-up"),
                    given,
                ));
            }
            (_, Some(given)) => given,
            (ScheduleKind::Cosine, None) => after_warmup,
            (ScheduleKind::Wsd, None) => (steps / 5).min(after_warmup),
        };
        let decay_start = match kind {
            ScheduleKind::Cosine => warmup_steps,
            ScheduleKind::Constant | ScheduleKind::Wsd => steps - decay_steps,
        };
        Ok(Self {
            kind,
            peak_lr,
            min_lr_ratio,
            warmup_steps,
            decay_start,
            decay_steps,
        })
    }

    /// Learning rate of step `step`, counted from 0, skipped steps included.
    ///
    /// Warm-up: `peak * (step + 1) / warmup_steps`, so step 0 already learns and step `warmup_steps - 1` is at
    /// the peak. The fall would reach the minimum at the first step after it.
    pub fn lr(&self, step: u64) -> f64 {
        if step < self.warmup_steps {
            return self.peak_lr * ((step + 1) as f64 / self.warmup_steps as f64);
        }
        if self.kind == ScheduleKind::Constant || step < self.decay_start {
            return self.peak_lr;
        }
        let into_decay = step - self.decay_start;
        if into_decay >= self.decay_steps {
            return self.peak_lr * self.min_lr_ratio;
        }
        let x = into_decay as f64 / self.decay_steps as f64;
        let remaining = match self.kind {
            ScheduleKind::Constant => 1.0,
            ScheduleKind::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * x).cos()),
            ScheduleKind::Wsd => 1.0 - x.sqrt(),
        };
        self.peak_lr * (self.min_lr_ratio + (1.0 - self.min_lr_ratio) * remaining)
    }
}
