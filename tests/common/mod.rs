//! Small random models, shared by tests.

#[path = "../random/mod.rs"]
mod random;

pub use random::random_f64 as random;
use segattn::device::reference::Reference;
use segattn::device::{Device, Kind};
use segattn::model::config::ModelConfig;
use segattn::model::decoder::Decoder;
use segattn::model::parameters::{Role, specs};
use segattn::model::switches::{QkNorm, Switches};
use segattn::train::config::Config;

pub fn config(tied: bool) -> ModelConfig {
    config_of(tied, 4)
}

pub fn config_of(tied: bool, head_dim: usize) -> ModelConfig {
    let json = serde_json::json!({
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 11,
        "hidden_size": 12,
        "intermediate_size": 10,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": head_dim,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 64,
        "tie_word_embeddings": tied,
        "segment": {
            "segment_len": 8,
            "prior_len": 4,
            "past_len": 4,
            "retrieval": {"block_len": 2, "probe_len": 6, "probe_window": 2, "probe_stride": 2},
            "head_reads": [
                [["prior"], ["past"], ["prior", "past"], []],
                [["prior", "past"], ["prior"], ["prior"], ["past"]],
            ],
        },
    });
    ModelConfig::from_json(json).unwrap()
}

/// The same model with switches (`model::switches`): between the two of them, every one is on.
pub fn switched(after: bool) -> ModelConfig {
    let mut config = config_of(!after, 8);
    config.switches = Switches {
        qkv_bias: true,
        output_bias: after,
        mlp_bias: true,
        qk_norm: if after { QkNorm::Full } else { QkNorm::Head },
        norm_after: after,
        rotary_dim: if after { None } else { Some(4) },
        unrotated: if after { vec![1] } else { Vec::new() },
        sink_logits: true,
        embedding_multiplier: 1.5,
        residual_multiplier: if after { 0.75 } else { 1.25 },
        attention_scale: Some(0.5),
        logits_divisor: 2.0,
    };
    config.validate().unwrap();
    config
}

pub fn values(config: &ModelConfig, seed: u64) -> Vec<Vec<f64>> {
    let mut next = random(seed);
    let mut draw = |role: Role| match role {
        Role::Matrix { .. } => (0..role.len()).map(|_| 1.2 * next()).collect(),
        Role::Norm { .. } => (0..role.len()).map(|_| 1.0 + 0.3 * next()).collect(),
        Role::Bias { .. } => (0..role.len()).map(|_| 0.5 * next()).collect(),
        Role::Sink { .. } => (0..role.len()).map(|_| 1.0 + 2.0 * next()).collect(),
        // Gates are f32 on every device: multiples of 1/64 keep them, and steps on them, exact.
        Role::Gate { .. } => (0..role.len())
            .map(|_| 0.75 + (64.0 * next()).round() / 64.0)
            .collect(),
    };
    specs(config).iter().map(|s| draw(s.role)).collect()
}

pub fn model(config: &ModelConfig, values: &[Vec<f64>]) -> Decoder<Reference> {
    Decoder::new(Reference, config.clone(), |i| Ok(values[i].clone()), true).unwrap()
}

pub fn model_on<D: Device + Copy>(
    device: D,
    config: &ModelConfig,
    values: &[Vec<f64>],
) -> Decoder<D> {
    let upload = |i: usize| {
        let values: Vec<f32> = values[i].iter().map(|x| *x as f32).collect();
        let mut buffer = device.empty(Kind::Exact, values.len())?;
        device.write(&mut buffer, 0, &values)?;
        Ok(buffer)
    };
    Decoder::new(device, config.clone(), upload, true).unwrap()
}

/// The configuration of a run that says `base`, and `overrides` over it.
pub fn run_config(base: &[(&str, &str)], overrides: &[(&str, &str)]) -> Config {
    let all = base.iter().chain(overrides);
    let all: Vec<_> = all
        .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
        .collect();
    Config::parse("", &all).unwrap()
}

pub fn tokens(seed: u64, len: usize) -> Vec<u32> {
    let mut next = random(seed);
    (0..len).map(|_| ((next() + 0.5) * 11.0) as u32).collect()
}
