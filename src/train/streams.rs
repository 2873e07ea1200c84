//! Exact TBPTT(K) by gradient streams (docs/contract.md, section 3).
//!
//! Every segment runs forward once. A step computes any number of segments; the gradient has the same bits for every
//! number.
//!
//! After the forward of segments up to `t`, the losses that are due run backward in *passes*. A pass goes through all
//! layers for the segments it covers. The loss of a segment beyond the first K+1 is stream K in its own segment, stream
//! K-1 in the segment before, and so on. Stream 0 treats the prior tail as a constant, which truncates the gradient.
//! The losses of segments 0..=K are never truncated. They share one pass, which receives its own prior gradients.
//!
//! Upstream gradients of every GEMM are summed over passes. The weight gradients of a segment are computed once, after
//! its last pass. Their order does not depend on the number of segments per step.
//!
//! All passes that are due advance together, layer by layer. Once all segments of a group are at their last pass, the
//! group frees the tape and the sums of each layer as soon as the layer's weight gradients are computed. So sums of all
//! layers exist only for groups that wait for another pass.

use std::collections::{HashMap, VecDeque};
use std::slice::from_mut;

mod pass;
mod tail;
mod weight_grads;

pub use weight_grads::Gradients;

use pass::{LayerSums, Pass, Work};
use tail::{Arrivals, StreamId};

use crate::device::{Device, Kind, Purpose, Result, Rows, RowsMut};
use crate::model::decoder::{Decoder, Derived, Forward, LayerTape, Span, Step};
use crate::model::parameters::index;
use crate::model::segmentation::Segment;
use crate::model::state::{Angles, Plan, SequenceState, Slots};
use crate::train::data::{AsExample, ExampleRef};

/// How a gradient is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StreamConfig {
    /// K: number of earlier segments that a loss sends gradients to; 0 detaches the state.
    pub tbptt: usize,
    /// Segments of a sequence in one step; `usize::MAX` for all.
    pub segments_per_step: usize,
    /// Activation checkpointing: keeps only each layer's input and attention's output between forward and backward,
    /// and recomputes the rest with the same bits.
    pub recompute: bool,
}

/// Spans of one forward step, with its tape and the sums over the passes so far.
struct Group<D: Device> {
    step: Step,
    /// Segment number of each span.
    segments: Vec<usize>,
    slots: Slots<D>,
    /// Layers whose weight gradients are not computed yet.
    layers: Vec<Layer<D>>,
    /// Gradient of the segments' own losses with respect to the output of the last layer.
    d_top: D::Buffer,
    /// Gradient of the embedded tokens.
    d_embedded: D::Buffer,
    /// Whether each span has had its last pass.
    finished: Vec<bool>,
}

/// A layer of a group.
struct Layer<D: Device> {
    tape: LayerTape<D>,
    /// `None` under `recompute` while no pass needs it.
    derived: Option<Derived<D>>,
    /// `None` before the first pass.
    sums: Option<LayerSums<D>>,
}

/// A span whose last pass is due: `time` is the segment at which its stream ends.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Due {
    time: usize,
    segment: usize,
    sequence: usize,
    group: usize,
    span: usize,
}

/// One gradient computation over a batch of sequences.
struct Streams<'a, D: Device> {
    model: &'a Decoder<D>,
    plan: &'a Plan,
    config: StreamConfig,
    sequences: &'a [ExampleRef<'a>],
    /// The segments of each sequence's inputs, at least one.
    segments: &'a [Vec<Segment>],
    scale: f64,
    alive: VecDeque<Group<D>>,
    head_done: bool,
    /// The spans of each step and the log-probabilities of their rows. They stay on the device until the end, because a
    /// read synchronizes with the device.
    scores: Vec<(Vec<Span>, D::Buffer)>,
}

