//! What counts in a step, and how much: weights of targets, tensors that are updated, the price of gates.

use crate::common::{self, config_of, run_config, tokens};
use segattn::device::Device;
use segattn::device::cpu::Cpu;
use segattn::device::reference::Reference;
use segattn::model::config::ModelConfig;
use segattn::model::parameters::{index, specs};
use segattn::model::session::score;
use segattn::train::TrainError;
use segattn::train::config::Config;
use segattn::train::data::{Example, Policy};
use segattn::train::progress::Tensors;
use segattn::train::streams::{Gradients, StreamConfig, accumulate};
use segattn::train::trainer::Trainer;

const STREAMS: StreamConfig = StreamConfig {
    tbptt: 1,
    segments_per_step: 2,
    recompute: false,
};

/// Every loss reaches every segment before it: the gradient is that of the whole objective.
const FULL: StreamConfig = StreamConfig {
    tbptt: usize::MAX,
    ..STREAMS
};

fn config(overrides: &[(&str, &str)]) -> Config {
    let base = [
        ("data.train", "x"),
        ("schedule.warmup_steps", "0"),
        ("schedule.lr", "1e-2"),
        ("optimizer.clip_norm", "none"),
    ];
    run_config(&base, overrides)
}

fn trainer<D: Device>(device: D, overrides: &[(&str, &str)]) -> Result<Trainer<D>, TrainError> {
    let model = config_of(true, 8);
    let tensors = Tensors::initial(&model, 3);
    Trainer::new(device, model, config(overrides), &tensors, None)
}

fn bits(tensors: &Tensors) -> Vec<Vec<u32>> {
    let all = [&tensors.values, &tensors.m, &tensors.v]
        .into_iter()
        .flatten();
    all.map(|t| t.iter().map(|x| x.to_bits()).collect())
        .collect()
}

fn sequences() -> Vec<Vec<u32>> {
    vec![tokens(1, 30), tokens(2, 9), tokens(3, 17)]
}

fn weighted(weight: impl Fn(usize) -> f32) -> Vec<Example> {
    let one = |tokens: Vec<u32>| Example {
        weights: Some((0..tokens.len()).map(&weight).collect()),
        ..Example::from(tokens)
    };
    sequences().into_iter().map(one).collect()
}

#[test]
fn equal_weights_give_the_bits_of_a_step_without() {
    fn check<D: Device + Copy>(device: D) {
        // Of weights that are powers of two the quotient is exact.
        for weight in [1.0, 4.0] {
            let plain = &mut trainer(device, &[]).unwrap();
            let with = &mut trainer(device, &[]).unwrap();
            for _ in 0..3 {
                let expected = plain.step_on(&[sequences(), sequences()]).unwrap();
                let batch = weighted(|_| weight);
                let got = with.step_on(&[batch.clone(), batch]).unwrap();
                let same = got.loss == expected.loss && got.grad_norm == expected.grad_norm;
                assert!(same, "{got:?}, {expected:?}");
            }
            assert!(bits(&with.tensors().unwrap()) == bits(&plain.tensors().unwrap()));
        }
    }
    check(Reference);
    check(Cpu);
}

fn gradient(batch: &[Example]) -> Vec<Vec<f64>> {
    let trainer = trainer(Reference, &[]).unwrap();
    let mut gradients = Gradients::new(trainer.model()).unwrap();
    accumulate(trainer.model(), batch, STREAMS, 1.0, &mut gradients).unwrap();
    gradients.finish(&Reference).unwrap().to_vec()
}

#[test]
fn the_gradient_is_the_weighted_sum_of_those_of_the_targets_and_weight_zero_gives_zeros() {
    let weight = |i: usize| [0.0, 0.5, 3.0, 0.0, 16.0][i % 5];
    let whole = gradient(&weighted(weight));
    let parts: Vec<_> = (0..5)
        .map(|k| gradient(&weighted(|i| if i % 5 == k { 1.0 } else { 0.0 })))
        .collect();
    for (t, tensor) in whole.iter().enumerate() {
        for (i, got) in tensor.iter().enumerate() {
            let expected: f64 = (0..5).map(|k| f64::from(weight(k)) * parts[k][t][i]).sum();
            assert!(
                (got - expected).abs() <= 1e-9 * (1.0 + expected.abs()),
                "{t}: {got}, {expected}"
            );
        }
    }
    let nothing = gradient(&weighted(|_| 0.0));
    assert!(nothing.iter().flatten().all(|g| *g == 0.0));
}

