//! Adapters on a simulated GPU: scores and gradients agree with the CPU's, and section 4 of the contract holds by bits.

use crate::common::{config, gpu, model, tokens, values};
use crate::model::{SCORE_BOUND, assert_close, decoded, gradients, streams};
use segattn::device::cpu::Cpu;
use segattn::model::lora::{Lora, LoraConfig};
use segattn::model::session::score;
use segattn::train::streams::StreamConfig;
use segattn_sim::Checks;

#[test]
fn adapters_agree_with_the_cpu_and_have_equal_bits() {
    let mut config = config(true);
    let lora = LoraConfig {
        rank: 3,
        alpha: 2.0,
        rslora: false,
        targets: ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
            .map(String::from)
            .to_vec(),
    };
    config.lora = Some(Lora::new(&config, lora).expect("adapters"));
    let (values, tokens) = (values(&config, 40), tokens(41, 26, config.vocab_size));
    let (on_cpu, on_gpu) = (
        model(Cpu, &config, &values),
        model(gpu(4, Checks::None), &config, &values),
    );
    let expected = score(&on_cpu, &tokens, 1).expect("scores");
    let got = score(&on_gpu, &tokens, 1).expect("scores");
    let errors = expected.iter().zip(&got).map(|(a, b)| (a - b).abs());
    let worst = errors.fold(0.0, f32::max);
    assert!(worst < SCORE_BOUND, "{worst}");
    assert_eq!(score(&on_gpu, &tokens, 3).expect("scores"), got);
    assert_eq!(decoded(&on_gpu, &tokens), got);
    let sequences = [tokens];
    let (_, expected) = gradients(&on_cpu, &sequences, streams(1, 1));
    let (scores, one) = gradients(&on_gpu, &sequences, streams(1, 1));
    let trained: Vec<f32> = scores[0].iter().map(|x| *x as f32).collect();
    assert_eq!(trained, got);
    assert!(one.iter().filter(|gradient| !gradient.is_empty()).count() == 20);
    assert_close(&on_cpu, &one, &expected);
    let recomputed = StreamConfig {
        recompute: true,
        ..streams(1, 9)
    };
    assert!(
        gradients(&on_gpu, &sequences, recomputed).1 == one,
        "recomputed"
    );
}
