//! Training with a teacher: the student comes closer to it, ranks and resumed runs have equal bits, and what does not
//! fit is refused. Gradients are checked by `model_gradients.rs`, the command by `cli_distillation.rs`.

use crate::meeting;

use std::time::Duration;

use crate::common::{self, config_of, model_on, values};
use crate::spread::{bits, config, sequences};
use segattn::device::cpu::Cpu;
use segattn::model::config::ModelConfig;
use segattn::model::decoder::Decoder;
use segattn::ranks::Ranks;
use segattn::train::TrainError;
use segattn::train::data::Example;
use segattn::train::progress::{Progress, Tensors};
use segattn::train::trainer::{StepReport, Trainer};

const ON: (&str, &str) = ("distillation.model", "teacher");

/// The student's shape, without segments.
fn full() -> ModelConfig {
    let mut config = config_of(true, 8);
    config.segment = None;
    config
}

fn teacher() -> Decoder<Cpu> {
    let config = full();
    model_on(Cpu, &config, &values(&config, 4))
}

fn student() -> Tensors {
    let values = values(&config_of(true, 8), 4).into_iter();
    Tensors::new(
        values
            .map(|v| v.into_iter().map(|x| x as f32).collect())
            .collect(),
    )
}

fn trainer(overrides: &[(&str, &str)]) -> Trainer<Cpu> {
    let config = config(&[&[ON], overrides].concat());
    let trainer = Trainer::new(Cpu, config_of(true, 8), config, &student(), None);
    trainer.unwrap().with_teacher(teacher()).unwrap()
}

#[test]
fn a_student_that_runs_in_segments_comes_closer_to_full_attention() {
    for (weight, temperature) in [("1", "1"), ("0.95", "2")] {
        let mut trainer = trainer(&[
            ("distillation.weight", weight),
            ("distillation.temperature", temperature),
            ("optimizer.weight_decay", "0"),
            ("schedule.lr", "1e-3"),
        ]);
        let batch = [sequences(1, 6)];
        let reports: Vec<StepReport> = (0..60).map(|_| trainer.step_on(&batch).unwrap()).collect();
        let [first, last] = [&reports[0], &reports[59]].map(|report| report.divergence.unwrap());
        assert!(first > 1e-2, "{first}");
        assert!(
            last < 0.5 * first,
            "{weight}, {temperature}: {first}, {last}"
        );
    }
}

#[test]
fn a_share_of_zero_measures_the_divergence_and_trains_as_without_a_teacher() {
    let mut with = trainer(&[("distillation.weight", "0")]);
    let mut without = Trainer::new(Cpu, config_of(true, 8), config(&[]), &student(), None).unwrap();
    for step in 0..3 {
        let batch = [sequences(step, 3)];
        let (a, b) = (
            with.step_on(&batch).unwrap(),
            without.step_on(&batch).unwrap(),
        );
        assert!(a.divergence.unwrap() > 0.0 && b.divergence.is_none());
        assert_eq!(a.loss.to_bits(), b.loss.to_bits());
    }
    let [a, b] = [&with, &without].map(|trainer| bits(&trainer.tensors().unwrap()));
    assert!(a == b);
}

#[test]
fn targets_that_weigh_nothing_teach_nothing() {
    let [mut one, mut two] = [trainer(&[]), trainer(&[])];
    let whole = sequences(3, 1);
    let silent = Example {
        weights: Some(vec![0.0; 20]),
        ..Example::from(common::tokens(9, 20))
    };
    let a = one.step_on(std::slice::from_ref(&whole)).unwrap();
    let b = two.step_on(&[vec![whole[0].clone(), silent]]).unwrap();
    assert_eq!(a.divergence, b.divergence);
    assert_eq!(a.grad_norm, b.grad_norm);
    let [a, b] = [one, two].map(|trainer| bits(&trainer.tensors().unwrap()));
    assert!(a == b);
}

