//! Exact TBPTT(K) by gradient streams (docs/contract.md, section 3).
//!
//! Every segment runs forward once, beside those readings that only ask for rows of the past. A step computes any
//! number of segments; the gradient has the same bits for every number.
//!
//! After the forward of segments up to `t`, the losses that are due run backward in *passes*. A pass goes through all
//! layers for the segments it covers. The loss of a segment beyond the first K+1 is stream K in its own segment, stream
//! K-1 in the segment before, and so on. Stream 0 treats the prior tail as a constant, which truncates the gradient.
//! The losses of segments 0..=K are never truncated. They share one pass, which receives its own prior gradients.
//!
//! Upstream gradients of every GEMM are summed over passes. The weight gradients of a segment are computed once, after
//! its last pass, together with those of the same segment of the next sequences of its group, whose rows lie beside
//! it. Their order does not depend on the number of segments per step.
//!
//! All passes that are due advance together, layer by layer. Once all segments of a group are at their last pass, the
//! group frees the tape and the sums of each layer as soon as the layer's weight gradients are computed. So sums of all
//! layers exist only for groups that wait for another pass.
//!
//! Where a model's layers are spread over stages (`model::stage`), each stage computes the same passes over its own
//! layers. It runs forward as many steps ahead of its backward as there are stages behind it (`streams::turns`).

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::ops::Range;

mod losses;
mod objective;
mod pass;
mod tail;
mod teacher;
mod turns;
mod weight_grads;

pub use objective::{Objective, Scores, accumulate, accumulate_of};
pub use teacher::Teacher;
pub(super) use turns::{Sums, accumulate_batches};
pub use weight_grads::Gradients;

use pass::{LayerSums, Pass, Work};
use tail::{Arrivals, StreamId};
use teacher::Teaching;

use crate::device::{Device, Kind, Result};
use crate::model::decoder::{Decoder, Derived, LayerTape, Span, Step};
use crate::model::segmentation::Segment;
use crate::model::state::{Angles, Plan, SequenceState, Slots};
use crate::train::data::ExampleRef;

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
    /// Gradient of the segments' own losses with respect to the output of the model's last layer, where that is here.
    d_top: Option<D::Buffer>,
    /// Gradient of the embedded tokens, where the embedding is here.
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

impl Due {
    /// Whether a span's rows lie behind this one's and belong to the same segment of another sequence. Such spans add
    /// to the gradients of weights together, as far as they add to the same.
    fn is_before(&self, next: &Due) -> bool {
        let at = |due: &Due| (due.time, due.segment, due.group);
        at(self) == at(next) && self.span + 1 == next.span
    }
}

/// Sequences that are computed side by side.
struct Batch<'a> {
    sequences: &'a [ExampleRef<'a>],
    plan: Plan,
    /// The segments of each sequence's inputs, at least one.
    segments: Vec<Vec<Segment>>,
    /// Of each sequence, see [`Plan::asks`].
    asks: Vec<BTreeMap<usize, Vec<usize>>>,
}

/// One gradient computation over a batch of sequences.
struct Streams<'a, D: Device> {
    model: &'a Decoder<D>,
    plan: &'a Plan,
    config: StreamConfig,
    sequences: &'a [ExampleRef<'a>],
    segments: &'a [Vec<Segment>],
    asks: &'a [BTreeMap<usize, Vec<usize>>],
    scale: f64,
    teaching: Option<Teaching<'a, D>>,
    states: Vec<SequenceState<D>>,
    alive: VecDeque<Group<D>>,
    head_done: bool,
    /// Of each step. They stay on the device until the end, because a read synchronizes with it.
    scores: Vec<StepScores<D>>,
    /// Divergences of the rows of each step, where there is a teacher; they stay there too.
    divergences: Vec<D::Buffer>,
}

/// Log-probabilities of the rows of a step.
struct StepScores<D: Device> {
    spans: Vec<Span>,
    log_probabilities: D::Buffer,
}

/// Gradients of groups of sequences.
struct Groups<'a, D: Device> {
    gradients: &'a mut [Gradients<D>],
    /// Sequences of a group.
    sequences: usize,
}

impl<'a, D: Device> Groups<'a, D> {
    fn new(gradients: &'a mut [Gradients<D>], sequences: usize) -> Self {
        Self {
            gradients,
            sequences,
        }
    }

    /// Runs of spans that add to the same gradients together.
    fn runs<'d>(&self, due: &'d [Due]) -> Vec<&'d [Due]> {
        let group = |due: &Due| due.sequence / self.sequences;
        let together = |a: &Due, b: &Due| a.is_before(b) && group(a) == group(b);
        due.chunk_by(together).collect()
    }

    /// Runs of spans of one segment that add to the same gradients.
    fn runs_of_segment(&self, step: &Step, segments: &[usize]) -> Vec<Range<usize>> {
        let of = |span: usize| (segments[span], step.spans[span].sequence / self.sequences);
        let spans: Vec<usize> = (0..step.spans.len()).collect();
        let runs = spans.chunk_by(|a, b| of(*a) == of(*b));
        runs.map(|run| run[0]..run[0] + run.len()).collect()
    }

    /// Those that a sequence adds to.
    fn of(&mut self, sequence: usize) -> &mut Gradients<D> {
        &mut self.gradients[sequence / self.sequences]
    }

    fn check_stop(&self) -> Result<()> {
        self.gradients.iter().try_for_each(Gradients::check_stop)
    }
}

