//! Reading: what a session makes of the tokens it is fed.

use std::ops::Range;

use super::{Command, Session};
use crate::device::{Accumulate, Device, DeviceError, Kind, Purpose, Result, Rows, RowsMut};
use crate::model::decoder::{Decoder, Forward, Span, Step};
use crate::model::segmentation::{End, Sequence, Tokens};
use crate::model::state::{Carry, SequenceState};

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
    /// Rereads: the segment's tokens are read once more after so many of `tokens`, each from 1 to all of them, strictly
    /// ascending ([`Sequence::rereads`]). The segment has begun in this call then.
    pub rereads: &'a [usize],
}

impl<'a> Feed<'a> {
    fn sequence(&self) -> Sequence<'a> {
        Sequence {
            tokens: self.tokens,
            breaks: self.breaks,
            rereads: self.rereads,
        }
    }

    fn check(&self) -> Result<()> {
        for (name, positions) in [("breaks", self.breaks), ("rereads", self.rereads)] {
            if positions.first() == Some(&0) {
                let expected = "positions from 1 on: each goes with the token before it";
                return Err(DeviceError::argument(name, expected, 0));
            }
        }
        self.sequence().check()
    }
}

/// A step, the feed and the place in it where each span starts, and whether the spans are whole segments.
type NextStep = (Step, Vec<(usize, usize)>, bool);

impl<D: Device> Session<'_, D> {
    /// Where segments end in the next tokens of a sequence: after so many of `next`, ascending.
    pub fn segment_ends(&self, sequence: usize, next: Sequence<'_>) -> Vec<usize> {
        let (mut cursor, mut at, mut ends) = (self.cursors[sequence], 0, Vec::new());
        let next = Sequence {
            rereads: &[],
            ..next
        };
        while at < next.tokens.len() {
            let part = self.plan.next_part(cursor, next, at);
            at += part.rows;
            cursor.advance(part);
            if part.end == End::Complete {
                ends.push(at);
            }
        }
        ends
    }

    /// The tokens of `whole` that a sequence reads after the first `from` of them: at most `count`, and more only where
    /// fewer would cut a segment that is read twice.
    pub fn next_piece(
        &self,
        sequence: usize,
        whole: Sequence<'_>,
        from: usize,
        count: usize,
    ) -> Range<usize> {
        let end = whole.tokens.len().min(from.saturating_add(count.max(1)));
        let near = end.saturating_add(self.plan.segment_len);
        let after = whole.rereads.partition_point(|r| *r <= end);
        if whole.rereads.get(after).is_none_or(|r| *r > near) {
            return from..end;
        }
        let once = Sequence {
            rereads: &[],
            ..whole
        };
        let (mut cursor, mut at, mut start) = (self.cursors[sequence], from, from);
        while at < end {
            let part = self.plan.next_part(cursor, once, at);
            at += part.rows;
            cursor.advance(part);
            let before = whole.rereads.partition_point(|r| *r <= at);
            match whole.rereads[..before].last() {
                Some(last) if *last > end && start > from => return from..start,
                Some(last) if *last > end => return from..*last,
                _ => start = at,
            }
        }
        from..end
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
            let cursor = self.cursors[feed.sequence];
            self.plan.check_rereads(cursor, feed.sequence())?;
            self.model.check_tokens("tokens", feed.tokens)?;
            self.model.check_tokens("targets", feed.targets)?;
        }
        let told = |feed: &Feed<'_>| {
            let tokens = Tokens {
                ids: feed.tokens.to_vec(),
                breaks: feed.breaks.to_vec(),
                rereads: feed.rereads.to_vec(),
            };
            (feed.sequence, tokens)
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
    pub(super) fn undone_on_error<T>(
        &mut self,
        step: impl FnOnce(&mut Self) -> Result<T>,
    ) -> Result<T> {
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
        // Rows that are read for their queries alone have no output.
        let counts = |span: &Span| span.end != End::Again;
        let asked = |(span, (feed, first)): (&Span, &(usize, usize))| {
            let Feed {
                tokens, targets, ..
            } = &feeds[*feed];
            counts(span) && (*first < targets.len() || first + span.rows.rows == tokens.len())
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
        let owned = step.spans.iter().zip(owners);
        for (span, (feed, first)) in owned.filter(|(span, _)| counts(span)) {
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

    /// The next rows of every feed, ordered by segment: either whole segments, read for good or to be read again, at
    /// most `side_by_side` of each feed, or parts, one of each feed. Also the feed of each span, how far into the feed
    /// it starts, and whether they are whole segments: those come first, since parts take slots that stay.
    fn next_step(&mut self, feeds: &[Feed<'_>], read: &mut [usize]) -> NextStep {
        let (mut step, mut owners) = (Step::default(), Vec::new());
        let next_is_whole = |(feed, read): (&Feed<'_>, &usize)| {
            let cursor = self.cursors[feed.sequence];
            let part = self.plan.next_part(cursor, feed.sequence(), *read);
            part.rows > 0 && cursor.rows == 0 && part.end != End::Open
        };
        let wholes = feeds.iter().zip(read.iter()).any(next_is_whole);
        for iteration in 0..self.side_by_side {
            let before = step.spans.len();
            for (i, feed) in feeds.iter().enumerate() {
                let cursor = &mut self.cursors[feed.sequence];
                let part = self.plan.next_part(*cursor, feed.sequence(), read[i]);
                let whole = cursor.rows == 0 && part.end != End::Open;
                if part.rows == 0 || whole != wholes || (iteration > 0 && !whole) {
                    continue;
                }
                let slot = match whole {
                    true => feed.sequence * self.side_by_side + iteration,
                    false => feed.sequence,
                };
                let tokens = &feed.tokens[read[i]..read[i] + part.rows];
                step.push(feed.sequence, slot, cursor.rows, tokens, part.end);
                owners.push((i, read[i]));
                // A segment that is read again has begun with this part.
                read[i] += if part.end == End::Again { 0 } else { part.rows };
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
    pub(super) fn take_logits(
        &mut self,
        forward: &Forward<D>,
        ended: &[(usize, usize)],
    ) -> Result<()> {
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
    let all = 0..inputs.tokens.len();
    let (breaks, rereads) = (
        inputs.breaks_within(all.clone()),
        inputs.rereads_within(all),
    );
    let feed = Feed {
        sequence: 0,
        tokens: inputs.tokens,
        targets: &sequence.tokens[1..],
        breaks: &breaks,
        rereads: &rereads,
    };
    Ok(session.feed(&[feed])?.remove(0))
}
