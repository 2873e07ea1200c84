//! Where the segments of a sequence end (docs/contract.md, section 2): after `segment_len` tokens, after a token listed
//! in `segment.break_ids`, and after the positions given beside the tokens.

use std::ops::Range;

use super::state::Plan;
use crate::device::{DeviceError, Result};

/// The tokens of a sequence, and its breaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Sequence<'a> {
    /// The tokens.
    pub tokens: &'a [u32],
    /// Strictly ascending: a segment ends after so many of the tokens, at most after all of them. A break where a
    /// segment begins anyway, such as 0, changes nothing. Breaks change nothing in a model without segments.
    pub breaks: &'a [usize],
}

/// A sequence that owns its tokens.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Tokens {
    /// The tokens.
    pub ids: Vec<u32>,
    /// As [`Sequence::breaks`].
    pub breaks: Vec<usize>,
}

impl<'a> From<&'a Tokens> for Sequence<'a> {
    fn from(tokens: &'a Tokens) -> Self {
        Self {
            tokens: &tokens.ids,
            breaks: &tokens.breaks,
        }
    }
}

/// Tokens without breaks beside them.
impl<'a> From<&'a [u32]> for Sequence<'a> {
    fn from(tokens: &'a [u32]) -> Self {
        Self {
            tokens,
            breaks: &[],
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
    /// Checks the breaks.
    ///
    /// # Errors
    /// [`DeviceError::Argument`] for breaks that do not ascend or lie behind the tokens.
    pub fn check(&self) -> Result<()> {
        if let Some(pair) = self.breaks.windows(2).find(|pair| pair[0] >= pair[1]) {
            let got = format!("{} before {}", pair[0], pair[1]);
            let expected = "strictly ascending positions";
            return Err(DeviceError::argument("breaks", expected, got));
        }
        match self.breaks.last() {
            Some(last) if *last > self.tokens.len() => {
                let expected = format!("positions up to the {} tokens", self.tokens.len());
                Err(DeviceError::argument("breaks", expected, last))
            }
            _ => Ok(()),
        }
    }

    /// All tokens but the last, whose next token is not known.
    pub fn inputs(&self) -> Sequence<'a> {
        let tokens = &self.tokens[..self.tokens.len().saturating_sub(1)];
        let count = self.breaks.partition_point(|b| *b <= tokens.len());
        Sequence {
            tokens,
            breaks: &self.breaks[..count],
        }
    }

    /// The breaks after tokens of `range`, counted from the first of them. A break goes with the token before it, so
    /// pieces of a sequence keep all of its breaks but 0.
    pub fn breaks_within(&self, range: Range<usize>) -> Vec<usize> {
        let after = self.breaks.iter().map(|b| b.wrapping_sub(range.start));
        after.filter(|b| (1..=range.len()).contains(b)).collect()
    }
}

/// How far a sequence has been read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Cursor {
    /// Tokens read.
    pub position: usize,
    /// Those of the segment that has not ended yet.
    pub rows: usize,
}

/// Next tokens of a sequence, all of one segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// Number of tokens.
    pub rows: usize,
    /// Whether the segment ends after them.
    pub closes: bool,
}

/// A segment of a sequence that is known as a whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    /// Its tokens.
    pub tokens: Range<usize>,
    /// Whether it ends after them; otherwise the sequence goes on in it.
    pub closes: bool,
}

impl Cursor {
    /// Tokens of segments that have ended.
    pub fn completed(&self) -> usize {
        self.position - self.rows
    }

    /// Moves behind a part.
    pub fn advance(&mut self, part: Part) {
        self.position += part.rows;
        self.rows = if part.closes {
            0
        } else {
            self.rows + part.rows
        };
    }
}