#[test]
fn the_loss_is_the_weighted_mean_and_a_validation_the_plain_one() {
    let mut trainer = trainer(Cpu, &[]).unwrap();
    let batch = weighted(|i| [0.0, 2.0, 0.25][i % 3]);
    let (mut sum, mut weights, mut plain, mut count) = (0.0, 0.0, 0.0, 0.0);
    for example in &batch {
        let scored = score(trainer.model(), &example.tokens, 1).unwrap();
        for (i, x) in scored.iter().enumerate() {
            let weight = f64::from(example.weights.as_ref().unwrap()[i + 1]);
            sum -= weight * f64::from(*x);
            plain -= f64::from(*x);
            (weights, count) = (weights + weight, count + 1.0);
        }
    }
    let validated = trainer.validate(&batch).unwrap().unwrap();
    assert!((validated - plain / count).abs() < 1e-9);
    let (one, others) = batch.split_at(1);
    let report = trainer.step_on(&[one.to_vec(), others.to_vec()]).unwrap();
    assert!((report.loss - sum / weights).abs() < 1e-6, "{report:?}");
    assert_eq!(report.tokens, 53);
}

#[test]
fn a_step_without_any_weight_is_an_error_that_changes_nothing() {
    let mut trainer = trainer(Cpu, &[]).unwrap();
    let error = trainer.step_on(&[weighted(|_| 0.0)]).unwrap_err();
    assert!(matches!(error, TrainError::Argument { .. }), "{error}");
    assert!(error.to_string().contains("above 0"), "{error}");
    assert_eq!(trainer.progress().step, 0);
}

#[test]
fn only_what_is_named_changes_and_it_changes_as_in_a_whole_step() {
    let batches = [sequences()];
    let mut whole = trainer(Cpu, &[("training.learn_gates", "true")]).unwrap();
    let before = bits(&whole.tensors().unwrap());
    whole.step_on(&batches).unwrap();
    let all = bits(&whole.tensors().unwrap());
    for (patterns, expected) in [
        ("past_gate", &["past_gate"][..]),
        ("layers.1.mlp", &["layers.1.mlp"]),
        ("q_proj,k_proj,v_proj", &["q_proj"]),
        ("norm,embed", &["norm", "embed"]),
    ] {
        let mut part = trainer(Cpu, &[("training.train_only", patterns)]).unwrap();
        part.step_on(&batches).unwrap();
        let after = bits(&part.tensors().unwrap());
        let specs = specs(&part.model().config);
        let mut changed = 0;
        for kind in 0..3 {
            for (i, spec) in specs.iter().enumerate() {
                let at = kind * specs.len() + i;
                let named = expected.iter().any(|e| spec.parts[0].0.contains(e));
                let right = if named { &all[at] } else { &before[at] };
                assert!(after[at] == *right, "{patterns}: {}", spec.parts[0].0);
                changed += usize::from(after[at] != before[at]);
            }
        }
        assert!(changed > 0, "{patterns}");
    }
}

#[test]
fn patterns_that_fit_nothing_or_a_part_of_a_tensor_are_errors() {
    for (patterns, part) in [
        ("past_gates", "past_gates"),
        ("q_proj", "all or none of"),
        ("gate_proj,lm_head", "lm_head"),
    ] {
        let error = trainer(Cpu, &[("training.train_only", patterns)]).unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("training.train_only") && text.contains(part),
            "{text}"
        );
    }
    let error = trainer(Cpu, &[("training.gate_l1", "0.1")]).unwrap_err();
    assert!(error.to_string().contains("learn_gates"), "{error}");
}

#[test]
fn the_price_of_gates_is_the_gradient_of_their_mean() {
    let batches = [sequences()];
    let (price, count) = (0.75, 8.0);
    let gates = |price: &str| {
        let only = [
            ("training.train_only", "past_gate"),
            ("training.gate_l1", price),
        ];
        trainer(Reference, &only)
            .unwrap()
            .step_on(&batches)
            .unwrap()
    };
    let trainer = trainer(Reference, &[]).unwrap();
    let mut gradients = Gradients::new(trainer.model()).unwrap();
    let targets: usize = batches[0].iter().map(|s| s.len() - 1).sum();
    let scale = 1.0 / targets as f64;
    accumulate(trainer.model(), &batches[0], STREAMS, scale, &mut gradients).unwrap();
    let all = gradients.finish(&Reference).unwrap();
    let norm = |price: f64| {
        let config = &trainer.model().config;
        let mut sum = 0.0;
        for l in 0..2 {
            for (h, g) in all[index::past_gate(l)].iter().enumerate() {
                let reads = config.reads_past(l, h / 2);
                sum += (g + if reads { price / count } else { 0.0 }).powi(2);
            }
        }
        sum.sqrt()
    };
    let (plain, priced) = (gates("0.0"), gates("0.75"));
    assert!((plain.grad_norm - norm(0.0)).abs() < 1e-12);
    assert!(
        (priced.grad_norm - norm(price)).abs() < 1e-8,
        "{} {}",
        priced.grad_norm,
        norm(price)
    );
    assert_eq!(priced.loss, plain.loss);
}