/// Adds to `gradients` the gradient of `scale * sum of weight * negative log-probability` over all targets, or of what
/// a policy gradient has instead of the log-probability. Targets are all tokens but the first of each sequence.
/// `scale = 1 / sum of weights` gives the mean loss.
///
/// Returns the log-probabilities of each sequence's targets. Sequences may have weights and breaks; each has at least
/// two tokens, with ids below the size of the vocabulary.
///
/// # Errors
/// [`DeviceError::Argument`](crate::device::DeviceError::Argument) for fewer tokens, another number of weights, breaks
/// that a sequence cannot have, and token ids that the model does not have; or what the device says.
pub fn accumulate<D: Device, S: AsExample>(
    model: &Decoder<D>,
    sequences: &[S],
    config: StreamConfig,
    scale: f64,
    gradients: &mut Gradients<D>,
) -> Result<Vec<Vec<f64>>> {
    let sequences: Vec<ExampleRef<'_>> = sequences.iter().map(AsExample::as_example).collect();
    let group = sequences.len().max(1);
    accumulate_groups(model, &sequences, group, config, scale, from_mut(gradients))
}

/// As [`accumulate`], with gradients for each group of `group` sequences. They have the bits of a group computed alone.
///
/// # Errors
/// As [`accumulate`].
pub(super) fn accumulate_groups<D: Device>(
    model: &Decoder<D>,
    sequences: &[ExampleRef<'_>],
    group: usize,
    config: StreamConfig,
    scale: f64,
    gradients: &mut [Gradients<D>],
) -> Result<Vec<Vec<f64>>> {
    sequences.iter().try_for_each(ExampleRef::check)?;
    let mut tokens = sequences.iter().map(|sequence| sequence.tokens);
    tokens.try_for_each(|tokens| model.check_tokens("sequences", tokens))?;
    let mut groups = Groups {
        gradients,
        sequences: group,
    };
    let device = &model.device;
    let scored = device.together(|| run(model, sequences, config, scale, &mut groups));
    scored.map_err(|error| error.wanted_for(Purpose::Backward))
}

/// Gradients of groups of sequences.
struct Groups<'a, D: Device> {
    gradients: &'a mut [Gradients<D>],
    /// Sequences of a group.
    sequences: usize,
}

impl<D: Device> Groups<'_, D> {
    /// Those that a sequence adds to.
    fn of(&mut self, sequence: usize) -> &mut Gradients<D> {
        &mut self.gradients[sequence / self.sequences]
    }

    fn check_stop(&self) -> Result<()> {
        self.gradients.iter().try_for_each(Gradients::check_stop)
    }
}

