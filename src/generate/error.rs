//! What can go wrong in generation.

use super::sampler::SamplerError;
use crate::device::DeviceError;

/// Generation that cannot begin or go on.
#[derive(Debug, thiserror::Error)]
pub enum GenerateError {
    /// Prompts and sequences of the session do not match.
    #[error("prompts: expected one for each of the session's {expected} sequences, got {got}")]
    Prompts {
        /// Sequences of the session.
        expected: usize,
        /// Prompts given.
        got: usize,
    },
    /// A sequence that has read nothing needs a token to begin with.
    #[error("prompt {prompt}: expected at least one token, got none")]
    EmptyPrompt {
        /// Which prompt, from 0.
        prompt: usize,
    },
    /// A token that the model does not have.
    #[error("prompt {prompt}, token {at}: expected an id below {vocab_size}, got {got}")]
    Token {
        /// Which prompt, from 0.
        prompt: usize,
        /// Which of its tokens, from 0.
        at: usize,
        /// The vocabulary's size.
        vocab_size: usize,
        /// The id given.
        got: u32,
    },
    /// The session has no room for the prompt and the tokens after it.
    #[error("prompt {prompt}: expected at most {capacity} tokens with those to come, got {got}")]
    TooLong {
        /// Which prompt, from 0.
        prompt: usize,
        /// Tokens that the session has room for.
        capacity: usize,
        /// Tokens there would be.
        got: usize,
    },
    /// The next token could not be chosen.
    #[error(transparent)]
    Sampler(#[from] SamplerError),
    /// The device failed.
    #[error(transparent)]
    Device(DeviceError),
}

impl From<DeviceError> for GenerateError {
    fn from(error: DeviceError) -> Self {
        match error {
            DeviceError::Sampler(error) => Self::Sampler(error),
            error => Self::Device(error),
        }
    }
}
