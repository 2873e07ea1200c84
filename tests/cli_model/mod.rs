//! A folder with a small random model, and runs of the command on it.

#![cfg(feature = "cli")]
// Every test program uses a part of this.
#![allow(dead_code)]

#[path = "../random/mod.rs"]
mod random;

use random::random;
use safetensors::tensor::{Dtype, TensorView};
use segattn::model::config::ModelConfig;
use segattn::model::parameters::{Role, specs};
use std::path::Path;
use std::process::{Command, Output};

/// Byte-level: an id is a byte.
pub fn config() -> ModelConfig {
    let json = serde_json::json!({
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 256,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": true,
        "eos_token_id": 0,
        "segment": {
            "segment_len": 64,
            "prior_len": 16,
            "past_len": 16,
            "head_reads": [[["prior"], ["past"]], [["prior", "past"], []]],
        },
    });
    ModelConfig::from_json(json).unwrap()
}

pub fn tokens(seed: u64, len: usize) -> Vec<u32> {
    let mut next = random(seed);
    (0..len)
        .map(|_| ((next() + 0.5) * 255.0) as u32 + 1)
        .collect()
}

/// Writes config.json and model.safetensors.
pub fn save(folder: &Path, config: &ModelConfig) {
    let mut next = random(5);
    let mut tensors = Vec::new();
    for spec in specs(config) {
        for (name, shape) in spec.parts {
            // Gates are optional, 1 where absent.
            if name == "model.layers.1.self_attn.past_gate" {
                continue;
            }
            let len: usize = shape.iter().product();
            let value = |_| match spec.role {
                Role::Matrix { .. } => 1.2 * next(),
                Role::Bias { .. } | Role::Sink { .. } => 0.5 * next(),
                Role::Norm { .. } | Role::Gate { .. } => 1.0 + 0.3 * next(),
            };
            let bytes: Vec<u8> = (0..len).map(value).flat_map(f32::to_le_bytes).collect();
            tensors.push((name, shape, bytes));
        }
    }
    let views = tensors.iter().map(|(name, shape, bytes)| {
        let view = TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap();
        (name.as_str(), view)
    });
    let file = safetensors::serialize(views, None).unwrap();
    std::fs::write(folder.join("model.safetensors"), file).unwrap();
    config.save(folder).unwrap();
}

/// Runs `segattn` in `folder`.
pub fn segattn(folder: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_segattn"))
        .current_dir(folder)
        .args(args)
        .output()
        .unwrap()
}

/// Runs `segattn`, which must succeed, and returns what it printed.
pub fn printed(folder: &Path, args: &[&str]) -> String {
    let output = segattn(folder, args);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{args:?}: {errors}");
    String::from_utf8(output.stdout).unwrap()
}

/// Runs `segattn`, which must fail with a message that says `what`.
pub fn fails(folder: &Path, args: &[&str], what: &str) {
    let output = segattn(folder, args);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success(), "{args:?} succeeded");
    assert!(errors.contains(what), "{args:?}: {errors}");
    assert!(!errors.contains("panicked"), "{args:?}: {errors}");
}

pub fn json(path: &Path) -> serde_json::Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}
