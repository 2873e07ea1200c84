//! Parts of a mixture of data, the tasks that are woven into their text, and parts that are made.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::train::error::{Result, TrainError};

/// Longest sequence that is made, in tokens.
const MAX_MADE: usize = 1 << 26;

/// A table `data.mixture`: a part that sequences are drawn from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MixtureSection {
    /// Its name, for messages.
    pub name: String,
    /// Files and folders; empty: what of `data.train` is not held out.
    #[serde(default)]
    pub paths: Vec<PathBuf>,
    /// How often a sequence is drawn from it, against the other parts' weights.
    #[serde(default = "one")]
    pub weight: f64,
    /// Tasks in its text.
    #[serde(default)]
    pub tasks: Option<TaskSection>,
    /// Sequences that are made, in place of text.
    #[serde(default)]
    pub relay: Option<RelaySection>,
}

fn one() -> f64 {
    1.0
}

/// `tasks` of a part: questions about statements that are hidden in its text.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TaskSection {
    /// Share of records: sentences that give a key a value, among others of the same form.
    pub records: f64,
    /// Share of entries: `key = value` and the like.
    pub entries: f64,
    /// Share of chains: a number that is copied from register to register.
    pub chains: f64,
    /// Share of lists: keys with several values.
    pub lists: f64,
    /// Share of codes: keys with values of 16 to 32 hexadecimal digits.
    pub codes: f64,
    /// Share of lookalikes: made-up keys that share parts with the other keys of their group.
    pub lookalikes: f64,
    /// Questions of a sequence at most.
    pub questions: usize,
    /// Weight of an answer's tokens in the loss. Text weighs 1, statements and questions 0.
    pub answer_weight: f32,
    /// Least distance between a statement and the question about it, in tokens.
    pub min_distance: usize,
}

impl Default for TaskSection {
    fn default() -> Self {
        Self {
            records: 1.0,
            entries: 1.0,
            chains: 1.0,
            lists: 1.0,
            codes: 0.0,
            lookalikes: 0.0,
            questions: 8,
            answer_weight: 16.0,
            min_distance: 64,
        }
    }
}

impl TaskSection {
    /// Shares of the kinds, in the order of the fields.
    pub(in crate::train) fn shares(&self) -> [f64; 6] {
        [
            self.records,
            self.entries,
            self.chains,
            self.lists,
            self.codes,
            self.lookalikes,
        ]
    }

    fn validate(&self, key: &str) -> Result<()> {
        let shares = self.shares();
        if shares.iter().any(|s| !s.is_finite() || *s < 0.0) || shares.iter().sum::<f64>() <= 0.0 {
            let expected = "shares of the kinds of at least 0, one above 0";
            return Err(TrainError::config(key, expected, format!("{shares:?}")));
        }
        if !(self.answer_weight.is_finite() && self.answer_weight >= 0.0) {
            let (key, got) = (format!("{key}.answer_weight"), self.answer_weight);
            return Err(TrainError::config(key, "a finite number >= 0", got));
        }
        let whole = [
            ("questions", self.questions),
            ("min_distance", self.min_distance),
        ];
        match whole.iter().find(|(_, value)| *value == 0) {
            Some((name, _)) => {
                let key = format!("{key}.{name}");
                Err(TrainError::config(key, "at least 1", 0))
            }
            None => Ok(()),
        }
    }
}

/// `relay` of a part: sequences of a letter, filler, and the question which letter it was.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RelaySection {
    /// Tokens of a segment of the model that is trained.
    pub segment_len: usize,
    /// Segments between the letter and the question, each as likely.
    pub distances: Vec<usize>,
}

impl RelaySection {
    /// Tokens that the longest sequence predicts.
    pub fn longest(&self) -> usize {
        let most = self.distances.iter().copied().max().unwrap_or(0);
        let tokens = most.saturating_add(1).saturating_mul(self.segment_len);
        tokens.saturating_sub(1)
    }

    pub(in crate::train) fn validate(&self, key: &str) -> Result<()> {
        let got = format!("{:?}", self.distances);
        if self.distances.is_empty() || self.distances.contains(&0) {
            let key = format!("{key}.distances");
            return Err(TrainError::config(key, "numbers of at least 1", got));
        }
        if self.longest() >= MAX_MADE {
            let key = format!("{key}.distances");
            let expected = format!("sequences of at most {MAX_MADE} tokens");
            return Err(TrainError::config(key, expected, got));
        }
        Ok(())
    }
}

/// Checks the parts of a mixture, whose sequences predict at most `sequence_len` tokens (0: any number).
pub(super) fn validate(parts: &[MixtureSection], sequence_len: usize) -> Result<()> {
    for (i, part) in parts.iter().enumerate() {
        let key = format!("data.mixture.{}", part.name);
        if part.name.is_empty() || parts[..i].iter().any(|other| other.name == part.name) {
            let expected = "a name that no other part has";
            return Err(TrainError::config(
                "data.mixture.name",
                expected,
                &part.name,
            ));
        }
        if !(part.weight.is_finite() && part.weight > 0.0) {
            let (key, expected) = (format!("{key}.weight"), "a finite number > 0");
            return Err(TrainError::config(key, expected, part.weight));
        }
        if let Some(tasks) = &part.tasks {
            tasks.validate(&format!("{key}.tasks"))?;
        }
        if let Some(relay) = &part.relay {
            let key = format!("{key}.relay");
            relay.validate(&key)?;
            if part.tasks.is_some() || !part.paths.is_empty() {
                let expected =
                    "no `paths` and no `tasks` beside it: its sequences are made, not read";
                return Err(TrainError::config(key, expected, "both"));
            }
            if sequence_len != 0 && relay.longest() > sequence_len {
                let expected = format!(
                    "sequences that fit into `training.sequence_len` = {sequence_len}, or 0 there"
                );
                let got = format!("{} tokens to predict", relay.longest());
                return Err(TrainError::config(key, expected, got));
            }
        }
    }
    Ok(())
}
