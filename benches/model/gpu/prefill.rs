//! Time to first token and peak memory of a 7B by context, then the time of each further token.

use std::time::Instant;

use segattn::device::Device;
use segattn::generate::sampler::SamplerConfig;
use segattn::generate::{Generator, GeneratorConfig, Prompt};
use segattn::model::decoder::Decoder;
use segattn::model::session::{Feed, Session};
use serde_json::{Value, json};

use super::shapes::{LLAMA_7B, Shape};
use super::{Bench, OURS, PEERS, Result, memory, planned, reason, tokens, wait, weights};

pub const CONTEXTS: [usize; 6] = [8192, 32_768, 81_920, 131_072, 524_288, 1_048_576];
/// Tokens of a plain prompt in one call, which bounds its activations.
const PART: usize = 4096;
/// Tokens decoded after the first.
const DECODED: usize = 32;
/// A prompt that takes longer is read once.
const ONCE: f64 = 1.0;

/// Reads a prompt and goes on: seconds of the first token, when `at_first` is called, and of each of `more`.
fn read<D: Device>(
    model: &Decoder<D>,
    prompt: &[u32],
    more: usize,
    mut at_first: impl FnMut(),
) -> Result<Vec<f64>> {
    let mut session = Session::new(model, 1, prompt.len() + more, 1)?;
    let mut begin = Instant::now();
    read_prompt(&mut session, 0, prompt)?;
    let mut generator = greedy(&mut session, more + 1)?;
    let mut seconds = Vec::with_capacity(more + 1);
    for _ in 0..=more {
        generator.step()?;
        seconds.push(begin.elapsed().as_secs_f64());
        if seconds.len() == 1 {
            at_first();
        }
        begin = Instant::now();
    }
    Ok(seconds)
}

/// Feeds a sequence its prompt.
pub fn read_prompt<D: Device>(
    session: &mut Session<'_, D>,
    sequence: usize,
    prompt: &[u32],
) -> Result<()> {
    let plain = session.model().config.segment.is_none();
    for tokens in prompt.chunks(if plain { PART } else { prompt.len() }) {
        let targets = &[];
        session.feed(&[Feed {
            sequence,
            tokens,
            targets,
            breaks: &[],
            rereads: &[],
        }])?;
    }
    Ok(())
}

/// A generator that goes on from what the sequences have read.
pub fn greedy<'s, 'm, D: Device>(
    session: &'s mut Session<'m, D>,
    max_new: usize,
) -> Result<Generator<'s, 'm, D>> {
    let prompt = |stream| Prompt {
        before: &[],
        breaks: &[],
        tokens: &[],
        stream: stream as u64,
        rereads: &[],
    };
    let prompts: Vec<_> = (0..session.sequences()).map(prompt).collect();
    let config = GeneratorConfig {
        sampler: SamplerConfig {
            temperature: 0.0,
            ..SamplerConfig::default()
        },
        max_new,
        end_tokens: Vec::new(),
    };
    Ok(Generator::new(session, &prompts, config)?)
}

/// The middle one.
pub fn median(seconds: &[f64]) -> f64 {
    let mut sorted = seconds.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

fn ours(shape: &Shape, who: &str, context: usize) -> Result<Value> {
    let (config, prompt) = (shape.config(who), tokens(context, shape.vocab));
    let gpu = planned(who, |dry| {
        let model = weights::decoder(&dry, config.clone())?;
        read(&model, &prompt, DECODED, || ()).map(|_| ())
    })?;
    let model = weights::decoder(&gpu, config)?;
    wait(&gpu)?;
    let weights = gpu.memory_use().buffers.used;
    // The first call loads kernels and chooses algorithms of GEMMs.
    read(&model, &prompt[..PART.min(context)], 2, || ())?;
    let (mut figures, mut best, mut more) = (Value::Null, f64::INFINITY, Vec::new());
    for _ in 0..2 {
        gpu.reset_peaks();
        let seconds = read(&model, &prompt, DECODED, || figures = memory(&gpu))?;
        best = best.min(seconds[0]);
        more = seconds[1..].to_vec();
        if best > ONCE {
            break;
        }
    }
    figures["decoding_peak_bytes"] = memory(&gpu)["peak_bytes"].clone();
    figures["weights_bytes"] = json!(weights);
    figures["first_token_s"] = json!(best);
    figures["per_token_s"] = json!(median(&more));
    Ok(figures)
}

/// All contexts, one implementation after the other.
pub fn run(bench: &mut Bench) -> Result<()> {
    let shape = LLAMA_7B.with_layers(bench.options.layers);
    let contexts = bench.options.contexts.clone();
    let key = |who: &str, context: usize| {
        let (part, model) = ("prefill", shape.name);
        json!({ "part": part, "model": model, "who": who, "tokens": context })
    };
    for who in bench.options.who(OURS) {
        for &context in &contexts {
            bench.row(key(who, context), |_| ours(&shape, who, context))?;
        }
    }
    for who in bench.options.who(PEERS) {
        for &context in &contexts {
            let mut question = json!({
                "do": "prefill", "who": who, "shape": shape.json(), "tokens": context, "batch": 1,
            });
            bench.row(key(who, context), |bench| bench.ask(&question))?;
            if who != "compiled" {
                continue;
            }
            question["do"] = json!("decode");
            let more = |bench: &mut Bench| {
                Ok(match bench.ask(&question) {
                    Ok(answer) => json!({ "per_token_s": answer["step_s"] }),
                    Err(error) => json!({ "per_token_failed": reason(error.as_ref()) }),
                })
            };
            bench.row(key(who, context), more)?;
        }
        bench.free();
    }
    Ok(())
}
