//! What can go wrong with a model, whichever part of the crate says it.

use std::fmt::Display;

use pyo3::prelude::*;
use segattn::device::DeviceError;
use segattn::eval::EvalError;
use segattn::generate::GenerateError;
use segattn::generate::sampler::SamplerError;
use segattn::model::error::ModelError;
use segattn::model::lora::AdapterError;
use segattn::train::TrainError;

use crate::errors;

/// An error that has not met Python yet.
#[derive(Debug)]
pub enum Failure {
    /// Something that was passed.
    Argument {
        argument: String,
        index: Option<usize>,
        expected: String,
        got: String,
    },
    /// Too little memory.
    OutOfMemory(String),
    /// The device.
    Device(String),
    /// A callback of the caller's raised this.
    Raised(PyErr),
    /// Files, and everything else.
    Other(String),
}

impl Failure {
    /// A wrong argument.
    pub fn argument(argument: impl Display, expected: impl Display, got: impl Display) -> Self {
        Failure::Argument {
            argument: argument.to_string(),
            index: None,
            expected: expected.to_string(),
            got: got.to_string(),
        }
    }

    /// The place in the argument.
    fn at(self, place: usize) -> Self {
        match self {
            Failure::Argument {
                argument,
                expected,
                got,
                ..
            } => Failure::Argument {
                argument,
                index: Some(place),
                expected,
                got,
            },
            other => other,
        }
    }

    /// Any error as text.
    pub fn other(error: impl Display) -> Self {
        Failure::Other(error.to_string())
    }

    /// As an exception.
    pub fn raise(self, py: Python<'_>) -> PyErr {
        match self {
            Failure::Argument {
                argument,
                index,
                expected,
                got,
            } => errors::argument(py, &argument, index, expected, got),
            Failure::OutOfMemory(said) => errors::named(py, "OutOfMemory", said),
            Failure::Device(said) => errors::named(py, "DeviceError", said),
            Failure::Raised(error) => error,
            Failure::Other(said) => errors::named(py, "Error", said),
        }
    }
}

impl From<DeviceError> for Failure {
    fn from(error: DeviceError) -> Self {
        match error {
            DeviceError::Argument {
                argument,
                expected,
                got,
            } => Failure::argument(argument, expected, got),
            DeviceError::OutOfMemory(_) => Failure::OutOfMemory(error.to_string()),
            DeviceError::Sampler(error) => error.into(),
            error => Failure::Device(error.to_string()),
        }
    }
}

impl From<AdapterError> for Failure {
    fn from(error: AdapterError) -> Self {
        match error {
            AdapterError::Key { key, expected, got } => {
                Failure::argument(format!("adapter.{key}"), expected, got)
            }
            error => Failure::other(error),
        }
    }
}

impl From<ModelError> for Failure {
    fn from(error: ModelError) -> Self {
        match error {
            ModelError::Adapter(error) => error.into(),
            ModelError::Device(error) => error.into(),
            error => Failure::other(error),
        }
    }
}

impl From<SamplerError> for Failure {
    fn from(error: SamplerError) -> Self {
        match error {
            SamplerError::Setting {
                name,
                expected,
                got,
            } => Failure::argument(name, expected, got),
            error => Failure::other(error),
        }
    }
}

impl From<GenerateError> for Failure {
    fn from(error: GenerateError) -> Self {
        match error {
            GenerateError::EmptyPrompt { prompt } => {
                Failure::argument("prompts", "at least one token", "none").at(prompt)
            }
            GenerateError::Token {
                prompt,
                vocab_size,
                got,
                ..
            } => Failure::argument("prompts", format!("ids below {vocab_size}"), got).at(prompt),
            GenerateError::TooLong {
                prompt,
                capacity,
                got,
            } => {
                let expected = format!("at most {capacity} tokens with those to come");
                Failure::argument("prompts", expected, got).at(prompt)
            }
            GenerateError::Sampler(error) => error.into(),
            GenerateError::Device(error) => error.into(),
            error => Failure::other(error),
        }
    }
}

impl From<TrainError> for Failure {
    fn from(error: TrainError) -> Self {
        match error {
            TrainError::Argument {
                argument,
                expected,
                got,
            } => Failure::argument(argument, expected, got),
            TrainError::Config { key, expected, got } => Failure::argument(key, expected, got),
            TrainError::Device(error) => error.into(),
            error => Failure::other(error),
        }
    }
}

impl From<EvalError> for Failure {
    fn from(error: EvalError) -> Self {
        Failure::other(error)
    }
}
