//! A run has the same bits on any number of stages of layers (docs/contract.md, section 4).

use crate::common::{config_of, random, switched, tokens};
use crate::spread::{Run, Spread, config, same, sequences};
use segattn::device::cpu::Cpu;
use segattn::model::config::{ModelConfig, SegmentConfig};
use segattn::ranks::Ranks;
use segattn::train::TrainError;
use segattn::train::data::Example;
use segattn::train::progress::Tensors;
use segattn::train::trainer::Trainer;

/// A model of four layers with heads that read prior rows, past rows, both or neither. In the last layer no head reads
/// prior rows, so that a stage may get no gradient of a stream's last segment.
fn model(tied: bool) -> ModelConfig {
    deep(config_of(tied, 8))
}

/// The same with four layers.
fn deep(mut model: ModelConfig) -> ModelConfig {
    model.num_hidden_layers = 4;
    if let Some(SegmentConfig { head_reads, .. }) = &mut model.segment {
        let mut last = head_reads[0].clone();
        last.iter_mut().for_each(|head| head.prior = false);
        head_reads.extend([head_reads[1].clone(), last]);
    }
    model.validate().unwrap();
    model
}

/// Sequences of up to eight segments, some of them with breaks and rereads.
fn long(step: u64, count: usize) -> Vec<Example> {
    let mut next = random(step);
    let one = |i: usize| {
        let tokens = tokens(100 * step + i as u64, 30 + (19 * i) % 33);
        Example {
            weights: Some(tokens.iter().map(|_| (next() + 0.5) as f32).collect()),
            breaks: if i % 2 == 1 { vec![3, 4, 17] } else { vec![] },
            rereads: if i % 3 == 1 { vec![4, 20, 29] } else { vec![] },
            ..Example::from(tokens)
        }
    };
    (0..count).map(one).collect()
}

#[test]
fn losses_weights_and_moments_have_the_same_bits_on_any_number_of_stages() {
    // Gradient accumulation: batches of two sequences, in groups.
    for (tied, group, gate_l1, tbptt) in [
        (true, "1", "0.1", "1"),
        (false, "2", "0", "2"),
        (true, "2", "0", "0"),
    ] {
        let config = config(&[
            ("training.group", group),
            ("training.gate_l1", gate_l1),
            ("training.tbptt", tbptt),
            ("training.batch", "2"),
        ]);
        let run = Run {
            model: &model(tied),
            config: &config,
            sequences: &|step| long(step, 5),
        };
        let one = run.to(Spread::Sequences(1), None, 3);
        for stages in [1, 2, 3, 4] {
            let several = run.to(Spread::Layers(stages), None, 3);
            same(&one, &several, &format!("{stages} stages, K {tbptt}"));
        }
    }
}

#[test]
fn no_setting_of_the_backward_pass_changes_a_bit_on_stages() {
    let of = |tbptt: &str, segments: &str, recompute: &str| {
        let config = config(&[
            ("training.tbptt", tbptt),
            ("training.segments_per_step", segments),
            ("training.recompute", recompute),
        ]);
        (format!("K {tbptt}, {segments} a step, {recompute}"), config)
    };
    let model = model(true);
    for (what, config) in [
        of("1", "2", "true"),
        of("3", "1", "false"),
        of("100", "1", "true"),
        of("2", "0", "false"),
    ] {
        let run = Run {
            model: &model,
            config: &config,
            sequences: &|step| long(step, 2),
        };
        let one = run.to(Spread::Sequences(1), None, 2);
        same(&one, &run.to(Spread::Layers(3), None, 2), &what);
    }
}

#[test]
fn switches_of_families_and_plain_attention_have_the_same_bits_on_stages() {
    let (mut plain, mut bounded) = (model(false), model(true));
    plain.segment = None;
    // Pools that drop tokens.
    bounded.segment.as_mut().unwrap().pool_len = 10;
    bounded.validate().unwrap();
    for model in [deep(switched(false)), deep(switched(true)), plain, bounded] {
        let config = config(&[("training.learn_gates", "false")]);
        let run = Run {
            model: &model,
            config: &config,
            sequences: &|step| sequences(step, 3),
        };
        let one = run.to(Spread::Sequences(1), None, 2);
        for stages in [2, 3] {
            let several = run.to(Spread::Layers(stages), None, 2);
            same(&one, &several, &format!("{stages} stages"));
        }
    }
}

#[test]
fn tensors_that_are_not_updated_stay_on_every_stage() {
    for (tied, names) in [
        (true, "norm,past_gate"),
        (false, "lm_head"),
        (true, "embed"),
    ] {
        let config = config(&[("training.train_only", names)]);
        let run = Run {
            model: &model(tied),
            config: &config,
            sequences: &|step| sequences(step, 3),
        };
        let one = run.to(Spread::Sequences(1), None, 2);
        same(&one, &run.to(Spread::Layers(3), None, 2), names);
    }
}

#[test]
fn a_run_goes_on_with_another_number_of_stages_or_ranks_to_the_same_bits() {
    let config = config(&[("training.batch", "2")]);
    let run = Run {
        model: &model(true),
        config: &config,
        sequences: &|step| long(step, 4),
    };
    let whole = run.to(Spread::Sequences(1), None, 4);
    let two = run.to(Spread::Layers(2), None, 2);
    for spread in [
        Spread::Layers(4),
        Spread::Sequences(2),
        Spread::Sequences(1),
    ] {
        let other = run.to(spread, Some(&two), 4);
        same(&whole, &other, &format!("2 stages, then {spread:?}"));
    }
}

#[test]
fn stages_that_cannot_be_are_refused() {
    let model = model(true);
    let tensors = Tensors::initial(&model, 3);
    let ranks = Ranks::planned(0, 5);
    let refused = Trainer::on_stages(Cpu, model, config(&[]), &tensors, None, ranks);
    let Err(TrainError::Argument { .. }) = &refused else {
        panic!("five stages of four layers: {:?}", refused.map(drop));
    };
    let said = refused.unwrap_err().to_string();
    assert!(
        said.contains("at most 4") && said.contains("got 5"),
        "{said}"
    );
}
