//! Decoding on a real GPU: recorded steps give the bits of unrecorded ones and of scoring, and tokens are chosen from
//! the logits as the host's sampler does. Where there is no GPU every test says so and passes, unless
//! `SEGATTN_REQUIRE_GPU` is set.
//!
//! `cargo test --release --features cuda --test decode_cuda`, or `tests/portable.sh` for a machine without Rust.

mod random;

use std::io::Write;
use std::ops::ControlFlow;

use random::random;
use segattn::device::gpu::Gpu;
use segattn::device::gpu::cuda_driver::{Choice, Cuda};
use segattn::device::sampler::{Sampler, SamplerConfig};
use segattn::device::{Device, Kind, Sampled};
use segattn::generate::{Generator, GeneratorConfig, Prompt};
use segattn::model::config::ModelConfig;
use segattn::model::decoder::Decoder;
use segattn::model::parameters::{Role, specs};
use segattn::model::session::{Feed, Session, score};

const VOCAB: usize = 1000;
const NEW: usize = 150;

/// GPU 0; `None`, said, where there is none.
fn gpu() -> Option<Gpu<Cuda>> {
    match segattn::cuda::open(0) {
        Ok(_) => Some(Gpu::new(Cuda::open(0, Choice::SameBits).expect("a driver"))),
        Err(error) => {
            let required = std::env::var_os("SEGATTN_REQUIRE_GPU").is_some();
            assert!(!required && error.is_absent(), "{error}");
            // Not by a macro, whose output the test harness keeps to itself.
            let said = writeln!(std::io::stderr(), "SKIPPED, nothing runs here: {error}");
            said.expect("standard error");
            None
        }
    }
}

fn tokens(seed: u64, len: usize) -> Vec<u32> {
    let mut next = random(seed);
    let token = |_| ((next() + 0.5) * VOCAB as f32) as u32;
    (0..len).map(token).collect()
}

/// Three layers in which heads read everything that there is to read, in segments of 128; or a plain model.
fn model(gpu: &Gpu<Cuda>, plain: bool) -> Decoder<Gpu<Cuda>> {
    let json = serde_json::json!({
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": VOCAB,
        "hidden_size": 512,
        "intermediate_size": 768,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": true,
        "segment": {
            "segment_len": 128,
            "prior_len": 32,
            "past_len": 32,
            "retrieval": {"block_len": 8, "probe_len": 16, "probe_window": 4, "probe_stride": 4},
            "head_reads": [
                [["prior"], ["past"], ["prior", "past"], []],
                [["prior", "past"], ["prior"], ["prior"], ["past"]],
                [["prior"], ["prior"], ["prior"], ["prior"]],
            ],
        },
    });
    let mut config = ModelConfig::from_json(json).expect("a config");
    if plain {
        config.segment = None;
    }
    let specs = specs(&config);
    let mut next = random(3);
    let values = |i: usize| {
        let role = specs[i].role;
        let mut draw = |_| match role {
            Role::Matrix { inner, .. } => 3.4 * next() / (inner as f32).sqrt(),
            Role::Norm { .. } => 1.0 + 0.2 * next(),
            Role::Bias { .. } | Role::Sink { .. } => 0.5 * next(),
            Role::Gate { .. } => 0.75,
        };
        let values: Vec<f32> = (0..role.len()).map(&mut draw).collect();
        let mut buffer = gpu.empty(Kind::Exact, values.len())?;
        gpu.write(&mut buffer, 0, &values)?;
        Ok(buffer)
    };
    Decoder::new(gpu.clone(), config.clone(), values, false).expect("a model")
}

fn settings(greedy: bool) -> SamplerConfig {
    match greedy {
        true => SamplerConfig::greedy(),
        false => SamplerConfig {
            temperature: 0.8,
            top_k: 40,
            top_p: 0.95,
            repetition_penalty: 1.1,
            seed: 3,
            ..SamplerConfig::default()
        },
    }
}

