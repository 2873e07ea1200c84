//! The losses of a step's targets, and their gradient with respect to the input of the head.

use super::teacher::Lessons;
use super::{Groups, Scores, StepScores, Streams, rows_of};
use crate::device::{Accumulate, Device, Kind, Result, Rows, RowsMut};
use crate::model::decoder::{Forward, Span, Step};
use crate::model::parameters::index;

/// A token whose log-probability a loss has.
struct Target {
    token: u32,
    sequence: usize,
    /// Number of the target in its sequence.
    number: usize,
}

impl<D: Device> Streams<'_, D> {
    /// Computes the scores of the step's targets, from what the head reads and what the teacher's head reads, if there
    /// is one. Returns the gradient of the losses with respect to the input of the last norm.
    pub(super) fn losses(
        &mut self,
        step: &Step,
        segments: &[usize],
        (forward, taught): (&Forward<D>, Option<D::Buffer>),
        gradients: &mut Groups<'_, D>,
    ) -> Result<D::Buffer> {
        let (device, config) = (&self.model.device, &self.model.config);
        let (hidden, vocab) = (config.hidden_size, config.vocab_size);
        let (head, all) = (self.model.head(), step.own_rows());
        let mut d_hidden = device.empty(Kind::Activation, all * hidden)?;
        let runs = gradients.runs_of_segment(step, segments);
        let longest = runs
            .iter()
            .map(|run| rows_of(&step.spans[run.clone()])[1])
            .max();
        let chunk = D::LOGIT_ROWS;
        let most = longest.unwrap_or(0).min(chunk);
        let mut logits = device.empty(Kind::Exact, most * vocab)?;
        let mut scores = device.empty(Kind::Exact, all)?;
        let lessons = self.teaching.as_ref().zip(taught);
        let lessons =
            lessons.map(|(teaching, taught)| Lessons::new(teaching.teacher, taught, [all, most]));
        let mut lessons = lessons.transpose()?;
        for run in &runs {
            let targets = self.targets(&step.spans[run.clone()], segments[run.start]);
            let [mut row, _] = rows_of(&step.spans[run.clone()]);
            for targets in targets.chunks(chunk) {
                let rows = targets.len();
                let x = Rows::packed(&forward.hidden, row, hidden);
                let out = RowsMut::packed(&mut logits, 0, vocab);
                device.linear(x, rows, head, out, Accumulate::No)?;
                let tokens: Vec<u32> = targets.iter().map(|target| target.token).collect();
                let with_policy =
                    |target: &Target| self.sequences[target.sequence].policy.is_some();
                let known = match targets.iter().any(with_policy) {
                    false => vec![f64::NAN; rows],
                    // The derivative depends on the log-probabilities, so they are computed and read first.
                    true => {
                        let out = RowsMut::packed(&mut logits, 0, vocab);
                        let to = RowsMut::packed(&mut scores, row, 1);
                        device.log_probabilities(out, vocab, &tokens, None, to)?;
                        device.read_wide(&scores, row..row + rows)?
                    }
                };
                let scales = targets.iter().zip(&known);
                let scale = |(target, x): (&Target, &f64)| {
                    self.scale * self.sequences[target.sequence].slope(target.number, *x)
                };
                let scales: Vec<f64> = scales.map(scale).collect();
                let out = RowsMut::packed(&mut logits, 0, vocab);
                let to = RowsMut::packed(&mut scores, row, 1);
                match &mut lessons {
                    None => device.log_probabilities(out, vocab, &tokens, Some(&scales), to)?,
                    Some(lessons) => {
                        let weight = |t: &Target| self.sequences[t.sequence].weight(t.number);
                        let weights = targets.iter().map(|t| self.scale * weight(t));
                        let scales = scales.into_iter().zip(weights).collect();
                        lessons.learn(row, &tokens, scales, [out, to])?;
                    }
                }
                let d_logits = Rows::packed(&logits, 0, vocab);
                let d_x = RowsMut::packed(&mut d_hidden, row, hidden);
                device.linear_input_grad(d_logits, rows, head, d_x, Accumulate::No)?;
                let gradients = gradients.of(targets[0].sequence);
                gradients.add_head(device, d_logits, x, rows, [vocab, hidden])?;
                row += rows;
            }
        }
        self.scores.push(StepScores {
            spans: step.spans.clone(),
            log_probabilities: scores,
        });
        self.divergences.extend(lessons.map(Lessons::divergences));
        let divisor = config.switches.logits_divisor;
        let d_hidden = self.model.times(1.0 / divisor, d_hidden, [all, hidden])?;
        let mut d_top = device.zeros(Kind::Activation, all * hidden)?;
        let norm = index::final_norm(config.num_hidden_layers);
        let x = Rows::packed(&forward.x, 0, hidden);
        let (rstd, d_y) = (
            Rows::packed(&forward.rstd, 0, 1),
            Rows::packed(&d_hidden, 0, hidden),
        );
        for run in runs {
            let spans = &step.spans[run];
            let [row, rows] = rows_of(spans);
            let at = |buffer, width| Rows::packed(buffer, row, width);
            if let Some(tensor) = gradients.of(spans[0].sequence).tensor_mut(norm) {
                let (d_y, x) = (at(&d_hidden, hidden), at(&forward.x, hidden));
                let rstd = at(&forward.rstd, 1);
                device.rms_norm_weight_grad(d_y, x, rstd, [rows, 1], tensor)?;
            }
        }
        let weight = self.model.weights.vector(norm);
        let d_x = RowsMut::packed(&mut d_top, 0, hidden);
        device.rms_norm_grad(d_y, x, rstd, [all, 1], weight, d_x)?;
        Ok(d_top)
    }

    /// The targets of spans of one segment.
    fn targets(&self, spans: &[Span], segment: usize) -> Vec<Target> {
        let of = |span: &Span| {
            let (sequence, inputs) = (span.sequence, &self.segments[span.sequence][segment].tokens);
            let tokens = self.sequences[sequence].tokens;
            inputs.clone().map(move |number| Target {
                token: tokens[number + 1],
                sequence,
                number,
            })
        };
        spans.iter().flat_map(of).collect()
    }

    /// Scores of every sequence's targets, in order.
    pub(super) fn scores(&self) -> Result<Scores> {
        let log_probabilities = self.scores.iter().map(|step| &step.log_probabilities);
        let log_probabilities = self.by_sequence(log_probabilities)?;
        let divergences = self.teaching.as_ref();
        let divergences = divergences.map(|_| self.by_sequence(self.divergences.iter()));
        Ok(Scores {
            log_probabilities,
            divergences: divergences.transpose()?,
        })
    }

    /// Numbers of every sequence's targets, from a buffer for each step, with one for each of its rows.
    fn by_sequence<'b>(&self, buffers: impl Iterator<Item = &'b D::Buffer>) -> Result<Vec<Vec<f64>>>
    where
        D: 'b,
    {
        let mut all = vec![Vec::new(); self.sequences.len()];
        for (step, buffer) in self.scores.iter().zip(buffers) {
            let rows = step.spans.iter().map(|s| s.rows.rows).sum();
            let numbers = self.model.device.read_wide(buffer, 0..rows)?;
            for Span { sequence, rows, .. } in &step.spans {
                all[*sequence].extend_from_slice(&numbers[rows.row..rows.row + rows.rows]);
            }
        }
        Ok(all)
    }
}
