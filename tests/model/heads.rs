//! Heads of a width that devices have no kernels for. They are kept longer, with zeros behind their elements, and
//! compute what the f64 reference computes with heads of that width. Files have the width that they had.

use crate::common::{config_of, model_on, tokens, values};
use segattn::device::Device;
use segattn::device::cpu::Cpu;
use segattn::device::reference::Reference;
use segattn::model::config::ModelConfig;
use segattn::model::decoder::Decoder;
use segattn::model::lora::{Lora, LoraConfig};
use segattn::model::parameters::specs;
use segattn::model::session::score;
use segattn::model::weights::Checkpoint;
use segattn::train::checkpoint::{self, Disk, Fingerprints};
use segattn::train::config::Config;
use segattn::train::progress::Tensors;
use segattn::train::streams::{Gradients, StreamConfig, accumulate};
use segattn::train::trainer::Trainer;

const WIDTH: usize = 36;
const STREAMS: StreamConfig = StreamConfig {
    tbptt: 2,
    segments_per_step: 2,
    recompute: false,
};

/// A model whose heads are kept longer, with biases or without.
fn longer(biased: bool) -> ModelConfig {
    let mut json = config_of(!biased, WIDTH).to_json();
    json["attention_bias"] = biased.into();
    let config = ModelConfig::from_json(json).unwrap();
    assert_eq!((config.head_dim, config.file_head_dim), (64, WIDTH));
    config
}

/// The same model with heads of their own width, which the reference computes with.
fn as_in_files(config: &ModelConfig) -> ModelConfig {
    let mut config = config.clone();
    config.head_dim = WIDTH;
    if config.switches.rotary_dim == Some(WIDTH) {
        config.switches.rotary_dim = None;
        config.switches.attention_scale = None;
    }
    config
}

fn with_adapters(mut config: ModelConfig) -> ModelConfig {
    let settings = LoraConfig {
        rank: 1,
        alpha: 3.0,
        rslora: false,
        targets: vec!["all-linear".into()],
    };
    config.lora = Some(Lora::new(&config, settings).unwrap());
    config
}

/// Values of `plain` as those of `longer`.
fn kept(plain: &ModelConfig, longer: &ModelConfig, values: &[Vec<f64>]) -> Vec<Vec<f64>> {
    let specs = specs(plain).into_iter().zip(specs(longer));
    let pairs = specs.zip(values).map(|((plain, longer), values)| {
        let mut values: Vec<f32> = values.iter().map(|x| *x as f32).collect();
        plain.for_file(&mut values);
        longer.keep(&mut values);
        assert_eq!(values.len(), longer.role.len());
        values.into_iter().map(f64::from).collect()
    });
    pairs.collect()
}

/// Log-probabilities, and gradients as files would have them.
fn gradients<D: Device>(model: &Decoder<D>, tokens: &[u32]) -> (Vec<f64>, Vec<Vec<f64>>) {
    let mut gradients = Gradients::new(model).unwrap();
    let sequence = [tokens.to_vec()];
    let scored = accumulate(model, &sequence, STREAMS, 1.0, &mut gradients).unwrap();
    let buffers = gradients.finish(&model.device).unwrap().iter();
    let in_files = model.specs.iter().zip(buffers).map(|(spec, buffer)| {
        let len = model.device.len(buffer);
        let mut values = model.device.read(buffer, 0..len).unwrap();
        if len > 0 {
            spec.for_file(&mut values);
        }
        values.into_iter().map(f64::from).collect()
    });
    (scored.concat(), in_files.collect())
}

/// The largest difference; NaN where there is one.
fn largest(got: &[f64], expected: &[f64]) -> f64 {
    assert_eq!(got.len(), expected.len());
    let errors = got.iter().zip(expected).map(|(a, b)| (a - b).abs());
    errors.fold(0.0, |a, x| if x > a || x.is_nan() { x } else { a })
}

