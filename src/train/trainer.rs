//! The training step: gradients of several batches, the guard's decision, AdamW, prepared weights.
//!
//! Nothing reaches weights or moments before the guard has seen loss and gradient norm, so a skipped step
//! leaves both as they are. Counters, data and learning rate go on (see [`schedule`](super::schedule)).
//!
//! A step happens or does not. The update of weights and moments is one call of the device and everything before it
//! can be done again, so a step that fails leaves the trainer where it was, and the next try gives the bits of one that
//! never failed. What comes after the update, bringing the new weights into the form that the model computes with, is
//! made up for before the next use if it fails.

use std::sync::atomic::{AtomicBool, Ordering};

use super::checkpoint::{Checkpoint, Fingerprints};
use super::config::Config;
use super::data::{AsExample, Corpus, Example, Mixture, Position};
use super::error::{Result, TrainError};
use super::guard::{Guard, SkipReason, Verdict};
use super::optimizer::{MIN_GATE, decays, updated};
use super::progress::{Progress, Tensors};
use super::schedule::Schedule;
use super::streams::{Gradients, StreamConfig, accumulate};
use crate::device::{AdamW, Device, GradTensor, Kind, Purpose};
use crate::model::config::ModelConfig;
use crate::model::decoder::Decoder;
use crate::model::parameters::{Role, TensorSpec, Weights, index, specs};
use crate::model::session::score;

/// What a step did.
#[derive(Clone, Debug, PartialEq)]
pub struct StepReport {
    /// Its number, from 0.
    pub step: u64,
    /// Mean negative log-probability of its targets, each by its weight.
    pub loss: f64,
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
    m: Vec<D::Buffer>,
    v: Vec<D::Buffer>,
    gradients: Gradients<D>,
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
    /// A trainer at the start of a run, or, with `progress`, where that run is.
    ///
    /// # Errors
    /// [`TrainError::Config`], [`TrainError::Device`], or [`TrainError::Argument`] for tensors of other sizes
    /// than the model's.
    pub fn new(
        device: D,
        model: ModelConfig,
        config: Config,
        tensors: &Tensors,
        progress: Option<Progress>,
    ) -> Result<Self> {
        check_sizes(&specs(&model), tensors)?;
        let lists = [&tensors.values, &tensors.m, &tensors.v];
        let tensor = |device: &D, kind: Kept, i: usize| {
            let mut buffer = room(device, lists[kind as usize][i].len())?;
            device.write(&mut buffer, 0, &lists[kind as usize][i])?;
            Ok(buffer)
        };
        Self::made(device, model, config, progress, tensor)
    }

    /// A trainer at the start of a run, with arbitrary tensors: for dry runs, which only measure memory.
    ///
    /// # Errors
    /// [`TrainError::Config`], [`TrainError::Device`].
    pub fn for_dry_run(device: D, model: ModelConfig, config: Config) -> Result<Self> {
        let lens: Vec<usize> = specs(&model).iter().map(|s| s.role.len()).collect();
        let tensor = |device: &D, _, i: usize| room(device, lens[i]);
        Self::made(device, model.for_dry_run(), config, None, tensor)
    }

    fn made(
        device: D,
        model: ModelConfig,
        config: Config,
        progress: Option<Progress>,
        tensor: impl Fn(&D, Kept, usize) -> crate::device::Result<D::Buffer>,
    ) -> Result<Self> {
        let count = specs(&model).len();
        let all = |kind| -> Result<Vec<D::Buffer>> {
            (0..count).map(|i| Ok(tensor(&device, kind, i)?)).collect()
        };
        let [values, m, v] = [all(Kept::Values)?, all(Kept::M)?, all(Kept::V)?];
        let progress = match progress {
            // The settings may be others than when the run was saved.
            Some(progress) => Progress {
                guard: progress.guard.reconfigured(config.guard.clone())?,
                ..progress
            },
            None => Progress {
                step: 0,
                updates: 0,
                tokens: 0,
                position: Position::default(),
                guard: Guard::new(config.guard.clone())?,
            },
        };
        let specs = specs(&model);
        // The model prepares values of its own, one tensor at a time.
        let weights =
            Weights::prepare(&device, &specs, |i| tensor(&device, Kept::Values, i), true)?;
        let model = Decoder {
            device,
            config: model,
            specs,
            weights,
        };
        let updated = updated(&model.specs, &config.training)?;
        Ok(Self {
            schedule: config.schedule()?,
            gradients: Gradients::of(&model, &updated)?,
            updated,
            config,
            model,
            values,
            m,
            v,
            progress,
            ahead: None,
            stale: false,
            stop: Stop::default(),
        })
    }

