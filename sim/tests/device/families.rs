//! Families of models (`model::families`) on a simulated GPU: scores and gradients agree with the CPU's, and section 4
//! of the contract holds by bits.

use crate::common::{config, gpu, model, tokens, values};
use crate::model::{SCORE_BOUND, assert_close, decoded, gradients, streams};
use segattn::device::cpu::Cpu;
use segattn::model::config::ModelConfig;
use segattn::model::parameters::Role;
use segattn::model::session::score;
use segattn_sim::Checks;
use serde_json::{Value, json};

/// The shared model as one of this family, with these keys.
fn family(model_type: &str, architecture: &str, keys: Value) -> ModelConfig {
    let Value::Object(mut source) = config(false).to_json() else {
        unreachable!("a config is an object")
    };
    source.insert("model_type".into(), model_type.into());
    source.insert("architectures".into(), json!([architecture]));
    source.extend(keys.as_object().expect("keys").clone());
    ModelConfig::from_json(Value::Object(source)).expect("a config")
}

/// Between them every switch.
fn families() -> [ModelConfig; 5] {
    let windows = json!({"queries": 3, "window_len": 2});
    let mut segment = config(false).to_json()["segment"].clone();
    segment["retrieval"] = windows;
    [
        family("qwen3", "Qwen3ForCausalLM", json!({"attention_bias": true})),
        family("olmo2", "Olmo2ForCausalLM", json!({"attention_bias": true})),
        family(
            "granite",
            "GraniteForCausalLM",
            json!({
                "mlp_bias": true, "embedding_multiplier": 3.0, "residual_multiplier": 0.22,
                "attention_multiplier": 0.3, "logits_scaling": 1.7, "segment": segment,
            }),
        ),
        family(
            "smollm3",
            "SmolLM3ForCausalLM",
            json!({"no_rope_layers": [1, 0]}),
        ),
        family(
            "phi3",
            "Phi3ForCausalLM",
            json!({
                "rope_scaling": {
                    "rope_type": "longrope", "short_factor": [1.0, 1.5, 2.0, 3.0],
                    "long_factor": [1.5, 2.0, 3.0, 4.0], "original_max_position_embeddings": 8,
                },
                "partial_rotary_factor": 0.25,
            }),
        ),
    ]
}

#[test]
fn families_agree_with_the_cpu_and_have_equal_bits() {
    for (seed, config) in families().into_iter().enumerate() {
        let (seed, name) = (seed as u64, config.family.model_type);
        let (values, tokens) = (
            values(&config, 20 + seed),
            tokens(30 + seed, 26, config.vocab_size),
        );
        let on_cpu = model(Cpu, &config, &values);
        let checks = if seed < 2 { Checks::All } else { Checks::None };
        let on_gpu = model(gpu(seed, checks), &config, &values);
        let expected = score(&on_cpu, &tokens, 1).expect("scores");
        let got = score(&on_gpu, &tokens, 1).expect("scores");
        let errors = expected.iter().zip(&got).map(|(a, b)| (a - b).abs());
        let worst = errors.fold(0.0, f32::max);
        assert!(worst < SCORE_BOUND, "{name}: {worst}");
        assert_eq!(score(&on_gpu, &tokens, 3).expect("scores"), got, "{name}");
        assert_eq!(decoded(&on_gpu, &tokens), got, "{name}");
        let sequences = [tokens];
        let (_, expected) = gradients(&on_cpu, &sequences, streams(1, 1));
        let (scores, one) = gradients(&on_gpu, &sequences, streams(1, 1));
        let trained: Vec<f32> = scores[0].iter().map(|x| *x as f32).collect();
        assert_eq!(trained, got, "{name}");
        // Gradients of gates are sums that cancel; `model.rs` compares them.
        let gates = |i: usize| matches!(on_cpu.specs[i].role, Role::Gate { .. });
        let compared = |all: &[Vec<f32>]| -> Vec<Vec<f32>> {
            let known = all.iter().enumerate();
            known
                .map(|(i, x)| if gates(i) { Vec::new() } else { x.clone() })
                .collect()
        };
        assert_close(&on_cpu, &compared(&one), &compared(&expected));
        let (_, all) = gradients(&on_gpu, &sequences, streams(1, 9));
        assert!(one == all, "{name}: segments per step");
    }
}
