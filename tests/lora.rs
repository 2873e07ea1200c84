//! Adapters (docs/contract.md, section 2): against PEFT, equal bits, shared weights, training and its checkpoints.
//! `tests/golden/lora/make.py` writes what is compared.

#[allow(dead_code, reason = "each test uses a part")]
mod common;
mod meeting;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use common::{config_of, model_on, switched, tokens, values};
use meeting::on_ranks;
use safetensors::SafeTensors;
use segattn::convert::merge::merge;
use segattn::device::Device;
use segattn::device::cpu::Cpu;
use segattn::device::reference::Reference;
use segattn::model::config::{ModelConfig, WeightType};
use segattn::model::decoder::Decoder;
use segattn::model::lora::folder::{ADAPTER_CONFIG_FILE, ADAPTER_FILE, AdapterFolder};
use segattn::model::lora::{AdapterError, Lora, LoraConfig};
use segattn::model::memory::{Use, memory};
use segattn::model::parameters::{base_specs, specs};
use segattn::model::session::{Feed, Session, score};
use segattn::model::weights::Checkpoint;
use segattn::ranks::Ranks;
use segattn::train::TrainError;
use segattn::train::checkpoint::{self, Disk, Fingerprints};
use segattn::train::config::Config;
use segattn::train::progress::Tensors;
use segattn::train::streams::{Gradients, StreamConfig, accumulate};
use segattn::train::trainer::Trainer;
use serde_json::{Value, json};

const GOLDEN: [&str; 5] = ["granite", "llama_bias", "olmo2", "phi3", "qwen3"];
/// Largest error of a log-probability, and of a gradient relative to the largest of its tensor.
const ERRORS: [f64; 2] = [2e-4, 1e-3];
const STREAMS: StreamConfig = StreamConfig {
    tbptt: 1,
    segments_per_step: 2,
    recompute: false,
};

/// The folders of a model and of its adapters.
fn folders(name: &str) -> [PathBuf; 2] {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    ["families", "lora"].map(|kind| golden.join(kind).join(name))
}

fn base<D: Device>(device: D, folder: &Path) -> Decoder<D> {
    segattn::model::weights::load(device, folder, false).unwrap()
}

fn with_adapters<D: Device + Clone>(device: D, name: &str) -> Decoder<D> {
    let [model, adapters] = folders(name);
    let base = base(device, &model);
    let adapters = AdapterFolder::open(&adapters, &base.config).unwrap();
    adapters.over(&base).unwrap()
}

struct Expected(Vec<u8>);

impl Expected {
    fn of(name: &str) -> Self {
        Self(std::fs::read(folders(name)[1].join("expected.safetensors")).unwrap())
    }

    fn numbers(&self, name: &str) -> Vec<f64> {
        let file = SafeTensors::deserialize(&self.0).unwrap();
        let tensor = file.tensor(name).unwrap();
        let (bytes, wide) = (tensor.data(), tensor.dtype() == safetensors::Dtype::F32);
        match tensor.dtype() {
            _ if wide => (bytes.as_chunks().0.iter())
                .map(|b| f64::from(f32::from_le_bytes(*b)))
                .collect(),
            safetensors::Dtype::I64 => (bytes.as_chunks().0.iter())
                .map(|b| i64::from_le_bytes(*b) as f64)
                .collect(),
            _ => (bytes.as_chunks().0.iter())
                .map(|b| f64::from_le_bytes(*b))
                .collect(),
        }
    }

    fn tokens(&self) -> Vec<u32> {
        self.numbers("tokens").iter().map(|t| *t as u32).collect()
    }
}

/// The largest difference; NaN where there is one.
fn largest(got: &[f64], expected: &[f64]) -> f64 {
    assert_eq!(got.len(), expected.len());
    let errors = got.iter().zip(expected).map(|(a, b)| (a - b).abs());
    errors.fold(0.0, |a, x| if x > a || x.is_nan() { x } else { a })
}