fn bits(scores: &[f32]) -> Vec<u32> {
    scores.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn a_batch_decodes_to_the_bits_of_score_and_of_one_alone() {
    let Some(gpu) = gpu() else { return };
    for (plain, greedy) in [(false, true), (false, false), (true, false)] {
        let model = model(&gpu, plain);
        // Without segments the longest goes beyond the 1024 rows that a first recording is good for.
        let prompts: Vec<Vec<u32>> = [100, 127, 128, 15, 1000]
            .map(|n| tokens(n as u64, n))
            .to_vec();
        let by = settings(greedy);
        let mut session = Session::new(&model, prompts.len(), 1000 + NEW, 1).expect("a session");
        let given: Vec<Prompt<'_>> = (prompts.iter().enumerate())
            .map(|(i, tokens)| Prompt {
                before: &[],
                breaks: &[],
                tokens,
                stream: i as u64,
                rereads: &[],
            })
            .collect();
        let config = GeneratorConfig {
            sampler: by,
            max_new: NEW,
            end_tokens: Vec::new(),
        };
        let mut generator = Generator::new(&mut session, &given, config).expect("prompts");
        let generated = generator
            .run(|_| ControlFlow::Continue(()))
            .expect("tokens");
        for (i, (prompt, generated)) in prompts.iter().zip(&generated).enumerate() {
            let whole = [&prompt[..], &generated.tokens].concat();
            let expected = score(&model, &whole, 2).expect("scores");
            let expected = bits(&expected[prompt.len() - 1..]);
            assert_eq!(bits(&generated.log_probabilities), expected, "{i}");
            let alone = unrecorded(&model, &by, i as u64, prompt);
            let tokens: Vec<u32> = alone.iter().map(|x| x.token).collect();
            assert_eq!(generated.tokens, tokens, "{i}");
            let scores: Vec<f32> = alone.iter().map(|x| x.log_probability).collect();
            assert_eq!(bits(&generated.log_probabilities), bits(&scores), "{i}");
        }
    }
}

/// One sequence by calls that are never recorded.
fn unrecorded(
    model: &Decoder<Gpu<Cuda>>,
    by: &SamplerConfig,
    stream: u64,
    prompt: &[u32],
) -> Vec<Sampled> {
    let mut session = Session::new(model, 1, prompt.len() + NEW, 1).expect("a session");
    session
        .choose_by(by, &[stream], &[prompt])
        .expect("settings");
    let mut next = prompt.to_vec();
    let step = |_| {
        let feed = Feed {
            sequence: 0,
            tokens: &next,
            targets: &[],
            breaks: &[],
            rereads: &[],
        };
        session.feed(&[feed]).expect("a step");
        let sampled = session.sample(&[0]).expect("a token")[0];
        next = vec![sampled.token];
        sampled
    };
    (0..NEW).map(step).collect()
}

/// Weights are f32 on the device and f64 on the host: a token may differ where the draw falls within that rounding,
/// which in some hundred tokens it does not.
#[test]
fn tokens_are_chosen_as_the_host_chooses_them() {
    let Some(gpu) = gpu() else { return };
    let model = model(&gpu, false);
    let by = settings(false);
    let mut history = tokens(5, 50);
    let mut session = Session::new(&model, 1, 50 + NEW, 1).expect("a session");
    session.choose_by(&by, &[9], &[&history]).expect("settings");
    let feed = Feed {
        sequence: 0,
        tokens: &history,
        targets: &[],
        breaks: &[],
        rereads: &[],
    };
    session.feed(&[feed]).expect("a step");
    let mut host = Sampler::new(by, 9).expect("settings");
    let mut chosen = session.sample(&[0]).expect("a token")[0];
    for step in 0..NEW {
        let logits = session.logits(0).expect("logits");
        let token = host.sample(&logits, &history).expect("a token");
        assert_eq!(chosen.token, token, "step {step}");
        history.push(token);
        chosen = session.decode(&[(0, token)]).expect("a token")[0];
    }
}
