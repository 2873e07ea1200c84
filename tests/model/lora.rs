//! Adapters (docs/contract.md, section 2): against PEFT, equal bits, shared weights, files that are refused.

use crate::adapters::{ERRORS, Expected, GOLDEN, TARGETS, base, bits, folders, largest, lora};
use crate::common::{config_of, model_on, switched, tokens, values};
use crate::pieces::in_pieces;
use segattn::convert::merge::merge;
use segattn::device::Device;
use segattn::device::cpu::Cpu;
use segattn::device::reference::Reference;
use segattn::model::config::{ModelConfig, WeightType};
use segattn::model::decoder::Decoder;
use segattn::model::lora::folder::{ADAPTER_CONFIG_FILE, ADAPTER_FILE, AdapterFolder};
use segattn::model::lora::{AdapterError, Lora, LoraConfig};
use segattn::model::parameters::base_specs;
use segattn::model::session::score;
use segattn::model::weights::Checkpoint;
use segattn::train::streams::{Gradients, StreamConfig, accumulate};
use serde_json::{Value, json};

const STREAMS: StreamConfig = StreamConfig {
    tbptt: 1,
    segments_per_step: 2,
    recompute: false,
};

fn with_adapters<D: Device + Clone>(device: D, name: &str) -> Decoder<D> {
    let [model, adapters] = folders(name);
    let base = base(device, &model);
    let adapters = AdapterFolder::open(&adapters, &base.config).unwrap();
    adapters.over(&base).unwrap()
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
