//! Every family and switch against Transformers: tiny random models, whose log-probabilities and gradients
//! `tests/golden/families/make.py` writes. The same models with segments: equal bits (docs/contract.md, section 4).

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::pieces::in_pieces;
use safetensors::SafeTensors;
use segattn::device::Device;
use segattn::device::cpu::Cpu;
use segattn::device::reference::Reference;
use segattn::model::config::ModelConfig;
use segattn::model::decoder::Decoder;
use segattn::model::parameters::{Role, specs};
use segattn::model::session::score;
use segattn::model::weights::{Checkpoint, SaveOptions, save};
use segattn::train::checkpoint;
use segattn::train::config::Config;
use segattn::train::data::Position;
use segattn::train::guard::{Guard, GuardConfig};
use segattn::train::progress::{Progress, Tensors};
use segattn::train::streams::{Gradients, StreamConfig, accumulate};
use serde_json::{Value, json};

/// Largest error of a log-probability, and of a gradient relative to the largest of its tensor.
const ERRORS: [f64; 2] = [2e-4, 1e-3];

fn golden() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/families");
    let entries = std::fs::read_dir(root).unwrap().map(|e| e.unwrap().path());
    let mut folders: Vec<PathBuf> = entries.filter(|path| path.is_dir()).collect();
    folders.sort();
    assert!(folders.len() >= 16, "{folders:?}");
    folders
}

/// A tensor of numbers or of ids.
fn numbers(file: &SafeTensors<'_>, name: &str) -> Vec<f64> {
    let tensor = file.tensor(name).unwrap();
    let bytes = tensor.data();
    match tensor.dtype() {
        safetensors::Dtype::F64 => (bytes.chunks(8))
            .map(|b| f64::from_le_bytes(b.try_into().unwrap()))
            .collect(),
        safetensors::Dtype::F32 => (bytes.chunks(4))
            .map(|b| f64::from(f32::from_le_bytes(b.try_into().unwrap())))
            .collect(),
        safetensors::Dtype::I64 => (bytes.chunks(8))
            .map(|b| i64::from_le_bytes(b.try_into().unwrap()) as f64)
            .collect(),
        other => panic!("{name}: {other:?}"),
    }
}

fn tokens(file: &SafeTensors<'_>) -> Vec<u32> {
    numbers(file, "tokens").iter().map(|t| *t as u32).collect()
}

/// The largest magnitude; NaN where there is one.
fn largest(values: &[f64]) -> f64 {
    let larger = |a: f64, x: &f64| match x.abs() > a || x.is_nan() {
        true => x.abs(),
        false => a,
    };
    values.iter().fold(0.0, larger)
}

/// The model of a folder, with this `segment` object.
fn load<D: Device>(device: D, folder: &Path, segment: Option<&Value>) -> Decoder<D> {
    let text = std::fs::read_to_string(folder.join("config.json")).unwrap();
    let mut json: Value = serde_json::from_str(&text).unwrap();
    if let Some(segment) = segment {
        json["segment"] = segment.clone();
    }
    let config = ModelConfig::from_json(json).unwrap_or_else(|e| panic!("{folder:?}: {e}"));
    let checkpoint = Checkpoint::open(folder).unwrap();
    checkpoint.load(device, config, true).unwrap()
}

const STREAMS: StreamConfig = StreamConfig {
    tbptt: 1,
    segments_per_step: 2,
    recompute: false,
};

/// Log-probabilities, and the gradients of their negative sum under the names of files.
fn gradients<D: Device>(
    model: &Decoder<D>,
    tokens: &[u32],
    streams: StreamConfig,
) -> (Vec<f64>, Vec<(String, Vec<f64>)>) {
    let mut gradients = Gradients::new(model).unwrap();
    let scored = accumulate(model, &[tokens.to_vec()], streams, 1.0, &mut gradients).unwrap();
    let mut named = Vec::new();
    let buffers = gradients.finish(&model.device).unwrap();
    for (spec, buffer) in model.specs.iter().zip(buffers) {
        let mut values = model.device.read(buffer, 0..spec.role.len()).unwrap();
        spec.for_file(&mut values);
        let mut rest = values.as_slice();
        for (name, shape) in &spec.parts {
            let (part, more) = rest.split_at(shape.iter().product());
            named.push((name.clone(), part.iter().map(|x| f64::from(*x)).collect()));
            rest = more;
        }
    }
    (scored.concat(), named)
}

