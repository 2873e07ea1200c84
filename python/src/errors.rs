//! Errors of the crate as exceptions of `segattn.errors`.

use std::fmt::Display;

use pyo3::prelude::*;
use pyo3::types::PyDict;
use segattn::attention::Error;

/// An instance of a class in `segattn.errors`.
fn raise(
    py: Python<'_>,
    class: &str,
    make: impl FnOnce(&Bound<'_, PyAny>) -> PyResult<Py<PyAny>>,
) -> PyErr {
    let class = py
        .import("segattn.errors")
        .and_then(|errors| errors.getattr(class));
    match class.and_then(|class| make(&class)) {
        Ok(error) => PyErr::from_value(error.into_bound(py)),
        Err(error) => error,
    }
}

/// A wrong argument.
pub fn argument(
    py: Python<'_>,
    argument: &str,
    index: Option<usize>,
    expected: impl Display,
    got: impl Display,
) -> PyErr {
    raise(py, "ArgumentError", |class| {
        let kwargs = PyDict::new(py);
        kwargs.set_item("index", index)?;
        let args = (argument, expected.to_string(), got.to_string());
        Ok(class.call(args, Some(&kwargs))?.unbind())
    })
}

/// What an attention call refused.
pub fn attention(py: Python<'_>, error: &Error) -> PyErr {
    match error {
        Error::Shape {
            argument: name,
            expected,
            got,
        } => argument(py, name, None, expected, got),
        Error::Length {
            argument: name,
            index,
            expected,
            got,
        } => argument(py, name, Some(*index), expected, got),
        Error::Value {
            argument: name,
            index,
            expected,
            got,
        } => argument(py, name, Some(*index), expected, got),
        Error::Unsupported {
            argument: name,
            expected,
            got,
        } => argument(py, name, None, expected, got),
        other => named(py, "Error", other.to_string()),
    }
}

/// What a call on a GPU refused, or why it failed.
#[cfg(feature = "cuda")]
pub fn gpu(py: Python<'_>, error: segattn::attention::cuda::Error) -> PyErr {
    use segattn::attention::cuda::Error;
    match error {
        Error::Argument(error) => attention(py, &error),
        Error::Alignment {
            argument: name,
            expected,
            got,
        } => argument(py, name, None, expected, got),
        error => named(py, "DeviceError", error.to_string()),
    }
}

/// An exception that has no more than a message.
pub fn named(py: Python<'_>, class: &str, message: String) -> PyErr {
    raise(py, class, |class| Ok(class.call1((message,))?.unbind()))
}
