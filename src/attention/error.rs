//! What can be wrong with the arguments of an attention call.

/// A rejected argument. Nothing has been computed or written when it is returned.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A dimension or a slice length does not fit the problem.
    #[error("{argument}: expected {expected}, got {got}")]
    Shape {
        /// The offending argument.
        argument: &'static str,
        /// What would have been accepted.
        expected: String,
        /// What was passed.
        got: String,
    },
    /// A length is outside its tensor.
    #[error("{argument}[{index}]: expected {expected}, got {got}")]
    Length {
        /// The offending argument.
        argument: &'static str,
        /// Position in the argument.
        index: usize,
        /// What would have been accepted.
        expected: String,
        /// What was passed.
        got: i64,
    },
    /// A number (gate or scale) is not usable.
    #[error("{argument}[{index}]: expected {expected}, got {got}")]
    Value {
        /// The offending argument.
        argument: &'static str,
        /// Position in the argument (0 for a scalar).
        index: usize,
        /// What would have been accepted.
        expected: &'static str,
        /// What was passed.
        got: f32,
    },
    /// A row lies beyond the tensor's data.
    #[error("{argument}: batch element {batch_index}: expected {}, got {got}", at_least(*.expected))]
    OutOfBounds {
        /// The offending argument.
        argument: &'static str,
        /// The batch element that does not fit.
        batch_index: usize,
        /// Elements needed; `None` if that number overflows.
        expected: Option<usize>,
        /// Elements there are.
        got: usize,
    },
    /// Two rows of an output view share elements.
    #[error("{argument}: expected rows that do not overlap, got {got}")]
    Overlap {
        /// The offending argument.
        argument: &'static str,
        /// The layout.
        got: String,
    },
    /// The shape is meaningful but this device does not compute it.
    #[error("{argument}: supported are {expected}, got {got}")]
    Unsupported {
        /// The offending argument.
        argument: &'static str,
        /// What is supported.
        expected: &'static str,
        /// What was passed.
        got: String,
    },
}

fn at_least(elements: Option<usize>) -> String {
    match elements {
        Some(elements) => format!("at least {elements} elements"),
        None => format!("at least 2^{} elements", usize::BITS),
    }
}
