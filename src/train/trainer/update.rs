//! The parts of a step: the gradient over all groups, its norm, the update, and what follows it.

use std::ops::Range;
use std::time::Instant;

use super::{Stop, Trainer};
use crate::device::{AdamW, Device, GradTensor, Kind};
use crate::model::parameters::{Role, index};
use crate::train::data::ExampleRef;
use crate::train::error::Result;
use crate::train::optimizer::{MIN_GATE, decays};
use crate::train::streams::{Gradients, accumulate_groups};

impl<D: Device> Trainer<D> {
    /// Leaves the gradient of the mean loss in `gradients`, as far as this rank owns it. Returns the loss,
    /// and the log-probabilities of the targets of each sequence that this rank computed.
    pub(super) fn gradient(
        &mut self,
        sequences: &[ExampleRef<'_>],
        scale: f64,
    ) -> Result<(f64, Vec<Vec<f64>>)> {
        self.spread.begin();
        let (streams, mut sums, mut log_probabilities) = (self.streams(), Vec::new(), Vec::new());
        let training = &self.config.training;
        let (batch, group) = (training.batch, training.group());
        let groups = sequences.len().div_ceil(group);
        let mut own = self.spread.share(groups);
        let began = Instant::now();
        while !own.is_empty() {
            self.stop.check()?;
            let at_once = own.start..own.end.min(own.start + (batch / group).max(1));
            self.prepare(&at_once)?;
            let (model, gradients) = (&self.model, &mut self.gradients[..at_once.len()]);
            let all = &sequences[at_once.start * group..sequences.len().min(at_once.end * group)];
            let scored = accumulate_groups(model, all, group, streams, scale, gradients)?;
            let weighted = all.iter().zip(&scored);
            sums.extend(weighted.map(|(s, scores)| s.weighted(scores).sum::<f64>()));
            log_probabilities.extend(scored);
            for (i, gradients) in at_once.clone().zip(gradients) {
                self.spread.push(&model.device, gradients, i)?;
            }
            own.start = at_once.end;
        }
        let computed = began.elapsed();
        let sums = self.spread.ranks.concat(sums, "losses are added up")?;
        let device = &self.model.device;
        let waited = began.elapsed();
        self.spread.sum(device, &mut self.gradients[0], groups)?;
        tracing::debug!(
            "gradients: {:.4} s, waiting for others {:.4} s, sums over ranks {:.4} s",
            computed.as_secs_f64(),
            (waited - computed).as_secs_f64(),
            (began.elapsed() - waited).as_secs_f64()
        );
        Ok((-sums.iter().sum::<f64>() * scale, log_probabilities))
    }

    /// Makes gradients ready for these groups.
    fn prepare(&mut self, groups: &Range<usize>) -> Result<()> {
        while self.gradients.len() < groups.len() {
            let new = Gradients::of(&self.model, &self.updated)?;
            self.gradients.push(new);
        }
        for gradients in &mut self.gradients[..groups.len()] {
            if let Stop(Some(flag)) = self.stop {
                gradients.interrupt_by(flag);
            }
            self.spread.clear(&self.model.device, gradients)?;
        }
        match groups.start {
            0 => self.price_gates(),
            _ => Ok(()),
        }
    }

    /// Sets the gradient to that of `gate_l1` times the mean of the gates that are read, those above 0 of heads that
    /// read the past.
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
            self.gradients[0].write(&self.model.device, gates, &price)?;
        }
        Ok(())
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
        let squares = device.grad_squares(&own)?;
        let doing = "the gradients' norm is added up";
        Ok(self.spread.ranks.concat(squares, doing)?)
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
