//! Prefill, scoring and decoding of sequences, all through [`Decoder::forward`].
//!
//! A session holds the state of each sequence, and slots for the segments in flight. [`Session::feed`] takes any number
//! of tokens for any of the sequences. The bits of the results do not depend on how tokens are split into calls.

mod decode;
mod feed;
mod flight;
mod follow;
mod selection;

use super::decoder::{Decoder, Step};
use super::segmentation::Cursor;
use super::state::{Plan, SequenceState, allocate_segment, elements};
use crate::device::{Accumulate, Device, Kind, Result, Rows, RowsMut};
use decode::Decoding;
pub use feed::{Feed, score};
pub(super) use flight::Flight;
use follow::{Command, Told};
pub use follow::{follow, rehearse};
pub use selection::SelectedTokens;

/// Tokens per step of a model without segments; it bounds the memory of activations.
const PLAIN_CHUNK: usize = 1024;
/// Steps that the stages of a model may be apart in one call: each call ends with the last stage.
const STAGED_STEPS: usize = 64;

/// Sequences that a model reads and continues.
#[derive(Debug)]
pub struct Session<'m, D: Device> {
    pub(super) model: &'m Decoder<D>,
    pub(super) plan: Plan,
    pub(super) flight: Flight<D>,
    pub(super) states: Vec<SequenceState<D>>,
    /// How far each sequence has been read.
    pub(super) cursors: Vec<Cursor>,
    /// Logits after the last token of each sequence `[sequences, vocab]`, where it has read any.
    pub(super) logits: D::Buffer,
    /// Whole segments of a sequence in one step.
    side_by_side: usize,
    /// Samplers of the sequences, and the recorded decoding steps.
    pub(super) decoding: Decoding<D>,
    /// The same session of the model's other stages.
    told: Told<'m, D>,
}

impl<'m, D: Device> Session<'m, D> {
    /// A session of `sequences` empty sequences of at most `longest` tokens each, running
    /// `segments_per_step` of their segments side by side where many tokens come at once.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`](crate::device::DeviceError::OutOfMemory) for what the device or the host cannot
    /// hold, or another error of the device.
    pub fn new(
        model: &'m Decoder<D>,
        sequences: usize,
        longest: usize,
        segments_per_step: usize,
    ) -> Result<Self> {
        let plan = Plan::new(&model.config, longest);
        let logits = match model.config.part.ends {
            true => elements([sequences, model.config.vocab_size])?,
            false => 0,
        };
        // Breaks can make more segments, of fewer rows: those follow in other steps.
        let needed = longest.div_ceil(plan.segment_len).max(1);
        let side_by_side = segments_per_step.clamp(1, needed);
        elements([sequences, side_by_side])?;
        SequenceState::<D>::check_host(&plan, sequences)?;
        let told = Told::open(
            model,
            &Command::Open {
                sequences,
                longest,
                segments_per_step,
            },
        )?;
        let room = plan.segment_len.min(longest.max(1));
        let flight = Flight::new(model, &plan, sequences, room)?;
        let states = (0..sequences)
            .map(|_| SequenceState::new(&model.device, &plan))
            .collect::<Result<_>>()?;
        Ok(Self {
            model,
            plan,
            flight,
            states,
            cursors: vec![Cursor::default(); sequences],
            logits: model.device.empty(Kind::Exact, logits)?,
            side_by_side,
            decoding: Decoding::default(),
            told,
        })
    }

    /// Empties a sequence, as if it had read nothing. The others stay as they are.
    ///
    /// # Errors
    /// Those of the device.
    pub fn restart(&mut self, sequence: usize) -> Result<()> {
        self.told.tell(&Command::Restart(sequence))?;
        let (device, plan) = (&self.model.device, &self.plan);
        let layers = self.states[sequence].layers.iter_mut();
        for (carry, reads) in layers.zip(&plan.reads) {
            carry.clear(device, plan, reads)?;
        }
        self.cursors[sequence] = Cursor::default();
        self.decoding.interrupt();
        Ok(())
    }

    /// Tokens that a sequence has read.
    pub fn position(&self, sequence: usize) -> usize {
        self.cursors[sequence].position
    }

    /// Number of sequences.
    pub fn sequences(&self) -> usize {
        self.cursors.len()
    }

    /// Segments of a sequence computed side by side.
    pub fn segments_per_step(&self) -> usize {
        self.side_by_side
    }

