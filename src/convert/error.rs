use std::path::PathBuf;

use crate::model::error::{ConfigError, FileError, WeightsError};

/// Why a file was not converted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConvertError {
    /// A file cannot be read or written.
    #[error(transparent)]
    File(#[from] FileError),
    /// The file breaks its format.
    #[error("{}: {what}: expected {expected}, got {got}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Which part of it.
        what: String,
        /// What the format demands.
        expected: String,
        /// What is there.
        got: String,
    },
    /// The file asks for something that is not computed or not converted.
    #[error("{}: {what} is not supported; {remedy}", path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// What it asks for.
        what: String,
        /// What can be done about it.
        remedy: String,
    },
    /// The configuration made of it is none that the model computes.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The weights cannot be written.
    #[error(transparent)]
    Weights(#[from] WeightsError),
}
