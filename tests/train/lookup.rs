//! A small model learns to answer from its past: a value somewhere in the text, a question, a break, the answer. Only
//! the answer counts.

use crate::common::random;
use segattn::device::cpu::Cpu;
use segattn::model::config::ModelConfig;
use segattn::model::parameters::index;
use segattn::model::session::score;
use segattn::train::config::Config;
use segattn::train::data::{AsExample, Example};
use segattn::train::progress::Tensors;
use segattn::train::trainer::Trainer;

const VALUES: u32 = 8;
const FILLER: u32 = 8;
const QUESTION: u32 = 9;
const ANSWER: u32 = 10;
/// Tokens before the question: two segments and more.
const TEXT: usize = 20;
/// The value stands before these last ones, which are in the tail at the break.
const TAIL: usize = 8;

fn model() -> ModelConfig {
    let json = serde_json::json!({
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 11,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 64,
        "tie_word_embeddings": false,
        "segment": {
            "segment_len": 8,
            "prior_len": 4,
            "past_len": 24,
            "retrieval": {"block_len": 4, "probe_len": 4, "probe_window": 2, "probe_stride": 2},
            "head_reads": [[["prior"], ["past"]], [["prior"], ["past"]]],
        },
    });
    ModelConfig::from_json(json).unwrap()
}

/// Text of one token with one of the values in it.
fn example(next: &mut impl FnMut() -> f64) -> Example {
    let mut below = |n: f64| ((next() + 0.5) * n) as usize;
    let mut tokens = vec![FILLER; TEXT];
    let value = below(f64::from(VALUES)) as u32;
    tokens[below((TEXT - TAIL) as f64)] = value;
    tokens.push(QUESTION);
    let at = tokens.len();
    tokens.extend([ANSWER, value]);
    let mut weights = vec![0.0; at + 2];
    weights[at + 1] = 1.0;
    Example {
        tokens,
        weights: Some(weights),
        breaks: vec![at],
        ..Example::default()
    }
}

/// Mean negative log-probability of the answers.
fn loss(trainer: &Trainer<Cpu>, examples: &[Example]) -> f64 {
    let answer = |example: &Example| {
        let scored = score(trainer.model(), example.as_example().sequence(), 1).unwrap();
        -f64::from(*scored.last().unwrap())
    };
    examples.iter().map(answer).sum::<f64>() / examples.len() as f64
}

#[test]
fn a_small_model_learns_to_answer_from_its_past_after_a_break() {
    let overrides = [
        ("data.train", "x"),
        ("schedule.lr", "2e-3"),
        ("schedule.kind", "constant"),
        ("schedule.warmup_steps", "10"),
        ("optimizer.weight_decay", "0"),
    ];
    let overrides = overrides.map(|(k, v)| (k.to_owned(), v.to_owned()));
    let config = Config::parse("", &overrides).unwrap();
    let start = Tensors::initial(&model(), 1);
    let mut trainer = Trainer::new(Cpu, model(), config.clone(), &start, None).unwrap();
    let mut next = random(1);
    let held_out: Vec<Example> = (0..32).map(|_| example(&mut next)).collect();
    let blind = f64::from(VALUES).ln();
    assert!(loss(&trainer, &held_out) > 0.9 * blind);
    let mut found = f64::INFINITY;
    for step in 0..600 {
        let batch: Vec<Example> = (0..32).map(|_| example(&mut next)).collect();
        let report = trainer.step_on(&[batch]).unwrap();
        found = report.loss;
        if step > 50 && found < 0.1 {
            break;
        }
    }
    let learned = loss(&trainer, &held_out);
    assert!(learned < 0.5, "{learned}, {found} in the last step");
    // It is the past that it answers from.
    let mut closed = trainer.tensors().unwrap();
    (0..2).for_each(|l| closed.values[index::past_gate(l)].fill(0.0));
    let closed = Trainer::new(Cpu, model(), config, &closed, None).unwrap();
    let blinded = loss(&closed, &held_out);
    assert!(blinded > 0.7 * blind, "{blinded}");
}
