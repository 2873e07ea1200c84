//! Training of adapters: checkpoints, ranks, what is refused, memory, and PEFT as a reader.

use std::process::Command;
use std::time::Duration;

use crate::adapters::{ERRORS, Expected, GOLDEN, TARGETS, base, bits, folders, largest, lora};
use crate::common::{config_of, model_on, run_config, tokens, values};
use crate::meeting::on_ranks;
use segattn::device::cpu::Cpu;
use segattn::model::config::ModelConfig;
use segattn::model::decoder::Decoder;
use segattn::model::lora::folder::{ADAPTER_FILE, AdapterFolder};
use segattn::model::memory::{Use, memory};
use segattn::model::parameters::{base_specs, specs};
use segattn::model::session::score;
use segattn::ranks::Ranks;
use segattn::train::TrainError;
use segattn::train::checkpoint::{self, Disk, Fingerprints};
use segattn::train::config::Config;
use segattn::train::progress::Tensors;
use segattn::train::trainer::Trainer;

fn settings(overrides: &[(&str, &str)]) -> Config {
    let base = [
        ("data.train", "x"),
        ("model.folder", "base"),
        ("lora.r", "2"),
        ("lora.targets", "q_proj,v_proj,up_proj,o_proj"),
        ("schedule.warmup_steps", "0"),
        ("schedule.lr", "1e-2"),
        ("training.group", "1"),
    ];
    run_config(&base, overrides)
}

/// A model with new adapters, and their values.
fn fresh(config: &Config) -> (Decoder<Cpu>, ModelConfig, Tensors) {
    let mut model = config_of(true, 8);
    let base = model_on(Cpu, &model, &values(&model, 3));
    model.lora = config.lora.adapters(&model).unwrap();
    let tensors = Tensors::initial(&model, 4);
    (base, model, tensors)
}

fn all_bits(tensors: &Tensors) -> Vec<Vec<u32>> {
    let all = [&tensors.values, &tensors.m, &tensors.v];
    all.into_iter().flatten().map(|t| bits(t)).collect()
}

fn batch(step: u64) -> Vec<Vec<u32>> {
    (0..4)
        .map(|i| tokens(10 * step + i, 8 + 5 * i as usize))
        .collect()
}

#[test]
fn training_changes_adapters_alone_lowers_the_loss_and_goes_on_from_a_checkpoint_to_the_same_bits()
{
    let config = settings(&[]);
    let (base, model, tensors) = fresh(&config);
    let start = |tensors: &Tensors, progress| {
        let (model, config) = (model.clone(), config.clone());
        Trainer::adapting(&base, model, config, tensors, progress, Ranks::alone()).unwrap()
    };
    let sequence = tokens(9, 40);
    let before = bits(&score(&base, &sequence, 1).unwrap());
    let mut whole = start(&tensors, None);
    // B is 0 at first, so that nothing is added yet.
    assert_eq!(bits(&score(whole.model(), &sequence, 1).unwrap()), before);
    let mut losses = Vec::new();
    let (root, mut saved) = (tempfile::tempdir().unwrap(), None);
    for step in 0..6 {
        losses.push(whole.step_on(&[batch(0)]).unwrap().loss);
        if step == 2 {
            let data = Fingerprints {
                base: Some("of the weights".into()),
                ..Fingerprints::default()
            };
            let checkpoint = whole.checkpoint(&data, &[]).unwrap();
            let place = checkpoint::save(&mut Disk, root.path(), &checkpoint, 2).unwrap();
            saved = Some((place, checkpoint));
        }
    }
    assert!(losses[5] < losses[0] - 0.1, "{losses:?}");
    assert_eq!(bits(&score(&base, &sequence, 1).unwrap()), before);
    assert_ne!(bits(&score(whole.model(), &sequence, 1).unwrap()), before);
    let (place, checkpoint) = saved.unwrap();
    assert!(!place.join("model.safetensors").exists() && place.join(ADAPTER_FILE).exists());
    let read = checkpoint::load(&place).unwrap();
    assert!(read.tensors == checkpoint.tensors && read.progress == checkpoint.progress);
    assert!(read.data == checkpoint.data && read.config == checkpoint.config);
    assert!(read.model.lora == checkpoint.model.lora);
    let mut again = start(&read.tensors, Some(read.progress));
    for _ in 3..6 {
        again.step_on(&[batch(0)]).unwrap();
    }
    let end = whole.tensors().unwrap();
    assert!(all_bits(&again.tensors().unwrap()) == all_bits(&end));
    // Generation reads what the checkpoint holds, to the bits of the trainer.
    let opened = AdapterFolder::open(&place, &base.config).unwrap();
    let resumed = start(&checkpoint.tensors, Some(checkpoint.progress));
    let (one, two) = (opened.over(&base).unwrap(), resumed.model());
    let scores = [&one, two].map(|model| bits(&score(model, &sequence, 1).unwrap()));
    assert_eq!(scores[0], scores[1]);
}

#[test]
fn adapters_have_the_same_bits_on_any_number_of_ranks() {
    let config = settings(&[("training.batch", "2")]);
    let (base, model, tensors) = fresh(&config);
    let run = |world: usize| {
        let mut all = on_ranks(world, Duration::from_secs(60), |_, mesh| {
            let (model, config, ranks) = (model.clone(), config.clone(), Ranks::new(mesh.unwrap()));
            let trainer = Trainer::adapting(&base, model, config, &tensors, None, ranks);
            let mut trainer = trainer.unwrap();
            let step = |step| {
                let report = trainer.step_on(&[batch(step)]).unwrap();
                [report.loss, report.grad_norm].map(f64::to_bits)
            };
            let reports: Vec<_> = (0..3).map(step).collect();
            (reports, all_bits(&trainer.tensors().unwrap()))
        });
        all.swap_remove(0)
    };
    let one = run(1);
    for world in [2, 3] {
        assert!(run(world) == one, "{world} ranks");
    }
}

