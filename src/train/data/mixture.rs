//! What a run reads: the sequences of one set of documents in their order, or a mixture of parts.

use super::pieces::Encode;
use super::tasks::Tasks;
use super::{Corpus, Example, Position, Sequences};
use crate::random::Random;
use crate::train::config::MixtureSection;
use crate::train::error::{Result, TrainError};

/// Distinguishes these random numbers from others of the same seed.
const PURPOSE: u8 = 0x6d;

/// The sequences of a run.
pub struct Mixture<'a> {
    parts: Vec<Part<'a>>,
    /// Whether parts are drawn; without, there is one.
    drawn: bool,
}

/// A part of a mixture.
struct Part<'a> {
    sequences: Sequences,
    weight: f64,
    tasks: Option<Tasks<'a>>,
}

impl From<Sequences> for Mixture<'_> {
    fn from(sequences: Sequences) -> Self {
        let part = Part {
            sequences,
            weight: 1.0,
            tasks: None,
        };
        Self {
            parts: vec![part],
            drawn: false,
        }
    }
}

impl<'a> Mixture<'a> {
    /// The parts that `sections` describe, with the sequences of each. Without any, those of `main`.
    ///
    /// # Errors
    /// [`TrainError::Config`] for a part without a sequence; [`TrainError::Argument`] as [`Tasks::new`].
    pub fn new(
        main: Sequences,
        sections: &[MixtureSection],
        sequences: Vec<Sequences>,
        encode: &'a dyn Encode,
        vocab_size: usize,
    ) -> Result<Self> {
        if sections.is_empty() {
            return Ok(main.into());
        }
        let part = |(section, sequences): (&MixtureSection, Sequences)| {
            if sequences.is_empty() {
                let key = format!("data.mixture.{}", section.name);
                let expected = "at least one document of two tokens";
                return Err(TrainError::config(key, expected, "none"));
            }
            let tasks = section.tasks.clone();
            let tasks = tasks.map(|t| Tasks::new(t, encode, vocab_size));
            Ok(Part {
                sequences,
                weight: section.weight,
                tasks: tasks.transpose()?,
            })
        };
        let parts = sections.iter().zip(sequences).map(part);
        Ok(Self {
            parts: parts.collect::<Result<_>>()?,
            drawn: true,
        })
    }

    /// The same with tasks whose questions go on after their break ([`Tasks::with_suffix`]).
    #[must_use]
    pub fn with_suffix(mut self, suffix_len: usize) -> Self {
        for part in &mut self.parts {
            part.tasks = part.tasks.take().map(|tasks| tasks.with_suffix(suffix_len));
        }
        self
    }

    /// Whether there is no sequence.
    pub fn is_empty(&self) -> bool {
        self.parts.iter().all(|part| part.sequences.is_empty())
    }

    /// Number of sequences in one pass over each part.
    pub fn len(&self) -> u64 {
        self.parts.iter().map(|part| part.sequences.len()).sum()
    }

    /// Predicted tokens of one pass over each part.
    pub fn tokens(&self) -> u64 {
        self.parts.iter().map(|part| part.sequences.tokens()).sum()
    }

    /// Whether a cut after `sequence_len` tokens gives the same sequences.
    pub fn same_cut(&self, sequence_len: usize) -> bool {
        let mut parts = self.parts.iter();
        parts.all(|part| part.sequences.same_cut(sequence_len))
    }

    /// What the documents are: those of each part, see [`fingerprint`](super::fingerprint).
    pub fn fingerprint(&self) -> String {
        let all = self.parts.iter().map(|part| part.sequences.fingerprint());
        all.collect::<Vec<_>>().join("+")
    }

    /// The next `count` sequences from `position` on, which moves past them. Which part a sequence comes from depends
    /// on `seed` and the sequence's number alone, and so do the tasks in it.
    ///
    /// # Errors
    /// As [`Sequences::next_batch`]; [`TrainError::Argument`] for a position of another mixture.
    pub fn next_batch(
        &self,
        corpus: &Corpus,
        seed: u64,
        position: &mut Position,
        count: usize,
    ) -> Result<Vec<Example>> {
        if !self.drawn {
            return self.parts[0]
                .sequences
                .next_batch(corpus, seed, position, count);
        }
        if position.index == 0 {
            position.parts = vec![Position::default(); self.parts.len()];
        }
        if position.parts.len() != self.parts.len() {
            let expected = format!("places in {} parts", self.parts.len());
            return Err(TrainError::argument(
                "position",
                expected,
                position.parts.len(),
            ));
        }
        let mut batch = Vec::with_capacity(count);
        for _ in 0..count {
            let number = position.index;
            let i = self.draw(seed, number);
            let (part, place) = (&self.parts[i], &mut position.parts[i]);
            // Parts of the same documents have orders of their own.
            let order = seed.wrapping_add((i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15));
            let mut example = part.sequences.next(corpus, order, place)?;
            if let Some(tasks) = &part.tasks {
                example = tasks.weave(example, seed, number)?;
            }
            batch.push(example);
            position.index += 1;
        }
        Ok(batch)
    }

    /// The part that sequence `number` comes from.
    fn draw(&self, seed: u64, number: u64) -> usize {
        let mut key = [0; 32];
        key[..8].copy_from_slice(&seed.to_le_bytes());
        key[8..16].copy_from_slice(&number.to_le_bytes());
        key[31] = PURPOSE;
        let total: f64 = self.parts.iter().map(|part| part.weight).sum();
        let mut left = Random::from_key(key).unit() * total;
        for (i, part) in self.parts.iter().enumerate() {
            if left < part.weight {
                return i;
            }
            left -= part.weight;
        }
        self.parts.len() - 1
    }
}
