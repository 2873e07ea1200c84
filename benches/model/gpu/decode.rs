//! Tokens a second of decoding by batch, at equal context.

use std::time::Instant;

use segattn::device::Device;
use segattn::model::decoder::Decoder;
use segattn::model::session::Session;
use serde_json::{Value, json};

use super::prefill::{greedy, median, read_prompt};
use super::shapes::Shape;
use super::{Bench, Result, memory, planned, tokens, weights};

/// `model:batch:context`. 6144 tokens are a segment and a half; 64 sequences of a 7B have room for less.
pub const CASES: &str = "7B:1:6144,7B:8:6144,7B:64:1024,1B:1:6144,1B:8:6144,1B:64:6144";
/// Steps timed, after some that are not.
const STEPS: usize = 64;
const WARM: usize = 4;

/// Seconds of each step, one token for every sequence, from `context` tokens on.
fn steps<D: Device>(model: &Decoder<D>, batch: usize, context: usize) -> Result<Vec<f64>> {
    let count = WARM + STEPS;
    let mut session = Session::new(model, batch, context + count, 1)?;
    let vocab = model.config.vocab_size;
    let all = tokens(batch * context, vocab);
    // One after the other: the prompts' activations are no part of what is measured.
    for (sequence, prompt) in all.chunks(context).enumerate() {
        read_prompt(&mut session, sequence, prompt)?;
    }
    let mut generator = greedy(&mut session, count)?;
    let mut step = || -> Result<f64> {
        let begin = Instant::now();
        generator.step()?;
        Ok(begin.elapsed().as_secs_f64())
    };
    (0..count).map(|_| step()).collect()
}

fn ours(shape: &Shape, who: &str, batch: usize, context: usize) -> Result<Value> {
    let config = shape.config(who);
    let gpu = planned(who, |dry| {
        steps(&weights::decoder(&dry, config.clone())?, batch, context)?;
        Ok(())
    })?;
    let seconds = steps(&weights::decoder(&gpu, config)?, batch, context)?;
    let mut figures = memory(&gpu);
    figures["step_s"] = json!(median(&seconds[WARM..]));
    Ok(figures)
}

/// "7B:8:6144".
fn case(text: &str) -> Result<(Shape, usize, usize)> {
    let expected = || format!("SEGATTN_BENCH_DECODE: expected model:batch:context, got {text}");
    let mut parts = text.split(':');
    let shape = parts.next().and_then(Shape::by_name).ok_or_else(expected)?;
    let mut number = || parts.next()?.parse().ok().filter(|n| *n > 0);
    let (batch, context) = (number(), number());
    Ok((
        shape,
        batch.ok_or_else(expected)?,
        context.ok_or_else(expected)?,
    ))
}

/// All cases, one implementation after the other.
pub fn run(bench: &mut Bench) -> Result<()> {
    let cases = bench.options.decode.clone();
    // Where the pool lies is nothing to a step inside a segment.
    for who in bench.options.who(["segment", "plain", "compiled"]) {
        for text in &cases {
            let (shape, batch, context) = case(text)?;
            let shape = shape.with_layers(bench.options.layers);
            let key = json!({
                "part": "decode", "model": shape.name, "who": who, "batch": batch, "tokens": context,
            });
            let question = json!({
                "do": "decode", "shape": shape.json(), "batch": batch, "tokens": context,
            });
            bench.row(key, |bench| match who {
                "segment" | "plain" => ours(&shape, who, batch, context),
                _ => bench.ask(&question),
            })?;
        }
    }
    bench.free();
    Ok(())
}
