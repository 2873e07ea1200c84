//! Relay: sequences whose end asks for a letter that their beginning states, whole segments before.
//!
//! Between the two stands filler that says nothing about the letter. A model without a past can answer only if each
//! segment's tail hands the letter on. Such a model is trained from random weights, so statement and question are those
//! of the test in `eval`; words of filler are others.
//!
//! A sequence is a function of the seed and its number.

use super::example::Example;
use super::pieces::Encode;
use super::tasks::sentence;
use crate::random::Random;
use crate::train::config::RelaySection;
use crate::train::error::{Result, TrainError};

/// Distinguishes these random numbers from others of the same seed.
const PURPOSE: u8 = 0x72;
/// What is stated and asked. One in 16 is right by chance.
const LETTERS: [&str; 16] = [
    "A", "B", "C", "D", "E", "F", "G", "H", "I", "J", "K", "L", "M", "N", "O", "P",
];
const QUESTION: &str = ". Letter:";
/// Letters of words of filler. In `eval` words begin with others.
const FIRST: [&str; 7] = ["b", "d", "f", "g", "k", "l", "m"];
const MIDDLE: [&str; 5] = ["a", "e", "i", "o", "u"];
const LAST: [&str; 14] = [
    "b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z",
];

/// Makes sequences.
pub struct Relay {
    section: RelaySection,
    /// For each letter its statement, and its answer.
    letters: Vec<[Vec<u32>; 2]>,
    question: Vec<u32>,
    words: Vec<Vec<u32>>,
}

impl Relay {
    /// For a tokenizer with ids below `vocab_size`. `key`: the section, for messages.
    ///
    /// # Errors
    /// [`TrainError::Argument`] if the tokenizer refuses the sentences; [`TrainError::Config`] if the section is out of
    /// range or a segment has no room for a sentence.
    pub fn new(
        section: RelaySection,
        encode: &dyn Encode,
        vocab_size: usize,
        key: &str,
    ) -> Result<Self> {
        section.validate(key)?;
        let name = "data.mixture.relay";
        let ids = |text: String| match sentence(encode, &text, vocab_size, name)? {
            ids if ids.is_empty() => {
                let expected = format!("a tokenizer with ids for {text:?}");
                Err(TrainError::argument(name, expected, "none"))
            }
            ids => Ok(ids),
        };
        let letter = |letter| {
            Ok([
                ids(format!("Letter: {letter}"))?,
                ids(format!(" {letter}"))?,
            ])
        };
        let words = FIRST.iter().flat_map(|first| {
            let rest = MIDDLE.iter().flat_map(|m| LAST.iter().map(move |l| (m, l)));
            rest.map(move |(middle, last)| format!(" {first}{middle}{last}"))
        });
        let relay = Self {
            section,
            letters: LETTERS.into_iter().map(letter).collect::<Result<_>>()?,
            question: ids(QUESTION.to_owned())?,
            words: words.map(ids).collect::<Result<_>>()?,
        };
        let asked = |[statement, answer]: &[Vec<u32>; 2]| {
            statement.len().max(relay.question.len() + answer.len())
        };
        let least = relay.letters.iter().map(asked).max().unwrap_or(0);
        if relay.section.segment_len < least {
            let expected = format!("at least {least}, the tokens of a question and its answer");
            let key = format!("{key}.segment_len");
            return Err(TrainError::config(key, expected, relay.section.segment_len));
        }
        Ok(relay)
    }

    /// Tokens that the longest sequence predicts.
    pub fn longest(&self) -> usize {
        self.section.longest()
    }

    /// Sequence `number`: the statement at its start; the question anywhere in the segment that is so many behind, and
    /// the answer, which alone has weight, in the same segment.
    pub fn make(&self, seed: u64, number: u64) -> Example {
        let mut key = [0; 32];
        key[..8].copy_from_slice(&seed.to_le_bytes());
        key[8..16].copy_from_slice(&number.to_le_bytes());
        key[31] = PURPOSE;
        let mut random = Random::from_key(key);
        let distance = self.section.distances[random.below(self.section.distances.len())];
        let [statement, answer] = &self.letters[random.below(self.letters.len())];
        let len = self.section.segment_len;
        let free = len - self.question.len() - answer.len();
        let question_at = distance * len + random.below(free + 1);
        let mut tokens = statement.clone();
        while tokens.len() < question_at {
            tokens.extend(&self.words[random.below(self.words.len())]);
        }
        tokens.truncate(question_at);
        tokens.extend(&self.question);
        let mut weights = vec![0.0; tokens.len()];
        tokens.extend(answer);
        weights.resize(tokens.len(), 1.0);
        Example {
            tokens,
            weights: Some(weights),
            ..Example::default()
        }
    }
}
