//! Where the segments of a sequence end, and which of their tokens are read twice (docs/contract.md, section 2). A
//! segment ends after `segment_len` tokens, after a token listed in `segment.break_ids`, and after the positions given
//! beside the tokens.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::state::Plan;
use crate::device::{DeviceError, Result};

/// How often the same tokens are read again.
pub const MOST_REREADS: usize = 7;

/// The tokens of a sequence, and its breaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Sequence<'a> {
    /// The tokens.
    pub tokens: &'a [u32],
    /// Strictly ascending: a segment ends after so many of the tokens, at most after all of them. A break where a
    /// segment begins anyway, such as 0, changes nothing. Breaks change nothing in a model without segments.
    pub breaks: &'a [usize],
    /// Ascending: after so many of the tokens, those of the segment up to there are read once more, with what their
    /// queries select; as often as the position is listed, at most [`MOST_REREADS`] times. At most all tokens; 0
    /// changes nothing, nor does any in a model that retrieves nothing.
    pub rereads: &'a [usize],
}

/// A sequence that owns its tokens.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Tokens {
    /// The tokens.
    pub ids: Vec<u32>,
    /// As [`Sequence::breaks`].
    pub breaks: Vec<usize>,
    /// As [`Sequence::rereads`].
    pub rereads: Vec<usize>,
}

impl<'a> From<&'a Tokens> for Sequence<'a> {
    fn from(tokens: &'a Tokens) -> Self {
        Self {
            tokens: &tokens.ids,
            breaks: &tokens.breaks,
            rereads: &tokens.rereads,
        }
    }
}

/// Tokens without breaks beside them.
impl<'a> From<&'a [u32]> for Sequence<'a> {
    fn from(tokens: &'a [u32]) -> Self {
        Self {
            tokens,
            ..Self::default()
        }
    }
}

/// Tokens without breaks beside them.
impl<'a> From<&'a Vec<u32>> for Sequence<'a> {
    fn from(tokens: &'a Vec<u32>) -> Self {
        tokens.as_slice().into()
    }
}

impl<'a> Sequence<'a> {
    /// Checks the positions.
    ///
    /// # Errors
    /// [`DeviceError::Argument`] for breaks or rereads that do not ascend or lie behind the tokens, and for more than
    /// [`MOST_REREADS`] rereads at a position.
    pub fn check(&self) -> Result<()> {
        let check = |name, positions: &[usize], most: usize| {
            if let Some((expected, got)) = disorder(positions, most) {
                return Err(DeviceError::argument(name, expected, got));
            }
            match positions.last() {
                Some(last) if *last > self.tokens.len() => {
                    let expected = format!("positions up to the {} tokens", self.tokens.len());
                    Err(DeviceError::argument(name, expected, last))
                }
                _ => Ok(()),
            }
        };
        check("breaks", self.breaks, 1)?;
        check("rereads", self.rereads, MOST_REREADS)
    }

    /// All tokens but the last, whose next token is not known.
    pub fn inputs(&self) -> Sequence<'a> {
        let tokens = &self.tokens[..self.tokens.len().saturating_sub(1)];
        let up_to_end = |positions: &'a [usize]| {
            let count = positions.partition_point(|b| *b <= tokens.len());
            &positions[..count]
        };
        Sequence {
            tokens,
            breaks: up_to_end(self.breaks),
            rereads: up_to_end(self.rereads),
        }
    }

    /// The breaks after tokens of `range`, counted from the first of them. A break goes with the token before it, so
    /// pieces of a sequence keep all of its breaks but 0.
    pub fn breaks_within(&self, range: Range<usize>) -> Vec<usize> {
        within(self.breaks, range)
    }

    /// The rereads after tokens of `range`, as [`Sequence::breaks_within`].
    pub fn rereads_within(&self, range: Range<usize>) -> Vec<usize> {
        within(self.rereads, range)
    }
}

