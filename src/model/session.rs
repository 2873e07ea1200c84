//! Prefill, scoring and decoding of sequences, all through [`Decoder::forward`].
//!
//! A session holds the state of each sequence, and slots for the segments in flight. [`Session::feed`] takes any number
//! of tokens for any of the sequences. The bits of the results do not depend on how tokens are split into calls.

mod decode;
mod flight;
mod follow;
mod selection;

use super::decoder::{Decoder, Forward, Span, Step};
use super::segmentation::{Cursor, Sequence};
use super::state::{Carry, Plan, SequenceState, allocate_segment, elements};
use crate::device::{Accumulate, Device, DeviceError, Kind, Purpose, Result, Rows, RowsMut};
use decode::Decoding;
pub(super) use flight::Flight;
use follow::{Command, Told};
pub use follow::{follow, rehearse};
pub use selection::SelectedTokens;

/// Tokens per step of a model without segments; it bounds the memory of activations.
const PLAIN_CHUNK: usize = 1024;
/// Steps that the stages of a model may be apart in one call: each call ends with the last stage.
const STAGED_STEPS: usize = 64;

/// Tokens for one sequence of a session.
#[derive(Debug, Clone, Copy)]
pub struct Feed<'a> {
    /// Index of the sequence.
    pub sequence: usize,
    /// Its next tokens.
    pub tokens: &'a [u32],
    /// Targets: the next token after each of `tokens`. Their log-probabilities are computed. May be shorter than
    /// `tokens`, or empty.
    pub targets: &'a [u32],
    /// Breaks: the segment ends after so many of `tokens`, each from 1 to all of them, strictly ascending. A break
    /// after the last one ends the segment at once.
    pub breaks: &'a [usize],
}

impl<'a> Feed<'a> {
    fn sequence(&self) -> Sequence<'a> {
        let (tokens, breaks) = (self.tokens, self.breaks);
        Sequence { tokens, breaks }
    }

    fn check(&self) -> Result<()> {
        if self.breaks.first() == Some(&0) {
            let expected = "positions from 1 on: a break goes with the token before it";
            return Err(DeviceError::argument("breaks", expected, 0));
        }
        self.sequence().check()
    }
}

