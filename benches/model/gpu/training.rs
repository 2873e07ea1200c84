//! Tokens a second and peak memory of training a 1B, one sequence a step, by its length.

use std::time::Instant;

use segattn::device::Device;
use segattn::model::config::ModelConfig;
use segattn::train::config::Config;
use segattn::train::error::TrainError;
use segattn::train::progress::Tensors;
use segattn::train::trainer::Trainer;
use serde_json::{Value, json};

use super::prefill::median;
use super::shapes::{LLAMA_1B, Shape};
use super::{Bench, OUT_OF_MEMORY, Result, memory, planned, tokens, wait};

pub const LENGTHS: [usize; 3] = [8192, 32_768, 131_072];
/// Steps timed: at most so many, and none that begins after so many seconds.
const STEPS: usize = 8;
const SECONDS: f64 = 6.0;

fn settings(recompute: bool) -> Config {
    let recompute = recompute.to_string();
    let keys = [
        ("data.train", "none"),
        ("training.tbptt", "1"),
        ("training.segments_per_step", "1"),
        ("training.recompute", &recompute),
        ("schedule.kind", "constant"),
        ("schedule.warmup_steps", "0"),
    ];
    let keys: Vec<_> = keys.map(|(k, v)| (k.to_owned(), v.to_owned())).to_vec();
    Config::parse("", &keys).expect("a valid configuration")
}

fn trainer<D: Device + Clone>(
    device: &D,
    model: &ModelConfig,
    recompute: bool,
    tensors: &Tensors,
) -> std::result::Result<Trainer<D>, TrainError> {
    let settings = settings(recompute);
    Trainer::new(device.clone(), model.clone(), settings, tensors, None)
}

fn ours(
    model: &ModelConfig,
    tensors: &Tensors,
    batch: &[Vec<u32>],
    recompute: bool,
) -> Result<Value> {
    let batches = [batch.to_vec()];
    let gpu = planned("segment", |dry| {
        trainer(&dry, model, recompute, tensors)?.step_on(&batches)?;
        Ok(())
    })?;
    let mut trainer = trainer(&gpu, model, recompute, tensors)?;
    let first = trainer.step_on(&batches)?;
    wait(&gpu)?;
    let (begin, mut seconds, mut last) = (Instant::now(), Vec::new(), first.loss);
    while seconds.len() < STEPS && begin.elapsed().as_secs_f64() < SECONDS {
        let begin = Instant::now();
        last = trainer.step_on(&batches)?.loss;
        wait(&gpu)?;
        seconds.push(begin.elapsed().as_secs_f64());
    }
    let mut figures = memory(&gpu);
    figures["step_s"] = json!(median(&seconds));
    figures["recompute"] = json!(recompute);
    figures["losses"] = json!([first.loss, last]);
    Ok(figures)
}

/// Keeps activations where they fit, else computes them again.
fn fitting(shape: &Shape, who: &str, tensors: &Tensors, context: usize) -> Result<Value> {
    let model = shape.config(who);
    let batch = [tokens(context + 1, shape.vocab)];
    match ours(&model, tensors, &batch, false) {
        Err(error) if super::reason(error.as_ref()) == OUT_OF_MEMORY => {
            ours(&model, tensors, &batch, true)
        }
        other => other,
    }
}

/// All lengths, one implementation after the other.
pub fn run(bench: &mut Bench) -> Result<()> {
    let shape = LLAMA_1B.with_layers(bench.options.layers);
    let contexts = bench.options.lengths.clone();
    let key = |who: &str, context: usize| {
        let (part, model) = ("training", shape.name);
        json!({ "part": part, "model": model, "who": who, "tokens": context })
    };
    let ours = bench.options.who(["segment", "plain"]);
    if !ours.is_empty() {
        let tensors = Tensors::initial(&shape.config("segment"), 1);
        for who in ours {
            for &context in &contexts {
                bench.row(key(who, context), |_| {
                    fitting(&shape, who, &tensors, context)
                })?;
            }
        }
    }
    if !bench.options.who(["compiled"]).is_empty() {
        for &context in &contexts {
            let question = json!({
                "do": "train", "shape": shape.json(), "tokens": context, "steps": STEPS, "seconds": SECONDS,
            });
            bench.row(key("compiled", context), |bench| bench.ask(&question))?;
        }
    }
    bench.free();
    Ok(())
}
