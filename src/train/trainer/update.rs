//! The parts of a step: the gradient over all groups, its norm, the update, and what follows it.

use std::ops::Range;
use std::time::Instant;

use super::{Stop, Trainer};
use crate::device::{self, AdamW, Device, GradTensor, Kind};
use crate::model::decoder::Decoder;
use crate::model::parameters::{Role, index};
use crate::train::data::ExampleRef;
use crate::train::error::{Result, TrainError};
use crate::train::optimizer::{MIN_GATE, decays};
use crate::train::spread::Spread;
use crate::train::streams::{Gradients, Objective, Scores, Sums, accumulate_batches};

/// What a step's gradient comes with.
pub(super) struct Gradient {
    /// As in [`StepReport`](super::StepReport).
    pub loss: f64,
    /// As there.
    pub divergence: Option<f64>,
    /// As there.
    pub log_probabilities: Vec<Vec<f64>>,
}

/// What a step takes from its batches.
struct StepSums<'a, D: Device> {
    model: &'a Decoder<D>,
    updated: &'a [bool],
    /// Gradients that group 0 begins with, by tensor.
    prices: &'a [(usize, Vec<f32>)],
    stop: Stop,
    spread: &'a mut Spread<D>,
    gradients: &'a mut Vec<Gradients<D>>,
    /// Groups of the batch at work.
    at_work: usize,
    /// The groups of each batch.
    batches: &'a [Range<usize>],
    sequences: &'a [&'a [ExampleRef<'a>]],
    /// Of each sequence, where the model's head is here.
    weighted: Vec<f64>,
    /// The same for divergences, where there is a teacher.
    diverged: Vec<f64>,
    log_probabilities: Vec<Vec<f64>>,
}

impl<D: Device> Sums<D> for StepSums<'_, D> {
    type Error = TrainError;

    fn begin(&mut self, batch: usize) -> Result<()> {
        self.stop.check()?;
        let groups = &self.batches[batch];
        self.at_work = groups.len();
        while self.gradients.len() < groups.len() {
            let new = Gradients::of(self.model, self.updated)?;
            self.gradients.push(new);
        }
        for gradients in &mut self.gradients[..groups.len()] {
            if let Stop(Some(flag)) = self.stop {
                gradients.interrupt_by(flag);
            }
            self.spread.clear(&self.model.device, gradients)?;
        }
        if groups.start == 0 {
            for (tensor, price) in self.prices {
                self.gradients[0].write(&self.model.device, *tensor, price)?;
            }
        }
        Ok(())
    }

    fn gradients(&mut self) -> &mut [Gradients<D>] {
        &mut self.gradients[..self.at_work]
    }

    fn end(&mut self, batch: usize, scores: Scores) -> Result<()> {
        let Scores {
            log_probabilities,
            divergences,
        } = scores;
        for (s, divergences) in self.sequences[batch]
            .iter()
            .zip(divergences.unwrap_or_default())
        {
            self.diverged.push(s.weighed(&divergences));
        }
        if self.model.config.part.ends {
            let weighted = self.sequences[batch].iter().zip(&log_probabilities);
            let sums = weighted.map(|(s, scores)| s.weighted(scores).sum::<f64>());
            self.weighted.extend(sums);
            self.log_probabilities.extend(log_probabilities);
        }
        let groups = self.batches[batch].clone().zip(self.gradients.iter_mut());
        for (group, gradients) in groups {
            join_head(self.model, gradients)?;
            self.spread.push(&self.model.device, gradients, group)?;
        }
        Ok(())
    }
}

/// Brings the head's share of a tied embedding's gradient to the embedding, where they are on different stages.
fn join_head<D: Device>(model: &Decoder<D>, gradients: &mut Gradients<D>) -> device::Result<()> {
    let (device, part) = (&model.device, model.config.part);
    match (part.begins, part.ends) {
        (false, true) => {
            let share = gradients.take_head();
            share.map_or(Ok(()), |share| model.stage.head_to_first(device, share))
        }
        (true, false) => {
            let share = gradients.head_mut();
            share.map_or(Ok(()), |share| model.stage.head_from_last(device, share))
        }
        _ => Ok(()),
    }
}