/// `bounds`: of a log-probability, and of a gradient relative to the largest of its tensor.
fn agrees<D: Device + Copy>(device: D, bounds: [f64; 2]) {
    for (switched, adapters) in [(false, false), (true, false), (false, true), (true, true)] {
        let mut config = longer(switched);
        if switched {
            config.switches.rotary_dim = Some(12);
            config.switches.attention_scale = Some(0.1);
        }
        let mut plain = as_in_files(&config);
        if adapters {
            (config, plain) = (with_adapters(config), with_adapters(plain));
        }
        let values = values(&plain, 5);
        let tokens = tokens(6, 40);
        let (scores, expected) = gradients(&model_on(Reference, &plain, &values), &tokens);
        let model = model_on(device, &config, &kept(&plain, &config, &values));
        let (got, all) = gradients(&model, &tokens);
        let error = largest(&got, &scores);
        assert!(error <= bounds[0], "{switched} {adapters}: {error}");
        let mut compared = 0;
        for (i, (got, expected)) in all.iter().zip(&expected).enumerate() {
            let scale = largest(expected, &vec![0.0; expected.len()]);
            let error = largest(got, expected);
            let name = &model.specs[i].parts[0].0;
            // Gradients of gates are sums that cancel.
            if name.ends_with("past_gate") {
                continue;
            }
            assert!(error <= bounds[1] * scale, "{name}: {error} of {scale}");
            compared += usize::from(scale > 0.0);
        }
        assert!(compared >= 14, "{compared}");
    }
}

// A scale that is given is f32 on every device, and 1/6 is not.
#[test]
fn longer_heads_compute_the_same_in_f64() {
    agrees(Reference, [1e-6, 1e-5]);
}

#[test]
fn longer_heads_compute_the_same_on_the_cpu() {
    agrees(Cpu, [2e-4, 1e-3]);
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn training_leaves_what_is_added_at_zero_and_files_have_their_own_width() {
    let model = longer(true);
    let keys = [
        ("data.train", "x"),
        ("schedule.warmup_steps", "0"),
        ("schedule.lr", "1e-2"),
    ];
    let keys = keys.map(|(k, v)| (k.to_owned(), v.to_owned()));
    let config = Config::parse("", &keys).unwrap();
    let tensors = Tensors::initial(&model, 3);
    let mut trainer = Trainer::new(Cpu, model.clone(), config, &tensors, None).unwrap();
    for step in 0..3 {
        trainer.step_on(&[vec![tokens(step, 30)]]).unwrap();
    }
    let after = trainer.tensors().unwrap();
    assert!(after.values != tensors.values);
    for list in [&after.values, &after.m, &after.v] {
        for (spec, values) in specs(&model).iter().zip(list) {
            let mut again = values.clone();
            spec.for_file(&mut again);
            let shapes = spec.parts.iter().map(|(_, shape)| shape);
            let len: usize = shapes.map(|shape| shape.iter().product::<usize>()).sum();
            assert_eq!(again.len(), len);
            spec.keep(&mut again);
            assert_eq!(bits(&again), bits(values), "{}", spec.parts[0].0);
        }
    }
    let saved = trainer.checkpoint(&Fingerprints::default(), &[]).unwrap();
    let root = tempfile::tempdir().unwrap();
    let place = checkpoint::save(&mut Disk, root.path(), &saved, 2).unwrap();
    assert!(checkpoint::load(&place).unwrap().tensors == after);
    let files = Checkpoint::open(&place).unwrap();
    let shape = |name: &str| {
        let (_, entry) = files.tensors().find(|(n, _)| n.ends_with(name)).unwrap();
        entry.shape.clone()
    };
    assert_eq!(shape("0.self_attn.q_proj.weight"), [8 * WIDTH, 12]);
    assert_eq!(shape("0.self_attn.o_proj.weight"), [12, 8 * WIDTH]);
    assert_eq!(shape("0.self_attn.v_proj.bias"), [4 * WIDTH]);
    let again = files.load(Cpu, model, false).unwrap();
    let sequence = tokens(9, 40);
    let expected = bits(&score(trainer.model(), &sequence, 1).unwrap());
    assert_eq!(bits(&score(&again, &sequence, 1).unwrap()), expected);
    assert_eq!(bits(&score(&again, &sequence, 3).unwrap()), expected);
}
