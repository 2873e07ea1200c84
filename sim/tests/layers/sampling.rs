//! `kernels/sampling.cu` under every check, against the host's sampler, token by token.

use std::sync::{Arc, OnceLock};

use segattn::cuda::kernels::layer_params::{
    SegattnLossParams, SegattnSampleParams, SegattnSampler,
};
use segattn::generate::sampler::{Sampler, SamplerConfig};
use segattn_sim::{Buffer, Gpu, Module};

use super::common::*;

fn sampling() -> &'static Arc<Module> {
    static MODULE: OnceLock<Arc<Module>> = OnceLock::new();
    MODULE.get_or_init(|| module("sampling.cu"))
}

fn threads(vocab: usize) -> Option<u32> {
    Some((vocab.div_ceil(512).max(1) * 32).min(1024) as u32)
}

/// Sequences that are sampled side by side, each with settings and a stream of its own.
struct Batch {
    vocab: usize,
    configs: Vec<SamplerConfig>,
    /// Tokens seen before.
    histories: Vec<Vec<u32>>,
}

/// What the kernel leaves of each sequence.
#[derive(Debug, PartialEq)]
struct Chosen {
    tokens: Vec<u32>,
    log_probabilities: Vec<u32>,
}

struct OnGpu {
    sampler: Buffer,
    seen: Buffer,
    tokens: Buffer,
    log_probability: Buffer,
    seen_pitch: usize,
}

const STREAM: u64 = 7_000_000_000;
/// Two draws before a block of the cipher ends.
const POSITION: u64 = 14;

impl Batch {
    fn upload(&self, gpu: &mut Gpu) -> OnGpu {
        let rows = self.configs.len();
        let seen_pitch = self.vocab.div_ceil(32) + 1;
        let mut seen = vec![0u32; rows * seen_pitch];
        for (row, history) in self.histories.iter().enumerate() {
            history
                .iter()
                .for_each(|t| seen[row * seen_pitch + *t as usize / 32] |= 1 << (t % 32));
        }
        let samplers: Vec<u8> = self
            .configs
            .iter()
            .enumerate()
            .flat_map(|(row, c)| entry(c, row))
            .collect();
        OnGpu {
            sampler: gpu.upload("sampler", &samplers).expect("memory"),
            seen: gpu.upload("seen", &seen).expect("memory"),
            tokens: gpu.alloc("tokens", rows * 4).expect("memory"),
            log_probability: gpu.alloc("log_probability", rows * 4).expect("memory"),
            seen_pitch,
        }
    }

    /// The next token of every sequence.
    fn step(&self, gpu: &mut Gpu, at: &OnGpu, logits: &Matrix) {
        // In two launches, so that a row's place in the launch is not its index.
        for parity in 0..2 {
            let rows = 0..self.configs.len() as i32;
            let indices: Vec<i32> = rows.filter(|row| row % 2 == parity).collect();
            if indices.is_empty() {
                continue;
            }
            let of_launch = gpu.upload("indices", &indices).expect("memory");
            let params = SegattnSampleParams {
                logits: logits.view(),
                sampler: at.sampler.ptr(),
                seen: at.seen.ptr(),
                tokens: at.tokens.ptr(),
                log_probability: at.log_probability.ptr(),
                indices: of_launch.ptr(),
                seen_pitch: at.seen_pitch as i64,
                rows: indices.len() as i64,
                vocab: self.vocab as i32,
            };
            launch(
                gpu,
                sampling(),
                "sample_f32",
                indices.len(),
                threads(self.vocab),
                &params,
            );
        }
    }
}

/// A sequence's entry of the samplers' table, as bytes.
fn entry(config: &SamplerConfig, row: usize) -> Vec<u8> {
    let words = [config.seed, STREAM + row as u64, POSITION];
    let floats = [
        config.temperature,
        config.top_p,
        config.min_p,
        config.repetition_penalty,
    ];
    let mut bytes: Vec<u8> = words.iter().flat_map(|x| x.to_le_bytes()).collect();
    bytes.extend(floats.iter().flat_map(|x| x.to_le_bytes()));
    bytes.extend((config.top_k as u32).to_le_bytes());
    bytes.extend((-1i32).to_le_bytes());
    assert_eq!(bytes.len(), size_of::<SegattnSampler>());
    bytes
}

fn config(seed: u64) -> SamplerConfig {
    SamplerConfig {
        seed,
        ..SamplerConfig::default()
    }
}

