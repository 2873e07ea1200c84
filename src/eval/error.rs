//! Why an evaluation failed.

use super::kind::TaskKind;

/// What can go wrong in an evaluation.
#[derive(Debug, thiserror::Error)]
pub enum EvalError {
    /// A setting is out of its range.
    #[error("{name}: expected {expected}, got {got}")]
    Argument {
        /// The setting's name.
        name: &'static str,
        /// Its range.
        expected: String,
        /// The value given.
        got: String,
    },
    /// The task's smallest prompt does not fit in the length.
    #[error("{task}: expected a length of at least {expected} tokens, got {got}")]
    TooShort {
        /// The task.
        task: TaskKind,
        /// Tokens that the smallest prompt needs.
        expected: usize,
        /// Tokens there are.
        got: usize,
    },
    /// Longer texts do not have more tokens, so no length can be met.
    #[error(
        "tokenizer: expected more tokens for a longer text, got {tokens} tokens for {units} pieces of text"
    )]
    Tokenizer {
        /// Tokens of the longest text tried.
        tokens: usize,
        /// Its pieces.
        units: usize,
    },
    /// A token's log-probability is no number: the model's numbers have overflowed.
    #[error("sequence {sequence}, token {token}: expected a finite log-probability, got {got}")]
    NotFinite {
        /// Which of the sequences read side by side, from 0.
        sequence: usize,
        /// Which of its tokens, from 0.
        token: usize,
        /// The log-probability.
        got: f32,
    },
    /// The model or its tokenizer failed.
    #[error("model: {0}")]
    Model(#[source] Box<dyn std::error::Error + Send + Sync>),
}

impl EvalError {
    /// Wraps an error of the model.
    pub fn model(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self::Model(error.into())
    }

    pub(crate) fn argument(
        name: &'static str,
        expected: impl Into<String>,
        got: impl ToString,
    ) -> Self {
        Self::Argument {
            name,
            expected: expected.into(),
            got: got.to_string(),
        }
    }
}
