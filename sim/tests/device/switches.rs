//! The switches of the decoder (`model::switches`) on a simulated GPU: scores and gradients agree with the CPU's, and
//! section 4 of the contract holds by bits.

use crate::common::{config, gpu, model, tokens, values};
use crate::model::{SCORE_BOUND, assert_close, decoded, gradients, streams};
use segattn::device::cpu::Cpu;
use segattn::model::config::{ModelConfig, RetrievalConfig};
use segattn::model::parameters::{Role, specs};
use segattn::model::session::score;
use segattn::model::switches::{QkNorm, Switches};
use segattn::train::streams::StreamConfig;
use segattn_sim::Checks;

/// The shared model with switches: between the two of them, every one is on.
fn switched(after: bool) -> ModelConfig {
    let mut config = config(after);
    config.switches = Switches {
        qkv_bias: true,
        output_bias: after,
        mlp_bias: true,
        qk_norm: if after { QkNorm::Full } else { QkNorm::Head },
        norm_after: after,
        rotary_dim: if after { None } else { Some(8) },
        unrotated: if after { vec![1] } else { Vec::new() },
        sink_logits: true,
        embedding_multiplier: 3.0,
        residual_multiplier: if after { 1.0 } else { 0.22 },
        attention_scale: Some(0.3),
        logits_divisor: 1.7,
    };
    if after {
        let segment = config.segment.as_mut().expect("segments");
        let (queries, window_len) = (3, 2);
        segment.retrieval = RetrievalConfig::Windows {
            queries,
            window_len,
            window_before: 0,
        };
    }
    config.validate().expect("a config");
    config
}

#[test]
fn switches_agree_with_the_cpu_and_have_equal_bits() {
    for after in [false, true] {
        let (seed, config) = (u64::from(after), switched(after));
        let name = format!("norms after blocks: {after}");
        let (values, tokens) = (
            values(&config, 20 + seed),
            tokens(30 + seed, 26, config.vocab_size),
        );
        let on_cpu = model(Cpu, &config, &values);
        let on_gpu = model(gpu(seed, Checks::All), &config, &values);
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
        let recompute = StreamConfig {
            recompute: true,
            ..streams(1, 1)
        };
        let (_, again) = gradients(&on_gpu, &sequences, recompute);
        assert!(one == again, "{name}: derived again");
    }
}

/// Heads of 36 elements, kept as 64.
#[test]
fn longer_heads_agree_with_the_cpu_and_have_equal_bits() {
    let mut config = config(true);
    config.set_head_dim(36);
    assert_eq!(config.head_dim, 64);
    // With these values bf16 and f32 select the same past rows.
    let mut values = values(&config, 53);
    for (spec, values) in specs(&config).iter().zip(&mut values) {
        spec.for_file(values);
        spec.keep(values);
    }
    let tokens = tokens(54, 26, config.vocab_size);
    let on_cpu = model(Cpu, &config, &values);
    let on_gpu = model(gpu(5, Checks::None), &config, &values);
    let expected = score(&on_cpu, &tokens, 1).expect("scores");
    let got = score(&on_gpu, &tokens, 1).expect("scores");
    let errors = expected.iter().zip(&got).map(|(a, b)| (a - b).abs());
    let worst = errors.fold(0.0, f32::max);
    assert!(worst < SCORE_BOUND, "{worst}");
    assert_eq!(decoded(&on_gpu, &tokens), got);
    let (scores, gradients) = gradients(&on_gpu, &[tokens], streams(1, 1));
    let trained: Vec<f32> = scores[0].iter().map(|x| *x as f32).collect();
    assert_eq!(trained, got);
    for (spec, gradient) in on_gpu.specs.iter().zip(&gradients) {
        let mut again = gradient.clone();
        spec.for_file(&mut again);
        spec.keep(&mut again);
        assert_eq!(
            again, *gradient,
            "{}: what is added has a gradient",
            spec.parts[0].0
        );
    }
}
