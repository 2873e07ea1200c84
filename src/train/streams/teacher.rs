//! The teacher of a distillation (docs/contract.md, section 3): it reads the tokens of each step before its student
//! computes the losses. Nothing of it has a gradient.
//!
//! Its keys, values and segments are its own. Of a step it keeps what its head reads, row by row as the student's rows
//! lie. Its logits are computed with the student's, as many rows at a time.

use std::ops::Range;

use super::Streams;
use crate::device::{Accumulate, Device, DeviceError, Kind, Lesson, Result, Rows, RowsMut};
use crate::model::decoder::{Decoder, Span, Step};
use crate::model::segmentation::{Cursor, Sequence};
use crate::model::state::{Angles, Plan, SequenceState, Slots};
use crate::train::data::ExampleRef;

/// A model whose probabilities another one learns.
#[derive(Debug)]
pub struct Teacher<'a, D: Device> {
    /// The model, as it is executed. It has the vocabulary of its student.
    pub model: &'a Decoder<D>,
    /// Share of the divergence in the objective, from 0 to 1. The loss on the next token has the rest.
    pub weight: f64,
    /// What both models' logits are divided by for the divergence, above 0.
    pub temperature: f64,
}

impl<D: Device> Clone for Teacher<'_, D> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<D: Device> Copy for Teacher<'_, D> {}

impl<D: Device> Teacher<'_, D> {
    /// Checks that `student` can learn from it so.
    ///
    /// # Errors
    /// [`DeviceError::Argument`] for another vocabulary, a part of a model on either side, and numbers out of range.
    pub(super) fn check(&self, student: &Decoder<D>) -> Result<()> {
        let [own, other] = [student, self.model].map(|model| model.config.vocab_size);
        if own != other {
            let expected = format!("a model with the student's vocabulary of {own} ids");
            return Err(DeviceError::argument("teacher", expected, other));
        }
        if !(student.stage.is_whole() && self.model.stage.is_whole()) {
            let expected = "student and teacher with all their layers on one device";
            let got = "layers spread over stages";
            return Err(DeviceError::argument("teacher", expected, got));
        }
        if !(0.0..=1.0).contains(&self.weight) {
            let expected = "a share from 0 to 1";
            return Err(DeviceError::argument("weight", expected, self.weight));
        }
        match self.temperature.is_finite() && self.temperature > 0.0 {
            true => Ok(()),
            false => {
                let expected = "a finite number above 0";
                let got = self.temperature;
                Err(DeviceError::argument("temperature", expected, got))
            }
        }
    }
}

/// Tokens of a sequence that lie in a row of rows.
struct Place {
    sequence: usize,
    tokens: Range<usize>,
    /// Row of the first of them.
    row: usize,
}

/// A teacher that reads sequences side by side.
pub(super) struct Teaching<'a, D: Device> {
    pub teacher: Teacher<'a, D>,
    plan: Plan,
    /// One slot a sequence.
    slots: Slots<D>,
    states: Vec<SequenceState<D>>,
    cursors: Vec<Cursor>,
}