/// What is wrong with positions that should ascend, each listed at most `most` times: what was expected, and what is
/// there.
pub(crate) fn disorder<T: Copy + Ord + Display>(
    positions: &[T],
    most: usize,
) -> Option<(String, String)> {
    let (order, ordered): (_, fn(&T, &T) -> bool) = match most {
        1 => ("strictly ascending positions", |a, b| a < b),
        _ => ("ascending positions", |a, b| a <= b),
    };
    if let Some(pair) = positions
        .windows(2)
        .find(|pair| !ordered(&pair[0], &pair[1]))
    {
        return Some((order.into(), format!("{} before {}", pair[0], pair[1])));
    }
    let same = positions
        .chunk_by(|a, b| a == b)
        .find(|same| same.len() > most)?;
    let expected = format!("a position at most {most} times");
    Some((expected, format!("{} {} times", same[0], same.len())))
}

fn within(positions: &[usize], range: Range<usize>) -> Vec<usize> {
    let after = positions.iter().map(|b| b.wrapping_sub(range.start));
    after.filter(|b| (1..=range.len()).contains(b)).collect()
}

/// How far a sequence has been read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Cursor {
    /// Tokens read.
    pub position: usize,
    /// Those of the segment that has not ended yet.
    pub rows: usize,
    /// How often tokens of this segment have been read for their queries.
    pub asked: usize,
}

/// What comes after the rows of a part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The segment goes on.
    Open,
    /// The segment is complete.
    Complete,
    /// The segment is read again from its first token, with what its queries have selected.
    Again,
}

/// Next tokens of a sequence, all of one segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// Number of tokens.
    pub rows: usize,
    /// What comes after them.
    pub end: End,
}

/// A segment of a sequence that is known as a whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    /// Its tokens.
    pub tokens: Range<usize>,
    /// Whether it ends after them; otherwise the sequence goes on in it.
    pub closes: bool,
}

impl Segment {
    /// What comes after its last token.
    pub fn end(&self) -> End {
        match self.closes {
            true => End::Complete,
            false => End::Open,
        }
    }
}

impl Cursor {
    /// Tokens of segments that have ended.
    pub fn completed(&self) -> usize {
        self.position - self.rows
    }

    /// Moves behind a part, or back to the segment's first token.
    pub fn advance(&mut self, part: Part) {
        *self = match part.end {
            End::Open => Self {
                position: self.position + part.rows,
                rows: self.rows + part.rows,
                ..*self
            },
            End::Complete => Self {
                position: self.position + part.rows,
                ..Self::default()
            },
            End::Again => Self {
                position: self.completed(),
                rows: 0,
                asked: self.asked + 1,
            },
        };
    }
}

impl Plan {
    /// The tokens from `from` on that belong to one segment, or those of it that are read again, for a sequence of
    /// which `cursor` says how much of the segment has been read. A segment that is read again has all its tokens among
    /// these ([`Plan::check_rereads`]).
    pub fn next_part(&self, cursor: Cursor, sequence: Sequence<'_>, from: usize) -> Part {
        let left = &sequence.tokens[from..];
        if !self.segmented {
            let (rows, end) = (left.len(), End::Open);
            return Part { rows, end };
        }
        let room = self.segment_len - cursor.rows;
        let left = &left[..left.len().min(room)];
        let after = sequence.breaks.partition_point(|b| *b <= from);
        let given = sequence.breaks.get(after).map_or(room, |b| b - from);
        let token = left
            .iter()
            .position(|t| self.break_ids.binary_search(t).is_ok());
        let end = room.min(given).min(token.map_or(room, |i| i + 1));
        let rows = left.len().min(end);
        if let Some(again) = self.next_reread(cursor, sequence, from)
            && again - from <= rows
        {
            let (rows, end) = (again - from, End::Again);
            return Part { rows, end };
        }
        let complete = end <= left.len();
        let end = if complete { End::Complete } else { End::Open };
        Part { rows, end }
    }

    /// The reread that comes next, behind the first `from` tokens.
    fn next_reread(&self, cursor: Cursor, sequence: Sequence<'_>, from: usize) -> Option<usize> {
        // Those of this segment that are done are among these tokens only if it begins among them.
        let (start, done) = match from.checked_sub(cursor.rows) {
            Some(start) => (start, cursor.asked),
            None => (from, 0),
        };
        let first = sequence.rereads.partition_point(|r| *r <= start);
        let next = sequence.rereads.get(first + done).copied();
        next.filter(|r| self.retrieves() && *r > from)
    }

