//! What can be wrong with an adapter.

use std::path::PathBuf;

use crate::model::error::{ConfigError, FileError, NameList, WeightsError};

/// An adapter is unreadable, or not one of the model that is computed.
#[derive(Debug, thiserror::Error)]
pub enum AdapterError {
    /// A file itself.
    #[error(transparent)]
    File(#[from] FileError),
    /// The file of its tensors.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// The configuration of the model that it was trained with.
    #[error("beside the adapter: {0}")]
    Config(#[from] ConfigError),
    /// A key of `adapter_config.json` with a value that is not accepted, or that is not computed.
    #[error("adapter_config.json: `{key}` expected {expected}, got {got}")]
    Key {
        /// The key.
        key: String,
        /// What would be accepted.
        expected: String,
        /// What is there, shortened.
        got: String,
    },
    /// The folder holds no adapter in a file that is read.
    #[error(
        "{folder}: expected adapter_model.safetensors; other weights there: {found}. An adapter_model.bin is not read: \
         load the adapter in Python with peft and save it again with save_pretrained"
    )]
    NoWeights {
        /// The folder.
        folder: PathBuf,
        /// Files in it that hold weights.
        found: NameList,
    },
    /// Tensors that are no adapter of a projection of the model, or adapters without one of their tensors.
    #[error(
        "adapter in {folder} does not fit the model: missing {missing}, unexpected {unexpected}"
    )]
    Names {
        /// The folder.
        folder: PathBuf,
        /// Tensors that the file lacks.
        missing: NameList,
        /// Tensors that belong to no projection.
        unexpected: NameList,
    },
}

impl AdapterError {
    pub(super) fn key(key: &str, expected: impl Into<String>, got: impl ToString) -> Self {
        Self::Key {
            key: key.to_owned(),
            expected: expected.into(),
            got: got.to_string(),
        }
    }
}
