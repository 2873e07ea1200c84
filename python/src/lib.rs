//! `segattn._native`: what the Python package `segattn` calls. Addresses are trusted here; the package checks types,
//! keeps memory alive and chooses the device.

mod arguments;
mod errors;
mod host;
mod tensor;

#[pyo3::pymodule]
mod _native {
    #[pymodule_export]
    use crate::host::{backward, forward};
}