    /// Refuses tokens with a reread of a segment that began before the first of them.
    ///
    /// # Errors
    /// [`DeviceError::Argument`].
    pub fn check_rereads(&self, cursor: Cursor, sequence: Sequence<'_>) -> Result<()> {
        let part = self.next_part(cursor, sequence, 0);
        if part.end != End::Again || cursor.rows == 0 {
            return Ok(());
        }
        let expected = "positions in segments that begin in the same call";
        let got = format!(
            "{}, in a segment of which {} tokens have been read",
            part.rows, cursor.rows
        );
        Err(DeviceError::argument("rereads", expected, got))
    }

    /// What is read of a whole sequence, in order: each part's first token, and the part. Only the last can be open.
    fn parts<'s>(&'s self, sequence: Sequence<'s>) -> impl Iterator<Item = (usize, Part)> + 's {
        let mut cursor = Cursor::default();
        std::iter::from_fn(move || {
            let start = cursor.position;
            let part = self.next_part(cursor, sequence, start);
            cursor.advance(part);
            (part.rows > 0).then_some((start, part))
        })
    }

    /// The segments of a whole sequence, in order. Only the last can be without an end.
    pub fn segments(&self, sequence: Sequence<'_>) -> Vec<Segment> {
        let parts = self.parts(sequence);
        let parts = parts.filter(|(_, part)| part.end != End::Again);
        let segment = |(start, part): (usize, Part)| Segment {
            tokens: start..start + part.rows,
            closes: part.end == End::Complete,
        };
        parts.map(segment).collect()
    }

