//! Training data: documents, cut into sequences, in an order that is a function of seed and epoch.
//!
//! A sequence lies inside one document and starts with a fresh state, so documents never see each other;
//! short documents are short sequences of a ragged batch and are never joined. A document longer than
//! `sequence_len` becomes several sequences, each beginning with the last token of the one before, so that
//! every token but a document's first is predicted exactly once. Breaks given beside the tokens go with the token
//! before them (docs/contract.md, section 2). Nothing but the index of documents is in
//! memory: tokens stay in files.

mod cache;
mod corpus;
mod encoded;
mod error;
mod example;
mod ids;
mod listing;
mod marks;
#[cfg(feature = "tokenizer")]
mod messages;
mod mixture;
mod permutation;
mod pieces;
mod policy;
mod reading;
mod relay;
mod store;
mod table;
mod tasks;
mod token_files;

use serde::{Deserialize, Serialize};

pub use corpus::{Corpus, Document, fingerprint};
pub use encoded::hash_file;
pub use example::{AsExample, Example, ExampleRef};
pub use ids::parse_ids;
pub use listing::{Format, is_compressed, list_files};
#[cfg(feature = "tokenizer")]
pub use messages::converse;
pub use mixture::Mixture;
pub use permutation::Permutation;
pub use pieces::{Bytes, Conversed, Encode, Located};
pub use policy::Policy;
pub use reading::Reading;
pub use relay::Relay;
pub use table::{compressed_text, table_texts};
pub use tasks::Tasks;

use super::config::Split;
use super::error::{Result, TrainError};

/// Where in the data a run is. Serialisable: with the seed, all that a resumed run needs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    /// Passes over the data that are complete; 0 in a mixture, whose parts have passes of their own.
    pub epoch: u64,
    /// Sequences taken of the current pass; in a mixture all that were taken.
    pub index: u64,
    /// Places in the parts of a mixture.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub parts: Vec<Position>,
}

/// Sequences of one side of a corpus.
#[derive(Debug, Clone)]
pub struct Sequences {
    documents: Vec<Document>,
    /// Sequences in all documents up to and with each.
    ends: Vec<u64>,
    sequence_len: u64,
}

impl Sequences {
    /// The sequences of `documents`: at most `sequence_len` predicted tokens each, 0 for whole documents.
    /// Documents of fewer than two tokens predict nothing and have none.
    pub fn new(documents: Vec<Document>, sequence_len: usize) -> Self {
        let sequence_len = match sequence_len {
            0 => u64::MAX,
            len => len as u64,
        };
        let mut total = 0;
        let count = |d: &Document| {
            total += d.len.saturating_sub(1).div_ceil(sequence_len);
            total
        };
        let ends = documents.iter().map(count).collect();
        Self {
            documents,
            ends,
            sequence_len,
        }
    }

    /// Number of sequences.
    pub fn len(&self) -> u64 {
        self.ends.last().copied().unwrap_or(0)
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Predicted tokens of one pass.
    pub fn tokens(&self) -> u64 {
        let predicted = |d: &Document| d.len.saturating_sub(1);
        self.documents.iter().map(predicted).sum()
    }

    /// Sequence `i` in the files' order.
    ///
    /// # Errors
    /// [`TrainError::Argument`] beyond the last, [`TrainError::Io`] if its file cannot be read.
    pub fn get(&self, corpus: &Corpus, i: u64) -> Result<Example> {
        let d = self.ends.partition_point(|end| *end <= i);
        let Some(document) = self.documents.get(d) else {
            let expected = format!("a number below {}", self.len());
            return Err(TrainError::argument("sequence", expected, i));
        };
        let first = if d == 0 { 0 } else { self.ends[d - 1] };
        let start = (i - first).saturating_mul(self.sequence_len);
        let end = start.saturating_add(self.sequence_len).saturating_add(1);
        corpus.example(document, start..end.min(document.len))
    }

    /// Whether a cut after `sequence_len` tokens gives the same sequences.
    pub fn same_cut(&self, sequence_len: usize) -> bool {
        Self::new(self.documents.clone(), sequence_len).ends == self.ends
    }

    /// What the documents are, see [`fingerprint`].
    pub fn fingerprint(&self) -> String {
        fingerprint(&self.documents)
    }

    /// The next `count` sequences from `position` on, which moves past them, on into the next epoch.
    ///
    /// # Errors
    /// As [`Sequences::get`]; [`TrainError::Argument`] if there is no sequence at all, or for a position that is not
    /// one of these sequences'.
    pub fn next_batch(
        &self,
        corpus: &Corpus,
        seed: u64,
        position: &mut Position,
        count: usize,
    ) -> Result<Vec<Example>> {
        (0..count)
            .map(|_| self.next(corpus, seed, position))
            .collect()
    }

    /// The sequence at `position`, which moves past it.
    fn next(&self, corpus: &Corpus, seed: u64, position: &mut Position) -> Result<Example> {
        if self.is_empty() {
            let expected = "at least one document of two tokens";
            return Err(TrainError::argument("data.train", expected, "none"));
        }
        let order = Permutation::new(self.len(), seed, position.epoch);
        let Some(sequence) = order.at(position.index) else {
            let expected = format!("an index below {}", self.len());
            return Err(TrainError::argument("position", expected, position.index));
        };
        let example = self.get(corpus, sequence)?;
        position.index += 1;
        if position.index == self.len() {
            (position.epoch, position.index) = (position.epoch + 1, 0);
        }
        Ok(example)
    }
}

/// Holds out `share` of the documents' data for validation: (training, validation).
pub fn split(documents: &[Document], split: Split, share: f64) -> (Vec<Document>, Vec<Document>) {
    let usable = documents.iter().filter(|d| d.len >= 2).copied();
    if share <= 0.0 {
        return (usable.collect(), Vec::new());
    }
    if split != Split::Tail {
        let held_out = |d: &Document| (d.hash as f64) < share * u64::MAX as f64;
        let (validation, train): (Vec<_>, Vec<_>) = usable.clone().partition(held_out);
        if split == Split::Document || (!validation.is_empty() && !train.is_empty()) {
            return (train, validation);
        }
    }
    let cut = |d: Document| {
        let tail = ((d.len as f64 * share).ceil() as u64).min(d.len);
        let body = d.len - tail;
        (d.part(0..body), d.part(body..d.len))
    };
    usable.map(cut).unzip()
}
