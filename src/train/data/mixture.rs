//! What a run reads: the sequences of one set of documents in their order, or a mixture of parts.

use super::pieces::Encode;
use super::relay::Relay;
use super::tasks::Tasks;
use super::{Corpus, Example, Position, Sequences};
use crate::model::config::PromptBreak;
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
    source: Source<'a>,
    weight: f64,
}

/// Where the sequences of a part come from.
enum Source<'a> {
    /// Documents, with tasks in their text.
    Text(Sequences, Option<Tasks<'a>>),
    /// A generator: no file is read.
    Relay(Relay),
}

impl Source<'_> {
    fn sequences(&self) -> Option<&Sequences> {
        match self {
            Self::Text(sequences, _) => Some(sequences),
            Self::Relay(_) => None,
        }
    }
}

impl From<Sequences> for Mixture<'_> {
    fn from(sequences: Sequences) -> Self {
        let part = Part {
            source: Source::Text(sequences, None),
            weight: 1.0,
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
    /// [`TrainError::Config`] for a part without a sequence; as [`Tasks::new`] and [`Relay::new`].
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
            let key = format!("data.mixture.{}", section.name);
            let source = match (&section.relay, section.tasks.clone()) {
                (Some(relay), _) => {
                    let key = format!("{key}.relay");
                    Source::Relay(Relay::new(relay.clone(), encode, vocab_size, &key)?)
                }
                (None, _) if sequences.is_empty() => {
                    let expected = "at least one document of two tokens";
                    return Err(TrainError::config(key, expected, "none"));
                }
                (None, tasks) => {
                    let tasks = tasks.map(|t| Tasks::new(t, encode, vocab_size));
                    Source::Text(sequences, tasks.transpose()?)
                }
            };
            Ok(Part {
                source,
                weight: section.weight,
            })
        };
        let parts = sections.iter().zip(sequences).map(part);
        Ok(Self {
            parts: parts.collect::<Result<_>>()?,
            drawn: true,
        })
    }

    /// The same with tasks whose questions have the breaks of prompts ([`Tasks::with_break`]).
    #[must_use]
    pub fn with_break(mut self, own: PromptBreak) -> Self {
        for part in &mut self.parts {
            if let Source::Text(_, tasks) = &mut part.source {
                *tasks = tasks.take().map(|tasks| tasks.with_break(own));
            }
        }
        self
    }

    fn sequences(&self) -> impl Iterator<Item = &Sequences> {
        self.parts.iter().filter_map(|part| part.source.sequences())
    }

    /// Whether there is no sequence.
    pub fn is_empty(&self) -> bool {
        let text = |part: &Part<'_>| part.source.sequences().is_some_and(Sequences::is_empty);
        self.parts.iter().all(text)
    }

    /// Number of sequences in one pass over each part that is read.
    pub fn len(&self) -> u64 {
        self.sequences().map(Sequences::len).sum()
    }

    /// Predicted tokens of one pass over each part that is read.
    pub fn tokens(&self) -> u64 {
        self.sequences().map(Sequences::tokens).sum()
    }

    /// Tokens that the longest sequence predicts of those that are made; 0 without any.
    pub fn longest_made(&self) -> usize {
        let made = self.parts.iter().filter_map(|part| match &part.source {
            Source::Text(..) => None,
            Source::Relay(relay) => Some(relay.longest()),
        });
        made.max().unwrap_or(0)
    }

    /// Whether a cut after `sequence_len` tokens gives the same sequences.
    pub fn same_cut(&self, sequence_len: usize) -> bool {
        self.sequences().all(|s| s.same_cut(sequence_len))
    }

    /// What the documents are: those of each part, see [`fingerprint`](super::fingerprint).
    pub fn fingerprint(&self) -> String {
        let of = |part: &Part<'_>| match &part.source {
            Source::Text(sequences, _) => sequences.fingerprint(),
            Source::Relay(_) => "relay".into(),
        };
        self.parts.iter().map(of).collect::<Vec<_>>().join("+")
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
        if let Some(sequences) = self.sequences().next().filter(|_| !self.drawn) {
            return sequences.next_batch(corpus, seed, position, count);
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
            let example = match &part.source {
                Source::Text(sequences, tasks) => {
                    // Parts of the same documents have orders of their own.
                    let order = seed.wrapping_add((i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15));
                    let example = sequences.next(corpus, order, place)?;
                    match tasks {
                        Some(tasks) => tasks.weave(example, seed, number)?,
                        None => example,
                    }
                }
                Source::Relay(relay) => relay.make(seed, number),
            };
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