    /// Ends steps and validations with [`TrainError::Interrupted`] once `flag` is set, between two segments or
    /// sequences. The run is where it was then.
    pub fn interrupt_by(&mut self, flag: &'static AtomicBool) {
        self.gradients.interrupt_by(flag);
        self.stop = Stop(Some(flag));
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

    /// The model as it is now; after a step whose last part failed, once [`Trainer::settle`] has succeeded.
    pub fn model(&self) -> &Decoder<D> {
        &self.model
    }

    /// The run's configuration.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Where the run is.
    pub fn progress(&self) -> &Progress {
        &self.progress
    }

    /// Weights and moments, read back.
    ///
    /// # Errors
    /// [`TrainError::Device`].
    pub fn tensors(&self) -> Result<Tensors> {
        let device = &self.model.device;
        let read = |list: &[D::Buffer]| -> Result<Vec<Vec<f32>>> {
            let one = |b: &D::Buffer| Ok(device.read(b, 0..device.len(b))?);
            list.iter().map(one).collect()
        };
        Ok(Tensors {
            values: read(&self.values)?,
            m: read(&self.m)?,
            v: read(&self.v)?,
        })
    }

    /// All that a resumed run needs. `extra`: files for the model folder.
    ///
    /// # Errors
    /// [`TrainError::Device`].
    pub fn checkpoint(
        &self,
        data: &Fingerprints,
        extra: &[(String, Vec<u8>)],
    ) -> Result<Checkpoint> {
        Ok(Checkpoint {
            config: self.config.clone(),
            model: self.model.config.clone(),
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
    /// without a prediction and for targets none of which has a weight.
    pub fn step_on<S: AsExample>(&mut self, batches: &[Vec<S>]) -> Result<StepReport> {
        let sequences = batches.iter().flatten().map(AsExample::as_example);
        if sequences.clone().any(|s| s.targets() == 0) || sequences.clone().next().is_none() {
            let expected = "sequences of at least two tokens";
            return Err(TrainError::argument(
                "batches",
                expected,
                "none or a shorter one",
            ));
        }
        sequences.clone().try_for_each(|s| s.check())?;
        let tokens: usize = sequences.clone().map(|s| s.targets()).sum();
        let weight: f64 = sequences.map(|s| s.total_weight()).sum();
        if weight.is_nan() || weight <= 0.0 {
            let expected = "a sum above 0 over a step's targets; train with more sequences a step, or leave out those \
                            whose targets all weigh 0";
            return Err(TrainError::argument("weights", expected, weight));
        }
        self.settle()?;
        let loss = self.gradient(batches, 1.0 / weight)?;
        let step = self.progress.step;
        let lr = self.schedule.lr(step);
        let grad_norm = self.adamw(lr, true)?;
        let mut guard = self.progress.guard.clone();
        let verdict = guard.decide(step, loss, grad_norm);
        if verdict == Verdict::Apply {
            self.adamw(lr, false)?;
            // From here on the step is done.
            self.progress.updates += 1;
            self.stale = true;
        }
        self.progress.guard = guard;
        self.progress.step += 1;
        self.progress.tokens += tokens as u64;
        if let Err(error) = self.settle() {
            tracing::warn!("{error}; tried again before the next use of the model");
        }
        let (skipped, stop) = match verdict {
            Verdict::Apply => (None, false),
            Verdict::Skip(reason) => (Some(reason), false),
            Verdict::Stop(reason) => (Some(reason), true),
        };
        Ok(StepReport {
            step,
            loss,
            grad_norm,
            lr,
            tokens,
            skipped,
            stop,
        })
    }

    /// Mean negative log-probability over all predicted tokens of `sequences`, whatever they weigh; `None` without any.
    ///
    /// # Errors
    /// [`TrainError::Device`]; [`TrainError::Interrupted`] as [`Trainer::interrupt_by`] says.
    pub fn validate<S: AsExample>(&mut self, sequences: &[S]) -> Result<Option<f64>> {
        self.settle()?;
        let (mut sum, mut count) = (0.0, 0usize);
        for sequence in sequences {
            self.stop.check()?;
            let sequence = sequence.as_example().sequence();
            let scored = score(&self.model, sequence, self.streams().segments_per_step)?;
            sum -= scored.iter().map(|x| f64::from(*x)).sum::<f64>();
            count += scored.len();
        }
        Ok((count > 0).then(|| sum / count as f64))
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

    /// Leaves the gradient of the mean loss in `gradients` and returns the loss.
    fn gradient<S: AsExample>(&mut self, batches: &[Vec<S>], scale: f64) -> Result<f64> {
        self.gradients.clear(&self.model.device)?;
        self.price_gates()?;
        let (streams, mut sum) = (self.streams(), 0.0);
        for batch in batches {
            self.stop.check()?;
            let scored = accumulate(&self.model, batch, streams, scale, &mut self.gradients)?;
            let weighted = batch.iter().zip(&scored);
            let weighted = weighted.flat_map(|(s, scores)| s.as_example().weighted(scores));
            sum += weighted.sum::<f64>();
        }
        self.gradients.finish(&self.model.device)?;
        Ok(-sum * scale)
    }

    /// Adds the gradient of `gate_l1` times the mean of the gates that are read, those above 0 of heads that read the
    /// past.
    fn price_gates(&mut self) -> Result<()> {
        let (price, config) = (self.config.training.gate_l1, &self.model.config);
        if price == 0.0 {
            return Ok(());
        }
        let group = config.num_attention_heads / config.num_key_value_heads;
        let open = |l: usize| {
            let gates = self
                .model
                .weights
                .gate(index::past_gate(l))
                .iter()
                .enumerate();
            gates.map(move |(h, gate)| *gate > 0.0 && config.reads_past(l, h / group))
        };
        let layers = 0..config.num_hidden_layers;
        let count = layers.clone().flat_map(open).filter(|open| *open).count();
        let each = (price / count.max(1) as f64) as f32;
        for l in layers {
            let price: Vec<f32> = open(l).map(|open| if open { each } else { 0.0 }).collect();
            let gates = index::past_gate(l);
            self.gradients.write(&self.model.device, gates, &price)?;
        }
        Ok(())
    }

    /// The gradients' norm; applies the update too unless `only_measure`.
    fn adamw(&mut self, lr: f64, only_measure: bool) -> Result<f64> {
        let optimizer = &self.config.optimizer;
        let device = &self.model.device;
        let moments = self.m.iter_mut().zip(&mut self.v);
        let buffers = self.values.iter_mut().zip(self.gradients.finish(device)?);
        let mut tensors = Vec::with_capacity(self.model.specs.len());
        let specs = self.model.specs.iter().zip(&self.updated);
        for (((spec, updated), (values, grads)), (m, v)) in specs.zip(buffers).zip(moments) {
            if !updated {
                continue;
            }
            let gate = matches!(spec.role, Role::Gate { .. });
            let (name, shape) = &spec.parts[0];
            tensors.push(GradTensor {
                values,
                grads,
                m,
                v,
                decay: decays(name, shape, optimizer.decay_embeddings),
                lr_scale: if gate { optimizer.gate_lr_scale } else { 1.0 },
                floor: gate.then_some(f64::from(MIN_GATE)),
            });
        }
        let update = AdamW {
            lr,
            betas: optimizer.betas,
            eps: optimizer.eps,
            weight_decay: optimizer.weight_decay,
            clip_norm: optimizer.clip_norm,
            step: self.progress.updates + 1,
            only_measure,
        };
        Ok(device.adamw(&mut tensors, &update)?.grad_norm)
    }

    /// Brings weights and moments to f32 on a device that computes in more, since that is what a checkpoint
    /// holds: a run that is resumed goes on to the same bits there too. Doing it twice changes nothing.
    fn round(&mut self) -> Result<()> {
        let device = &self.model.device;
        if device.element_bytes(Kind::Exact) <= size_of::<f32>() {
            return Ok(());
        }
        for buffer in self.values.iter_mut().chain(&mut self.m).chain(&mut self.v) {
            let rounded = device.read(buffer, 0..device.len(buffer))?;
            device.write(buffer, 0, &rounded)?;
        }
        Ok(())
    }

    /// Takes over the changed values wherever the model holds prepared ones.
    fn refresh(&mut self) -> Result<()> {
        for i in 0..self.values.len() {
            if self.updated[i] {
                let (device, values) = (&self.model.device, &self.values[i]);
                self.model.weights.refresh(device, i, values)?;
            }
        }
        Ok(())
    }
}

/// What is kept of each tensor, in the order of [`Tensors`]' fields.
#[derive(Clone, Copy)]
enum Kept {
    Values,
    M,
    V,
}

fn room<D: Device>(device: &D, len: usize) -> crate::device::Result<D::Buffer> {
    let buffer = device.empty(Kind::Exact, len);
    buffer.map_err(|error| error.wanted_for(Purpose::Optimizer))
}

fn check_sizes(specs: &[TensorSpec], tensors: &Tensors) -> Result<()> {
    for (kind, list) in [
        ("values", &tensors.values),
        ("m", &tensors.m),
        ("v", &tensors.v),
    ] {
        if list.len() != specs.len() {
            let expected = format!("{} tensors", specs.len());
            return Err(TrainError::argument(kind, expected, list.len()));
        }
        for (spec, tensor) in specs.iter().zip(list) {
            if tensor.len() != spec.role.len() {
                let name = format!("{kind} of `{}`", spec.parts[0].0);
                let expected = format!("{} elements", spec.role.len());
                return Err(TrainError::argument(name, expected, tensor.len()));
            }
        }
    }
    Ok(())
}