    /// Of the segments of a whole sequence that are read again, by their number: so many of their first tokens are read
    /// for their queries before, each time with what the time before has selected.
    pub fn asks(&self, sequence: Sequence<'_>) -> BTreeMap<usize, Vec<usize>> {
        let (mut asks, mut segment) = (BTreeMap::new(), 0);
        for (_, part) in self.parts(sequence) {
            match part.end {
                End::Again => asks.entry(segment).or_insert_with(Vec::new).push(part.rows),
                End::Open | End::Complete => segment += 1,
            }
        }
        asks
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::config::ModelConfig;
    use proptest::prelude::*;

    fn plan(segment: serde_json::Value) -> Plan {
        let json = serde_json::json!({
            "model_type": "llama", "vocab_size": 9, "hidden_size": 8, "intermediate_size": 8,
            "num_hidden_layers": 1, "num_attention_heads": 1, "head_dim": 8, "segment": segment,
        });
        Plan::new(&ModelConfig::from_json(json).unwrap(), 40)
    }

    /// What is read of a sequence, token by token: first token, end, and what comes after it.
    fn readings(plan: &Plan, sequence: Sequence<'_>) -> Vec<(usize, usize, End)> {
        let (mut readings, mut start) = (Vec::new(), 0);
        for (i, token) in sequence.tokens.iter().enumerate() {
            let end = i + 1;
            for _ in sequence.rereads.iter().filter(|r| **r == end) {
                readings.push((start, end, End::Again));
            }
            let listed = plan.break_ids.contains(token);
            let given = sequence.breaks.contains(&end);
            if end - start == plan.segment_len || listed || given {
                readings.push((start, end, End::Complete));
                start = end;
            }
        }
        if start < sequence.tokens.len() {
            readings.push((start, sequence.tokens.len(), End::Open));
        }
        readings
    }

    proptest! {
        #[test]
        fn segments_are_read_as_a_walk_over_the_tokens_reads_them(
            tokens in prop::collection::vec(0u32..9, 0..40),
            breaks in prop::collection::btree_set(0usize..41, 0..8),
            rereads in prop::collection::vec(0usize..41, 0..6),
            ids in prop::collection::vec(0u32..9, 0..3),
            segment_len in 1usize..7,
            cuts in prop::collection::btree_set(0usize..41, 0..5),
        ) {
            let breaks: Vec<usize> = breaks.into_iter().filter(|b| *b <= tokens.len()).collect();
            let mut rereads = rereads;
            rereads.retain(|r| *r <= tokens.len());
            rereads.sort_unstable();
            let plan = plan(serde_json::json!({
                "segment_len": segment_len, "prior_len": 0, "past_len": 1, "break_ids": ids,
                "retrieval": {"block_len": 1},
            }));
            let sequence = Sequence { tokens: &tokens, breaks: &breaks, rereads: &rereads };
            sequence.check().unwrap();
            let expected = readings(&plan, sequence);
            let (mut got, asks) = (Vec::new(), plan.asks(sequence));
            for (i, segment) in plan.segments(sequence).into_iter().enumerate() {
                let Range { start, end } = segment.tokens;
                let asks = asks.get(&i).into_iter().flatten();
                got.extend(asks.map(|rows| (start, start + rows, End::Again)));
                got.push((start, end, segment.end()));
            }
            prop_assert_eq!(&got, &expected);
            // The same in pieces, none of which ends in a segment that is read again afterwards.
            let (mut cursor, mut got, mut start) = (Cursor::default(), Vec::new(), 0);
            let whole = |cut: &usize| {
                let within = |(start, end, kind): &(usize, usize, End)| {
                    *kind == End::Again && start < cut && cut < end
                };
                *cut < tokens.len() && !expected.iter().any(within)
            };
            for end in cuts.into_iter().filter(whole).chain([tokens.len()]) {
                let breaks = sequence.breaks_within(start..end);
                let rereads = sequence.rereads_within(start..end);
                let piece = Sequence {
                    tokens: &tokens[start..end],
                    breaks: &breaks,
                    rereads: &rereads,
                };
                plan.check_rereads(cursor, piece).unwrap();
                while cursor.position < end {
                    let (first, from) = (cursor.completed(), cursor.position - start);
                    let part = plan.next_part(cursor, piece, from);
                    prop_assert!(part.rows > 0);
                    cursor.advance(part);
                    if part.end != End::Open || cursor.position == tokens.len() {
                        got.push((first, start + from + part.rows, part.end));
                    }
                }
                start = end;
            }
            prop_assert_eq!(got, expected);
        }
    }

    #[test]
    fn a_segment_that_began_before_its_tokens_is_not_read_again() {
        let plan = plan(serde_json::json!({
            "segment_len": 8, "prior_len": 0, "past_len": 1, "retrieval": {"block_len": 1},
        }));
        let piece = Sequence {
            tokens: &[1, 2, 3],
            breaks: &[1],
            rereads: &[2],
        };
        let cursor = |rows| Cursor {
            position: 9,
            rows,
            asked: 0,
        };
        // It begins at the break.
        plan.check_rereads(cursor(4), piece).unwrap();
        let piece = Sequence {
            breaks: &[],
            ..piece
        };
        plan.check_rereads(cursor(0), piece).unwrap();
        let error = plan.check_rereads(cursor(4), piece).unwrap_err();
        assert!(error.to_string().contains("4 tokens"), "{error}");
    }

    #[test]
    fn a_model_without_segments_has_no_breaks() {
        let plan = plan(serde_json::Value::Null);
        let (tokens, breaks) = (&[1, 2, 3][..], &[1, 2][..]);
        let segments = plan.segments(Sequence {
            tokens,
            breaks,
            rereads: &[],
        });
        let tokens = 0..3;
        let closes = false;
        assert_eq!(segments, [Segment { tokens, closes }]);
    }

    #[test]
    fn breaks_that_do_not_ascend_or_lie_behind_the_tokens_are_refused() {
        let message = |breaks: &[usize]| {
            let tokens = &[1, 2, 3];
            Sequence {
                tokens,
                breaks,
                rereads: &[],
            }
            .check()
            .unwrap_err()
            .to_string()
        };
        assert!(
            message(&[2, 2]).contains("2 before 2"),
            "{}",
            message(&[2, 2])
        );
        assert!(
            message(&[1, 4]).contains("up to the 3 tokens"),
            "{}",
            message(&[1, 4])
        );
    }
}