/// The model without heads that read the past, through which no gradient flows.
fn without_past() -> ModelConfig {
    let mut model = config_of(true, 8);
    let segment = model.segment.as_mut().unwrap();
    for reads in segment.head_reads.iter_mut().flatten() {
        reads.past = false;
    }
    model
}

/// Sequences of a policy gradient with old log-probabilities near those of the model.
fn drawn() -> Vec<Example> {
    let values = Tensors::initial(&without_past(), 3);
    let trainer = Trainer::new(Cpu, without_past(), config(&[]), &values, None).unwrap();
    let one = |(n, tokens): (usize, Vec<u32>)| {
        let scored = score(trainer.model(), &tokens, 1).unwrap();
        let moved = scored.iter().enumerate().map(|(i, x)| {
            let by = 0.25 * ((i + n) % 5) as f32 - 0.5;
            (x - by).min(0.0)
        });
        let len = tokens.len();
        Example {
            weights: Some((0..len).map(|i| [1.0, 0.0, 0.5][i % 3]).collect()),
            policy: Some(Policy {
                old: std::iter::once(0.0).chain(moved).collect(),
                advantages: (0..len).map(|i| [1.5, -0.75, 0.3][(i / 2) % 3]).collect(),
                clip: [0.2, 0.3],
            }),
            ..Example::from(tokens)
        }
    };
    sequences().into_iter().enumerate().map(one).collect()
}

#[test]
fn a_policy_gradient_is_that_of_the_clipped_objective_by_finite_differences() {
    let batch = drawn();
    // The objective as docs/contract.md, section 3 has it, and where it is not differentiable.
    let loss = |scores: &[Vec<f64>]| -> f64 {
        let mut sum = 0.0;
        for (example, scores) in batch.iter().zip(scores) {
            let (policy, weights) = (
                example.policy.as_ref().unwrap(),
                example.weights.as_ref().unwrap(),
            );
            for (i, x) in scores.iter().enumerate() {
                let advantage = f64::from(policy.advantages[i + 1]);
                let ratio = (x - f64::from(policy.old[i + 1])).exp();
                let value = (ratio * advantage).min(ratio.clamp(0.8, 1.3) * advantage);
                sum -= f64::from(weights[i + 1]) * value;
            }
        }
        sum
    };
    let model = without_past();
    let values = Tensors::initial(&model, 3).values;
    let wide = |tensor: &Vec<f32>| tensor.iter().map(|x| f64::from(*x)).collect::<Vec<_>>();
    let values: Vec<Vec<f64>> = values.iter().map(wide).collect();
    let start = common::model(&model, &values);
    let mut gradients = Gradients::new(&start).unwrap();
    let scored = accumulate(&start, &batch, FULL, 1.0, &mut gradients).unwrap();
    let gradient = gradients.finish(&Reference).unwrap().to_vec();
    let ratios = |i: usize| {
        let policy = batch[i].policy.as_ref().unwrap();
        let old = policy.old[1..].iter().map(|x| f64::from(*x));
        scored[i]
            .iter()
            .zip(old)
            .map(|(x, old)| (x - old).exp())
            .collect::<Vec<_>>()
    };
    let all: Vec<f64> = (0..batch.len()).flat_map(ratios).collect();
    assert!(
        all.iter().any(|r| *r < 0.8)
            && all.iter().any(|r| *r > 1.3)
            && all.iter().any(|r| (*r - 1.0).abs() < 0.01)
    );
    let step = 1e-6;
    for (t, at) in [(0, 5), (1, 2), (2, 40), (4, 7), (6, 3)] {
        let ends = [1.0, -1.0].map(|sign| {
            let mut values = values.clone();
            values[t][at] += sign * step;
            let moved = common::model(&model, &values);
            let mut unused = Gradients::new(&moved).unwrap();
            loss(&accumulate(&moved, &batch, FULL, 1.0, &mut unused).unwrap())
        });
        let expected = (ends[0] - ends[1]) / (2.0 * step);
        let got = gradient[t][at];
        assert!(
            (got - expected).abs() < 1e-6 * (1.0 + expected.abs()),
            "{t}: {got}, {expected}"
        );
    }
}

#[test]
fn tokens_that_the_model_does_not_have_are_named() {
    for (at, id) in [(0, 1000), (29, 1000)] {
        let mut batch = sequences();
        batch[0][at] = id;
        let error = trainer(Cpu, &[]).unwrap().step_on(&[batch]).unwrap_err();
        assert!(
            error
                .to_string()
                .starts_with("sequences: expected ids below"),
            "{error}"
        );
    }
}
