//! The `retrieval` object of `config.json`: which rule of retrieval runs, and its lengths.

use serde_json::{Map, Value, json};

use super::MAX_SEGMENT_LEN;
use super::fields::Fields;
use crate::device::SelectionRule;
use crate::model::error::ConfigError;

/// How past rows are chosen at the end of a segment (docs/contract.md, section 2). Lengths in tokens, at least 1 where
/// nothing else is said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RetrievalConfig {
    /// Whole blocks with the highest products of probes and keys. Probes are means over queries.
    Blocks {
        /// Consecutive tokens that are retrieved together.
        block_len: usize,
        /// Last tokens of a segment whose queries make the probes.
        probe_len: usize,
        /// Queries averaged into one probe.
        probe_window: usize,
        /// Distance between the starts of two probes.
        probe_stride: usize,
    },
    /// Windows around the tokens with the largest share of a query's attention to all eligible tokens.
    Windows {
        /// Last tokens of a segment whose queries are the probes.
        queries: usize,
        /// Tokens of a window.
        window_len: usize,
        /// Tokens of a whole window that come before its best token: 0 to `window_len - 1`, by default half of them.
        window_before: usize,
    },
}

/// Keys of the rules.
const RULE_KEYS: [&[&str]; 2] = [
    &["block_len", "probe_len", "probe_window", "probe_stride"],
    &["queries", "window_len", "window_before"],
];

impl Default for RetrievalConfig {
    fn default() -> Self {
        Self::Blocks {
            block_len: 8,
            probe_len: 64,
            probe_window: 8,
            probe_stride: 4,
        }
    }
}

impl RetrievalConfig {
    /// The second rule with its default lengths.
    pub fn windows() -> Self {
        Self::Windows {
            queries: 16,
            window_len: 32,
            window_before: 16,
        }
    }

    /// Last queries of a segment that the rule uses.
    pub fn queries(&self) -> usize {
        match *self {
            Self::Blocks { probe_len, .. } => probe_len,
            Self::Windows { queries, .. } => queries,
        }
    }

    /// The rule, as a device takes it.
    pub fn rule(&self) -> SelectionRule {
        match *self {
            Self::Blocks {
                block_len,
                probe_window,
                probe_stride,
                ..
            } => SelectionRule::Blocks {
                block_len,
                probe_window,
                probe_stride,
            },
            Self::Windows {
                window_len,
                window_before,
                ..
            } => SelectionRule::Windows {
                window_len,
                window_before,
            },
        }
    }

    /// Replaces lengths by those that are given: `get` returns the value of a key. Where keys of the other rule are
    /// given, that rule is chosen, and its other lengths are the defaults.
    ///
    /// # Errors
    /// What `get` returns; [`ConfigError::Invalid`] where keys of both rules are given.
    pub fn set(
        &mut self,
        get: impl Fn(&'static str) -> Result<Option<usize>, ConfigError>,
    ) -> Result<(), ConfigError> {
        let mut given = [None; 2];
        for (keys, given) in RULE_KEYS.iter().zip(&mut given) {
            for key in *keys {
                if get(key)?.is_some() {
                    *given = Some(*key);
                }
            }
        }
        *self = match (given, *self) {
            ([Some(a), Some(b)], _) => {
                let [first, second] = RULE_KEYS.map(|keys| keys.join(", "));
                return Err(ConfigError::Invalid {
                    key: "segment.retrieval".into(),
                    expected: format!("keys of one rule: {first}; or {second}"),
                    got: format!("`{a}` and `{b}`"),
                });
            }
            ([Some(_), None], Self::Windows { .. }) => Self::default(),
            ([None, Some(_)], Self::Blocks { .. }) => Self::windows(),
            (_, rule) => rule,
        };
        for (key, len) in self.lengths() {
            *len = get(key)?.unwrap_or(*len);
        }
        if let Self::Windows {
            window_len,
            window_before,
            ..
        } = self
            && get("window_len")?.is_some()
            && get("window_before")?.is_none()
        {
            *window_before = *window_len / 2;
        }
        Ok(())
    }

    /// Keys and lengths of the rule.
    fn lengths(&mut self) -> Vec<(&'static str, &mut usize)> {
        match self {
            Self::Blocks {
                block_len,
                probe_len,
                probe_window,
                probe_stride,
            } => vec![
                ("block_len", block_len),
                ("probe_len", probe_len),
                ("probe_window", probe_window),
                ("probe_stride", probe_stride),
            ],
            Self::Windows {
                queries,
                window_len,
                window_before,
            } => vec![
                ("queries", queries),
                ("window_len", window_len),
                ("window_before", window_before),
            ],
        }
    }

    pub(super) fn from_json(object: &Map<String, Value>) -> Result<Self, ConfigError> {
        let fields = Fields::new(object, "segment.retrieval.");
        fields.only(&RULE_KEYS.concat())?;
        let mut retrieval = Self::default();
        retrieval.set(|key| fields.size(key, least(key)..=MAX_SEGMENT_LEN))?;
        Ok(retrieval)
    }

    /// Keys and lengths of the rule, as in `config.json`.
    pub fn to_json(mut self) -> Value {
        let lengths = self.lengths().into_iter();
        Value::Object(
            lengths
                .map(|(key, len)| (key.to_owned(), json!(*len)))
                .collect(),
        )
    }

    pub(super) fn validate(mut self) -> Result<(), ConfigError> {
        for (key, len) in self.lengths() {
            let range = least(key)..=MAX_SEGMENT_LEN;
            if !range.contains(len) {
                let [least, most] = [range.start(), range.end()];
                return Err(ConfigError::Invalid {
                    key: format!("segment.retrieval.{key}"),
                    expected: format!("an integer from {least} to {most}"),
                    got: len.to_string(),
                });
            }
        }
        match self {
            Self::Windows {
                window_len,
                window_before,
                ..
            } if window_before >= window_len => Err(ConfigError::Invalid {
                key: "segment.retrieval.window_before".into(),
                expected: format!("less than window_len, which is {window_len}"),
                got: window_before.to_string(),
            }),
            _ => Ok(()),
        }
    }
}

/// The least value of a key.
fn least(key: &str) -> usize {
    usize::from(key != "window_before")
}