impl<'a, D: Device> Streams<'a, D> {
    fn new(
        model: &'a Decoder<D>,
        batch: &'a Batch<'a>,
        config: StreamConfig,
        objective: &Objective<'a, D>,
    ) -> Result<Self> {
        let state = |_| SequenceState::new(&model.device, &batch.plan);
        let teacher = objective.teacher;
        let teaching = teacher.map(|teacher| Teaching::new(teacher, batch.sequences));
        Ok(Self {
            model,
            plan: &batch.plan,
            config,
            sequences: batch.sequences,
            segments: &batch.segments,
            asks: &batch.asks,
            scale: objective.scale,
            teaching: teaching.transpose()?,
            states: batch.sequences.iter().map(state).collect::<Result<_>>()?,
            alive: VecDeque::new(),
            head_done: false,
            scores: Vec::new(),
            divergences: Vec::new(),
        })
    }

    /// Runs segments `[first, next)` of every sequence forward and, where the model's head is here, computes the
    /// gradients of their losses, which go to `gradients`.
    fn forward(
        &mut self,
        first: usize,
        next: usize,
        gradients: Option<&mut Groups<'_, D>>,
    ) -> Result<()> {
        let (mut step, mut segments) = (Step::default(), Vec::new());
        for segment in first..next {
            for (b, sequence) in self.sequences.iter().enumerate() {
                let Some(at) = self.segments[b].get(segment) else {
                    continue;
                };
                let tokens = &sequence.tokens[at.tokens.clone()];
                step.push(b, segments.len(), 0, tokens, at.end());
                segments.push(segment);
            }
        }
        self.push_asks(&mut step, &segments);
        // Before this step's activations are there.
        let taught = self.taught(&step, &segments)?;
        let device = &self.model.device;
        let room = step.spans.iter().map(|s| s.rows.rows).max().unwrap_or(0);
        let angles = Angles::new(device, &self.model.config, self.plan, room)?;
        let count = step.spans.len() + step.asks.len();
        let mut slots = Slots::new(device, self.plan, &angles, count, room)?;
        let mut layers = Vec::with_capacity(self.model.config.num_hidden_layers);
        let mut states: Vec<&mut SequenceState<D>> = self.states.iter_mut().collect();
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
        let d_top = match (forward, gradients) {
            (Some(forward), Some(gradients)) => {
                Some(self.losses(&step, &segments, (&forward, taught), gradients)?)
            }
            (Some(_), None) => unreachable!("no stage runs ahead of the head"),
            (None, _) => None,
        };
        let (rows, spans) = (step.own_rows(), step.spans.len());
        let embedded = match self.model.config.part.begins {
            true => rows * self.model.config.hidden_size,
            false => 0,
        };
        let d_embedded = device.empty(Kind::Activation, embedded)?;
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

    /// Adds the readings that only select for those of a step's segments. Retrieval has no gradient, so they have no
    /// part in the backward.
    fn push_asks(&self, step: &mut Step, segments: &[usize]) {
        for (i, segment) in segments.iter().enumerate() {
            let b = step.spans[i].sequence;
            let start = self.segments[b][*segment].tokens.start;
            for rows in self.asks[b].get(segment).into_iter().flatten() {
                let slot = step.spans.len() + step.asks.len();
                let tokens = &self.sequences[b].tokens[start..start + rows];
                step.push_ask(i, slot, tokens);
            }
        }
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
        let runs = gradients.runs(&due);
        let mut arrivals: Arrivals<D> = HashMap::new();
        let layers = self.model.config.num_hidden_layers;
        for l in (0..layers).rev() {
            for work in &mut passes {
                if l + 1 == layers {
                    work.take_over()?;
                }
                work.layer(l, &mut self.alive[work.group], &mut arrivals)?;
                if l == 0 {
                    work.hand_over()?;
                }
            }
            for run in &runs {
                let group = &mut self.alive[run[0].group];
                // A pass with zero upstream gradient does not prepare the layer.
                group.prepare(self.model, self.plan, l)?;
                let gradients = gradients.of(run[0].sequence);
                gradients.add_layer(self.model, self.plan, group, spans(run), l)?;
            }
            let recompute = self.config.recompute;
            self.alive.iter_mut().for_each(|g| g.release(l, recompute));
        }
        debug_assert!(arrivals.is_empty(), "every prior gradient is received");
        if self.model.config.part.begins {
            for work in passes {
                work.embedding(&mut self.alive[work.group])?;
            }
            for run in &runs {
                let (gradients, group) = (gradients.of(run[0].sequence), &self.alive[run[0].group]);
                gradients.add_embedding(self.model, group, spans(run))?;
            }
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

/// First row of spans that lie one after another, and number of rows.
fn rows_of(spans: &[Span]) -> [usize; 2] {
    let rows = spans.iter().map(|span| span.rows.rows).sum();
    [spans[0].rows.row, rows]
}

/// The spans of a run.
fn spans(run: &[Due]) -> Range<usize> {
    run[0].span..run[run.len() - 1].span + 1
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
            let (rows, spans) = (self.step.own_rows(), self.step.spans.len());
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

    /// First row of some spans, and number of rows.
    fn rows(&self, spans: Range<usize>) -> [usize; 2] {
        rows_of(&self.step.spans[spans])
    }

    fn is_finished(&self) -> bool {
        self.finished.iter().all(|done| *done)
    }
}
