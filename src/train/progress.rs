//! What a run has come to: all that the next step depends on, and all that a checkpoint holds.

use serde::{Deserialize, Serialize};

use super::data::Position;
use super::guard::Guard;
use crate::model::config::ModelConfig;
use crate::model::parameters::specs;
use crate::model::weights::initial;

/// Where a run is: with weights and moments, all that the next step depends on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// Steps done, skipped ones included.
    pub step: u64,
    /// Updates applied.
    pub updates: u64,
    /// Tokens predicted.
    pub tokens: u64,
    /// Where in the data.
    pub position: Position,
    /// What has been skipped, and what counts as normal.
    pub guard: Guard,
}

/// Values of every tensor, in the order of the model's specs; none of tensors that are frozen.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensors {
    /// Weights.
    pub values: Vec<Vec<f32>>,
    /// First moments.
    pub m: Vec<Vec<f32>>,
    /// Second moments.
    pub v: Vec<Vec<f32>>,
}

impl Tensors {
    /// Random weights of a new model or of new adapters, see [`initial`].
    pub fn initial(model: &ModelConfig, seed: u64) -> Self {
        let weights = initial(model, seed);
        let specs = specs(model).into_iter().enumerate();
        let values = specs.map(|(i, spec)| match spec.frozen {
            true => Vec::new(),
            false => weights.tensor(i),
        });
        Self::new(values.collect())
    }

    /// Weights that have not been updated yet.
    pub fn new(values: Vec<Vec<f32>>) -> Self {
        let zeros: Vec<Vec<f32>> = values.iter().map(|t| vec![0.0; t.len()]).collect();
        Self {
            m: zeros.clone(),
            v: zeros,
            values,
        }
    }
}
