//! Heads that read the past by the gates that a model folder has learned: `gate:N` in `model.segment.past_heads`.

use std::path::Path;

use anyhow::{Result, bail};
use segattn::eval::heads::{Scores, best};
use segattn::model::config::ModelConfig;
use segattn::model::parameters::{index, specs};
use segattn::model::weights::Checkpoint;
use segattn::train::config::ModelSection;

/// Mean gate of each KV head's query heads.
pub fn gates(folder: &Path, config: &ModelConfig) -> Result<Scores> {
    let checkpoint = Checkpoint::open(folder)?;
    let specs = specs(config);
    let group = config.num_attention_heads / config.num_key_value_heads;
    let layer = |l: usize| -> Result<Vec<f64>> {
        let gates = checkpoint.read(&specs[index::past_gate(l)])?;
        let mean = |gates: &[f32]| gates.iter().map(|g| f64::from(*g)).sum::<f64>() / group as f64;
        Ok(gates.chunks(group).map(mean).collect())
    };
    (0..config.num_hidden_layers).map(layer).collect()
}

/// The section with the names of the heads that `gate:N` stands for, by the weights in `folder`.
pub fn named(section: &ModelSection, folder: &Path, config: &ModelConfig) -> Result<ModelSection> {
    let mut section = section.clone();
    let names = section.segment.past_heads.as_deref().unwrap_or_default();
    if !names.iter().any(|name| name.starts_with("gate:")) {
        return Ok(section);
    }
    let all = config.num_hidden_layers * config.num_key_value_heads;
    let count = match names {
        [name] => name
            .strip_prefix("gate:")
            .and_then(|count| count.parse().ok()),
        _ => None,
    };
    let Some(count) = count.filter(|count| (1..=all).contains(count)) else {
        bail!(
            "`model.segment.past_heads`: expected gate:N alone, with 1 to {all} heads, got {names:?}"
        );
    };
    let chosen = best(&gates(folder, config)?, count);
    let name = |(layer, head): (usize, usize)| format!("{layer}.{head}");
    section.segment.past_heads = Some(chosen.into_iter().map(name).collect());
    Ok(section)
}
