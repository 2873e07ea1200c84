//! A run has the same bits on any number of ranks (docs/contract.md, section 4): losses, norms, weights and moments.

#[allow(dead_code, reason = "each test uses a part")]
mod common;
mod meeting;

use std::time::Duration;

use common::{config_of, random, run_config, tokens};
use meeting::on_ranks;
use segattn::device::cpu::Cpu;
use segattn::ranks::Ranks;
use segattn::train::config::Config;
use segattn::train::data::Example;
use segattn::train::progress::{Progress, Tensors};
use segattn::train::trainer::{StepReport, Trainer};

const LIMIT: Duration = Duration::from_secs(60);

fn config(overrides: &[(&str, &str)]) -> Config {
    let base = [
        ("data.train", "x"),
        ("schedule.warmup_steps", "0"),
        ("schedule.lr", "1e-2"),
        ("optimizer.clip_norm", "0.5"),
        ("training.learn_gates", "true"),
        ("training.group", "1"),
    ];
    run_config(&base, overrides)
}

/// The sequences of a step: of several lengths, with weights, whose sums depend on their order.
fn sequences(step: u64, count: usize) -> Vec<Example> {
    let mut next = random(step);
    let one = |i: usize| {
        let tokens = tokens(100 * step + i as u64, 5 + (7 * i) % 23);
        Example {
            weights: Some(tokens.iter().map(|_| (next() + 0.5) as f32).collect()),
            ..Example::from(tokens)
        }
    };
    (0..count).map(one).collect()
}

fn bits(tensors: &Tensors) -> Vec<u32> {
    let all = [&tensors.values, &tensors.m, &tensors.v]
        .into_iter()
        .flatten();
    all.flatten().map(|x| x.to_bits()).collect()
}

/// Where a run is.
struct At {
    reports: Vec<StepReport>,
    validated: Option<u64>,
    tensors: Tensors,
    progress: Progress,
}

/// Steps up to `end` on so many ranks, from the start or from where a run was.
fn run(world: usize, config: &Config, tied: bool, count: usize, from: Option<&At>, end: u64) -> At {
    let model = config_of(tied, 8);
    let initial = Tensors::initial(&model, 3);
    let mut all = on_ranks(world, LIMIT, |_, mesh| {
        let (tensors, progress) = match from {
            Some(at) => (&at.tensors, Some(at.progress.clone())),
            None => (&initial, None),
        };
        let (model, config, ranks) = (model.clone(), config.clone(), Ranks::new(mesh.unwrap()));
        let trainer = Trainer::on_ranks(Cpu, model, config, tensors, progress, ranks);
        let mut trainer = trainer.unwrap();
        let mut reports = Vec::new();
        while trainer.progress().step < end {
            let batch = sequences(trainer.progress().step, count);
            reports.push(trainer.step_on(&[batch]).unwrap());
        }
        At {
            reports,
            validated: trainer
                .validate(&sequences(99, 3))
                .unwrap()
                .map(f64::to_bits),
            tensors: trainer.tensors().unwrap(),
            progress: trainer.progress().clone(),
        }
    });
    // A report has the log-probabilities of its rank's sequences alone, which are consecutive.
    for step in 0..all[0].reports.len() {
        let own = all.iter_mut().map(|at| &mut at.reports[step]);
        let of_all: Vec<_> = own.flat_map(|r| r.log_probabilities.drain(..)).collect();
        for at in &mut all {
            at.reports[step].log_probabilities = of_all.clone();
        }
    }
    for other in &all {
        assert_eq!(other.reports, all[0].reports);
        assert_eq!(other.validated, all[0].validated);
        assert_eq!(other.progress, all[0].progress);
        let values = |at: &At| bits(&Tensors::new(at.tensors.values.clone()));
        assert!(
            values(other) == values(&all[0]),
            "weights differ between ranks"
        );
    }
    all.swap_remove(0)
}

fn same(a: &At, b: &At, what: &str) {
    let reports = |at: &At| -> Vec<_> {
        let bits = |r: &StepReport| {
            let scores = r.log_probabilities.iter().flatten();
            let scores: Vec<u64> = scores.map(|x| x.to_bits()).collect();
            let sums = [r.loss, r.grad_norm].map(f64::to_bits);
            (r.step, sums, r.tokens, scores)
        };
        at.reports.iter().map(bits).collect()
    };
    let (a_reports, b_reports) = (reports(a), reports(b));
    let last = a_reports.len().min(b_reports.len());
    let tail = |reports: &[_]| reports[reports.len() - last..].to_vec();
    assert_eq!(tail(&a_reports), tail(&b_reports), "{what}");
    assert_eq!(a.validated, b.validated, "{what}");
    assert_eq!(a.progress, b.progress, "{what}");
    assert!(
        bits(&a.tensors) == bits(&b.tensors),
        "{what}: weights or moments"
    );
}

#[test]
fn losses_weights_and_moments_have_the_same_bits_on_any_number_of_ranks() {
    for (tied, group, count, gate_l1) in [
        (true, "1", 8, "0"),
        (false, "1", 5, "0.1"),
        (true, "2", 7, "0.1"),
    ] {
        let config = config(&[("training.group", group), ("training.gate_l1", gate_l1)]);
        let one = run(1, &config, tied, count, None, 3);
        for world in [2, 3, 4, 8] {
            let several = run(world, &config, tied, count, None, 3);
            same(
                &one,
                &several,
                &format!("{world} ranks, groups of {group}, {count} sequences"),
            );
        }
    }
}

#[test]
fn how_many_sequences_are_computed_side_by_side_changes_no_bit() {
    for group in ["1", "2"] {
        let of = |batch: &str| config(&[("training.group", group), ("training.batch", batch)]);
        let one = run(1, &of("1"), true, 7, None, 3);
        for (world, batch) in [(1, "3"), (1, "8"), (2, "2")] {
            let several = run(world, &of(batch), true, 7, None, 3);
            same(
                &one,
                &several,
                &format!("{batch} side by side, groups of {group}, {world} ranks"),
            );
        }
    }
}

#[test]
fn the_order_of_sums_matters_here() {
    let bits_of = |group: &str| {
        let config = config(&[("training.group", group)]);
        bits(&run(1, &config, true, 8, None, 3).tensors)
    };
    assert!(
        bits_of("1") != bits_of("8"),
        "the test above could not fail"
    );
}

#[test]
fn only_tensors_that_are_updated_are_exchanged_and_all_keep_their_bits() {
    let config = config(&[("training.train_only", "norm,past_gate")]);
    let one = run(1, &config, true, 4, None, 2);
    same(&one, &run(3, &config, true, 4, None, 2), "3 ranks");
}

#[test]
fn a_run_goes_on_with_another_number_of_ranks_to_the_same_bits() {
    let config = config(&[]);
    let whole = run(1, &config, true, 8, None, 4);
    let two = run(2, &config, true, 8, None, 2);
    same(
        &whole,
        &run(4, &config, true, 8, Some(&two), 4),
        "2 ranks, then 4",
    );
    same(
        &whole,
        &run(1, &config, true, 8, Some(&two), 4),
        "2 ranks, then 1",
    );
}
