//! Exact TBPTT(K) by gradient streams (contract section 3): one forward per segment, any number of
//! segments per step, and the same gradient, to the bit, whatever that number is.
//!
//! After the forward of segments up to `t`, the losses that are due run backward in *passes*, each
//! through all layers for the segments it covers. A loss beyond the first K+1 runs as stream K
//! through its own segment, K-1 through the one before, ... and ends in stream 0, which reads the
//! prior tail as a constant. The losses of segments 0..=K are never cut, so they share one pass that
//! hands its prior gradients down to itself. Upstream gradients of every product are summed over
//! passes; a segment's weight gradients are taken once, after its last pass, in an order that does
//! not depend on the number of segments per step.

use std::collections::{HashMap, VecDeque};

mod pass;
mod weight_grads;

pub use weight_grads::Gradients;

use pass::{Arrivals, LayerSums, Pass, StreamId};

use crate::device::{Device, Kind, Result, Rows, RowsMut};
use crate::model::decoder::{Decoder, Forward, LayerTape, Span, Step};
use crate::model::parameters::index;
use crate::model::state::{Plan, SequenceState, Slots};

/// Rows of logits that exist at a time.
const LOGIT_ROWS: usize = 128;

/// How a gradient is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StreamConfig {
    /// Segments that a loss reaches back; 0 detaches the state.
    pub tbptt: usize,
    /// Segments computed side by side; `usize::MAX` for all.
    pub segments_per_step: usize,
}

/// Segments in flight: the forward's tape and the sums of the passes so far.
struct Group<D: Device> {
    step: Step,
    /// Segment number of each span.
    segments: Vec<usize>,
    slots: Slots<D>,
    layers: Vec<LayerTape<D>>,
    /// Gradient of the own losses at the top of the residual stream.
    d_top: D::Buffer,
    sums: Vec<LayerSums<D>>,
    /// Gradient of the embeddings.
    d_embedded: D::Buffer,
    /// Whether each span's weight gradients have been taken.
    finished: Vec<bool>,
}

/// One gradient computation over a batch of sequences.
struct Streams<'a, D: Device> {
    model: &'a Decoder<D>,
    plan: Plan,
    config: StreamConfig,
    sequences: &'a [Vec<u32>],
    /// Last segment of each sequence.
    last: Vec<usize>,
    scale: f64,
    alive: VecDeque<Group<D>>,
    arrivals: Arrivals<D>,
    head_done: bool,
    /// Log-probabilities of each step's rows, and which sequence the rows of each span belong to.
    /// They stay on the device to the end: reading them would wait for it.
    scores: Vec<(Vec<Span>, D::Buffer)>,
}

/// Adds to `gradients` the gradient of `scale * sum of negative log-probabilities` of every token
/// but the first of each sequence, and returns the log-probabilities. `scale = 1 / tokens` gives
/// the mean. Sequences need at least two tokens each, and ids below the vocabulary's size.
pub fn accumulate<D: Device>(
    model: &Decoder<D>,
    sequences: &[Vec<u32>],
    config: StreamConfig,
    scale: f64,
    gradients: &mut Gradients<D>,
) -> Result<Vec<Vec<f64>>> {
    let longest = sequences.iter().map(|s| s.len() - 1).max().unwrap_or(0);
    let plan = Plan::new(&model.config, longest);
    let last: Vec<usize> = sequences
        .iter()
        .map(|s| (s.len() - 2) / plan.segment_len)
        .collect();
    let mut states = sequences
        .iter()
        .map(|_| SequenceState::new(&model.device, &plan))
        .collect::<Result<Vec<_>>>()?;
    let end = last.iter().copied().max().map_or(0, |l| l + 1);
    let mut streams = Streams {
        model,
        plan,
        config,
        sequences,
        last,
        scale,
        alive: VecDeque::new(),
        arrivals: HashMap::new(),
        head_done: false,
        scores: Vec::new(),
    };
    let mut first = 0;
    while first < end {
        let next = first
            .saturating_add(config.segments_per_step.max(1))
            .min(end);
        streams.forward(first, next, &mut states, gradients)?;
        streams.backward(first, next, end)?;
        streams.finish(next, end, gradients)?;
        first = next;
    }
    streams.log_probabilities()
}