impl Plan {
    /// The tokens from `from` on that belong to one segment, of which `open` rows have been read before.
    pub fn next_part(&self, open: usize, sequence: Sequence<'_>, from: usize) -> Part {
        let room = self.segment_len - open;
        let left = &sequence.tokens[from..];
        let left = &left[..left.len().min(room)];
        if !self.segmented {
            let (rows, closes) = (left.len(), false);
            return Part { rows, closes };
        }
        let after = sequence.breaks.partition_point(|b| *b <= from);
        let given = sequence.breaks.get(after).map_or(room, |b| b - from);
        let token = left
            .iter()
            .position(|t| self.break_ids.binary_search(t).is_ok());
        let end = room.min(given).min(token.map_or(room, |i| i + 1));
        Part {
            rows: left.len().min(end),
            closes: end <= left.len(),
        }
    }

    /// The segments of a whole sequence, in order. Only the last can be without an end.
    pub fn segments(&self, sequence: Sequence<'_>) -> Vec<Segment> {
        let (mut segments, mut start) = (Vec::new(), 0);
        while start < sequence.tokens.len() {
            let part = self.next_part(0, sequence, start);
            segments.push(Segment {
                tokens: start..start + part.rows,
                closes: part.closes,
            });
            start += part.rows;
        }
        segments
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

    /// Where segments end, token by token.
    fn ends(plan: &Plan, sequence: Sequence<'_>) -> Vec<usize> {
        let (mut ends, mut rows) = (Vec::new(), 0);
        for (i, token) in sequence.tokens.iter().enumerate() {
            rows += 1;
            let listed = plan.break_ids.contains(token);
            if rows == plan.segment_len || listed || sequence.breaks.contains(&(i + 1)) {
                ends.push(i + 1);
                rows = 0;
            }
        }
        ends
    }

    proptest! {
        #[test]
        fn segments_end_where_a_walk_over_the_tokens_ends_them(
            tokens in prop::collection::vec(0u32..9, 0..40),
            breaks in prop::collection::btree_set(0usize..41, 0..8),
            ids in prop::collection::vec(0u32..9, 0..3),
            segment_len in 1usize..7,
            cuts in prop::collection::btree_set(0usize..41, 0..5),
        ) {
            let breaks: Vec<usize> = breaks.into_iter().filter(|b| *b <= tokens.len()).collect();
            let plan = plan(serde_json::json!({
                "segment_len": segment_len, "prior_len": 0, "past_len": 0, "break_ids": ids,
                "retrieval": {"block_len": 1},
            }));
            let sequence = Sequence { tokens: &tokens, breaks: &breaks };
            sequence.check().unwrap();
            let expected = ends(&plan, sequence);
            let segments = plan.segments(sequence);
            let closed = segments.iter().filter(|s| s.closes).map(|s| s.tokens.end);
            prop_assert_eq!(closed.collect::<Vec<_>>(), expected.clone());
            let starts = segments.iter().map(|s| s.tokens.start);
            let ends = segments.iter().map(|s| s.tokens.end);
            prop_assert!(starts.eq(std::iter::once(0).chain(ends).take(segments.len())));
            // The same in pieces.
            let (mut cursor, mut got, mut start) = (Cursor::default(), Vec::new(), 0);
            let cuts = cuts.into_iter().filter(|c| *c < tokens.len());
            for end in cuts.chain([tokens.len()]) {
                let breaks = sequence.breaks_within(start..end);
                let piece = Sequence { tokens: &tokens[start..end], breaks: &breaks };
                while cursor.position < end {
                    let part = plan.next_part(cursor.rows, piece, cursor.position - start);
                    prop_assert!(part.rows > 0);
                    cursor.advance(part);
                    if part.closes {
                        got.push(cursor.position);
                    }
                }
                start = end;
            }
            prop_assert_eq!(got, expected);
        }
    }

    #[test]
    fn a_model_without_segments_has_no_breaks() {
        let plan = plan(serde_json::Value::Null);
        let (tokens, breaks) = (&[1, 2, 3][..], &[1, 2][..]);
        let segments = plan.segments(Sequence { tokens, breaks });
        let tokens = 0..3;
        let closes = false;
        assert_eq!(segments, [Segment { tokens, closes }]);
    }

    #[test]
    fn breaks_that_do_not_ascend_or_lie_behind_the_tokens_are_refused() {
        let message = |breaks: &[usize]| {
            let tokens = &[1, 2, 3];
            Sequence { tokens, breaks }.check().unwrap_err().to_string()
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
