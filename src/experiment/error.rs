//! What can go wrong around an experiment.

use std::io;
use std::path::{Path, PathBuf};

use crate::train::TrainError;

/// Why an experiment cannot be read, run or reported.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExperimentError {
    /// A key of the definition is unknown, of the wrong type, or out of range.
    #[error("experiment key `{key}`: expected {expected}, got {got}")]
    Key {
        /// Dotted path of the key.
        key: String,
        /// What would be accepted.
        expected: String,
        /// What came.
        got: String,
    },
    /// The training configuration of an arm does not hold.
    #[error("arm `{arm}`: {error}")]
    Train {
        /// The arm.
        arm: String,
        /// Why not.
        #[source]
        error: Box<TrainError>,
    },
    /// A file could not be read or written.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was being done, as a verb.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        #[source]
        source: io::Error,
    },
    /// Another process appends rows to the file.
    #[error("{}: expected a file of rows that no other process writes, got one in use", path.display())]
    InUse {
        /// The file.
        path: PathBuf,
    },
    /// A line of a file of rows is not a row.
    #[error("{}, line {line}: expected {expected}, got {got}", path.display())]
    Row {
        /// The file.
        path: PathBuf,
        /// Its line, from 1.
        line: usize,
        /// What a line has to be.
        expected: &'static str,
        /// What came.
        got: String,
    },
}

impl From<TrainError> for ExperimentError {
    /// An error about a key of a TOML tree.
    fn from(error: TrainError) -> Self {
        match error {
            TrainError::Config { key, expected, got } => Self::Key { key, expected, got },
            error => Self::Train {
                arm: String::new(),
                error: Box::new(error),
            },
        }
    }
}

impl ExperimentError {
    pub(crate) fn key(
        key: impl Into<String>,
        expected: impl Into<String>,
        got: impl ToString,
    ) -> Self {
        Self::Key {
            key: key.into(),
            expected: expected.into(),
            got: got.to_string(),
        }
    }

    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io {
            action,
            path,
            source,
        }
    }
}

/// Result of this module.
pub type Result<T> = std::result::Result<T, ExperimentError>;
