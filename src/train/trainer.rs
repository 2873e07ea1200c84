//! The training step: gradients of several groups of sequences, the guard's decision, AdamW, prepared weights.
//!
//! Nothing reaches weights or moments before the guard has seen loss and gradient norm, so a skipped step
//! leaves both as they are. Counters, data and learning rate go on (see [`schedule`](super::schedule)).
//!
//! A step happens or does not. The update of weights and moments is one call of the device and everything before it
//! can be done again, so a step that fails leaves the trainer where it was, and the next try gives the bits of one that
//! never failed. What comes after the update, bringing the new weights into the form that the model computes with, is
//! made up for before the next use if it fails.

mod kept;
mod layers;
mod rehearsal;
mod start;
mod teacher;
mod update;

use std::sync::atomic::{AtomicBool, Ordering};

use layers::Layers;
pub use layers::part_of_rank;
use update::Gradient;

use super::checkpoint::{Checkpoint, Fingerprints};
use super::config::Config;
use super::data::{AsExample, Corpus, Example, ExampleRef, Mixture, Position};
use super::error::{Result, TrainError};
use super::guard::{SkipReason, Verdict};
use super::progress::{Progress, Tensors};
use super::schedule::Schedule;
use super::spread::Spread;
use super::streams::{Gradients, StreamConfig};
use crate::device::Device;
use crate::model::config::ModelConfig;
use crate::model::decoder::Decoder;
use crate::model::session::score;
use crate::ranks::Ranks;

/// What a step did.
#[derive(Clone, Debug, PartialEq)]
pub struct StepReport {
    /// Its number, from 0.
    pub step: u64,
    /// Mean negative log-probability of its targets, each by its weight; of a policy gradient its own loss.
    pub loss: f64,
    /// Mean divergence from the teacher, each target's by its weight, if there is a teacher.
    pub divergence: Option<f64>,
    /// Norm of all gradients before clipping.
    pub grad_norm: f64,
    /// Learning rate.
    pub lr: f64,
    /// Tokens predicted.
    pub tokens: usize,
    /// Why it was skipped, if it was.
    pub skipped: Option<SkipReason>,
    /// Whether the guard ends the run.
    pub stop: bool,
    /// Log-probabilities of the targets of each sequence that this rank computed, before the update.
    pub log_probabilities: Vec<Vec<f64>>,
}

/// A step's sequences, and where in the data they lie.
#[derive(Debug)]
struct Ahead {
    from: Position,
    batches: Vec<Vec<Example>>,
    to: Position,
}

impl Ahead {
    fn read(
        config: &Config,
        corpus: &Corpus,
        data: &Mixture<'_>,
        from: Position,
        stop: Stop,
    ) -> Result<Self> {
        let (training, mut to) = (&config.training, from.clone());
        let batch = |_| {
            stop.check()?;
            data.next_batch(corpus, training.seed, &mut to, training.batch)
        };
        let batches = (0..training.accumulation).map(batch);
        let batches = batches.collect::<Result<_>>()?;
        Ok(Self { from, batches, to })
    }
}