impl<D: Device> Trainer<D> {
    /// Leaves the gradient of the mean objective in `gradients`, as far as this rank owns it.
    pub(super) fn gradient(
        &mut self,
        sequences: &[ExampleRef<'_>],
        scale: f64,
    ) -> Result<Gradient> {
        self.spread.begin();
        let prices = self.prices_of_gates()?;
        let (batch, group) = (self.config.training.batch, self.config.training.group());
        let groups = sequences.len().div_ceil(group);
        let (own, at_once) = (self.spread.share(groups), (batch / group).max(1));
        let starts = own.clone().step_by(at_once);
        let batches: Vec<Range<usize>> = starts
            .map(|start| start..own.end.min(start + at_once))
            .collect();
        let of =
            |at: &Range<usize>| &sequences[at.start * group..sequences.len().min(at.end * group)];
        let sequences: Vec<_> = batches.iter().map(of).collect();
        let (streams, began) = (self.streams(), Instant::now());
        let section = &self.config.distillation;
        let objective = Objective {
            scale,
            teacher: self.teacher.as_ref().map(|model| section.teaching(model)),
        };
        let mut step = StepSums {
            model: &self.model,
            updated: &self.updated,
            prices: &prices,
            stop: self.stop,
            spread: &mut self.spread,
            gradients: &mut self.gradients,
            at_work: 0,
            batches: &batches,
            sequences: &sequences,
            weighted: Vec::new(),
            diverged: Vec::new(),
            log_probabilities: Vec::new(),
        };
        accumulate_batches(
            &self.model,
            &sequences,
            group,
            streams,
            &objective,
            &mut step,
        )?;
        let (sums, log_probabilities) = (step.weighted, step.log_probabilities);
        let diverged = step.diverged;
        self.model.stage.finish()?;
        let computed = began.elapsed();
        let sums = self.ranks().concat(sums, "losses are added up")?;
        let divergence = match &self.teacher {
            Some(_) => {
                let sums = self.ranks().concat(diverged, "divergences are added up")?;
                Some(sums.iter().sum::<f64>() * scale)
            }
            None => None,
        };
        let device = &self.model.device;
        let waited = began.elapsed();
        self.spread.sum(device, &mut self.gradients[0], groups)?;
        tracing::debug!(
            "gradients: {:.4} s, waiting for others {:.4} s, sums over ranks {:.4} s",
            computed.as_secs_f64(),
            (waited - computed).as_secs_f64(),
            (began.elapsed() - waited).as_secs_f64()
        );
        Ok(Gradient {
            loss: -sums.iter().sum::<f64>() * scale,
            divergence,
            log_probabilities,
        })
    }

    /// The gradients of `gate_l1` times the mean of the gates that are read, those above 0 of heads that read the past,
    /// with the numbers of their tensors.
    fn prices_of_gates(&self) -> Result<Vec<(usize, Vec<f32>)>> {
        let (price, config) = (self.config.training.gate_l1, &self.model.config);
        if price == 0.0 {
            return Ok(Vec::new());
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
        let doing = "the gates that are read are counted";
        let stages = self.model.stage.ranks();
        let counts = stages.concat(vec![count as f64], doing)?;
        let each = (price / counts.iter().sum::<f64>().max(1.0)) as f32;
        let prices = layers.map(|l| {
            let prices = open(l).map(|open| if open { each } else { 0.0 });
            (index::past_gate(l), prices.collect())
        });
        Ok(prices.collect())
    }

    /// Sums of squares of the chunks of all gradients, in order.
    pub(super) fn squares(&mut self) -> Result<Vec<f64>> {
        let device = &self.model.device;
        let grads = self.gradients[0].finish(device)?;
        let own = self.spread.own().iter();
        let own = own.filter(|part| self.updated[part.tensor]);
        let own: Vec<_> = own
            .map(|part| (&grads[part.tensor], part.range.clone()))
            .collect();
        let (squares, chunk) = (device.grad_squares(&own)?, device.norm_chunk()?);
        let doing = "the gradients' norm is added up";
        let lists = self.ranks().lists(squares, doing)?;
        Ok(match &self.layers {
            Some(layers) => layers.in_order(lists, chunk),
            None => lists.concat(),
        })
    }

    /// The gradients' norm; applies the update too unless `only_measure`.
    pub(super) fn adamw(&mut self, lr: f64, squares: &[f64], only_measure: bool) -> Result<f64> {
        let optimizer = &self.config.optimizer;
        let device = &self.model.device;
        let grads = self.gradients[0].finish(device)?;
        let mut values = self.values.iter_mut().enumerate();
        let mut tensors = Vec::new();
        let moments = self.m.iter_mut().zip(&mut self.v);
        for (part, (m, v)) in self.spread.own().iter().zip(moments) {
            let i = part.tensor;
            let values = values.find(|(tensor, _)| *tensor == i);
            if !self.updated[i] {
                continue;
            }
            let spec = &self.model.specs[i];
            let gate = matches!(spec.role, Role::Gate { .. });
            let (name, shape) = &spec.parts[0];
            tensors.push(GradTensor {
                values: values.expect("parts lie in the order of the tensors").1,
                grads: &grads[i],
                range: part.range.clone(),
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
        Ok(device.adamw(&mut tensors, squares, &update)?.grad_norm)
    }

    /// Brings weights and moments to f32 on a device that computes in more, since that is what a checkpoint
    /// holds: a run that is resumed goes on to the same bits there too. Doing it twice changes nothing.
    pub(super) fn round(&mut self) -> Result<()> {
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

    /// Takes over the changed values, those of other ranks too, wherever the model holds prepared ones.
    pub(super) fn refresh(&mut self) -> Result<()> {
        let began = Instant::now();
        self.spread
            .share_values(&self.model.device, &mut self.values)?;
        self.share_embedding()?;
        tracing::debug!("weights shared: {:.4} s", began.elapsed().as_secs_f64());
        for i in 0..self.values.len() {
            if self.updated[i] {
                let (device, values) = (&self.model.device, &self.values[i]);
                let spec = &self.model.specs[i];
                self.model.weights.refresh(device, i, spec, values)?;
            }
        }
        Ok(())
    }
}