/// Every filter alone, and all of them; a row each.
fn configs() -> Vec<SamplerConfig> {
    let with = |seed, f: fn(&mut SamplerConfig)| {
        let mut config = config(seed);
        f(&mut config);
        config
    };
    vec![
        SamplerConfig::greedy(),
        with(1, |c| c.temperature = 0.7),
        with(2, |c| c.top_k = 5),
        with(3, |c| c.top_p = 0.6),
        with(u64::MAX, |c| c.min_p = 0.2),
        with(5, |c| c.repetition_penalty = 1.7),
        with(6, |c| {
            (c.temperature, c.top_k, c.top_p) = (1.5, 40, 0.9);
            (c.min_p, c.repetition_penalty) = (0.01, 1.2);
        }),
        with(7, |c| (c.top_k, c.top_p) = (1, 0.5)),
        with(8, |c| (c.temperature, c.top_p) = (3.0, 0.999)),
        with(9, |c| (c.temperature, c.repetition_penalty) = (0.0, 2.0)),
        // More tokens than the kernel's list holds.
        with(10, |c| {
            (c.temperature, c.top_k, c.top_p) = (4.0, 1500, 0.95)
        }),
    ]
}

fn batch(vocab: usize) -> Batch {
    // Many streams where they are quick: a filter shows only where a draw would have fallen on what it removes.
    let copies = if vocab <= 300 { 8 } else { 1 };
    let configs = configs().repeat(copies);
    let history = |row: usize| {
        (0..vocab as u32)
            .filter(|t| (*t as usize + row).is_multiple_of(3))
            .collect()
    };
    let histories = (0..configs.len()).map(history).collect();
    Batch {
        vocab,
        configs,
        histories,
    }
}

/// Logits of which some are excluded, and many equal where `ties`.
fn logits(batch: &Batch, salt: u64, ties: bool) -> Vec<f32> {
    let mut logits = values(batch.configs.len() * batch.vocab, salt);
    for (i, x) in logits.iter_mut().enumerate() {
        *x = if ties {
            (*x * 3.0).round() + 0.0
        } else {
            *x * 4.0
        };
        if batch.vocab > 1 && i % batch.vocab % 11 == 1 {
            *x = f32::NEG_INFINITY;
        }
    }
    logits
}

/// So many tokens of every sequence by the kernel.
fn run(seed: u64, batch: &Batch, ties: bool, count: u64) -> Vec<Chosen> {
    let gpu = &mut gpu(seed);
    let at = batch.upload(gpu);
    let step = |salt| {
        let logits = Matrix::of(gpu, "logits", &logits(batch, salt, ties), batch.vocab, 1);
        batch.step(gpu, &at, &logits);
        Chosen {
            tokens: gpu.download(at.tokens),
            log_probabilities: gpu.download(at.log_probability),
        }
    };
    let chosen = (0..count).map(step).collect();
    let bytes: Vec<u8> = gpu.download(at.sampler);
    for entry in bytes.chunks(size_of::<SegattnSampler>()) {
        assert_eq!(entry[16..24], (POSITION + count).to_le_bytes());
        assert_eq!(entry[44..48], 0i32.to_le_bytes());
    }
    chosen
}

#[test]
fn tokens_are_those_of_the_host() {
    for (vocab, ties) in [
        (1, false),
        (7, false),
        (300, true),
        (300, false),
        (2100, false),
        (2100, true),
    ] {
        let mut batch = batch(vocab);
        let chosen = run(1, &batch, ties, 3);
        for (row, config) in batch.configs.clone().into_iter().enumerate() {
            let mut host = Sampler::new(config, STREAM + row as u64).expect("settings");
            host.set_position(POSITION);
            for (step, chosen) in chosen.iter().enumerate() {
                let all = logits(&batch, step as u64, ties);
                let row_logits = &all[row * vocab..(row + 1) * vocab];
                let token = host
                    .sample(row_logits, &batch.histories[row])
                    .expect("a token");
                assert_eq!(
                    chosen.tokens[row], token,
                    "vocab {vocab}, ties {ties}, row {row}, step {step}"
                );
                batch.histories[row].push(token);
            }
        }
    }
}

#[test]
fn a_large_vocabulary_by_all_threads() {
    let mut batch = batch(16_000);
    batch.configs.truncate(7);
    batch.configs.drain(..6);
    batch.histories.truncate(1);
    let chosen = run(1, &batch, false, 1);
    let mut host = Sampler::new(batch.configs[0], STREAM).expect("settings");
    host.set_position(POSITION);
    let token = host.sample(&logits(&batch, 0, false), &batch.histories[0]);
    assert_eq!(chosen[0].tokens[0], token.expect("a token"));
}

#[test]
fn draws_from_tokens_of_like_weight_fall_to_every_warp() {
    let mut batch = batch(1100);
    let flat = |seed| SamplerConfig {
        temperature: 100.0,
        ..config(seed)
    };
    batch.configs = (0..12).map(flat).collect();
    batch.histories = vec![Vec::new(); 12];
    let chosen = run(1, &batch, false, 1);
    let all = logits(&batch, 0, false);
    let mut thirds = [0; 3];
    for (row, config) in batch.configs.iter().enumerate() {
        let mut host = Sampler::new(*config, STREAM + row as u64).expect("settings");
        host.set_position(POSITION);
        let own = &all[row * batch.vocab..][..batch.vocab];
        let token = host.sample(own, &batch.histories[row]);
        let token = token.expect("a token");
        assert_eq!(chosen[0].tokens[row], token, "row {row}");
        thirds[token as usize * 3 / batch.vocab] += 1;
    }
    assert!(thirds.iter().all(|&count| count > 0), "{thirds:?}");
}

