//! The errors of this module's files, built in one place.

use std::io;
use std::path::Path;

use crate::train::error::TrainError;

pub(super) fn io_error(action: &'static str, path: &Path, source: io::Error) -> TrainError {
    let path = path.to_owned();
    TrainError::Io {
        action,
        path,
        source,
    }
}

pub(super) fn data_error(
    path: &Path,
    line: Option<usize>,
    expected: &str,
    got: impl ToString,
) -> TrainError {
    TrainError::Data {
        path: path.to_owned(),
        line,
        expected: expected.to_owned(),
        got: got.to_string(),
    }
}

/// An id that the model has no embedding for, token number `at` of what the file holds.
pub(super) fn vocabulary_error(path: &Path, vocab_size: usize, id: u32, at: u64) -> TrainError {
    let expected = format!("ids below the model's vocab_size = {vocab_size}");
    data_error(path, None, &expected, format!("{id} at token {at}"))
}