impl<'a, D: Device> Teaching<'a, D> {
    /// Before the first token of `sequences`.
    pub fn new(teacher: Teacher<'a, D>, sequences: &[ExampleRef<'_>]) -> Result<Self> {
        let Decoder { device, config, .. } = teacher.model;
        let inputs = sequences.iter().map(ExampleRef::targets);
        let (count, longest) = (sequences.len(), inputs.max().unwrap_or(0));
        let plan = Plan::new(config, longest);
        let room = plan.segment_len.min(longest.max(1));
        let angles = Angles::new(device, config, &plan, room)?;
        let state = |_| SequenceState::new(device, &plan);
        Ok(Self {
            teacher,
            slots: Slots::new(device, &plan, &angles, count, room)?,
            states: (0..count).map(state).collect::<Result<_>>()?,
            cursors: vec![Cursor::default(); count],
            plan,
        })
    }

    /// Reads on to the end of these tokens, of which a sequence has those next to what has been read. Returns what the
    /// head reads for each of their `rows` rows.
    fn read(
        &mut self,
        sequences: &[ExampleRef<'_>],
        places: &[Place],
        rows: usize,
    ) -> Result<D::Buffer> {
        let Decoder { device, config, .. } = self.teacher.model;
        let width = config.hidden_size;
        let mut all = device.empty(Kind::Activation, rows * width)?;
        let mut ends: Vec<usize> = self.cursors.iter().map(|cursor| cursor.position).collect();
        for place in places {
            let end = &mut ends[place.sequence];
            *end = place.tokens.end.max(*end);
        }
        loop {
            let (step, first) = self.next_step(sequences, &ends);
            if step.spans.is_empty() {
                return Ok(all);
            }
            let mut placed = device.step(step.rows(&self.plan, self.slots.room))?;
            let mut states: Vec<&mut SequenceState<D>> = self.states.iter_mut().collect();
            let (plan, slots) = (&self.plan, &mut self.slots);
            let model = self.teacher.model;
            let forward = model.forward(plan, &step, &mut placed, &mut states, slots, |_, _| ())?;
            let hidden = forward.expect("a teacher is a whole model").hidden;
            for (span, first) in step.spans.iter().zip(first) {
                let read = first..first + span.rows.rows;
                for place in places
                    .iter()
                    .filter(|place| place.sequence == span.sequence)
                {
                    let (from, to) = (
                        read.start.max(place.tokens.start),
                        read.end.min(place.tokens.end),
                    );
                    if from >= to {
                        continue;
                    }
                    let src = Rows::packed(&hidden, span.rows.row + from - read.start, width);
                    let row = place.row + from - place.tokens.start;
                    let dst = RowsMut::packed(&mut all, row, width);
                    device.copy(src, dst, to - from, width, Accumulate::No)?;
                }
            }
        }
    }

    /// The next rows of each sequence up to its end here, all of one segment, and the first token of each.
    fn next_step(&mut self, sequences: &[ExampleRef<'_>], ends: &[usize]) -> (Step, Vec<usize>) {
        let (mut step, mut first) = (Step::default(), Vec::new());
        for (b, cursor) in self.cursors.iter_mut().enumerate() {
            let sequence = Sequence {
                tokens: &sequences[b].tokens[..ends[b]],
                breaks: sequences[b].breaks,
                // Its segments may begin elsewhere than the student's. Then what it read twice would depend on the
                // number of segments in a step.
                rereads: &[],
            };
            let (tokens, at) = (sequence.tokens, cursor.position);
            let part = self.plan.next_part(*cursor, sequence, at);
            if part.rows == 0 {
                continue;
            }
            step.push(b, b, cursor.rows, &tokens[at..at + part.rows], part.end);
            first.push(at);
            cursor.advance(part);
        }
        (step, first)
    }
}

impl<D: Device> Streams<'_, D> {
    /// What the teacher's head reads for each row of a step, if there is a teacher.
    pub(super) fn taught(&mut self, step: &Step, segments: &[usize]) -> Result<Option<D::Buffer>> {
        let Some(teaching) = &mut self.teaching else {
            return Ok(None);
        };
        let place = |(span, segment): (&Span, &usize)| Place {
            sequence: span.sequence,
            tokens: self.segments[span.sequence][*segment].tokens.clone(),
            row: span.rows.row,
        };
        let places: Vec<Place> = step.spans.iter().zip(segments).map(place).collect();
        let taught = teaching.read(self.sequences, &places, step.own_rows());
        taught.map(Some)
    }
}

/// The teacher's side of the losses of a step.
pub(super) struct Lessons<'a, D: Device> {
    teacher: Teacher<'a, D>,
    /// What its head reads for each row.
    taught: D::Buffer,
    logits: D::Buffer,
    divergences: D::Buffer,
}

impl<'a, D: Device> Lessons<'a, D> {
    /// For a step of so many rows, at most so many of them at a time.
    pub fn new(
        teacher: Teacher<'a, D>,
        taught: D::Buffer,
        [rows, most]: [usize; 2],
    ) -> Result<Self> {
        let Decoder { device, config, .. } = teacher.model;
        Ok(Self {
            logits: device.empty(Kind::Exact, most * config.vocab_size)?,
            divergences: device.empty(Kind::Exact, rows)?,
            teacher,
            taught,
        })
    }

    /// Scores of consecutive rows from `row` on, and the gradient in place of their logits. `scales`: of each row, the
    /// factor of its loss on the next token and that of its divergence, before they are weighed against each other.
    pub fn learn(
        &mut self,
        row: usize,
        targets: &[u32],
        scales: Vec<(f64, f64)>,
        [logits, scores]: [RowsMut<'_, D::Buffer>; 2],
    ) -> Result<()> {
        let Decoder { device, config, .. } = self.teacher.model;
        let (vocab, rows) = (config.vocab_size, targets.len());
        let x = Rows::packed(&self.taught, row, config.hidden_size);
        let out = RowsMut::packed(&mut self.logits, 0, vocab);
        let head = self.teacher.model.head();
        device.linear(x, rows, head, out, Accumulate::No)?;
        let Teacher {
            weight,
            temperature,
            ..
        } = self.teacher;
        let scales: Vec<[f64; 2]> = scales
            .into_iter()
            .map(|(loss, divergence)| [(1.0 - weight) * loss, weight * divergence])
            .collect();
        let lesson = Lesson {
            teacher: Rows::packed(&self.logits, 0, vocab),
            temperature,
            scales: &scales,
        };
        let to = RowsMut::packed(&mut self.divergences, row, 1);
        device.divergences(logits, vocab, targets, &lesson, [scores, to])
    }

    /// Divergences of all rows.
    pub fn divergences(self) -> D::Buffer {
        self.divergences
    }
}
