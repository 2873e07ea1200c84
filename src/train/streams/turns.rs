//! The order in which batches of sequences run forward and backward.
//!
//! A *turn* is a step of a batch: some segments of all its sequences. On a device alone each turn runs forward and then
//! backward. Where a model's layers are spread over stages, a stage with `n` stages behind it runs `n` turns forward
//! before the first one comes back to it, and then one forward and one backward by turns. So all stages compute at a
//! time, and none keeps more than it has to. The next batch follows without a gap: what a turn computes depends neither
//! on the turns of other batches nor, in its forward, on any backward.

use std::collections::VecDeque;

use super::{Batch, Gradients, Groups, Objective, Scores, StreamConfig, Streams};
use crate::device::{Device, DeviceError, Purpose, Result};
use crate::model::decoder::Decoder;
use crate::model::state::Plan;
use crate::train::data::ExampleRef;

/// What takes the gradients of batches, which come in their order.
pub(in crate::train) trait Sums<D: Device>: Send {
    /// What can go wrong.
    type Error: From<DeviceError> + Send;

    /// Makes ready the gradients of the batch with this number.
    fn begin(&mut self, batch: usize) -> std::result::Result<(), Self::Error>;

    /// Those of the batch at work, for each of its groups.
    fn gradients(&mut self) -> &mut [Gradients<D>];

    /// The batch's gradients are complete. Takes the scores of each sequence's targets, which are there where the
    /// model's head is.
    fn end(&mut self, batch: usize, scores: Scores) -> std::result::Result<(), Self::Error>;
}

/// Segments of a batch that run in one step.
#[derive(Clone, Copy)]
struct Turn {
    batch: usize,
    first: usize,
    next: usize,
    /// Segments of the batch's longest sequence.
    end: usize,
}

/// As [`accumulate_of`](super::accumulate_of), for several batches with gradients for each group of `group` sequences.
/// They have the bits of a group computed alone.
///
/// # Errors
/// As [`accumulate_of`](super::accumulate_of), and those of `sums`.
pub(in crate::train) fn accumulate_batches<D: Device, S: Sums<D>>(
    model: &Decoder<D>,
    batches: &[&[ExampleRef<'_>]],
    group: usize,
    config: StreamConfig,
    objective: &Objective<'_, D>,
    sums: &mut S,
) -> std::result::Result<(), S::Error> {
    if let Some(teacher) = &objective.teacher {
        teacher.check(model)?;
    }
    let batches: Vec<Batch<'_>> = batches
        .iter()
        .map(|sequences| Batch::new(model, sequences))
        .collect::<Result<_>>()?;
    let device = &model.device;
    device.together(|| run(model, &batches, group, config, objective, sums))
}

impl<'a> Batch<'a> {
    fn new<D: Device>(model: &Decoder<D>, sequences: &'a [ExampleRef<'a>]) -> Result<Self> {
        sequences.iter().try_for_each(ExampleRef::check)?;
        let mut tokens = sequences.iter().map(|sequence| sequence.tokens);
        tokens.try_for_each(|tokens| model.check_tokens("sequences", tokens))?;
        let inputs = sequences.iter().map(|s| s.sequence().inputs());
        let longest = inputs.clone().map(|s| s.tokens.len()).max().unwrap_or(0);
        let plan = Plan::new(&model.config, longest);
        Ok(Self {
            sequences,
            segments: inputs.clone().map(|s| plan.segments(s)).collect(),
            asks: inputs.map(|s| plan.asks(s)).collect(),
            plan,
        })
    }

    /// Its turns, as the batch with this number.
    fn turns(&self, batch: usize, segments_per_step: usize) -> impl Iterator<Item = Turn> {
        let end = self.segments.iter().map(Vec::len).max().unwrap_or(0);
        let from = move |first: usize| {
            (first < end).then_some(Turn {
                batch,
                first,
                next: first.saturating_add(segments_per_step.max(1)).min(end),
                end,
            })
        };
        std::iter::successors(from(0), move |turn| from(turn.next))
    }
}

/// Body of [`accumulate_batches`], inside [`Device::together`].
fn run<D: Device, S: Sums<D>>(
    model: &Decoder<D>,
    batches: &[Batch<'_>],
    group: usize,
    config: StreamConfig,
    objective: &Objective<'_, D>,
    sums: &mut S,
) -> std::result::Result<(), S::Error> {
    let turns = batches.iter().enumerate();
    let turns = turns.flat_map(|(i, batch)| batch.turns(i, config.segments_per_step));
    let turns: Vec<Turn> = turns.collect();
    let ahead = model.stage.behind();
    let mut alive: VecDeque<Streams<'_, D>> = VecDeque::new();
    for i in 0..turns.len() + ahead {
        let back = i.checked_sub(ahead).map(|i| turns[i]);
        if let Some(turn) = back.filter(|turn| turn.first == 0) {
            sums.begin(turn.batch)?;
        }
        if let Some(turn) = turns.get(i) {
            if turn.first == 0 {
                let streams = Streams::new(model, &batches[turn.batch], config, objective);
                alive.push_back(streams.map_err(for_backward)?);
            }
            let mut groups = back.map(|_| Groups::new(sums.gradients(), group));
            groups.iter().try_for_each(Groups::check_stop)?;
            let streams = alive.back_mut().expect("a batch has begun");
            let done = streams.forward(turn.first, turn.next, groups.as_mut());
            done.map_err(for_backward)?;
        }
        if let Some(turn) = back {
            let mut groups = Groups::new(sums.gradients(), group);
            let streams = alive.front_mut().expect("a batch is at work");
            let done = streams.backward(turn.first, turn.next, turn.end, &mut groups);
            done.map_err(for_backward)?;
            if turn.next == turn.end {
                let scores = streams.scores()?;
                alive.pop_front();
                sums.end(turn.batch, scores)?;
            }
        }
    }
    Ok(())
}

fn for_backward(error: DeviceError) -> DeviceError {
    error.wanted_for(Purpose::Backward)
}