#[test]
fn the_guard_watches_what_is_minimised() {
    let config = full();
    let mut values = values(&config, 4);
    values[0][3] = f64::NAN;
    let broken = model_on(Cpu, &config, &values);
    let on = self::config(&[ON]);
    let student = Trainer::new(Cpu, config_of(true, 8), on, &student(), None);
    let mut trainer = student.unwrap().with_teacher(broken).unwrap();
    let before = bits(&trainer.tensors().unwrap());
    let report = trainer.step_on(&[sequences(1, 2)]).unwrap();
    assert!(
        report.loss.is_finite() && report.skipped.is_some(),
        "{report:?}"
    );
    assert!(bits(&trainer.tensors().unwrap()) == before);
}

type At = (Vec<StepReport>, Tensors, Progress);

/// Steps up to `end` on so many ranks, from the start or from where a run was.
fn run(world: usize, overrides: &[(&str, &str)], from: Option<&At>, end: u64) -> At {
    let config = config(&[&[ON, ("distillation.weight", "0.7")], overrides].concat());
    let limit = Duration::from_secs(60);
    let mut all = meeting::on_ranks(world, limit, |_, mesh| {
        let start = student();
        let (tensors, progress) = match from {
            Some((_, tensors, progress)) => (tensors, Some(progress.clone())),
            None => (&start, None),
        };
        let ranks = Ranks::new(mesh.unwrap());
        // Ranks that wait for each other must not wait for each other's threads.
        let threads = rayon::ThreadPoolBuilder::new().num_threads(1).build();
        threads.unwrap().install(|| {
            let (model, config) = (config_of(true, 8), config.clone());
            let trainer = Trainer::on_ranks(Cpu, model, config, tensors, progress, ranks);
            let mut trainer = trainer.unwrap().with_teacher(teacher()).unwrap();
            let mut reports = Vec::new();
            while trainer.progress().step < end {
                let batch = [sequences(trainer.progress().step, 5)];
                let mut report = trainer.step_on(&batch).unwrap();
                // They are those of a rank's own sequences.
                report.log_probabilities.clear();
                reports.push(report);
            }
            let tensors = trainer.tensors().unwrap();
            (reports, tensors, trainer.progress().clone())
        })
    });
    assert!(all.iter().all(|(reports, ..)| *reports == all[0].0));
    all.swap_remove(0)
}

#[test]
fn ranks_batches_recomputation_and_resuming_change_no_bit() {
    let one = run(1, &[], None, 3);
    let same = |other: &At, what: &str| {
        let last = other.0.len();
        assert_eq!(one.0[3 - last..], other.0, "{what}");
        assert!(bits(&one.1) == bits(&other.1), "{what}");
    };
    for world in [2, 3] {
        same(&run(world, &[], None, 3), &format!("{world} ranks"));
    }
    for (key, value) in [
        ("training.batch", "2"),
        ("training.segments_per_step", "0"),
        ("training.segments_per_step", "2"),
        ("training.recompute", "true"),
    ] {
        same(
            &run(1, &[(key, value)], None, 3),
            &format!("{key} = {value}"),
        );
    }
    let begun = run(2, &[], None, 1);
    same(&run(1, &[], Some(&begun), 3), "resumed");
}

#[test]
fn teachers_that_do_not_fit_are_typed_errors() {
    let start = |overrides: &[(&str, &str)]| {
        Trainer::new(Cpu, config_of(true, 8), config(overrides), &student(), None).unwrap()
    };
    let said = |error: TrainError, words: &[&str]| {
        let said = error.to_string();
        assert!(words.iter().all(|word| said.contains(word)), "{said}");
    };
    let missing = start(&[ON]).step_on(&[sequences(1, 2)]).unwrap_err();
    said(missing, &["`teacher`", "distillation.model", "got none"]);
    let unasked = start(&[]).with_teacher(teacher()).unwrap_err();
    said(unasked, &["`distillation.model`", "got none"]);
    let mut other = full();
    other.vocab_size = 12;
    let other = model_on(Cpu, &other, &values(&other, 4));
    let refused = start(&[ON]).with_teacher(other).unwrap_err();
    said(refused, &["`distillation.model`", "11 ids", "got 12"]);
    let ranks = Ranks::planned(0, 2);
    let (model, on) = (config_of(true, 8), config(&[ON]));
    let refused = Trainer::on_stages(Cpu, model, on, &student(), None, ranks).unwrap_err();
    said(refused, &["`stages`", "distillation.model", "got 2"]);
}
