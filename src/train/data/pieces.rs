//! A long text encoded in pieces, by several threads, to the tokens of the whole.
//!
//! The tokens at the two ends of a piece can differ from those of the whole text: some tokenizers put a space before
//! the first word, and a word at a cut is not complete. So neighbouring pieces overlap, and the cut between their
//! tokens is in a stretch of the overlap where both have the same tokens at the same bytes.
//!
//! A tokenizer encodes each word by itself, so a cut between two words changes nothing. Where no word begins in such a
//! stretch, the cut is in its middle. That is good for merges of neighbours (BPE). It is not good for a tokenizer that
//! compares sums of scores from the beginning of the word ([`Encode::needs_whole_words`]). There the rest of the text
//! is encoded as one.

use std::ops::Range;

/// A token, and where it stands in its text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Located {
    /// Its id.
    pub token: u32,
    /// The byte of the text at which it begins.
    pub start: usize,
    /// Whether a word begins with it: a stretch of text that the tokenizer encodes by itself.
    pub begins_word: bool,
}

/// A conversation's tokens.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Conversed {
    /// Their ids.
    pub ids: Vec<u32>,
    /// Which of them the assistant writes: ranges of `ids`, in order. They alone are targets of the loss.
    pub answers: Vec<Range<usize>>,
}

/// Turns text into tokens. Called from several threads.
pub trait Encode: Sync {
    /// Tokens of `text`, without any that stand around a text.
    ///
    /// # Errors
    /// Why the text has no tokens, in words.
    fn encode(&self, text: &str) -> Result<Vec<u32>, String>;

    /// The same, each with its place in `text`.
    ///
    /// # Errors
    /// As [`Encode::encode`].
    fn locate(&self, text: &str) -> Result<Vec<Located>, String>;

    /// Tokens of a conversation, an object of JSON with `messages`, as the model's chat template writes it: of one
    /// text, or of several.
    ///
    /// # Errors
    /// Why it has no tokens, in words.
    fn converse(&self, _conversation: &str) -> Result<Vec<Conversed>, String> {
        Err("no chat template".into())
    }

    /// Whether a line of text ends with the token `id`.
    fn ends_line(&self, id: u32) -> bool;

    /// Whether the tokens of a word depend on all of it, so that a text may be cut between words only.
    fn needs_whole_words(&self) -> bool {
        false
    }
}

/// One token a byte.
#[derive(Clone, Copy, Debug, Default)]
pub struct Bytes;

impl Encode for Bytes {
    fn encode(&self, text: &str) -> Result<Vec<u32>, String> {
        Ok(text.bytes().map(u32::from).collect())
    }

    fn locate(&self, text: &str) -> Result<Vec<Located>, String> {
        let located = |(start, byte)| Located {
            token: u32::from(byte),
            start,
            begins_word: true,
        };
        Ok(text.bytes().enumerate().map(located).collect())
    }

    fn ends_line(&self, id: u32) -> bool {
        id == u32::from(b'\n')
    }
}

/// Bytes of a piece, beside the overlap.
pub(super) const PIECE: usize = 1 << 18;
/// Bytes that neighbouring pieces share: some thousand tokens.
pub(super) const OVERLAP: usize = 1 << 12;

/// A piece of a document's text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    /// Byte of the document at which the piece begins.
    pub(super) start: u64,
    /// Bytes at its start that the piece before it has too; 0 for the first.
    pub(super) shared: usize,
    /// Whether the document ends with it.
    pub(super) last: bool,
}

/// A piece's tokens, each with the byte of the document at which it begins, and whether a word begins there.
pub(super) type Tokens = Vec<(u32, u64, bool)>;

/// Encodes a piece.
pub(super) fn encode(by: &dyn Encode, text: &str, place: Place) -> Result<Tokens, String> {
    if place.shared == 0 && place.last {
        // The only piece: nobody asks for places.
        let tokens = by.encode(text)?;
        return Ok(tokens.into_iter().map(|t| (t, 0, false)).collect());
    }
    let at = |t: Located| (t.token, place.start + t.start as u64, t.begins_word);
    Ok(by.locate(text)?.into_iter().map(at).collect())
}

/// Puts the pieces of a document together, in their order.
#[derive(Default)]
pub(super) struct Joiner {
    /// The piece before: its text, the byte of the document at which it begins, and those of its tokens that the next
    /// piece may replace.
    text: String,
    start: u64,
    open: Tokens,
    /// The rest of the document is encoded as one: `text` grows until it is complete.
    as_one: bool,
}

