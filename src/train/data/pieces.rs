//! A long text encoded in pieces, by several threads, to the tokens of the whole.
//!
//! A tokenizer treats the two ends of a text apart: some put a space before the first word, and a word that a cut goes
//! through becomes other tokens. So neighbouring pieces overlap, and each hands over to the next in the middle of the
//! longest stretch of the overlap in which both have the same tokens at the same places.

/// Turns text into tokens. Called from several threads.
pub trait Encode: Sync {
    /// Tokens of `text`, without any that stand around a text.
    ///
    /// # Errors
    /// Why the text has no tokens, in words.
    fn encode(&self, text: &str) -> Result<Vec<u32>, String>;

    /// The same, each with the byte of `text` at which it begins.
    ///
    /// # Errors
    /// As [`Encode::encode`].
    fn encode_with_starts(&self, text: &str) -> Result<Vec<(u32, usize)>, String>;

    /// Whether a line of text ends with the token `id`.
    fn ends_line(&self, id: u32) -> bool;
}

/// One token a byte.
#[derive(Clone, Copy, Debug, Default)]
pub struct Bytes;

impl Encode for Bytes {
    fn encode(&self, text: &str) -> Result<Vec<u32>, String> {
        Ok(text.bytes().map(u32::from).collect())
    }

    fn encode_with_starts(&self, text: &str) -> Result<Vec<(u32, usize)>, String> {
        Ok(text.bytes().map(u32::from).zip(0..).collect())
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

/// A piece's tokens, each with the byte of the document at which it begins.
pub(super) type Tokens = Vec<(u32, u64)>;

/// Encodes a piece.
pub(super) fn encode(by: &dyn Encode, text: &str, place: Place) -> Result<Tokens, String> {
    if place.shared == 0 && place.last {
        // The only piece: nobody asks for places.
        let tokens = by.encode(text)?;
        return Ok(tokens.into_iter().map(|t| (t, 0)).collect());
    }
    let tokens = by.encode_with_starts(text)?;
    let at = |(token, start): (u32, usize)| (token, place.start + start as u64);
    Ok(tokens.into_iter().map(at).collect())
}

/// Puts the pieces of a document together, in their order.
#[derive(Default)]
pub(super) struct Joiner {
    /// Tokens of the piece before that the next may replace.
    open: Tokens,
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
        let before = std::mem::take(&mut self.open);
        let stands = match handover(&before, &piece, place.start, end) {
            Some((left, right)) => {
                piece.drain(..right);
                left
            }
            // No token in common: the cut is where the piece before ends.
            None => {
                let own = Place {
                    start: end,
                    shared: 0,
                    last: false,
                };
                piece = encode(by, &text[place.shared..], own)?;
                before.len()
            }
        };
        let mut settled: Vec<u32> = before[..stands].iter().map(|t| t.0).collect();
        if place.last {
            settled.extend(piece.iter().map(|t| t.0));
        } else {
            self.open = piece;
        }
        Ok(settled)
    }
}

/// How many tokens of `left` stand, and how many of `right` are left out, where both cover the bytes `start..end`;
/// `None` if they have no token there in common.
fn handover(
    left: &[(u32, u64)],
    right: &[(u32, u64)],
    start: u64,
    end: u64,
) -> Option<(usize, usize)> {
    if start == end {
        return Some((left.len(), 0));
    }
    let mut i = left.partition_point(|t| t.1 < start);
    let (mut j, mut run, mut best) = (0, 0usize, (0usize, 0, 0));
    while i < left.len() && j < right.len() && right[j].1 < end {
        if left[i] == right[j] {
            (i, j, run) = (i + 1, j + 1, run + 1);
            if run > best.0 {
                best = (run, i, j);
            }
            continue;
        }
        run = 0;
        match left[i].1.cmp(&right[j].1) {
            std::cmp::Ordering::Less => i += 1,
            std::cmp::Ordering::Greater => j += 1,
            std::cmp::Ordering::Equal => (i, j) = (i + 1, j + 1),
        }
    }
    let (run, i, j) = best;
    (run > 0).then(|| (i - run.div_ceil(2), j - run.div_ceil(2)))
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
    use super::{Encode, Joiner, cut, encode};

    /// Words with the space before them; a space is put before the first; runs of digits go three by three from the
    /// left, so that a cut within one changes tokens; a token is a hash of its bytes.
    struct Words;

    impl Encode for Words {
        fn encode(&self, text: &str) -> Result<Vec<u32>, String> {
            let all = self.encode_with_starts(text)?;
            Ok(all.into_iter().map(|t| t.0).collect())
        }

        fn ends_line(&self, _: u32) -> bool {
            false
        }

        fn encode_with_starts(&self, text: &str) -> Result<Vec<(u32, usize)>, String> {
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
                tokens.push((hash(&spaced), begin));
                begin = end;
            }
            Ok(tokens)
        }
    }

    fn joined(text: &str, len: usize, overlap: usize) -> Vec<u32> {
        let (mut joiner, mut tokens) = (Joiner::default(), Vec::new());
        for (piece, place) in cut(text, len, overlap) {
            let encoded = encode(&Words, piece, place).unwrap();
            tokens.extend(joiner.push(&Words, piece, encoded, place).unwrap());
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
            assert_eq!(joined(&text, len, 120), whole, "{len}");
        }
    }

    #[test]
    fn without_a_token_in_common_every_byte_is_still_in_one_piece() {
        // One word: each piece is one token, and no two begin at the same place.
        let text = "a".repeat(1000);
        assert_eq!(joined(&text, 300, 50).len(), 4);
    }
}