/// The tokens that the kernel and the host draw from the same logits with 24 seeds, which must agree.
fn drawn(logits: &[f32], settings: SamplerConfig) -> Vec<u32> {
    let batch = Batch {
        vocab: logits.len(),
        configs: (0..24)
            .map(|seed| SamplerConfig { seed, ..settings })
            .collect(),
        histories: vec![Vec::new(); 24],
    };
    let gpu = &mut gpu(1);
    let at = batch.upload(gpu);
    let matrix = Matrix::of(gpu, "logits", &logits.repeat(24), batch.vocab, 0);
    batch.step(gpu, &at, &matrix);
    let chosen: Vec<u32> = gpu.download(at.tokens);
    for (i, (token, config)) in chosen.iter().zip(&batch.configs).enumerate() {
        let mut host = Sampler::new(*config, STREAM + i as u64).expect("settings");
        host.set_position(POSITION);
        assert_eq!(
            *token,
            host.sample(logits, &[]).expect("a token"),
            "row {i}"
        );
    }
    chosen
}

/// Number and mass both cut the same equal tokens: of one token of weight 6 and many of weight 1, `top_k` keeps the
/// first and `others`, and `top_p` of their mass the first and six others. With 1500 the kernel has no list of them.
#[test]
fn number_and_mass_cut_the_same_ties() {
    for (vocab, others) in [(300, 30), (3000, 1500)] {
        let mut logits = vec![0f32; vocab];
        logits[200] = 6f32.ln();
        let settings = SamplerConfig {
            top_k: others + 1,
            top_p: 11.5 / (6.0 + others as f32),
            ..config(0)
        };
        let tokens = drawn(&logits, settings);
        assert!(tokens.iter().all(|t| *t < 6 || *t == 200), "{tokens:?}");
        assert!(tokens.iter().any(|t| *t < 6), "{tokens:?}");
    }
}

/// Of 3000 tokens of one weight, the 1024 of the kernel's list do not have nine tenths of the mass.
#[test]
fn mass_beyond_the_list_is_drawn_from() {
    let settings = SamplerConfig {
        top_p: 0.9,
        ..config(0)
    };
    let tokens = drawn(&[0.0; 3000], settings);
    assert!(tokens.iter().all(|t| *t < 2700), "{tokens:?}");
    assert!(tokens.iter().any(|t| *t >= 1024), "{tokens:?}");
}

#[test]
fn the_log_probability_is_that_of_the_loss_kernel_to_the_bit() {
    let batch = batch(1100);
    let gpu = &mut gpu(1);
    let at = batch.upload(gpu);
    let values = logits(&batch, 0, false);
    let matrix = Matrix::of(gpu, "logits", &values, batch.vocab, 0);
    batch.step(gpu, &at, &matrix);
    let rows = batch.configs.len();
    let scored = gpu.alloc("scored", rows * 4).expect("memory");
    let params = SegattnLossParams {
        logits: matrix.view(),
        targets: at.tokens.ptr(),
        scales: std::ptr::null(),
        log_probability: scored.ptr(),
        d_logits: NO_ROWS,
        rows: rows as i64,
        vocab: batch.vocab as i32,
    };
    launch(
        gpu,
        &module("loss.cu"),
        "cross_entropy_bf16",
        rows,
        threads(batch.vocab),
        &params,
    );
    assert_eq!(
        gpu.download::<u32>(at.log_probability),
        gpu.download::<u32>(scored)
    );
}

#[test]
fn twenty_schedules_and_any_neighbours_choose_the_same() {
    let mut all = batch(600);
    all.configs.drain(..5);
    all.configs.truncate(3);
    all.histories.truncate(3);
    let first = run(0, &all, false, 2);
    for seed in 1..20 {
        assert_eq!(run(seed, &all, false, 2), first, "seed {seed}");
    }
}

#[test]
fn logits_that_cannot_be_sampled_are_reported_and_choose_nothing() {
    for (bad, failure) in [
        (f32::NAN, 1i32),
        (-f32::NAN, 1),
        (f32::INFINITY, 1),
        (f32::NEG_INFINITY, 2),
    ] {
        let batch = Batch {
            vocab: 70,
            configs: vec![config(1)],
            histories: vec![vec![]],
        };
        let gpu = &mut gpu(1);
        let at = batch.upload(gpu);
        let mut logits = vec![if failure == 2 { bad } else { 0.5 }; 70];
        logits[40] = bad;
        let matrix = Matrix::of(gpu, "logits", &logits, 70, 0);
        batch.step(gpu, &at, &matrix);
        let entry: Vec<u8> = gpu.download(at.sampler);
        assert_eq!(entry[44..48], failure.to_le_bytes());
        assert_eq!(entry[16..24], POSITION.to_le_bytes());
        assert_eq!(gpu.unwritten(at.tokens).len(), 1);
    }
}