impl Joiner {
    /// Takes the next piece, `text` with its tokens, and returns the tokens that are settled by it.
    ///
    /// # Errors
    /// As [`Encode::encode`].
    pub(super) fn push(
        &mut self,
        by: &dyn Encode,
        text: &str,
        mut piece: Tokens,
        place: Place,
    ) -> Result<Vec<u32>, String> {
        let end = place.start + place.shared as u64;
        let mut settled = Vec::new();
        if !self.as_one {
            match handover(&self.open, &piece, place.start, end, by.needs_whole_words()) {
                Some((left, right)) => {
                    settled.extend(ids(&self.open[..left]));
                    piece.drain(..right);
                    self.open = piece;
                    if by.needs_whole_words() {
                        (self.text, self.start) = (text.to_owned(), place.start);
                    }
                }
                None if by.needs_whole_words() => self.as_one = true,
                // No token in common: the cut is where the piece before ends.
                None => {
                    let own = Place {
                        start: end,
                        shared: 0,
                        last: false,
                    };
                    settled.extend(ids(&self.open));
                    self.open = encode(by, &text[place.shared..], own)?;
                }
            }
        }
        if self.as_one {
            self.text.push_str(&text[place.shared..]);
        }
        if place.last {
            let rest = std::mem::take(self).complete(by)?;
            settled.extend(ids(&rest));
        }
        Ok(settled)
    }

    /// The tokens that are open when the document is complete.
    fn complete(self, by: &dyn Encode) -> Result<Tokens, String> {
        if !self.as_one {
            return Ok(self.open);
        }
        let place = Place {
            start: self.start,
            shared: 0,
            last: false,
        };
        let mut tokens = encode(by, &self.text, place)?;
        // Tokens before the first open one are settled: a word or the document begins with it.
        if let Some(first) = self.open.first() {
            let settled = tokens.iter().position(|token| token == first);
            tokens.drain(..settled.unwrap_or_else(|| tokens.partition_point(|t| t.1 < first.1)));
        }
        Ok(tokens)
    }
}

fn ids(tokens: &[(u32, u64, bool)]) -> impl Iterator<Item = u32> {
    tokens.iter().map(|t| t.0)
}

/// How many tokens of `left` stand, and how many of `right` are left out, where both cover the bytes `start..end`.
///
/// The cut is at the word that begins nearest to the middle of the longest common stretch that has one, else in the
/// middle of the longest one. `None` if there is no common token, or with `whole_words` no common word.
fn handover(
    left: &[(u32, u64, bool)],
    right: &[(u32, u64, bool)],
    start: u64,
    end: u64,
    whole_words: bool,
) -> Option<(usize, usize)> {
    if start == end {
        return Some((left.len(), 0));
    }
    let mut i = left.partition_point(|t| t.1 < start);
    let mut j = 0;
    // Of a common stretch: whether a word begins in it, its length, and its end on both sides.
    let mut best = (false, 0usize, 0, 0);
    let (mut run, mut word) = (0usize, false);
    while i < left.len() && j < right.len() && right[j].1 < end {
        if left[i] == right[j] {
            word |= left[i].2;
            (i, j, run) = (i + 1, j + 1, run + 1);
            best = best.max((word, run, i, j));
            continue;
        }
        (run, word) = (0, false);
        match left[i].1.cmp(&right[j].1) {
            std::cmp::Ordering::Less => i += 1,
            std::cmp::Ordering::Greater => j += 1,
            std::cmp::Ordering::Equal => (i, j) = (i + 1, j + 1),
        }
    }
    let (word, run, i, j) = best;
    if run == 0 || whole_words && !word {
        return None;
    }
    let middle = run.div_ceil(2);
    let back = (1..=run).filter(|back| !word || left[i - back].2);
    let back = back.min_by_key(|back| back.abs_diff(middle))?;
    Some((i - back, j - back))
}

/// The character boundary of `text` at byte `at` or the last before it.
pub(super) fn boundary(text: &str, at: usize) -> usize {
    let mut at = at.min(text.len());
    while !text.is_char_boundary(at) {
        at -= 1;
    }
    at
}

/// Cuts a document's text into pieces of `len` bytes that share `overlap` bytes with the one before.
pub(super) fn cut(text: &str, len: usize, overlap: usize) -> impl Iterator<Item = (&str, Place)> {
    let mut next = Some((0usize, 0usize));
    std::iter::from_fn(move || {
        let (start, shared) = next?;
        let end = boundary(text, (start + shared).saturating_add(len));
        let last = end == text.len();
        let begin = boundary(text, end.saturating_sub(overlap));
        next = (!last).then_some((begin, end - begin));
        let place = Place {
            start: start as u64,
            shared,
            last,
        };
        Some((&text[start..end], place))
    })
}