fn agrees_with_peft<D: Device + Copy>(device: D) {
    for name in GOLDEN {
        let (model, expected) = (with_adapters(device, name), Expected::of(name));
        let mut gradients = Gradients::new(&model).unwrap();
        let sequence = [expected.tokens()];
        let scored = accumulate(&model, &sequence, STREAMS, 1.0, &mut gradients).unwrap();
        let error = largest(&scored.concat(), &expected.numbers("log_probabilities"));
        assert!(error <= ERRORS[0], "{name}: {error}");
        let plain = score(&base(device, &folders(name)[0]), &sequence[0], 1).unwrap();
        let plain: Vec<f64> = plain.iter().map(|x| f64::from(*x)).collect();
        assert!(
            largest(&plain, &scored.concat()) > 0.1,
            "{name}: nothing is added"
        );
        let first = base_specs(&model.config).len();
        let buffers = gradients.finish(&device).unwrap();
        assert!(
            buffers[..first].iter().all(|b| device.len(b) == 0),
            "{name}"
        );
        assert!(model.specs.len() > first);
        for (spec, buffer) in model.specs.iter().zip(buffers).skip(first) {
            let mut got = device.read(buffer, 0..spec.role.len()).unwrap();
            spec.for_file(&mut got);
            let got: Vec<f64> = got.iter().map(|x| f64::from(*x)).collect();
            let wanted = expected.numbers(&format!("grad.{}", spec.parts[0].0));
            let scale = largest(&wanted, &vec![0.0; wanted.len()]);
            let error = largest(&got, &wanted);
            assert!(
                scale > 0.0 && error <= ERRORS[1] * scale,
                "{name}, {spec:?}: {error} of {scale}"
            );
        }
    }
}

#[test]
fn log_probabilities_and_gradients_are_those_of_peft_in_f64() {
    agrees_with_peft(Reference);
}

#[test]
fn log_probabilities_and_gradients_are_those_of_peft_on_the_cpu() {
    agrees_with_peft(Cpu);
}

