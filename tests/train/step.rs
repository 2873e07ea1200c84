//! The training step: it learns, skips what it must without touching a bit, adds batches up, and goes on
//! from saved tensors and progress.

use crate::reading;

use std::sync::atomic::{AtomicBool, Ordering};

use crate::common::{config as model_config, random, run_config};
use segattn::device::reference::Reference;
use segattn::model::config::ModelConfig;
use segattn::train::TrainError;
use segattn::train::config::{Config, DataSection};
use segattn::train::data::Sequences;
use segattn::train::guard::SkipReason;
use segattn::train::progress::Tensors;
use segattn::train::trainer::Trainer;

fn config(overrides: &[(&str, &str)]) -> Config {
    let base = [
        ("data.train", "x"),
        ("schedule.warmup_steps", "0"),
        ("schedule.lr", "1e-2"),
    ];
    run_config(&base, overrides)
}

fn tensors(model: &ModelConfig) -> Tensors {
    Tensors::initial(model, 3)
}

fn trainer(overrides: &[(&str, &str)]) -> Trainer<Reference> {
    let model = model_config(true);
    let tensors = tensors(&model);
    Trainer::new(Reference, model, config(overrides), &tensors, None).unwrap()
}

fn sequence(len: usize, seed: u64) -> Vec<u32> {
    let mut next = random(seed);
    (0..len).map(|_| ((next() + 0.5) * 11.0) as u32).collect()
}

fn bits(tensors: &Tensors) -> Vec<u32> {
    let all = [&tensors.values, &tensors.m, &tensors.v];
    all.into_iter()
        .flatten()
        .flatten()
        .map(|x| x.to_bits())
        .collect()
}

#[test]
fn a_batch_is_learned_by_heart() {
    let mut trainer = trainer(&[("optimizer.weight_decay", "0")]);
    let batches = [vec![sequence(30, 1), sequence(9, 2)]];
    let first = trainer.step_on(&batches).unwrap().loss;
    assert!((first - 11f64.ln()).abs() < 0.1, "{first}");
    let last = (0..80)
        .map(|_| trainer.step_on(&batches).unwrap().loss)
        .last()
        .unwrap();
    assert!(last < 0.5 * first, "{first} {last}");
    let validated = trainer.validate(&batches[0]).unwrap().unwrap();
    let again = trainer.step_on(&batches).unwrap().loss;
    assert!((validated - again).abs() < 1e-5, "{validated} {again}");
    assert_eq!(trainer.validate::<Vec<u32>>(&[]).unwrap(), None);
}

#[test]
fn a_step_with_a_non_finite_loss_or_gradient_changes_no_weight_and_no_moment_and_is_counted() {
    let model = model_config(true);
    let mut broken = tensors(&model);
    broken.values[2][5] = f32::NAN;
    let overrides = [("guard.max_skipped", "2")];
    let mut trainer = Trainer::new(Reference, model, config(&overrides), &broken, None).unwrap();
    let before = bits(&trainer.tensors().unwrap());
    let batches = [vec![sequence(20, 1)]];
    for i in 0..3 {
        let report = trainer.step_on(&batches).unwrap();
        assert_eq!(report.skipped, Some(SkipReason::NonFiniteLoss));
        assert_eq!(report.stop, i == 2);
    }
    assert_eq!(bits(&trainer.tensors().unwrap()), before);
    let progress = trainer.progress();
    assert_eq!((progress.step, progress.updates), (3, 0));
    assert_eq!(progress.guard.skipped_total(), 3);
}

#[test]
fn a_skipped_spike_changes_nothing_and_the_next_step_goes_on() {
    let overrides = [
        ("guard.z_score", "6"),
        ("guard.window", "4"),
        ("schedule.lr", "0"),
    ];
    let mut trainer = trainer(&overrides);
    let mut loss = |t: u32| trainer.validate(&[vec![t; 4]]).unwrap().unwrap();
    let mut by_loss: Vec<u32> = (0..11).collect();
    by_loss.sort_by(|a, b| loss(*a).total_cmp(&loss(*b)));
    let usual = [vec![vec![by_loss[0]; 4]]];
    for _ in 0..6 {
        assert_eq!(trainer.step_on(&usual).unwrap().skipped, None);
    }
    let before = bits(&trainer.tensors().unwrap());
    let report = trainer.step_on(&[vec![vec![by_loss[10]; 4]]]).unwrap();
    assert!(report.skipped.is_some() && !report.stop, "{report:?}");
    assert_eq!(bits(&trainer.tensors().unwrap()), before);
    assert_eq!(trainer.step_on(&usual).unwrap().skipped, None);
    assert_ne!(bits(&trainer.tensors().unwrap()), before, "moments");
}