impl<D: Device> Streams<'_, D> {
    /// Runs segments `[first, next)` of every sequence and takes their losses' gradients.
    fn forward(
        &mut self,
        first: usize,
        next: usize,
        states: &mut [SequenceState<D>],
        gradients: &mut Gradients<D>,
    ) -> Result<()> {
        let (mut step, mut segments) = (Step::default(), Vec::new());
        for segment in first..next {
            for (b, sequence) in self.sequences.iter().enumerate() {
                let inputs = &sequence[..sequence.len() - 1];
                let start = segment * self.plan.segment_len;
                if start < inputs.len() {
                    let end = inputs.len().min(start + self.plan.segment_len);
                    step.push(b, segments.len(), 0, &inputs[start..end]);
                    segments.push(segment);
                }
            }
        }
        let device = &self.model.device;
        let room = step.spans.iter().map(|s| s.rows.rows).max().unwrap_or(0);
        let mut slots = Slots::new(device, &self.model.config, &self.plan, segments.len(), room)?;
        let mut layers = Vec::with_capacity(self.model.config.num_hidden_layers);
        let mut states: Vec<&mut SequenceState<D>> = states.iter_mut().collect();
        let forward =
            self.model
                .forward(&self.plan, &step, &mut states, &mut slots, |_, tape| {
                    layers.push(tape);
                })?;
        let d_top = self.losses(&step, &segments, &forward, gradients)?;
        let (rows, spans) = (step.tokens.len(), step.spans.len());
        let sums = (0..layers.len())
            .map(|_| LayerSums::new(self.model, &self.plan, rows, spans))
            .collect::<Result<_>>()?;
        let d_embedded = device.zeros(Kind::Activation, rows * self.model.config.hidden_size)?;
        self.alive.push_back(Group {
            step,
            segments,
            slots,
            layers,
            d_top,
            sums,
            d_embedded,
            finished: vec![false; spans],
        });
        Ok(())
    }

    /// Log-probabilities of the step's targets, and the losses' gradient before the last norm.
    fn losses(
        &mut self,
        step: &Step,
        segments: &[usize],
        forward: &Forward<D>,
        gradients: &mut Gradients<D>,
    ) -> Result<D::Buffer> {
        let (device, config) = (&self.model.device, &self.model.config);
        let (hidden, vocab) = (config.hidden_size, config.vocab_size);
        let head = self.model.head();
        let mut d_hidden = device.empty(Kind::Activation, step.tokens.len() * hidden)?;
        let mut logits = device.empty(Kind::Exact, LOGIT_ROWS * vocab)?;
        let mut scores = device.empty(Kind::Exact, step.tokens.len())?;
        for (span, segment) in step.spans.iter().zip(segments) {
            let at = segment * self.plan.segment_len + 1;
            let targets = &self.sequences[span.sequence][at..at + span.rows.rows];
            for (i, targets) in targets.chunks(LOGIT_ROWS).enumerate() {
                let (row, rows) = (span.rows.row + i * LOGIT_ROWS, targets.len());
                let x = Rows::packed(&forward.hidden, row, hidden);
                let out = RowsMut::packed(&mut logits, 0, vocab);
                device.linear(x, rows, head, out, crate::device::Fold::Set)?;
                let out = RowsMut::packed(&mut logits, 0, vocab);
                let to = RowsMut::packed(&mut scores, row, 1);
                device.log_probabilities(out, vocab, targets, Some(self.scale), to)?;
                let d_logits = Rows::packed(&logits, 0, vocab);
                let d_x = RowsMut::packed(&mut d_hidden, row, hidden);
                device.linear_input_grad(d_logits, rows, head, d_x, crate::device::Fold::Set)?;
                gradients.add_head(device, d_logits, x, rows, [vocab, hidden])?;
            }
        }
        self.scores.push((step.spans.clone(), scores));
        let mut d_top = device.zeros(Kind::Activation, step.tokens.len() * hidden)?;
        let norm = index::final_norm(config.num_hidden_layers);
        let x = Rows::packed(&forward.x, 0, hidden);
        let (rstd, d_y) = (
            Rows::packed(&forward.rstd, 0, 1),
            Rows::packed(&d_hidden, 0, hidden),
        );
        let rows = step.tokens.len();
        device.rms_norm_weight_grad(d_y, x, rstd, rows, gradients.tensor_mut(norm))?;
        let weight = self.model.weights.vector(norm);
        let d_x = RowsMut::packed(&mut d_top, 0, hidden);
        device.rms_norm_grad(d_y, x, rstd, rows, weight, d_x)?;
        Ok(d_top)
    }

    /// Of every sequence's targets, in order.
    fn log_probabilities(&self) -> Result<Vec<Vec<f64>>> {
        let mut all = vec![Vec::new(); self.sequences.len()];
        for (spans, scores) in &self.scores {
            let rows = spans.iter().map(|s| s.rows.rows).sum();
            let scores = self.model.device.read_wide(scores, 0..rows)?;
            for Span { sequence, rows } in spans {
                all[*sequence].extend_from_slice(&scores[rows.row..rows.row + rows.rows]);
            }
        }
        Ok(all)
    }

    /// Runs every pass that segments `[first, next)` make due.
    fn backward(&mut self, first: usize, next: usize, end: usize) -> Result<()> {
        let depth = self.config.tbptt;
        if !self.head_done && (next > depth || next == end) {
            let pass = Pass {
                stream: StreamId::Head,
                own_loss: true,
                hand_down: true,
            };
            self.run(&pass, 0, next.min(depth.saturating_add(1)))?;
            self.head_done = true;
        }
        let low = first.max(depth.saturating_add(1));
        for back in 0..=depth {
            if low >= next {
                break;
            }
            let pass = Pass {
                stream: StreamId::Stream(depth - back),
                own_loss: back == 0,
                hand_down: back < depth,
            };
            self.run(&pass, low - back, next - back)?;
        }
        Ok(())
    }

    /// One pass over segments `[low, high)`, later groups first.
    fn run(&mut self, pass: &Pass, low: usize, high: usize) -> Result<()> {
        for group in self.alive.iter_mut().rev() {
            let from = group.segments.partition_point(|s| *s < low);
            let to = group.segments.partition_point(|s| *s < high);
            if from < to {
                pass.run(self.model, &self.plan, group, from..to, &mut self.arrivals)?;
            }
        }
        Ok(())
    }

    /// Takes the weight gradients of the segments whose last pass is done, and lets them go.
    fn finish(&mut self, next: usize, end: usize, gradients: &mut Gradients<D>) -> Result<()> {
        if !self.head_done {
            return Ok(());
        }
        let mut due = Vec::new();
        for (g, group) in self.alive.iter().enumerate() {
            for (i, segment) in group.segments.iter().enumerate() {
                if group.finished[i] {
                    continue;
                }
                let b = group.step.spans[i].sequence;
                let time = segment.saturating_add(self.config.tbptt).min(self.last[b]);
                if time < next || next == end {
                    due.push((time, *segment, b, g, i));
                }
            }
        }
        due.sort_unstable();
        for (.., g, i) in &due {
            gradients.add_span(self.model, &self.plan, &self.alive[*g], *i)?;
        }
        self.release(&due);
        Ok(())
    }

    fn release(&mut self, due: &[(usize, usize, usize, usize, usize)]) {
        for (.., g, i) in due {
            self.alive[*g].finished[*i] = true;
        }
        while self
            .alive
            .front()
            .is_some_and(|g| g.finished.iter().all(|done| *done))
        {
            self.alive.pop_front();
        }
    }
}
