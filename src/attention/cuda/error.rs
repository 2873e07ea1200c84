//! What can be wrong with an attention call on a GPU.

use crate::cuda::kernels;

/// Why an attention call did nothing. After any of them the next call works, unless the message says that the context
/// is lost.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An argument that no device would take.
    #[error(transparent)]
    Argument(#[from] crate::attention::Error),
    /// Rows are copied 16 bytes at a time.
    #[error("{argument}: expected {expected}, got {got}")]
    Alignment {
        /// The offending argument.
        argument: &'static str,
        /// What would have been accepted.
        expected: &'static str,
        /// What was passed.
        got: u64,
    },
    /// The workspace does not hold what the plan needs.
    #[error(
        "workspace: expected at least {expected} bytes at a multiple of 256, got {got} bytes at {address:#x}"
    )]
    Workspace {
        /// Bytes that [`super::ForwardPlan::workspace_bytes`] says.
        expected: usize,
        /// Bytes that were passed.
        got: usize,
        /// Where they begin.
        address: u64,
    },
    /// There is no kernel for the call, or launching it failed.
    #[error(transparent)]
    Kernels(#[from] kernels::Error),
}

impl From<crate::cuda::Error> for Error {
    fn from(error: crate::cuda::Error) -> Self {
        Error::Kernels(error.into())
    }
}