    /// The model.
    pub fn model(&self) -> &'m Decoder<D> {
        self.model
    }

    /// Largest number of tokens of a sequence; `usize::MAX` where only the memory of the pool bounds it.
    pub fn capacity(&self) -> usize {
        if self.model.config.segment.is_none() || self.flight.room < self.plan.segment_len {
            self.flight.room
        } else {
            usize::MAX
        }
    }

    /// Preferred number of tokens per call for long inputs: whole segments, or a fixed number for a model without
    /// segments, so that the memory of activations is bounded.
    pub fn chunk(&self) -> usize {
        match &self.model.config.segment {
            Some(segment) => {
                let steps = if self.model.stage.is_whole() {
                    1
                } else {
                    STAGED_STEPS
                };
                let step = segment.segment_len.saturating_mul(self.side_by_side);
                step.saturating_mul(steps)
            }
            None => PLAIN_CHUNK,
        }
    }

    /// Allocates the pool and the state as if the sequence had read `tokens` more tokens, with arbitrary contents. For
    /// dry runs.
    pub(crate) fn allocate_ahead(&mut self, sequence: usize, tokens: usize) -> Result<()> {
        let (device, plan) = (&self.model.device, &self.plan);
        if tokens == 0 {
            return Ok(());
        }
        let cursor = &mut self.cursors[sequence];
        let (open, room) = (cursor.rows + tokens, plan.segment_len);
        let segments = if plan.segmented { open / room } else { 0 };
        cursor.position += tokens;
        cursor.rows = open - segments * room;
        if segments == 0 {
            return Ok(());
        }
        let rows = device.empty(Kind::Activation, plan.segment_len * plan.kv_width())?;
        for _ in 0..segments {
            for (l, carry) in self.states[sequence].layers.iter_mut().enumerate() {
                allocate_segment(device, plan, l, &rows, carry)?;
            }
        }
        Ok(())
    }

    /// Logits for the token after the last one read; empty before the first.
    pub fn logits(&self, sequence: usize) -> Result<Vec<f32>> {
        if self.position(sequence) == 0 {
            return Ok(Vec::new());
        }
        let vocab = self.model.config.vocab_size;
        let row = sequence * vocab..(sequence + 1) * vocab;
        self.model.device.read(&self.logits, row)
    }

    /// Log-probability of `token` as the next token of a sequence that has read at least one.
    pub fn log_probability(&self, sequence: usize, token: u32) -> Result<f32> {
        Ok(self.log_probabilities(sequence, &[token])?[0])
    }

    /// [`Session::log_probability`] of each of some tokens.
    pub fn log_probabilities(&self, sequence: usize, tokens: &[u32]) -> Result<Vec<f32>> {
        let device = &self.model.device;
        let (vocab, rows) = (self.model.config.vocab_size, tokens.len());
        let mut logits = device.empty(Kind::Exact, rows * vocab)?;
        for row in 0..rows {
            let src = Rows::packed(&self.logits, sequence, vocab);
            let dst = RowsMut::packed(&mut logits, row, vocab);
            device.copy(src, dst, 1, vocab, Accumulate::No)?;
        }
        let logits = RowsMut::packed(&mut logits, 0, vocab);
        let mut scores = device.empty(Kind::Exact, rows)?;
        let to = RowsMut::packed(&mut scores, 0, 1);
        device.log_probabilities(logits, vocab, tokens, None, to)?;
        device.read(&scores, 0..rows)
    }

    /// The `count` likeliest next tokens of a sequence that has read at least one, likeliest first, ties by id, with
    /// their log-probabilities.
    pub fn likeliest(&self, sequence: usize, count: usize) -> Result<Vec<(u32, f32)>> {
        let logits = self.logits(sequence)?;
        let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
        let count = count.min(ids.len());
        let by_rank = |a: &u32, b: &u32| {
            let logit = |id: &u32| logits[*id as usize];
            logit(b).total_cmp(&logit(a)).then(a.cmp(b))
        };
        if count < ids.len() {
            ids.select_nth_unstable_by(count, by_rank);
            ids.truncate(count);
        }
        ids.sort_unstable_by(by_rank);
        let scores = self.log_probabilities(sequence, &ids)?;
        Ok(ids.into_iter().zip(scores).collect())
    }
}