fn agrees_with_transformers<D: Device + Copy>(device: D) {
    let mut wrong = Vec::new();
    for folder in golden() {
        let family = folder.file_name().unwrap().to_string_lossy().into_owned();
        let bytes = std::fs::read(folder.join("expected.safetensors")).unwrap();
        let expected = SafeTensors::deserialize(&bytes).unwrap();
        let model = load(device, &folder, None);
        let (scored, named) = gradients(&model, &tokens(&expected), STREAMS);
        let scores = numbers(&expected, "log_probabilities");
        assert_eq!(scored.len(), scores.len(), "{family}");
        let mut check = |what: &str, got: &[f64], expected: &[f64], bound: f64| {
            assert_eq!(got.len(), expected.len(), "{family}: {what}");
            let errors: Vec<f64> = got.iter().zip(expected).map(|(a, b)| a - b).collect();
            let error = largest(&errors);
            if error > bound || error.is_nan() {
                wrong.push(format!(
                    "{family}: {what} is off by {error:.2e}, allowed {bound:.2e}"
                ));
            }
        };
        check("log-probability", &scored, &scores, ERRORS[0]);
        let mut compared = 0;
        for (name, gradient) in &named {
            if name.ends_with("past_gate") {
                continue;
            }
            let wanted = numbers(&expected, &format!("grad.{name}"));
            assert!(largest(&wanted) > 0.0, "{family}: {name} does not matter");
            check(name, gradient, &wanted, ERRORS[1] * largest(&wanted));
            compared += 1;
        }
        assert_eq!(
            compared + 2,
            expected.names().len(),
            "{family}: all gradients"
        );
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn log_probabilities_and_gradients_are_those_of_transformers_in_f64() {
    agrees_with_transformers(Reference);
}

#[test]
fn log_probabilities_and_gradients_are_those_of_transformers_on_the_cpu() {
    agrees_with_transformers(Cpu);
}

/// Segments of 8 tokens; every head reads something else.
fn segment(folder: &Path) -> Value {
    let text = std::fs::read_to_string(folder.join("config.json")).unwrap();
    let config = ModelConfig::from_json(serde_json::from_str(&text).unwrap()).unwrap();
    let reads = [json!(["prior", "past"]), json!(["past"]), json!(["prior"])];
    let layer = |l: usize| -> Value {
        let heads = 0..config.num_key_value_heads;
        heads.map(|h| reads[(l + h) % 3].clone()).collect()
    };
    let layers: Value = (0..config.num_hidden_layers).map(layer).collect();
    json!({
        "segment_len": 8, "prior_len": 4, "past_len": 4, "sink_len": 1, "head_reads": layers,
        "retrieval": {"queries": 3, "window_len": 2},
    })
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

fn equal_bits<D: Device + Copy>(device: D) {
    for folder in golden() {
        let bytes = std::fs::read(folder.join("expected.safetensors")).unwrap();
        let tokens = tokens(&SafeTensors::deserialize(&bytes).unwrap());
        let model = load(device, &folder, Some(&segment(&folder)));
        let expected = score(&model, &tokens, 1).unwrap();
        assert!(expected.iter().all(|x| x.is_finite()), "{folder:?}");
        assert_eq!(
            bits(&score(&model, &tokens, 3).unwrap()),
            bits(&expected),
            "{folder:?}"
        );
        assert_eq!(
            bits(&in_pieces(&model, &tokens)),
            bits(&expected),
            "{folder:?}"
        );
        let (scored, first) = gradients(&model, &tokens, STREAMS);
        let scored: Vec<f32> = scored.iter().map(|x| *x as f32).collect();
        assert_eq!(bits(&scored), bits(&expected), "{folder:?}, training");
        let other = StreamConfig {
            segments_per_step: usize::MAX,
            recompute: true,
            ..STREAMS
        };
        assert!(
            gradients(&model, &tokens, other).1 == first,
            "{folder:?}, gradients"
        );
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
fn a_folder_is_written_as_it_was_read() {
    for folder in golden() {
        let config = ModelConfig::load(&folder).unwrap();
        assert_eq!(config.ignored_keys(), Vec::<&str>::new(), "{folder:?}");
        let checkpoint = Checkpoint::open(&folder).unwrap();
        let (out, specs) = (tempfile::tempdir().unwrap(), specs(&config));
        let values = |i: usize| checkpoint.read(&specs[i]);
        let options = SaveOptions::new(config.dtype.unwrap());
        save(out.path(), &config, values, options).unwrap();
        let written = Checkpoint::open(out.path()).unwrap();
        assert_eq!(
            written.fingerprint().unwrap(),
            checkpoint.fingerprint().unwrap(),
            "{folder:?}"
        );
        let read = |folder: &Path| -> Value {
            serde_json::from_slice(&std::fs::read(folder.join("config.json")).unwrap()).unwrap()
        };
        let (before, after) = (read(&folder), read(out.path()));
        for (key, value) in before.as_object().unwrap() {
            assert_eq!(after[key], *value, "{folder:?}: {key}");
        }
    }
}

/// A checkpoint of the model after a step against its gradient, as training writes it.
fn trained(folder: &Path, tokens: &[u32]) -> (tempfile::TempDir, PathBuf, Tensors) {
    let model = load(Cpu, folder, None);
    let mut gradients = Gradients::new(&model).unwrap();
    accumulate(&model, &[tokens.to_vec()], STREAMS, 1e-3, &mut gradients).unwrap();
    let checkpoint = Checkpoint::open(folder).unwrap();
    let mut tensors = Tensors::initial(&model.config, 0);
    let steps = gradients.finish(&model.device).unwrap();
    for (i, (spec, step)) in model.specs.iter().zip(steps).enumerate() {
        let step = model.device.read(step, 0..spec.role.len()).unwrap();
        tensors.values[i] = checkpoint.read(spec).unwrap();
        tensors.m[i].copy_from_slice(&step);
        // Gates that no head uses have no place in a file.
        if !matches!(spec.role, Role::Gate { .. }) {
            let values = tensors.values[i].iter_mut().zip(&step);
            values.for_each(|(value, step)| *value -= step);
        }
    }
    let train = [("data.train".to_owned(), "x".to_owned())];
    let saved = checkpoint::Checkpoint {
        config: Config::parse("", &train).unwrap(),
        model: model.config.clone(),
        tensors: tensors.clone(),
        progress: Progress {
            step: 1,
            updates: 1,
            tokens: tokens.len() as u64,
            position: Position::default(),
            guard: Guard::new(GuardConfig::default()).unwrap(),
        },
        data: checkpoint::Fingerprints {
            train: String::new(),
            validation: String::new(),
            base: None,
            teacher: None,
        },
        extra: Vec::new(),
    };
    let root = tempfile::tempdir().unwrap();
    let place = checkpoint::save(&mut checkpoint::Disk, root.path(), &saved, 2).unwrap();
    (root, place, tensors)
}

#[test]
fn a_checkpoint_of_training_holds_the_same_values() {
    for folder in golden() {
        let (_root, place, tensors) = trained(&folder, &[3, 1, 4, 1, 5, 9, 2, 6]);
        let again = checkpoint::load(&place).unwrap();
        assert!(again.tensors == tensors, "{folder:?}");
        let config = ModelConfig::load(&place).unwrap();
        let weights = Checkpoint::open(&place).unwrap();
        for (spec, values) in specs(&config).iter().zip(&tensors.values) {
            assert!(
                weights.read(spec).unwrap() == *values,
                "{folder:?}: {spec:?}"
            );
        }
    }
}

/// Needs Python with Transformers: `SEGATTN_PYTHON`, or `python3`. Without, the test says so and passes, unless
/// `SEGATTN_REQUIRE_TORCH` is set.
#[test]
fn transformers_loads_what_training_wrote() {
    let python = std::env::var("SEGATTN_PYTHON").unwrap_or("python3".to_owned());
    let run = |args: &[String]| Command::new(&python).args(args).output();
    let is_there = run(&["-c".to_owned(), "import torch, transformers".to_owned()]);
    if !is_there.is_ok_and(|output| output.status.success()) {
        let required = std::env::var_os("SEGATTN_REQUIRE_TORCH").is_some();
        assert!(!required, "{python} has no Transformers");
        eprintln!("{python} has no Transformers: not tested");
        return;
    }
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/families/load.py");
    let (mut args, mut written) = (vec![script.to_owned()], Vec::new());
    for folder in golden() {
        let bytes = std::fs::read(folder.join("expected.safetensors")).unwrap();
        let tokens = tokens(&SafeTensors::deserialize(&bytes).unwrap());
        let (root, place, _) = trained(&folder, &tokens);
        let ids: Vec<String> = tokens.iter().map(u32::to_string).collect();
        args.extend([place.to_str().unwrap().to_owned(), ids.join(",")]);
        written.push((root, place, tokens));
    }
    let output = run(&args).unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    let printed = String::from_utf8(output.stdout).unwrap();
    assert_eq!(printed.lines().count(), written.len(), "{printed}");
    for (line, (_root, place, tokens)) in printed.lines().zip(&written) {
        let theirs: Vec<f64> = serde_json::from_str(line).unwrap();
        let model = load(Reference, place, None);
        let (ours, family) = (score(&model, tokens, 1).unwrap(), model.config.family);
        assert_eq!(ours.len(), theirs.len());
        for (ours, theirs) in ours.iter().zip(&theirs) {
            let error = (f64::from(*ours) - theirs).abs();
            assert!(error <= ERRORS[0], "{family:?}: {ours}, {theirs}");
        }
    }
}

#[test]
fn values_of_parts_survive_the_order_of_heads() {
    let folder = golden().into_iter().find(|f| f.ends_with("phi3")).unwrap();
    let config = ModelConfig::load(&folder).unwrap();
    let spec = specs(&config)
        .into_iter()
        .find(|s| s.heads.is_some())
        .unwrap();
    let before: Vec<f32> = (0..spec.role.len()).map(|i| i as f32).collect();
    let mut values = before.clone();
    spec.keep(&mut values);
    assert!(values != before);
    spec.for_file(&mut values);
    assert!(values == before);
}