#[test]
fn merged_weights_are_the_model_with_its_adapters() {
    for name in GOLDEN {
        let ([model, adapters], expected) = (folders(name), Expected::of(name));
        let config = ModelConfig::load(&model).unwrap();
        let adapters = AdapterFolder::open(&adapters, &config).unwrap();
        let out = tempfile::tempdir().unwrap();
        merge(&model, &adapters, out.path(), &config, WeightType::F32).unwrap();
        let merged = base(Reference, out.path());
        let scored = score(&merged, &expected.tokens(), 1).unwrap();
        let scored: Vec<f64> = scored.iter().map(|x| f64::from(*x)).collect();
        let error = largest(&scored, &expected.numbers("log_probabilities"));
        assert!(error <= ERRORS[0], "{name}: {error}");
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

fn lora(config: &ModelConfig, rank: usize, targets: &[&str]) -> Lora {
    let settings = LoraConfig {
        rank,
        alpha: 3.0,
        rslora: rank == 3,
        targets: targets.iter().map(|t| (*t).to_owned()).collect(),
    };
    Lora::new(config, settings).unwrap()
}

/// Adapters over some projections of every product, and over all of them.
const TARGETS: [&[&str]; 2] = [
    &["k_proj", "0.self_attn.o_proj", "up_proj", "down_proj"],
    &["all-linear"],
];

/// Log-probabilities, fed in pieces of 1, 2, ... tokens.
fn in_pieces<D: Device>(model: &Decoder<D>, tokens: &[u32]) -> Vec<f32> {
    let mut session = Session::new(model, 1, tokens.len(), 1).unwrap();
    let (mut scored, mut at) = (Vec::new(), 0);
    for step in 1.. {
        let end = (at + step).min(tokens.len() - 1);
        let feed = Feed {
            sequence: 0,
            tokens: &tokens[at..end],
            targets: &tokens[at + 1..=end],
            breaks: &[],
        };
        scored.extend(session.feed(&[feed]).unwrap().remove(0));
        at = end;
        if at + 1 == tokens.len() {
            break;
        }
    }
    scored
}

fn equal_bits<D: Device + Copy>(device: D) {
    for (i, targets) in TARGETS.iter().enumerate() {
        for mut config in [config_of(true, 8), switched(i == 0)] {
            config.lora = Some(lora(&config, 2 + i, targets));
            let model = model_on(device, &config, &values(&config, 5));
            let tokens = tokens(6, 40);
            let expected = score(&model, &tokens, 1).unwrap();
            assert_eq!(bits(&score(&model, &tokens, 3).unwrap()), bits(&expected));
            assert_eq!(bits(&in_pieces(&model, &tokens)), bits(&expected));
            let mut all = Vec::new();
            for (segments_per_step, recompute) in [(1, false), (2, true), (usize::MAX, false)] {
                let streams = StreamConfig {
                    tbptt: 2,
                    segments_per_step,
                    recompute,
                };
                let mut gradients = Gradients::new(&model).unwrap();
                let sequence = [tokens.clone()];
                let scored = accumulate(&model, &sequence, streams, 1.0, &mut gradients).unwrap();
                let scored: Vec<f32> = scored[0].iter().map(|x| *x as f32).collect();
                assert_eq!(bits(&scored), bits(&expected), "training");
                let buffers = gradients.finish(&device).unwrap().iter();
                let read = |b| device.read(b, 0..device.len(b)).unwrap();
                all.push(buffers.map(read).collect::<Vec<_>>());
            }
            assert!(all.iter().all(|gradients| *gradients == all[0]));
        }
    }
}

#[test]
fn training_scoring_and_decoding_agree_to_the_bit_in_f64() {
    equal_bits(Reference);
}

#[test]
fn training_scoring_and_decoding_agree_to_the_bit_on_the_cpu() {
    equal_bits(Cpu);
}

#[test]
fn models_with_several_adapters_share_the_weights_and_each_has_the_bits_of_one_alone() {
    let config = config_of(true, 8);
    let base_values = values(&config, 7);
    let (base, sequence) = (model_on(Cpu, &config, &base_values), tokens(8, 30));
    let plain = score(&base, &sequence, 1).unwrap();
    let adapted = |seed: u64| {
        let lora = lora(&config, 3, TARGETS[0]);
        let with = ModelConfig {
            lora: Some(lora.clone()),
            ..config.clone()
        };
        let mut all = base_values.clone();
        all.extend(values(&with, seed).split_off(base_values.len()));
        let alone = model_on(Cpu, &with, &all);
        let upload = |i: usize| {
            let values: Vec<f32> = all[i].iter().map(|x| *x as f32).collect();
            let mut buffer = Cpu.empty(segattn::device::Kind::Exact, values.len())?;
            Cpu.write(&mut buffer, 0, &values)?;
            Ok::<_, segattn::device::DeviceError>(buffer)
        };
        (base.with_adapters(Some(lora), upload).unwrap(), alone)
    };
    let (first, second) = (adapted(1), adapted(2));
    let mut scores = Vec::new();
    // Side by side, in turns, over one set of weights.
    for (shared, alone) in [&first, &second, &first] {
        let got = score(shared, &sequence, 1).unwrap();
        assert_eq!(bits(&got), bits(&score(alone, &sequence, 1).unwrap()));
        scores.push(bits(&got));
    }
    assert!(scores[0] == scores[2] && scores[0] != scores[1] && scores[0] != bits(&plain));
    let none = |_: usize| -> Result<_, segattn::device::DeviceError> { unreachable!() };
    let without = first.0.with_adapters(None, none).unwrap();
    assert_eq!(bits(&score(&without, &sequence, 1).unwrap()), bits(&plain));
}

/// The adapter of `qwen3` with these keys instead of its own.
fn changed(keys: &[(&str, Value)]) -> AdapterError {
    let ([model, adapters], folder) = (folders("qwen3"), tempfile::tempdir().unwrap());
    let text = std::fs::read(adapters.join(ADAPTER_CONFIG_FILE)).unwrap();
    let mut json: Value = serde_json::from_slice(&text).unwrap();
    for (key, value) in keys {
        json[*key] = value.clone();
    }
    std::fs::write(folder.path().join(ADAPTER_CONFIG_FILE), json.to_string()).unwrap();
    std::fs::copy(
        adapters.join(ADAPTER_FILE),
        folder.path().join(ADAPTER_FILE),
    )
    .unwrap();
    let config = ModelConfig::load(&model).unwrap();
    AdapterFolder::open(folder.path(), &config).unwrap_err()
}

#[test]
fn what_is_not_computed_is_refused_by_name() {
    for (key, value) in [
        ("use_dora", json!(true)),
        ("bias", json!("lora_only")),
        ("lora_bias", json!(true)),
        ("modules_to_save", json!(["lm_head"])),
        ("rank_pattern", json!({"q_proj": 8})),
        ("alpha_pattern", json!({"q_proj": 8})),
        ("fan_in_fan_out", json!(true)),
        ("layer_replication", json!([[0, 1]])),
        ("init_lora_weights", json!("pissa")),
        ("trainable_token_indices", json!([1])),
        ("peft_type", json!("IA3")),
        ("task_type", json!("SEQ_CLS")),
        ("a_key_of_next_year", json!(1)),
        ("r", json!(0)),
        ("r", json!("4")),
        ("lora_alpha", json!(-1)),
        ("use_rslora", json!("yes")),
    ] {
        let error = changed(&[(key, value.clone())]);
        let said = error.to_string();
        assert!(matches!(error, AdapterError::Key { .. }), "{said}");
        assert!(said.contains(&format!("`{key}`")), "{said}");
    }
    // Another rank than that of the tensors.
    let said = changed(&[("r", json!(8))]).to_string();
    assert!(
        said.contains("lora_A.weight") && said.contains("[8, 16]"),
        "{said}"
    );
}

#[test]
fn adapters_of_another_model_and_other_files_are_refused_by_name() {
    let open = |adapters: &str, model: &str| {
        let config = ModelConfig::load(&folders(model)[0]).unwrap();
        AdapterFolder::open(&folders(adapters)[1], &config).unwrap_err()
    };
    let said = open("phi3", "qwen3").to_string();
    assert!(
        said.contains("unexpected") && said.contains("qkv_proj.lora_A.weight"),
        "{said}"
    );
    assert!(
        open("olmo2", "qwen3")
            .to_string()
            .contains("expected shape")
    );
    let ([model, adapters], folder) = (folders("qwen3"), tempfile::tempdir().unwrap());
    let config = ModelConfig::load(&model).unwrap();
    let to = folder.path().join(ADAPTER_CONFIG_FILE);
    std::fs::copy(adapters.join(ADAPTER_CONFIG_FILE), to).unwrap();
    std::fs::write(folder.path().join("adapter_model.bin"), b"x").unwrap();
    let said = AdapterFolder::open(folder.path(), &config)
        .unwrap_err()
        .to_string();
    assert!(
        said.contains("adapter_model.bin") && said.contains("save_pretrained"),
        "{said}"
    );
    let error = Lora::new(
        &config,
        LoraConfig {
            rank: 1,
            alpha: 1.0,
            rslora: false,
            targets: vec!["q_proj".into(), "lm_head".into()],
        },
    );
    let said = error.unwrap_err().to_string();
    assert!(
        said.contains("\"lm_head\"") && said.contains("down_proj"),
        "{said}"
    );
}

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
    let all = base.iter().chain(overrides);
    let all: Vec<_> = all
        .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
        .collect();
    Config::parse("", &all).unwrap()
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

#[test]
fn the_base_model_of_adapters_is_checked_by_its_content() {
    let fingerprint = |name: &str| {
        Checkpoint::open(&folders(name)[0])
            .unwrap()
            .fingerprint()
            .unwrap()
    };
    assert_ne!(fingerprint("qwen3"), fingerprint("qwen3_bias"));
    let of = |name: &str| {
        let config = ModelConfig::load(&folders(name)[0]).unwrap();
        AdapterFolder::open(&folders(name)[1], &config)
            .unwrap()
            .fingerprint()
            .unwrap()
    };
    assert_ne!(of("qwen3"), of("olmo2"));
}