/// A step, the feed and the place in it where each span starts, and whether the spans are whole segments.
type NextStep = (Step, Vec<(usize, usize)>, bool);

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
    /// [`DeviceError::OutOfMemory`] for what the device or the host cannot hold, or another error of the device.
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

    /// Where segments end in the next tokens of a sequence: after so many of `next`, ascending.
    pub fn segment_ends(&self, sequence: usize, next: Sequence<'_>) -> Vec<usize> {
        let (mut cursor, mut at, mut ends) = (self.cursors[sequence], 0, Vec::new());
        while at < next.tokens.len() {
            let part = self.plan.next_part(cursor.rows, next, at);
            at += part.rows;
            cursor.advance(part);
            if part.closes {
                ends.push(at);
            }
        }
        ends
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

    /// Reads tokens; returns the log-probabilities of each feed's targets, in the feeds' order.
    /// Each sequence may be fed once a call, and not beyond the session's longest length.
    ///
    /// # Errors
    /// Breaks or tokens that a feed cannot have, or errors of the device. Every sequence is then where the last
    /// complete step left it ([`Session::position`]). Reading the rest gives the same bits as without the error.
    /// [`Session::logits`] are undefined until then.
    pub fn feed(&mut self, feeds: &[Feed<'_>]) -> Result<Vec<Vec<f32>>> {
        feeds.iter().try_for_each(Feed::check)?;
        for feed in feeds {
            self.model.check_tokens("tokens", feed.tokens)?;
            self.model.check_tokens("targets", feed.targets)?;
        }
        let told = |feed: &Feed<'_>| {
            let (tokens, breaks) = (feed.tokens.to_vec(), feed.breaks.to_vec());
            (feed.sequence, tokens, breaks)
        };
        if !self.model.stage.is_whole() {
            let feeds = feeds.iter().map(told);
            self.told.tell(&Command::Feed(feeds.collect()))?;
        }
        let device = &self.model.device;
        let fed = device.together(|| self.feed_all(feeds));
        fed.map_err(|error| error.wanted_for(Purpose::Activations))
    }

    fn feed_all(&mut self, feeds: &[Feed<'_>]) -> Result<Vec<Vec<f32>>> {
        let mut read = vec![0; feeds.len()];
        let mut scored = vec![Vec::new(); feeds.len()];
        while self.undone_on_error(|session| session.feed_step(feeds, &mut read, &mut scored))? {}
        Ok(scored)
    }

    /// Runs `step` as a transaction: if it fails, the state of every sequence is rolled back.
    fn undone_on_error<T>(&mut self, step: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        let cursors = self.cursors.clone();
        let carries = |session: &mut Self, change: fn(&mut Carry<D>)| {
            let layers = session
                .states
                .iter_mut()
                .flat_map(|state| &mut state.layers);
            layers.for_each(change);
        };
        carries(self, Carry::begin);
        let done = step(self);
        match done {
            Ok(_) => carries(self, Carry::commit),
            Err(ref error) => {
                carries(self, Carry::roll_back);
                self.cursors = cursors;
                self.told.fail(error);
            }
        }
        done
    }

    /// Reads the next rows of every feed. Returns whether there were any.
    fn feed_step(
        &mut self,
        feeds: &[Feed<'_>],
        read: &mut [usize],
        scored: &mut [Vec<f32>],
    ) -> Result<bool> {
        let (step, owners, whole) = self.next_step(feeds, read);
        if step.spans.is_empty() {
            return Ok(false);
        }
        self.decoding.interrupt();
        let mut states: Vec<&mut SequenceState<D>> = self.states.iter_mut().collect();
        let (model, plan) = (self.model, &self.plan);
        let slots = match whole {
            true => {
                let count = self.cursors.len() * self.side_by_side;
                self.flight.passing(&model.device, plan, count)?
            }
            false => self.flight.open(&model.device, plan)?,
        };
        let mut placed = model.device.step(step.rows(plan, slots.room))?;
        let asked = |(span, (feed, first)): (&Span, &(usize, usize))| {
            let Feed {
                tokens, targets, ..
            } = &feeds[*feed];
            *first < targets.len() || first + span.rows.rows == tokens.len()
        };
        if !step.spans.iter().zip(&owners).any(asked) {
            model.advance(plan, &step, &mut placed, &mut states, slots)?;
            return Ok(true);
        }
        let forward = model.forward(plan, &step, &mut placed, &mut states, slots, |_, _| ())?;
        let Some(forward) = forward else {
            return Ok(true);
        };
        let mut ended = Vec::new();
        for (span, (feed, first)) in step.spans.iter().zip(owners) {
            let (known, rows) = (&feeds[feed].targets, span.rows.rows);
            let targets = &known[first.min(known.len())..(first + rows).min(known.len())];
            let more = self.score(&forward, span.rows.row, targets)?;
            scored[feed].extend(more);
            if first + rows == feeds[feed].tokens.len() {
                ended.push((span.sequence, span.rows.row + rows - 1));
            }
        }
        for ended in ended.chunks(D::LOGIT_ROWS) {
            self.take_logits(&forward, ended)?;
        }
        Ok(true)
    }

    /// The next rows of every feed, ordered by segment: either whole segments, at most `side_by_side` of each feed, or
    /// parts, one of each feed. Also the feed of each span, how far into the feed it starts, and whether they are whole
    /// segments: those come first, since parts take slots that stay.
    fn next_step(&mut self, feeds: &[Feed<'_>], read: &mut [usize]) -> NextStep {
        let (mut step, mut owners) = (Step::default(), Vec::new());
        let next_is_whole = |(feed, read): (&Feed<'_>, &usize)| {
            let rows = self.cursors[feed.sequence].rows;
            let part = self.plan.next_part(rows, feed.sequence(), *read);
            part.rows > 0 && rows == 0 && part.closes
        };
        let wholes = feeds.iter().zip(read.iter()).any(next_is_whole);
        for iteration in 0..self.side_by_side {
            let before = step.spans.len();
            for (i, feed) in feeds.iter().enumerate() {
                let cursor = &mut self.cursors[feed.sequence];
                let part = self.plan.next_part(cursor.rows, feed.sequence(), read[i]);
                let whole = cursor.rows == 0 && part.closes;
                if part.rows == 0 || whole != wholes || (iteration > 0 && !whole) {
                    continue;
                }
                let slot = match whole {
                    true => feed.sequence * self.side_by_side + iteration,
                    false => feed.sequence,
                };
                let tokens = &feed.tokens[read[i]..read[i] + part.rows];
                step.push(feed.sequence, slot, cursor.rows, tokens, part.closes);
                owners.push((i, read[i]));
                read[i] += part.rows;
                cursor.advance(part);
            }
            if step.spans.len() == before {
                break;
            }
        }
        (step, owners, wholes)
    }

    fn score(&self, forward: &Forward<D>, row: usize, targets: &[u32]) -> Result<Vec<f32>> {
        let device = &self.model.device;
        let mut scores = device.empty(Kind::Exact, targets.len())?;
        for (i, targets) in targets.chunks(D::LOGIT_ROWS).enumerate() {
            let x = Rows::packed(&forward.hidden, row + i * D::LOGIT_ROWS, self.hidden());
            let mut logits = self.head(x, targets.len())?;
            let vocab = self.model.config.vocab_size;
            let rows = RowsMut::packed(&mut logits, 0, vocab);
            let to = RowsMut::packed(&mut scores, i * D::LOGIT_ROWS, 1);
            device.log_probabilities(rows, vocab, targets, None, to)?;
        }
        device.read(&scores, 0..targets.len())
    }

    /// Computes the logits of one row of each sequence in one GEMM, so that the head's weights are read once.
    fn take_logits(&mut self, forward: &Forward<D>, ended: &[(usize, usize)]) -> Result<()> {
        let (device, hidden) = (&self.model.device, self.hidden());
        let vocab = self.model.config.vocab_size;
        let runs = runs(ended);
        if let [(sequence, row, count)] = runs[..] {
            let x = Rows::packed(&forward.hidden, row, hidden);
            let y = RowsMut::packed(&mut self.logits, sequence, vocab);
            return device.linear(x, count, self.model.head(), y, Accumulate::No);
        }
        let mut last = device.empty(Kind::Activation, ended.len() * hidden)?;
        let mut at = 0;
        for (_, row, count) in &runs {
            let src = Rows::packed(&forward.hidden, *row, hidden);
            let dst = RowsMut::packed(&mut last, at, hidden);
            device.copy(src, dst, *count, hidden, Accumulate::No)?;
            at += count;
        }
        let logits = self.head(Rows::packed(&last, 0, hidden), ended.len())?;
        at = 0;
        for (sequence, _, count) in &runs {
            let src = Rows::packed(&logits, at, vocab);
            let dst = RowsMut::packed(&mut self.logits, *sequence, vocab);
            device.copy(src, dst, *count, vocab, Accumulate::No)?;
            at += count;
        }
        Ok(())
    }

    fn hidden(&self) -> usize {
        self.model.config.hidden_size
    }

    fn head(&self, x: Rows<'_, D::Buffer>, rows: usize) -> Result<D::Buffer> {
        let (device, vocab) = (&self.model.device, self.model.config.vocab_size);
        let mut logits = device.empty(Kind::Exact, rows * vocab)?;
        let y = RowsMut::packed(&mut logits, 0, vocab);
        device.linear(x, rows, self.model.head(), y, Accumulate::No)?;
        Ok(logits)
    }
}

/// Runs of consecutive sequences with consecutive rows: first sequence, its row, and the length.
fn runs(ended: &[(usize, usize)]) -> Vec<(usize, usize, usize)> {
    let mut runs: Vec<(usize, usize, usize)> = Vec::new();
    for (sequence, row) in ended {
        match runs.last_mut() {
            Some((first, first_row, count))
                if *first + *count == *sequence && *first_row + *count == *row =>
            {
                *count += 1;
            }
            _ => runs.push((*sequence, *row, 1)),
        }
    }
    runs
}

/// Log-probability of each token but the first. `segments_per_step` segments run in one step.
///
/// # Errors
/// As [`Session::feed`].
pub fn score<'a, D: Device>(
    model: &Decoder<D>,
    sequence: impl Into<Sequence<'a>>,
    segments_per_step: usize,
) -> Result<Vec<f32>> {
    let sequence = sequence.into();
    sequence.check()?;
    let inputs = sequence.inputs();
    if inputs.tokens.is_empty() {
        return Ok(Vec::new());
    }
    let mut session = Session::new(model, 1, inputs.tokens.len(), segments_per_step)?;
    let breaks = inputs.breaks_within(0..inputs.tokens.len());
    let feed = Feed {
        sequence: 0,
        tokens: inputs.tokens,
        targets: &sequence.tokens[1..],
        breaks: &breaks,
    };
    Ok(session.feed(&[feed])?.remove(0))
}