#[test]
fn batches_added_up_give_the_step_of_one_big_batch() {
    let sequences: Vec<Vec<u32>> = (0..4).map(|i| sequence(10 + 9 * i, i as u64)).collect();
    let (mut parts, mut whole) = (trainer(&[]), trainer(&[]));
    let halves = [sequences[..2].to_vec(), sequences[2..].to_vec()];
    for _ in 0..3 {
        let (a, b) = (
            parts.step_on(&halves).unwrap(),
            whole.step_on(std::slice::from_ref(&sequences)).unwrap(),
        );
        assert!((a.loss - b.loss).abs() < 1e-9 && (a.grad_norm - b.grad_norm).abs() < 1e-9);
    }
    let (a, b) = (parts.tensors().unwrap(), whole.tensors().unwrap());
    for (x, y) in a.values.iter().flatten().zip(b.values.iter().flatten()) {
        assert!((x - y).abs() <= 1e-6, "{x} {y}");
    }
}

#[test]
fn a_document_has_the_same_loss_bits_alone_and_among_others() {
    let model = model_config(false);
    let trainer = Trainer::new(
        Reference,
        model.clone(),
        config(&[]),
        &tensors(&model),
        None,
    )
    .unwrap();
    use segattn::train::streams::{Gradients, StreamConfig, accumulate};
    let streams = StreamConfig {
        tbptt: 1,
        segments_per_step: 2,
        recompute: false,
    };
    let mut gradients = Gradients::new(trainer.model()).unwrap();
    let mut run = |batch: &[Vec<u32>]| {
        let scored = accumulate(trainer.model(), batch, streams, 1.0, &mut gradients).unwrap();
        scored
            .into_iter()
            .map(|s| s.iter().map(|x| x.to_bits()).collect::<Vec<_>>())
            .collect::<Vec<_>>()
    };
    let documents: Vec<Vec<u32>> = [33, 2, 17, 8]
        .into_iter()
        .zip(1..)
        .map(|(n, s)| sequence(n, s))
        .collect();
    let together = run(&documents);
    for (document, expected) in documents.iter().zip(&together) {
        assert_eq!(&run(std::slice::from_ref(document))[0], expected);
    }
}

#[test]
fn gates_move_only_if_learned_and_stay_above_the_floor() {
    let gates = |learn: &str| {
        let overrides = [("training.learn_gates", learn), ("schedule.lr", "0.5")];
        let mut trainer = trainer(&overrides);
        for _ in 0..6 {
            trainer.step_on(&[vec![sequence(40, 4)]]).unwrap();
        }
        let tensors = trainer.tensors().unwrap();
        let gate = segattn::model::parameters::index::past_gate(0);
        tensors.values[gate].clone()
    };
    assert_eq!(gates("false"), [1.0; 8]);
    let learned = gates("true");
    assert!(
        learned.iter().any(|g| *g != 1.0) && learned.iter().all(|g| *g >= 1e-4),
        "{learned:?}"
    );
}

#[test]
fn sequences_without_a_prediction_and_tensors_of_another_model_are_typed_errors() {
    let mut trainer = trainer(&[]);
    assert!(trainer.step_on::<Vec<u32>>(&[]).is_err());
    assert!(trainer.step_on(&[vec![vec![1]]]).is_err());
    let model = model_config(true);
    let mut wrong = tensors(&model);
    wrong.m[1].pop();
    let error = Trainer::new(Reference, model, config(&[]), &wrong, None).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("m of `model.layers.0.input_layernorm.weight`"),
        "{error}"
    );
}

#[test]
fn a_flag_ends_a_step_or_a_validation_between_two_batches_and_the_trainer_is_where_it_was() {
    static STOP: AtomicBool = AtomicBool::new(false);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ids.json");
    let lines: Vec<Vec<u32>> = (0..9).map(|i| sequence(12, i)).collect();
    std::fs::write(&path, serde_json::to_string(&lines).unwrap()).unwrap();
    let corpus = reading::read_with(&[path], &DataSection::default()).unwrap();
    let data = Sequences::new(corpus.documents().to_vec(), 0).into();
    let steps = |stop_at: Option<u64>| {
        let mut trainer = trainer(&[("training.batch", "2"), ("training.accumulation", "3")]);
        trainer.interrupt_by(&STOP);
        while trainer.progress().step < 4 {
            if stop_at == Some(trainer.progress().step) {
                STOP.store(true, Ordering::SeqCst);
                let before = trainer.progress().clone();
                let stopped = trainer.step(&corpus, &data).unwrap_err();
                assert!(matches!(stopped, TrainError::Interrupted), "{stopped}");
                let stopped = trainer.validate(&lines).unwrap_err();
                assert!(matches!(stopped, TrainError::Interrupted), "{stopped}");
                assert_eq!(*trainer.progress(), before);
                STOP.store(false, Ordering::SeqCst);
            }
            trainer.step(&corpus, &data).unwrap();
        }
        (
            bits(&trainer.tensors().unwrap()),
            trainer.progress().clone(),
        )
    };
    let whole = steps(None);
    for at in 0..4 {
        assert!(steps(Some(at)) == whole, "stopped at step {at}");
    }
}
