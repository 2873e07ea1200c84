//! What the tests of the GPU device share: the device on a simulated GPU, and a small model for it.

#[path = "../../../tests/random/mod.rs"]
mod numbers;

use std::path::Path;

pub use numbers::random;
use segattn::device::gpu::Gpu;
use segattn::device::{Device, Kind};
use segattn::model::config::ModelConfig;
use segattn::model::decoder::Decoder;
use segattn::model::parameters::{Role, specs};
use segattn_sim::{Checks, Driver};

/// A simulated GPU with the project's kernels.
pub fn gpu(seed: u64, checks: Checks) -> Gpu<Driver> {
    let kernels = Path::new(env!("CARGO_MANIFEST_DIR")).join("../kernels");
    Gpu::new(Driver::new(&kernels, seed, checks))
}

/// Two layers in which heads read everything that there is to read: prior, past, both, and neither.
pub fn config(tied: bool) -> ModelConfig {
    let json = serde_json::json!({
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 27,
        "hidden_size": 64,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 64,
        "tie_word_embeddings": tied,
        "segment": {
            "segment_len": 8,
            "prior_len": 4,
            "past_len": 4,
            "sink_len": if tied { 3 } else { 0 },
            "retrieval": {"block_len": 2, "probe_len": 6, "probe_window": 2, "probe_stride": 2},
            "head_reads": [
                [["prior"], ["past"], ["prior", "past"], []],
                [["prior", "past"], ["prior"], ["prior"], ["past"]],
            ],
        },
    });
    ModelConfig::from_json(json).expect("a config")
}

/// Values of every tensor, in bf16's precision so that all devices begin with the same.
pub fn values(config: &ModelConfig, seed: u64) -> Vec<Vec<f32>> {
    let mut next = random(seed);
    let mut draw = |role: Role| -> Vec<f32> {
        let one = |x: f32| half::bf16::from_f32(x).to_f32();
        (0..role.len())
            .map(|_| match role {
                Role::Matrix { inner, .. } => one(3.0 * next() / (inner as f32).sqrt()),
                Role::Norm { .. } => one(1.0 + 0.3 * next()),
                Role::Bias { .. } => one(0.5 * next()),
                Role::Sink { .. } => 1.0 + 2.0 * next(),
                Role::Gate { .. } => 0.75 + (64.0 * next()).round() / 64.0,
            })
            .collect()
    };
    specs(config).iter().map(|s| draw(s.role)).collect()
}

/// The model on a device.
pub fn model<D: Device>(device: D, config: &ModelConfig, values: &[Vec<f32>]) -> Decoder<D> {
    let buffers: Vec<D::Buffer> = values
        .iter()
        .map(|v| upload(&device, Kind::Exact, v))
        .collect();
    let mut buffers = buffers.into_iter();
    let next = |_| Ok(buffers.next().expect("tensors are asked for in order"));
    Decoder::new(device, config.clone(), next, true).expect("a model")
}

/// A buffer that holds these values.
pub fn upload<D: Device>(device: &D, kind: Kind, values: &[f32]) -> D::Buffer {
    let mut buffer = device.empty(kind, values.len()).expect("memory");
    device.write(&mut buffer, 0, values).expect("a write");
    buffer
}

/// Token ids.
pub fn tokens(seed: u64, len: usize, vocab: usize) -> Vec<u32> {
    let mut next = random(seed);
    (0..len)
        .map(|_| ((next() + 0.5) * vocab as f32) as u32)
        .collect()
}
