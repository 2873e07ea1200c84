//! `segattn score`: the log-probability of each token of a text.

use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use segattn::eval::perplexity::log_probabilities;
use segattn::generate::dry_run::Reading;
use segattn::model::segmentation::Tokens;
use serde::Serialize;

use super::device::{Planned, on_device};
use super::files::{BreakArgs, Results, read_tokens};
use super::generate::{progress, read_prompt};
use super::model::ModelArgs;
use super::out::out;
use super::ranks::Party;
use super::stages::StageArgs;

/// Prints the mean negative log-probability (natural logarithm) and the perplexity. The first token
/// has no probability.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    stages: StageArgs,
    /// JSON array of token ids, or an object with `tokens` and `breaks`; no tokenizer is needed
    #[arg(long, value_name = "FILE", required_unless_present = "text")]
    tokens: Option<PathBuf>,
    #[command(flatten)]
    breaks: BreakArgs,
    /// File with a text, `-` for standard input
    #[arg(long, value_name = "FILE", conflicts_with = "tokens")]
    text: Option<PathBuf>,
    /// Where the log-probabilities go, JSON
    #[arg(short, long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Segments computed side by side: faster, more memory, the same bits
    #[arg(long, value_name = "N", default_value_t = 1)]
    segments_per_step: usize,
}

/// The scores as they lie in the `--out` file.
#[derive(Serialize)]
struct Scores {
    /// Widened, because the digits of an f64 survive readers of either width.
    logprobs: Vec<f64>,
    /// Mean negative log-probability.
    loss: f64,
    /// `exp(loss)`.
    perplexity: f64,
}

pub fn run(args: &Args, quiet: bool) -> Result<()> {
    args.stages.run(&args.model, |party| {
        on_device!(args.model.device(), party.local_rank(), device => run_on(device, args, party, quiet))
    })
}

fn run_on<D: Planned>(device: D, args: &Args, party: &Party, quiet: bool) -> Result<()> {
    let results = Results::maybe(args.out.as_deref())?;
    let opened = args.model.open(args.tokens.is_none())?.shared(party);
    let tokens = match (&args.tokens, &args.text, &opened.text) {
        (Some(path), ..) => read_tokens(path, opened.config.vocab_size)?,
        (None, Some(path), Some(text)) => Tokens {
            ids: text.encode(&read_prompt(path)?, true)?,
            ..Tokens::default()
        },
        (None, Some(_), None) => bail!("the model has no tokenizer; give --tokens"),
        (None, None, _) => bail!("nothing to score; give --tokens or --text"),
    };
    let tokens = args.breaks.over(tokens)?;
    let count = tokens.ids.len();
    ensure!(
        count >= 2,
        "expected at least 2 tokens to score, got {count}"
    );
    let reading = Reading {
        sequences: vec![[0, count - 1]],
        scored: true,
        new: 0,
        segments_per_step: args.segments_per_step,
    };
    let model = opened.load(device, &[reading])?;
    let bar = progress(!quiet, count as u64 - 1, "tokens");
    let scored = log_probabilities(
        &model,
        &[(&tokens).into()],
        args.segments_per_step,
        |read| {
            bar.inc(read as u64);
        },
    )?;
    bar.finish_and_clear();
    let logprobs: Vec<f64> = scored.concat().into_iter().map(f64::from).collect();
    let loss = -logprobs.iter().sum::<f64>() / logprobs.len() as f64;
    let scores = Scores {
        logprobs,
        loss,
        perplexity: loss.exp(),
    };
    if let Some(results) = results {
        results.write(&serde_json::to_vec(&scores).context("scores as JSON")?)?;
    }
    out!(
        "loss {:.6}  perplexity {:.4}",
        scores.loss,
        scores.perplexity
    )?;
    Ok(())
}