#[cfg(test)]
mod tests {
    use super::{Encode, Joiner, Located, cut, encode};

    /// Words with the space before them; a space is put before the first; runs of digits go three by three from the
    /// left, so that a cut within one changes tokens; a token is a hash of its bytes.
    struct Words;

    impl Encode for Words {
        fn encode(&self, text: &str) -> Result<Vec<u32>, String> {
            let all = self.locate(text)?;
            Ok(all.into_iter().map(|t| t.token).collect())
        }

        fn ends_line(&self, _: u32) -> bool {
            false
        }

        fn locate(&self, text: &str) -> Result<Vec<Located>, String> {
            let hash = |s: &str| {
                s.bytes()
                    .fold(7u32, |h, b| h.wrapping_mul(31) ^ u32::from(b))
            };
            let mut tokens = Vec::new();
            let mut begin = 0;
            let kind = |c: char| (c.is_ascii_digit(), c.is_alphabetic());
            let chars: Vec<(usize, char)> = text.char_indices().collect();
            for (n, (at, c)) in chars.iter().enumerate() {
                let next = chars.get(n + 1);
                let joins = next
                    .is_some_and(|(_, d)| kind(*c) == kind(*d) || *c == ' ' && d.is_alphabetic());
                let full = c.is_ascii_digit()
                    && n + 1 - chars.iter().position(|p| p.0 == begin).unwrap() == 3;
                if joins && !full {
                    continue;
                }
                let end = at + c.len_utf8();
                let word = &text[begin..end];
                let first = begin == 0 && !word.starts_with(' ');
                let spaced = if first {
                    format!(" {word}")
                } else {
                    word.to_owned()
                };
                tokens.push(Located {
                    token: hash(&spaced),
                    start: begin,
                    begins_word: !word.starts_with(|c: char| c.is_ascii_digit()),
                });
                begin = end;
            }
            Ok(tokens)
        }
    }

    fn joined(by: &dyn Encode, text: &str, len: usize, overlap: usize) -> Vec<u32> {
        let (mut joiner, mut tokens) = (Joiner::default(), Vec::new());
        for (piece, place) in cut(text, len, overlap) {
            let encoded = encode(by, piece, place).unwrap();
            tokens.extend(joiner.push(by, piece, encoded, place).unwrap());
        }
        tokens
    }

    #[test]
    fn pieces_give_the_tokens_of_the_whole() {
        let words = [
            "one",
            " ",
            "zwölf",
            "\n",
            "1234567890123",
            " of",
            ".",
            "  ",
            "ü",
        ];
        let text: String = (0..4000usize)
            .map(|i| words[i * i % 97 % words.len()])
            .collect();
        let whole = Words.encode(&text).unwrap();
        for len in [200, 333, 1000, 5000, text.len(), text.len() + 1] {
            assert_eq!(joined(&Words, &text, len, 120), whole, "{len}");
        }
    }

    #[test]
    fn without_a_token_in_common_every_byte_is_still_in_one_piece() {
        // One word: each piece is one token, and no two begin at the same place.
        let text = "a".repeat(1000);
        assert_eq!(joined(&Words, &text, 300, 50).len(), 4);
    }
    /// A token is a character with the parity of its place in its word, as where sums of scores from the word's
    /// beginning decide.
    struct Sums;

    impl Encode for Sums {
        fn encode(&self, text: &str) -> Result<Vec<u32>, String> {
            let all = self.locate(text)?;
            Ok(all.into_iter().map(|t| t.token).collect())
        }

        fn locate(&self, text: &str) -> Result<Vec<Located>, String> {
            let mut word = 0;
            let located = |(start, c): (usize, char)| {
                if c == ' ' {
                    word = start;
                }
                Located {
                    token: u32::from(c) << 1 | ((start - word) & 1) as u32,
                    start,
                    begins_word: start == word,
                }
            };
            Ok(text.char_indices().map(located).collect())
        }

        fn ends_line(&self, _: u32) -> bool {
            false
        }

        fn needs_whole_words(&self) -> bool {
            true
        }
    }

    #[test]
    fn words_longer_than_a_piece_are_encoded_whole_where_that_is_needed() {
        let long = "x".repeat(777);
        let texts = [
            "x".repeat(5001),
            format!("some words before {long} some words after {long}"),
            format!("{long} {long}").repeat(9),
            "many short words ".repeat(500),
        ];
        for text in &texts {
            let whole = Sums.encode(text).unwrap();
            for len in [101, 200, 333, 1000, 5000] {
                assert_eq!(joined(&Sums, text, len, 61), whole, "{len}");
            }
        }
    }
}
