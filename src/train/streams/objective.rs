//! What gradients are computed of, and the gradient of one batch of sequences.

use std::slice::from_mut;

use super::{Gradients, StreamConfig, Sums, Teacher, accumulate_batches};
use crate::device::{Device, DeviceError, Result};
use crate::model::decoder::Decoder;
use crate::train::data::{AsExample, ExampleRef};

/// What a gradient is computed of.
#[derive(Debug)]
pub struct Objective<'a, D: Device> {
    /// Factor of the sum over all targets.
    pub scale: f64,
    /// The model whose probabilities are learned, if there is one.
    pub teacher: Option<Teacher<'a, D>>,
}

/// Numbers of the targets of each sequence, in order.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Scores {
    /// Log-probabilities.
    pub log_probabilities: Vec<Vec<f64>>,
    /// Divergences from the teacher, where there is one.
    pub divergences: Option<Vec<Vec<f64>>>,
}

/// Adds to `gradients` the gradient of `scale * sum of weight * negative log-probability` over all targets, or of what
/// a policy gradient has instead of the log-probability. Targets are all tokens but the first of each sequence.
/// `scale = 1 / sum of weights` gives the mean loss.
///
/// Returns the log-probabilities of each sequence's targets. Sequences may have weights and breaks; each has at least
/// two tokens, with ids below the size of the vocabulary.
///
/// # Errors
/// [`DeviceError::Argument`] for fewer tokens, another number of weights, breaks
/// that a sequence cannot have, and token ids that the model does not have; or what the device says.
pub fn accumulate<D: Device, S: AsExample>(
    model: &Decoder<D>,
    sequences: &[S],
    config: StreamConfig,
    scale: f64,
    gradients: &mut Gradients<D>,
) -> Result<Vec<Vec<f64>>> {
    let teacher = None;
    let objective = Objective { scale, teacher };
    let scores = accumulate_of(model, sequences, config, &objective, gradients);
    Ok(scores?.log_probabilities)
}

/// [`accumulate`] of an objective that may have a teacher: each target then adds `1 - weight` of its loss and `weight *
/// temperature^2` of the divergence (docs/contract.md, section 3).
///
/// # Errors
/// As [`accumulate`]; also [`DeviceError::Argument`] for a teacher with another vocabulary, and for a weight or a
/// temperature out of range.
pub fn accumulate_of<D: Device, S: AsExample>(
    model: &Decoder<D>,
    sequences: &[S],
    config: StreamConfig,
    objective: &Objective<'_, D>,
    gradients: &mut Gradients<D>,
) -> Result<Scores> {
    let sequences: Vec<ExampleRef<'_>> = sequences.iter().map(AsExample::as_example).collect();
    let mut sums = Given {
        gradients: from_mut(gradients),
        scores: Scores::default(),
    };
    let group = sequences.len().max(1);
    accumulate_batches(model, &[&sequences], group, config, objective, &mut sums)?;
    Ok(sums.scores)
}

/// Gradients of one batch, to which its own are added.
struct Given<'a, D: Device> {
    gradients: &'a mut [Gradients<D>],
    scores: Scores,
}

impl<D: Device> Sums<D> for Given<'_, D> {
    type Error = DeviceError;

    fn begin(&mut self, _: usize) -> Result<()> {
        Ok(())
    }

    fn gradients(&mut self) -> &mut [Gradients<D>] {
        self.gradients
    }

    fn end(&mut self, _: usize, scores: Scores) -> Result<()> {
        self.scores = scores;
        Ok(())
    }
}