/// Body of [`accumulate`], inside [`Device::together`].
fn run<D: Device>(
    model: &Decoder<D>,
    sequences: &[ExampleRef<'_>],
    config: StreamConfig,
    scale: f64,
    gradients: &mut Groups<'_, D>,
) -> Result<Vec<Vec<f64>>> {
    let inputs = sequences.iter().map(|s| s.sequence().inputs());
    let longest = inputs.clone().map(|s| s.tokens.len()).max().unwrap_or(0);
    let plan = Plan::new(&model.config, longest);
    let segments: Vec<Vec<Segment>> = inputs.map(|s| plan.segments(s)).collect();
    let mut states = sequences
        .iter()
        .map(|_| SequenceState::new(&model.device, &plan))
        .collect::<Result<Vec<_>>>()?;
    let end = segments.iter().map(Vec::len).max().unwrap_or(0);
    let mut streams = Streams {
        model,
        plan: &plan,
        config,
        sequences,
        segments: &segments,
        scale,
        alive: VecDeque::new(),
        head_done: false,
        scores: Vec::new(),
    };
    let mut first = 0;
    while first < end {
        gradients.check_stop()?;
        let next = first
            .saturating_add(config.segments_per_step.max(1))
            .min(end);
        streams.forward(first, next, &mut states, gradients)?;
        streams.backward(first, next, end, gradients)?;
        first = next;
    }
    streams.log_probabilities()
}

impl<'a, D: Device> Streams<'a, D> {
    /// Runs segments `[first, next)` of every sequence forward and computes the gradients of their losses.
    fn forward(
        &mut self,
        first: usize,
        next: usize,
        states: &mut [SequenceState<D>],
        gradients: &mut Groups<'_, D>,
    ) -> Result<()> {
        let (mut step, mut segments) = (Step::default(), Vec::new());
        for segment in first..next {
            for (b, sequence) in self.sequences.iter().enumerate() {
                let Some(Segment { tokens, closes }) = self.segments[b].get(segment) else {
                    continue;
                };
                let tokens = &sequence.tokens[tokens.clone()];
                step.push(b, segments.len(), 0, tokens, *closes);
                segments.push(segment);
            }
        }
        let device = &self.model.device;
        let room = step.spans.iter().map(|s| s.rows.rows).max().unwrap_or(0);
        let angles = Angles::new(device, &self.model.config, self.plan, room)?;
        let mut slots = Slots::new(device, self.plan, &angles, segments.len(), room)?;
        let mut layers = Vec::with_capacity(self.model.config.num_hidden_layers);
        let mut states: Vec<&mut SequenceState<D>> = states.iter_mut().collect();
        let mut placed = device.step(step.rows(self.plan, slots.room))?;
        let forward = self.model.forward(
            self.plan,
            &step,
            &mut placed,
            &mut states,
            &mut slots,
            |tape, derived| {
                layers.push(Layer {
                    tape,
                    derived: (!self.config.recompute).then_some(derived),
                    sums: None,
                });
            },
        )?;
        let d_top = self.losses(&step, &segments, &forward, gradients)?;
        let (rows, spans) = (step.tokens.len(), step.spans.len());
        let d_embedded = device.empty(Kind::Activation, rows * self.model.config.hidden_size)?;
        self.alive.push_back(Group {
            step,
            segments,
            slots,
            layers,
            d_top,
            d_embedded,
            finished: vec![false; spans],
        });
        Ok(())
    }

    /// Computes the log-probabilities of the step's targets. Returns the gradient of the losses with respect to the
    /// input of the last norm.
    fn losses(
        &mut self,
        step: &Step,
        segments: &[usize],
        forward: &Forward<D>,
        gradients: &mut Groups<'_, D>,
    ) -> Result<D::Buffer> {
        let (device, config) = (&self.model.device, &self.model.config);
        let (hidden, vocab) = (config.hidden_size, config.vocab_size);
        let head = self.model.head();
        let mut d_hidden = device.empty(Kind::Activation, step.tokens.len() * hidden)?;
        let longest = step.spans.iter().map(|s| s.rows.rows).max().unwrap_or(0);
        let mut logits = device.empty(Kind::Exact, longest.min(D::LOGIT_ROWS) * vocab)?;
        let mut scores = device.empty(Kind::Exact, step.tokens.len())?;
        for (span, segment) in step.spans.iter().zip(segments) {
            let inputs = &self.segments[span.sequence][*segment].tokens;
            let example = &self.sequences[span.sequence];
            let targets = &example.tokens[inputs.start + 1..=inputs.end];
            for (i, targets) in targets.chunks(D::LOGIT_ROWS).enumerate() {
                let (row, rows) = (span.rows.row + i * D::LOGIT_ROWS, targets.len());
                let x = Rows::packed(&forward.hidden, row, hidden);
                let out = RowsMut::packed(&mut logits, 0, vocab);
                device.linear(x, rows, head, out, crate::device::Accumulate::No)?;
                let first = inputs.start + i * D::LOGIT_ROWS;
                let known = match example.policy {
                    None => vec![f64::NAN; rows],
                    // The derivative depends on the log-probabilities, so they are computed and read first.
                    Some(_) => {
                        let out = RowsMut::packed(&mut logits, 0, vocab);
                        let to = RowsMut::packed(&mut scores, row, 1);
                        device.log_probabilities(out, vocab, targets, None, to)?;
                        device.read_wide(&scores, row..row + rows)?
                    }
                };
                let scales = known.iter().zip(first..);
                let scales: Vec<f64> = scales
                    .map(|(x, t)| self.scale * example.slope(t, *x))
                    .collect();
                let out = RowsMut::packed(&mut logits, 0, vocab);
                let to = RowsMut::packed(&mut scores, row, 1);
                device.log_probabilities(out, vocab, targets, Some(&scales), to)?;
                let d_logits = Rows::packed(&logits, 0, vocab);
                let d_x = RowsMut::packed(&mut d_hidden, row, hidden);
                device.linear_input_grad(
                    d_logits,
                    rows,
                    head,
                    d_x,
                    crate::device::Accumulate::No,
                )?;
                let gradients = gradients.of(span.sequence);
                gradients.add_head(device, d_logits, x, rows, [vocab, hidden])?;
            }
        }
        self.scores.push((step.spans.clone(), scores));
        let rows = step.tokens.len();
        let divisor = config.switches.logits_divisor;
        let d_hidden = self.model.times(1.0 / divisor, d_hidden, [rows, hidden])?;
        let mut d_top = device.zeros(Kind::Activation, rows * hidden)?;
        let norm = index::final_norm(config.num_hidden_layers);
        let x = Rows::packed(&forward.x, 0, hidden);
        let (rstd, d_y) = (
            Rows::packed(&forward.rstd, 0, 1),
            Rows::packed(&d_hidden, 0, hidden),
        );
        for Span { sequence, rows, .. } in &step.spans {
            let at = |buffer, width| Rows::packed(buffer, rows.row, width);
            if let Some(tensor) = gradients.of(*sequence).tensor_mut(norm) {
                let (d_y, x) = (at(&d_hidden, hidden), at(&forward.x, hidden));
                let rstd = at(&forward.rstd, 1);
                device.rms_norm_weight_grad(d_y, x, rstd, [rows.rows, 1], tensor)?;
            }
        }
        let weight = self.model.weights.vector(norm);
        let d_x = RowsMut::packed(&mut d_top, 0, hidden);
        device.rms_norm_grad(d_y, x, rstd, [rows, 1], weight, d_x)?;
        Ok(d_top)
    }

    /// Log-probabilities of every sequence's targets, in order.
    fn log_probabilities(&self) -> Result<Vec<Vec<f64>>> {
        let mut all = vec![Vec::new(); self.sequences.len()];
        for (spans, scores) in &self.scores {
            let rows = spans.iter().map(|s| s.rows.rows).sum();
            let scores = self.model.device.read_wide(scores, 0..rows)?;
            for Span { sequence, rows, .. } in spans {
                all[*sequence].extend_from_slice(&scores[rows.row..rows.row + rows.rows]);
            }
        }
        Ok(all)
    }

    /// Runs every pass that segments `[first, next)` make due. Layer by layer, it then computes the weight gradients of
    /// the segments whose last pass this was.
    fn backward(
        &mut self,
        first: usize,
        next: usize,
        end: usize,
        gradients: &mut Groups<'_, D>,
    ) -> Result<()> {
        let mut passes = self.due_passes(first, next, end)?;
        let due = self.due_spans(next, end);
        let mut arrivals: Arrivals<D> = HashMap::new();
        let layers = self.model.config.num_hidden_layers;
        for l in (0..layers).rev() {
            for work in &mut passes {
                work.layer(l, &mut self.alive[work.group], &mut arrivals)?;
            }
            for due in &due {
                let group = &mut self.alive[due.group];
                // A pass with zero upstream gradient does not prepare the layer.
                group.prepare(self.model, self.plan, l)?;
                let gradients = gradients.of(due.sequence);
                gradients.add_layer(self.model, self.plan, group, due.span, l)?;
            }
            let recompute = self.config.recompute;
            self.alive.iter_mut().for_each(|g| g.release(l, recompute));
        }
        debug_assert!(arrivals.is_empty(), "every prior gradient is received");
        for work in passes {
            work.embedding(&mut self.alive[work.group])?;
        }
        for due in &due {
            let (gradients, group) = (gradients.of(due.sequence), &self.alive[due.group]);
            gradients.add_embedding(self.model, group, due.span)?;
        }
        while self.alive.front().is_some_and(Group::is_finished) {
            self.alive.pop_front();
        }
        Ok(())
    }

    /// The passes that are due. A pass that sends prior gradients comes before the pass that receives them.
    fn due_passes(&mut self, first: usize, next: usize, end: usize) -> Result<Vec<Work<'a, D>>> {
        let depth = self.config.tbptt;
        let mut passes = Vec::new();
        if !self.head_done && (next > depth || next == end) {
            let pass = Pass {
                stream: StreamId::Head,
                own_loss: true,
                hand_down: true,
            };
            self.split(pass, 0, next.min(depth.saturating_add(1)), &mut passes)?;
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
            self.split(pass, low - back, next - back, &mut passes)?;
        }
        Ok(passes)
    }

    /// A pass over segments `[low, high)`, group by group, later groups first.
    fn split(
        &self,
        pass: Pass,
        low: usize,
        high: usize,
        passes: &mut Vec<Work<'a, D>>,
    ) -> Result<()> {
        for (g, group) in self.alive.iter().enumerate().rev() {
            let from = group.segments.partition_point(|s| *s < low);
            let to = group.segments.partition_point(|s| *s < high);
            if from < to {
                passes.push(Work::new(
                    self.model,
                    self.plan,
                    self.segments,
                    pass,
                    (g, group),
                    from..to,
                )?);
            }
        }
        Ok(())
    }

    /// The spans whose last pass is due, in the order in which their weight gradients are added. Marks them finished.
    fn due_spans(&mut self, next: usize, end: usize) -> Vec<Due> {
        let mut due = Vec::new();
        if !self.head_done {
            return due;
        }
        for (g, group) in self.alive.iter_mut().enumerate() {
            for (i, segment) in group.segments.iter().enumerate() {
                let sequence = group.step.spans[i].sequence;
                let time = segment
                    .saturating_add(self.config.tbptt)
                    .min(self.segments[sequence].len() - 1);
                if !group.finished[i] && (time < next || next == end) {
                    group.finished[i] = true;
                    due.push(Due {
                        time,
                        segment: *segment,
                        sequence,
                        group: g,
                        span: i,
                    });
                }
            }
        }
        due.sort_unstable();
        due
    }
}

