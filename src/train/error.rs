//! What can go wrong around a training run, as one typed error: each variant names the argument, key, file or
//! tensor it is about, what was expected there and what was found.

use std::io;
use std::path::{Path, PathBuf};

use crate::device::DeviceError;
use crate::ranks::RankError;

/// An error of the training side: configuration, data, optimizer, checkpoints, metrics.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrainError {
    /// A key of the configuration is unknown, of the wrong type, or out of range.
    #[error("configuration key `{key}`: expected {expected}, got {got}")]
    Config {
        /// Dotted path of the key, for example `schedule.lr`.
        key: String,
        /// What would be accepted.
        expected: String,
        /// What came.
        got: String,
    },
    /// An argument of a function of this module does not fit.
    #[error("argument `{argument}`: expected {expected}, got {got}")]
    Argument {
        /// Name of the argument.
        argument: String,
        /// What would be accepted.
        expected: String,
        /// What came.
        got: String,
    },
    /// The device could not carry out a call.
    #[error(transparent)]
    Device(DeviceError),
    /// Another rank of the run is lost, too slow, or not of this run.
    #[error(transparent)]
    Ranks(#[from] RankError),
    /// A file or folder could not be read, written, synced or renamed.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was being done, as a verb: `read`, `write`, `sync`.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// What the operating system said.
        #[source]
        source: io::Error,
    },
    /// The content of a data file is not what its format asks for.
    #[error(
        "{}{}: expected {expected}, got {got}",
        path.display(),
        line.map(|n| format!(", line {n}")).unwrap_or_default()
    )]
    Data {
        /// The file.
        path: PathBuf,
        /// Line number, from 1, where the format has lines.
        line: Option<usize>,
        /// What the format asks for.
        expected: String,
        /// What was found.
        got: String,
    },
    /// A checkpoint is incomplete, damaged or of another version.
    #[error("checkpoint {}: {what}: expected {expected}, got {got}", path.display())]
    Checkpoint {
        /// The checkpoint's folder.
        path: PathBuf,
        /// The part concerned: a file, or a tensor by name.
        what: String,
        /// What the manifest says.
        expected: String,
        /// What the files hold.
        got: String,
    },
    /// Checkpoints are there, and none of them loads.
    #[error("no checkpoint in {} loads; the newest says: {newest}", path.display())]
    NoValidCheckpoint {
        /// The folder that was searched.
        path: PathBuf,
        /// Why the newest one was refused.
        #[source]
        newest: Box<TrainError>,
    },
    /// Another process works in this run's folder.
    #[error("{} is in use by {holder}; wait until it ends, or name another folder", path.display())]
    InUse {
        /// The run's folder.
        path: PathBuf,
        /// Who holds its lock.
        holder: String,
    },
    /// The work was interrupted before it was done, as the caller asked.
    #[error("interrupted")]
    Interrupted,
    /// A plot could not be drawn.
    #[error("cannot draw {}: {reason}", path.display())]
    Plot {
        /// The picture's file.
        path: PathBuf,
        /// What the drawing library said.
        reason: String,
    },
}

impl From<DeviceError> for TrainError {
    fn from(error: DeviceError) -> Self {
        match error {
            DeviceError::Interrupted => Self::Interrupted,
            error => Self::Device(error),
        }
    }
}

impl TrainError {
    pub(crate) fn argument(
        argument: impl Into<String>,
        expected: impl Into<String>,
        got: impl ToString,
    ) -> Self {
        Self::Argument {
            argument: argument.into(),
            expected: expected.into(),
            got: got.to_string(),
        }
    }

    pub(crate) fn config(
        key: impl Into<String>,
        expected: impl Into<String>,
        got: impl ToString,
    ) -> Self {
        Self::Config {
            key: key.into(),
            expected: expected.into(),
            got: got.to_string(),
        }
    }

    /// The same, where it is about a file's content: about this file.
    pub(super) fn at(mut self, file: &Path) -> Self {
        if let Self::Data { path, .. } = &mut self {
            *path = file.to_owned();
        }
        self
    }
}

/// Result of the training side.
pub type Result<T> = std::result::Result<T, TrainError>;
