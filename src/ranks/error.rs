//! What can go wrong between ranks. Each variant names the rank, the variable or the address it is about.

use std::io;

use crate::device::DeviceError;

/// An error between ranks.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RankError {
    /// A variable that a launcher of processes sets does not fit.
    #[error("environment variable {name}: expected {expected}, got {got}")]
    Environment {
        /// Its name.
        name: &'static str,
        /// What would be accepted.
        expected: String,
        /// What came.
        got: String,
    },
    /// Rank 0 cannot listen where the others look for it.
    #[error(
        "port {port} of {address} is in use: expected a free one, where the ranks of a run meet; name another in \
         MASTER_PORT"
    )]
    PortInUse {
        /// Rank 0's address.
        address: String,
        /// The port.
        port: u16,
    },
    /// The network cannot be used.
    #[error("cannot {action}: {source}")]
    Io {
        /// What was being done, as a verb with its object.
        action: String,
        /// What the operating system said.
        #[source]
        source: io::Error,
    },
    /// Ranks have not come within the time limit.
    #[error(
        "expected all {world} ranks within {seconds} s, got none of rank {}",
        list(ranks)
    )]
    Missing {
        /// Those that are missing.
        ranks: Vec<usize>,
        /// Number of ranks.
        world: usize,
        /// The time limit.
        seconds: u64,
    },
    /// A rank has ended, or its connection has.
    #[error("rank {rank} is lost while {doing}: {reason}")]
    Lost {
        /// The rank.
        rank: usize,
        /// What was being exchanged.
        doing: &'static str,
        /// What the operating system said.
        reason: String,
    },
    /// A rank has sent or taken nothing within the time limit.
    #[error(
        "rank {rank} does not answer while {doing}: expected something within {seconds} s, got nothing"
    )]
    Slow {
        /// The rank.
        rank: usize,
        /// What was being exchanged.
        doing: &'static str,
        /// The time limit.
        seconds: u64,
    },
    /// Another rank has ended the run, and says why.
    #[error("rank {rank} has ended the run: {message}")]
    Told {
        /// The rank that says so.
        rank: usize,
        /// Its error.
        message: String,
    },
    /// The ranks are not of one run.
    #[error("rank {rank}: {what}: expected {expected} as on rank 0, got {got}")]
    Differs {
        /// The rank that differs.
        rank: usize,
        /// What differs.
        what: String,
        /// What rank 0 has.
        expected: String,
        /// What the other one has.
        got: String,
    },
    /// Two ranks have one device, where each needs its own.
    #[error(
        "ranks {} have the same GPU: expected one each; LOCAL_RANK is the number of a rank's GPU among those that \
         CUDA_VISIBLE_DEVICES shows",
        list(ranks)
    )]
    SameDevice {
        /// The ranks.
        ranks: Vec<usize>,
    },
    /// A message is not what comes next.
    #[error("rank {rank} while {doing}: expected {expected}, got {got}")]
    Message {
        /// Its sender.
        rank: usize,
        /// What was being exchanged.
        doing: &'static str,
        /// What comes next.
        expected: String,
        /// What came.
        got: String,
    },
    /// A library for collectives cannot be used.
    #[error("{doing}: {reason}")]
    Library {
        /// What was being done.
        doing: String,
        /// What the library said.
        reason: String,
    },
    /// The device could not read or write what is exchanged.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

fn list(ranks: &[usize]) -> String {
    let ranks: Vec<String> = ranks.iter().map(ToString::to_string).collect();
    ranks.join(", ")
}

impl RankError {
    pub(super) fn io(action: impl Into<String>, source: io::Error) -> Self {
        Self::Io {
            action: action.into(),
            source,
        }
    }
}

/// Results between ranks.
pub type Result<T> = std::result::Result<T, RankError>;

impl From<RankError> for DeviceError {
    fn from(error: RankError) -> Self {
        match error {
            RankError::Device(error) => error,
            error => DeviceError::Exchange(Box::new(error)),
        }
    }
}
