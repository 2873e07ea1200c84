//! What the ranks of a run must have in common before its first step.

use rayon::prelude::*;
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::checkpoint::Fingerprints;
use super::config::Config;
use super::error::Result;
use super::hex::hex;
use super::progress::{Progress, Tensors};
use crate::model::config::ModelConfig;
use crate::ranks::Agreement;

/// Keys that say where a rank's files lie. What is in the files is compared.
const PLACES: [&str; 5] = [
    "training.output",
    "data.cache",
    "data.train",
    "data.validation",
    "distillation.model",
];

/// What a rank has: version, device, every key of the configuration, data, model, and the state it begins from.
/// `device`: a description of what it computes on, since other devices have other bits.
///
/// # Errors
/// [`TrainError::Config`](super::TrainError::Config) for a configuration that cannot be written.
pub fn agreement(
    device: &str,
    config: &Config,
    model: &ModelConfig,
    data: &Fingerprints,
    tensors: &Tensors,
    progress: Option<&Progress>,
) -> Result<Agreement> {
    let mut keys = Vec::new();
    let tree = serde_json::to_value(config).expect("numbers, strings, lists and tables are JSON");
    leaves("", &tree, &mut keys);
    keys.retain(|(key, _)| !PLACES.contains(&key.as_str()));
    let agreement = Agreement::new()
        .on("version of segattn", env!("CARGO_PKG_VERSION"))
        .on("device", device);
    let agreement = keys
        .into_iter()
        .fold(agreement, |all, (key, value)| all.on(key, value));
    let step = progress.map_or(0, |progress| progress.step);
    Ok(agreement
        .on("training data (hash)", &data.train)
        .on("validation data (hash)", &data.validation)
        .on(
            "weights under adapters (hash)",
            data.base.as_deref().unwrap_or("none"),
        )
        .on(
            "teacher's weights (hash)",
            data.teacher.as_deref().unwrap_or("none"),
        )
        .on(
            "model configuration (hash)",
            hash_of(&[model.to_json().to_string().as_bytes()]),
        )
        .on("step that the run goes on from", step)
        .on("weights (hash)", hash(&tensors.values))
        .on("first moments (hash)", hash(&tensors.m))
        .on("second moments (hash)", hash(&tensors.v)))
}

/// The values of a tree, by their dotted keys.
fn leaves(prefix: &str, tree: &Value, found: &mut Vec<(String, String)>) {
    let Value::Object(keys) = tree else {
        found.push((prefix.to_owned(), tree.to_string()));
        return;
    };
    for (key, value) in keys {
        let dot = if prefix.is_empty() { "" } else { "." };
        leaves(&format!("{prefix}{dot}{key}"), value, found);
    }
}

/// A hash of tensors, by a hash of each.
fn hash(tensors: &[Vec<f32>]) -> String {
    let one = |tensor: &Vec<f32>| Sha256::digest(bytemuck::cast_slice::<f32, u8>(tensor)).to_vec();
    let hashes: Vec<Vec<u8>> = tensors.par_iter().map(one).collect();
    hash_of(&hashes)
}

fn hash_of(parts: &[impl AsRef<[u8]>]) -> String {
    let mut hash = Sha256::new();
    parts.iter().for_each(|part| hash.update(part));
    hex(&hash.finalize())
}