impl<D: Device> Layer<D> {
    /// Tape, derived activations and sums, which [`Group::prepare`] has made available.
    fn parts(&mut self) -> (&LayerTape<D>, &Derived<D>, &mut LayerSums<D>) {
        match (&self.derived, &mut self.sums) {
            (Some(derived), Some(sums)) => (&self.tape, derived, sums),
            _ => unreachable!("a layer is prepared before a pass works on it"),
        }
    }
}

impl<D: Device> Group<D> {
    /// Recomputes the derived activations and allocates the sums of layer `l` where they are missing.
    fn prepare(&mut self, model: &Decoder<D>, plan: &Plan, l: usize) -> Result<()> {
        let layer = &mut self.layers[l];
        if layer.derived.is_none() {
            let derived = model.derive(plan, l, &layer.tape, &self.step, &self.slots)?;
            layer.derived = Some(derived);
        }
        if layer.sums.is_none() {
            let (rows, spans) = (self.step.tokens.len(), self.step.spans.len());
            layer.sums = Some(LayerSums::new(model, plan, rows, spans)?);
        }
        Ok(())
    }

    /// Frees what no later pass needs of layer `l`. All layers above are done.
    fn release(&mut self, l: usize, recompute: bool) {
        if self.is_finished() {
            self.layers.truncate(l);
            self.slots.layers.truncate(l);
        } else if recompute {
            self.layers[l].derived = None;
        }
    }

    fn is_finished(&self) -> bool {
        self.finished.iter().all(|done| *done)
    }
}