#[test]
fn a_trainer_needs_the_weights_that_adapters_are_added_to() {
    let config = settings(&[]);
    let (_, model, tensors) = fresh(&config);
    let error = Trainer::new(Cpu, model, config, &tensors, None).unwrap_err();
    assert!(matches!(error, TrainError::Argument { .. }), "{error}");
}

#[test]
fn keys_that_do_not_go_with_adapters_are_refused_by_name() {
    for (key, value, refused) in [
        ("lora.dropout", "0.1", "lora.dropout"),
        ("lora.modules_to_save", "lm_head", "lora.modules_to_save"),
        ("training.learn_gates", "true", "training.learn_gates"),
        ("training.train_only", "norm", "training.train_only"),
        ("model.folder", "none", "model.folder"),
        ("lora.r", "none", "lora.r"),
    ] {
        let pairs = [
            ("data.train", "x"),
            ("model.folder", "base"),
            ("lora.r", "2"),
            ("lora.alpha", "4.0"),
            (key, value),
        ];
        let pairs = pairs.map(|(k, v)| (k.to_owned(), v.to_owned()));
        match Config::parse("", &pairs).unwrap_err() {
            TrainError::Config { key, .. } => assert_eq!(key, refused),
            other => panic!("{other}"),
        }
    }
    let model = config_of(true, 8);
    for (overrides, refused) in [
        ([("lora.r", "0")], "lora.r"),
        ([("lora.alpha", "0.0")], "lora.alpha"),
        ([("lora.targets", "q_proj,embed_tokens")], "lora.targets"),
    ] {
        match settings(&overrides).lora.adapters(&model).unwrap_err() {
            TrainError::Config { key, .. } => assert_eq!(key, refused),
            other => panic!("{other}"),
        }
    }
}

#[test]
fn frozen_weights_are_counted_once() {
    let mut config = config_of(true, 8);
    let run = Use::Train {
        tbptt: 1,
        segments_per_step: 1,
        recompute: true,
        gradient_sets: 1,
        ranks: 1,
        behind: 0,
    };
    let base: usize = base_specs(&config).iter().map(|s| s.role.len()).sum();
    let whole = memory(&config, 64, run, 4).weights;
    config.lora = Some(lora(&config, 2, TARGETS[1]));
    let all: usize = specs(&config).iter().map(|s| s.role.len()).sum();
    let adapters = memory(&config, 64, run, 4).weights;
    // Two prepared forms, values, gradient and moments of each adapter.
    assert_eq!(adapters, 4 * (base + 6 * (all - base)) as u64);
    assert!(adapters < whole);
}

/// Needs Python with PEFT: `SEGATTN_PYTHON`, or `python3`. Without, the test says so and passes, unless
/// `SEGATTN_REQUIRE_TORCH` is set.
#[test]
fn peft_loads_what_training_wrote() {
    let python = std::env::var("SEGATTN_PYTHON").unwrap_or("python3".to_owned());
    let run = |args: &[String]| Command::new(&python).args(args).output();
    let is_there = run(&["-c".to_owned(), "import torch, peft".to_owned()]);
    if !is_there.is_ok_and(|output| output.status.success()) {
        let required = std::env::var_os("SEGATTN_REQUIRE_TORCH").is_some();
        assert!(!required, "{python} has no PEFT");
        eprintln!("{python} has no PEFT: not tested");
        return;
    }
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/lora/load.py");
    let (mut args, mut written) = (vec![script.to_owned()], Vec::new());
    for name in GOLDEN {
        let (folder, sequence) = (&folders(name)[0], Expected::of(name).tokens());
        let config = settings(&[("lora.targets", "all-linear"), ("lora.alpha", "5.0")]);
        let (base, mut model) = (base(Cpu, folder), ModelConfig::load(folder).unwrap());
        model.lora = config.lora.adapters(&model).unwrap();
        let tensors = Tensors::initial(&model, 4);
        let trainer = Trainer::adapting(&base, model, config, &tensors, None, Ranks::alone());
        let mut trainer = trainer.unwrap();
        for _ in 0..2 {
            trainer.step_on(&[vec![sequence.clone()]]).unwrap();
        }
        let saved = trainer.checkpoint(&Fingerprints::default(), &[]).unwrap();
        let root = tempfile::tempdir().unwrap();
        let place = checkpoint::save(&mut Disk, root.path(), &saved, 2).unwrap();
        let scored = score(trainer.model(), &sequence, 1).unwrap();
        let ids: Vec<String> = sequence.iter().map(u32::to_string).collect();
        args.extend([folder, &place].map(|p| p.to_str().unwrap().to_owned()));
        args.push(ids.join(","));
        written.push((root, scored));
    }
    let output = run(&args).unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    let printed = String::from_utf8(output.stdout).unwrap();
    assert_eq!(printed.lines().count(), written.len(), "{printed}");
    for (line, (_root, ours)) in printed.lines().zip(&written) {
        let theirs: Vec<f64> = serde_json::from_str(line).unwrap();
        let ours: Vec<f64> = ours.iter().map(|x| f64::from(*x)).collect();
        let error = largest(&ours, &theirs);
        assert!(error <= ERRORS[0], "{error}");
    }
}
