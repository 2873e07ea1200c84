//! Adapters of tiny models, and what PEFT computes with them (`tests/golden/lora/make.py`); shared by tests.

// Every test program uses a part of this.
#![allow(dead_code)]

use std::path::{Path, PathBuf};

use safetensors::SafeTensors;
use segattn::device::Device;
use segattn::model::config::ModelConfig;
use segattn::model::decoder::Decoder;
use segattn::model::lora::{Lora, LoraConfig};

pub const GOLDEN: [&str; 5] = ["granite", "llama_bias", "olmo2", "phi3", "qwen3"];
/// Largest error of a log-probability, and of a gradient relative to the largest of its tensor.
pub const ERRORS: [f64; 2] = [2e-4, 1e-3];

/// The folders of a model and of its adapters.
pub fn folders(name: &str) -> [PathBuf; 2] {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    ["families", "lora"].map(|kind| golden.join(kind).join(name))
}

pub fn base<D: Device>(device: D, folder: &Path) -> Decoder<D> {
    segattn::model::weights::load(device, folder, false).unwrap()
}

/// What PEFT computes.
pub struct Expected(Vec<u8>);

impl Expected {
    pub fn of(name: &str) -> Self {
        Self(std::fs::read(folders(name)[1].join("expected.safetensors")).unwrap())
    }

    pub fn numbers(&self, name: &str) -> Vec<f64> {
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

    pub fn tokens(&self) -> Vec<u32> {
        self.numbers("tokens").iter().map(|t| *t as u32).collect()
    }
}

/// The largest difference; NaN where there is one.
pub fn largest(got: &[f64], expected: &[f64]) -> f64 {
    assert_eq!(got.len(), expected.len());
    let errors = got.iter().zip(expected).map(|(a, b)| (a - b).abs());
    errors.fold(0.0, |a, x| if x > a || x.is_nan() { x } else { a })
}

pub fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

pub fn lora(config: &ModelConfig, rank: usize, targets: &[&str]) -> Lora {
    let settings = LoraConfig {
        rank,
        alpha: 3.0,
        rslora: rank == 3,
        targets: targets.iter().map(|t| (*t).to_owned()).collect(),
    };
    Lora::new(config, settings).unwrap()
}

/// Adapters over some projections of every product, and over all of them.
pub const TARGETS: [&[&str]; 2] = [
    &["k_proj", "0.self_attn.o_proj", "up_proj", "down_proj"],
    &["all-linear"],
];