/// What ends a step early.
#[derive(Clone, Copy, Debug, Default)]
struct Stop(Option<&'static AtomicBool>);

impl Stop {
    fn check(self) -> Result<()> {
        match self.0 {
            Some(flag) if flag.load(Ordering::SeqCst) => Err(TrainError::Interrupted),
            _ => Ok(()),
        }
    }
}

/// A model in training.
#[derive(Debug)]
pub struct Trainer<D: Device> {
    config: Config,
    schedule: Schedule,
    model: Decoder<D>,
    values: Vec<D::Buffer>,
    /// Moments of what this rank owns, part by part.
    m: Vec<D::Buffer>,
    v: Vec<D::Buffer>,
    /// Of groups that are computed side by side. The first has the sums of a step.
    gradients: Vec<Gradients<D>>,
    spread: Spread<D>,
    /// Where the model's layers are, if they are spread over ranks.
    layers: Option<Layers>,
    /// Whose probabilities are learned.
    teacher: Option<Decoder<D>>,
    /// Which tensors change.
    updated: Vec<bool>,
    progress: Progress,
    /// What the next step will work on, read while the last one ran.
    ahead: Option<Ahead>,
    /// Whether the model's own weights are those of before the last update.
    stale: bool,
    stop: Stop,
}

impl<D: Device> Trainer<D> {
    /// Ends steps and validations with [`TrainError::Interrupted`] once `flag` is set, between two segments or
    /// sequences. The run is where it was then. Of several ranks none stops in the middle, since the others would wait
    /// for it: see [`Trainer::any`].
    pub fn interrupt_by(&mut self, flag: &'static AtomicBool) {
        if self.ranks().world() == 1 {
            self.stop = Stop(Some(flag));
        }
    }

    /// The ranks of the run.
    pub fn ranks(&self) -> &Ranks<D> {
        match &self.layers {
            Some(_) => self.model.stage.ranks(),
            None => &self.spread.ranks,
        }
    }

    /// Whether each of these is so on any rank. All ranks ask together, and hear the same.
    ///
    /// # Errors
    /// [`TrainError::Ranks`].
    pub fn any<const N: usize>(&self, here: [bool; N]) -> Result<[bool; N]> {
        let doing = "the ranks agree whether to go on";
        let all = here.map(f64::from).to_vec();
        let all = self.ranks().concat(all, doing)?;
        Ok(std::array::from_fn(|i| {
            all.iter().skip(i).step_by(N).any(|there| *there != 0.0)
        }))
    }

    /// Makes up for what the last step may have left undone after its update, see [`trainer`](self).
    ///
    /// # Errors
    /// [`TrainError::Device`].
    pub fn settle(&mut self) -> Result<()> {
        if self.stale {
            self.round()?;
            self.refresh()?;
            self.stale = false;
        }
        Ok(())
    }

    /// The model as it is now, or this rank's layers of it; after a step whose last part failed, once
    /// [`Trainer::settle`] has succeeded.
    pub fn model(&self) -> &Decoder<D> {
        &self.model
    }

    /// The configuration of the whole model.
    pub fn model_config(&self) -> &ModelConfig {
        let layers = self.layers.as_ref();
        layers.map_or(&self.model.config, |layers| &layers.whole)
    }

    /// The run's configuration.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Where the run is.
    pub fn progress(&self) -> &Progress {
        &self.progress
    }

    /// Weights and moments, read back. On ranks but 0 the moments of what others own are zeros; where ranks have layers
    /// each, the tensors of others are empty there.
    ///
    /// # Errors
    /// [`TrainError::Device`], [`TrainError::Ranks`].
    pub fn tensors(&self) -> Result<Tensors> {
        let device = &self.model.device;
        let one = |b: &D::Buffer| Ok(device.read(b, 0..device.len(b))?);
        let values = self.values.iter().map(one);
        let mut tensors = Tensors::new(values.collect::<Result<_>>()?);
        self.spread.collect(device, &self.m, &mut tensors.m)?;
        self.spread.collect(device, &self.v, &mut tensors.v)?;
        match &self.layers {
            Some(layers) => layers.collect(self.ranks(), &tensors),
            None => Ok(tensors),
        }
    }

    /// All that a resumed run needs. `extra`: files for the model folder. Whole on rank 0 only, see
    /// [`Trainer::tensors`].
    ///
    /// # Errors
    /// [`TrainError::Device`], [`TrainError::Ranks`].
    pub fn checkpoint(
        &self,
        data: &Fingerprints,
        extra: &[(String, Vec<u8>)],
    ) -> Result<Checkpoint> {
        Ok(Checkpoint {
            config: self.config.clone(),
            model: self.model_config().clone(),
            tensors: self.tensors()?,
            progress: self.progress.clone(),
            data: data.clone(),
            extra: extra.to_vec(),
        })
    }

    /// One step on the next sequences of the data. Those of the step after it are read meanwhile.
    ///
    /// # Errors
    /// As [`Mixture::next_batch`] and [`Trainer::step_on`]; the run is where it was then.
    /// [`TrainError::Interrupted`] as [`Trainer::interrupt_by`] says.
    pub fn step(&mut self, corpus: &Corpus, data: &Mixture<'_>) -> Result<StepReport> {
        let from = self.progress.position.clone();
        let ready = self.ahead.take().filter(|ahead| ahead.from == from);
        let Ahead { batches, to, .. } = match ready {
            Some(ahead) => ahead,
            None => Ahead::read(&self.config, corpus, data, from, self.stop)?,
        };
        let (config, stop, next) = (self.config.clone(), self.stop, to.clone());
        let (report, ahead) = std::thread::scope(|scope| {
            // Without another thread the next step reads for itself.
            let next = std::thread::Builder::new()
                .spawn_scoped(scope, || Ahead::read(&config, corpus, data, next, stop));
            let report = self.step_on(&batches);
            let next = next.ok().map(|thread| thread.join());
            (report, next)
        });
        let report = report?;
        self.progress.position = to;
        // What could not be read is an error of the step that needs it.
        self.ahead = ahead.and_then(|read| {
            let read = read.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            read.ok()
        });
        Ok(report)
    }

    /// One step on these batches of sequences, whose gradients add up to that of the weighted mean over all targets
    /// (docs/contract.md, section 3).
    ///
    /// # Errors
    /// [`TrainError::Device`], also for weights and breaks that do not fit; [`TrainError::Argument`] for a sequence
    /// without a prediction, for targets none of which has a weight, and for a teacher that is missing.
    pub fn step_on<S: AsExample>(&mut self, batches: &[Vec<S>]) -> Result<StepReport> {
        let sequences: Vec<ExampleRef<'_>> = batches.iter().flatten().map(S::as_example).collect();
        if sequences.iter().any(|s| s.targets() == 0) || sequences.is_empty() {
            let expected = "sequences of at least two tokens";
            return Err(TrainError::argument(
                "batches",
                expected,
                "none or a shorter one",
            ));
        }
        sequences.iter().try_for_each(ExampleRef::check)?;
        let tokens: usize = sequences.iter().map(ExampleRef::targets).sum();
        let weight: f64 = sequences.iter().map(ExampleRef::total_weight).sum();
        if weight.is_nan() || weight <= 0.0 {
            let expected = "a sum above 0 over a step's targets; train with more sequences a step, or leave out those \
                            whose targets all weigh 0";
            return Err(TrainError::argument("weights", expected, weight));
        }
        self.check_teacher()?;
        self.settle()?;
        let Gradient {
            loss,
            divergence,
            log_probabilities,
        } = self.gradient(&sequences, 1.0 / weight)?;
        let step = self.progress.step;
        let lr = self.schedule.lr(step);
        let squares = self.squares()?;
        let grad_norm = self.adamw(lr, &squares, true)?;
        let mut guard = self.progress.guard.clone();
        let verdict = guard.decide(step, self.objective(loss, divergence), grad_norm);
        if verdict == Verdict::Apply {
            self.adamw(lr, &squares, false)?;
            // From here on the step is done.
            self.progress.updates += 1;
            self.stale = true;
        }
        self.progress.guard = guard;
        self.progress.step += 1;
        self.progress.tokens += tokens as u64;
        match self.settle() {
            Ok(()) => {}
            // The others are not where this one is.
            Err(error) if self.ranks().world() > 1 => return Err(error),
            Err(error) => tracing::warn!("{error}; tried again before the next use of the model"),
        }
        let (skipped, stop) = match verdict {
            Verdict::Apply => (None, false),
            Verdict::Skip(reason) => (Some(reason), false),
            Verdict::Stop(reason) => (Some(reason), true),
        };
        Ok(StepReport {
            step,
            loss,
            divergence,
            grad_norm,
            lr,
            tokens,
            skipped,
            stop,
            log_probabilities,
        })
    }

    /// Mean negative log-probability over all predicted tokens of `sequences`, whatever they weigh; `None` without any.
    ///
    /// # Errors
    /// [`TrainError::Device`]; [`TrainError::Interrupted`] as [`Trainer::interrupt_by`] says.
    pub fn validate<S: AsExample>(&mut self, sequences: &[S]) -> Result<Option<f64>> {
        self.settle()?;
        let mut sums = Vec::new();
        for sequence in &sequences[self.spread.share(sequences.len())] {
            self.stop.check()?;
            let sequence = sequence.as_example().sequence();
            let scored = score(&self.model, sequence, self.streams().segments_per_step)?;
            if self.model.config.part.ends {
                sums.push(scored.iter().map(|x| f64::from(*x)).sum::<f64>());
            }
        }
        self.model.stage.finish()?;
        let sums = self.ranks().concat(sums, "losses are added up")?;
        let count: usize = sequences.iter().map(|s| s.as_example().targets()).sum();
        Ok((count > 0).then(|| -sums.iter().sum::<f64>() / count as f64))
    }

    fn streams(&self) -> StreamConfig {
        let training = &self.config.training;
        StreamConfig {
            tbptt: training.tbptt,
            segments_per_step: match training.segments_per_step {
                0 => usize::MAX,
                n => n,
            },
            recompute: training.recompute,
        }
    }
}
