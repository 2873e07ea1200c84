//! Segments that are read again, on a simulated GPU: the bits that scoring, decoding and training share.

use std::ops::ControlFlow;

use crate::common::{config, gpu, model, tokens, values};
use crate::model::{SCORE_BOUND, assert_close, gradients, streams};
use segattn::device::cpu::Cpu;
use segattn::device::sampler::SamplerConfig;
use segattn::generate::{Generator, GeneratorConfig, Prompt};
use segattn::model::segmentation::Tokens;
use segattn::model::session::{Session, score};
use segattn_sim::Checks;

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

/// A short segment, a whole one, and one with two rereads.
fn reread(seed: u64, len: usize) -> Tokens {
    let up_to = |positions: &[usize]| positions.iter().copied().filter(|p| *p < len).collect();
    Tokens {
        ids: tokens(seed, len, 27),
        breaks: up_to(&[9, 13, 21]),
        rereads: up_to(&[12, 21, 24, 26, 26]),
    }
}

#[test]
fn gradients_with_rereads_agree_with_the_cpu_and_do_not_depend_on_segments_per_step() {
    let config = config(false);
    let values = values(&config, 11);
    let sequences = [reread(12, 30), reread(13, 18)];
    let on_cpu = model(Cpu, &config, &values);
    let on_gpu = model(gpu(3, Checks::None), &config, &values);
    let (scores, expected) = gradients(&on_cpu, &sequences, streams(1, 1));
    let (one, got) = gradients(&on_gpu, &sequences, streams(1, 1));
    let pairs = scores.iter().flatten().zip(one.iter().flatten());
    let worst = pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    assert!(worst < f64::from(SCORE_BOUND), "{worst}");
    assert_close(&on_cpu, &got, &expected);
    assert!(gradients(&on_gpu, &sequences, streams(1, 9)) == (one, got));
}

/// Prompts of a batch end at different places of their segments; steps of the answers are replayed.
#[test]
fn generation_after_a_reread_has_the_bits_of_score() {
    let mut config = config(true);
    let segment = config.segment.as_mut().expect("segments");
    (segment.break_after_prompt, segment.reread_suffix) = (true, 2);
    segment.prompt_suffix_len = 5;
    config.validate().expect("a config");
    let model = model(gpu(1, Checks::All), &config, &values(&config, 21));
    let prompts: Vec<Vec<u32>> = [3, 12, 21].map(|n| tokens(n, n as usize, 27)).to_vec();
    let prompt = |tokens| Prompt {
        before: &[],
        tokens,
        breaks: &[],
        rereads: &[],
        stream: 1,
    };
    let prompts: Vec<Prompt<'_>> = prompts.iter().map(|p| prompt(p)).collect();
    let settings = GeneratorConfig {
        sampler: SamplerConfig {
            seed: 11,
            ..SamplerConfig::default()
        },
        max_new: 9,
        end_tokens: Vec::new(),
    };
    let before = model.device.driver().replays();
    let mut session = Session::new(&model, prompts.len(), 48, 2).expect("a session");
    let mut generator = Generator::new(&mut session, &prompts, settings).expect("prompts");
    let generated = generator.run(|_| ControlFlow::Continue(()));
    assert!(model.device.driver().replays() > before);
    let own = config.prompt_break();
    for (prompt, generated) in prompts.iter().zip(&generated.expect("tokens")) {
        let count = prompt.tokens.len();
        let whole = Tokens {
            ids: [prompt.tokens, &generated.tokens].concat(),
            breaks: own.of(count).into_iter().collect(),
            rereads: own.rereads_of(count),
        };
        let expected = score(&model, &whole, 1).expect("scores");
        assert_eq!(
            bits(&generated.log_probabilities),
            bits(&expected[count - 1..])
        );
    }
}
