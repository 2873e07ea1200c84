//! How a checkpoint runs: as it says itself, segmented, or as plain full attention.
//!
//! Running a model another way than it was trained is the paper's misaligned ablation: the weights
//! stay, the `segment` object of the configuration goes or comes. Without it positions no longer
//! restart, since the whole sequence is one segment.

use super::error::EvalError;
use crate::model::config::{HeadReads, ModelConfig, SegmentConfig};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// How to run a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Execution {
    /// As its configuration says.
    #[default]
    Checkpoint,
    /// In segments.
    Segmented,
    /// As one segment: full causal attention.
    Full,
}

impl fmt::Display for Execution {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Checkpoint => "checkpoint",
            Self::Segmented => "segmented",
            Self::Full => "full",
        })
    }
}

impl FromStr for Execution {
    type Err = EvalError;

    fn from_str(s: &str) -> Result<Self, EvalError> {
        [Self::Checkpoint, Self::Segmented, Self::Full]
            .into_iter()
            .find(|e| e.to_string() == s)
            .ok_or_else(|| {
                EvalError::argument("execution", "one of checkpoint, segmented, full", s)
            })
    }
}

/// Segment settings that replace those of a checkpoint, or make up for their absence.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SegmentOverrides {
    /// Tokens of a segment.
    pub segment_len: Option<usize>,
    /// Rows of the prior tail.
    pub prior_len: Option<usize>,
    /// Rows retrieved from the past.
    pub past_len: Option<usize>,
    /// Layers in which the past is read; all where only heads are given.
    pub past_layers: Option<Vec<usize>>,
    /// KV heads that read the past in these layers, and nothing but their own segment in the
    /// others; the rest read the prior tail in every layer (the paper's setting). Where only layers
    /// are given, all their heads read both.
    pub past_heads: Option<Vec<usize>>,
}

impl SegmentOverrides {
    fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    fn reads(&self, config: &ModelConfig) -> Result<Option<Vec<Vec<HeadReads>>>, EvalError> {
        if self.past_layers.is_none() && self.past_heads.is_none() {
            return Ok(None);
        }
        let (layers, heads) = (config.num_hidden_layers, config.num_key_value_heads);
        below("past_layers", self.past_layers.as_deref(), layers)?;
        below("past_heads", self.past_heads.as_deref(), heads)?;
        let chosen = |list: &Option<Vec<usize>>, i| list.as_ref().is_none_or(|l| l.contains(&i));
        let reads = |l: usize, h: usize| {
            let past = chosen(&self.past_layers, l) && chosen(&self.past_heads, h);
            let long_range = self.past_heads.is_some() && chosen(&self.past_heads, h);
            let prior = !long_range;
            HeadReads { prior, past }
        };
        let layer = |l| (0..heads).map(|h| reads(l, h)).collect();
        Ok(Some((0..layers).map(layer).collect()))
    }
}

fn below(name: &'static str, list: Option<&[usize]>, count: usize) -> Result<(), EvalError> {
    match list.unwrap_or_default().iter().find(|i| **i >= count) {
        Some(i) => {
            let expected = format!("numbers below {count}");
            Err(EvalError::argument(name, expected, i))
        }
        None => Ok(()),
    }
}

/// Makes `config` run as `execution` says.
///
/// # Errors
/// [`EvalError::Argument`] for overrides that do not go with the execution, for segment and prior
/// lengths missing where the checkpoint has no segments, and for settings the model cannot have.
pub fn apply(
    config: &mut ModelConfig,
    execution: Execution,
    overrides: &SegmentOverrides,
) -> Result<(), EvalError> {
    if execution == Execution::Full {
        if !overrides.is_empty() {
            let expected = "segmented, since segment settings were given";
            return Err(EvalError::argument("execution", expected, execution));
        }
        config.segment = None;
        return Ok(());
    }
    if execution == Execution::Checkpoint && overrides.is_empty() {
        return Ok(());
    }
    let mut segment = match config.segment.take() {
        Some(segment) => segment,
        None => fresh(config, overrides)?,
    };
    segment.segment_len = overrides.segment_len.unwrap_or(segment.segment_len);
    segment.prior_len = overrides.prior_len.unwrap_or(segment.prior_len);
    segment.past_len = overrides.past_len.unwrap_or(segment.past_len);
    if let Some(reads) = overrides.reads(config)? {
        segment.head_reads = reads;
    }
    config.segment = Some(segment);
    config
        .validate()
        .map_err(|e| EvalError::argument("segment", "settings that fit the model", e))
}

fn fresh(config: &ModelConfig, overrides: &SegmentOverrides) -> Result<SegmentConfig, EvalError> {
    let needed = |name, value: Option<usize>| {
        let expected = "a number of tokens, since the checkpoint has no segments of its own";
        value.ok_or_else(|| EvalError::argument(name, expected, "nothing"))
    };
    Ok(SegmentConfig::new(
        needed("segment_len", overrides.segment_len)?,
        needed("prior_len", overrides.prior_len)?,
        overrides.past_len.unwrap_or(0),
        config.num_hidden_layers,
        config.num_key_value_heads,
    ))
}
