//! What can go wrong between a kernel's entry point and its launch.

/// Why a kernel was not launched, or what the driver said. After any of them the next call works, unless the message
/// says that the context is lost.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// There is no kernel for the element type and head size.
    #[error("no kernel for {dtype} with head_dim {head_dim}: supported are {supported}")]
    NoKernel {
        /// The element type.
        dtype: String,
        /// Elements of a row.
        head_dim: usize,
        /// What there are kernels for.
        supported: String,
    },
    /// More than the kernels' indices can count.
    #[error("{what}: expected at most {expected}, got {got}; split the batch")]
    TooLarge {
        /// What is too much.
        what: &'static str,
        /// The most there may be.
        expected: u64,
        /// What was asked for; `u64::MAX` stands for more than that.
        got: u64,
    },
    /// The compiled kernels are not those that this host side was written for.
    #[error(
        "{entry}: {what}: expected {expected}, got {got}; build kernels and library from the same source tree"
    )]
    Mismatch {
        /// The kernel's entry point.
        entry: String,
        /// What differs.
        what: &'static str,
        /// What the host has.
        expected: String,
        /// What the kernel has.
        got: String,
    },
    /// The driver failed.
    #[error(transparent)]
    Driver(#[from] crate::cuda::Error),
    /// Memory or a stream of another GPU than the kernels'.
    #[error(
        "{argument}: expected one of the kernels' context on GPU {expected}, got another on GPU {got}"
    )]
    Context {
        /// The offending argument.
        argument: &'static str,
        /// Number of the kernels' GPU.
        expected: usize,
        /// Number of the argument's.
        got: usize,
    },
    /// What reads or writes host memory cannot be part of a graph.
    #[error("{call}: expected none while calls are recorded for a graph")]
    Recording {
        /// What was asked for.
        call: &'static str,
    },
    /// A launcher that is not the driver's failed.
    #[error("{entry}: {source}")]
    Launcher {
        /// What it was doing: an entry point, or a copy.
        entry: String,
        /// Its own error.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}
