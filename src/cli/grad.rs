//! `segattn grad`: the gradient of the mean next-token loss, for comparison with other programs.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;

use anyhow::{Result, bail, ensure};
use safetensors::tensor::{Dtype, TensorView};
use segattn::device::{Device, Purpose};
use segattn::model::decoder::Decoder;
use segattn::model::segmentation::Tokens;
use segattn::model::weights::Checkpoint;
use segattn::train::streams::{Gradients, StreamConfig, accumulate};

use super::device::{Planned, on_device};
use super::files::{BreakArgs, Results, read_tokens};
use super::model::{ModelArgs, Opened};
use super::out::out;

/// Writes the exact gradient of every weight under its own name (F32), and the loss in the metadata:
/// the mean negative log-probability of all tokens but the first. The names are those of the folder's
/// weights: past gates that it does not hold are 1 and have none.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// JSON array of token ids, or an object with `tokens` and `breaks`
    #[arg(long, value_name = "FILE")]
    tokens: PathBuf,
    #[command(flatten)]
    breaks: BreakArgs,
    /// Segments that a loss reaches back through the prior tail
    #[arg(long, value_name = "K", default_value_t = 1)]
    tbptt: usize,
    /// Where the gradients go, safetensors
    #[arg(short, long, value_name = "FILE")]
    out: PathBuf,
    /// Segments computed side by side: faster, more memory, the same bits
    #[arg(long, value_name = "N", default_value_t = 1)]
    segments_per_step: usize,
    /// Compute activations again instead of keeping them: less memory, slower, the same bits
    #[arg(long)]
    recompute: bool,
}

pub fn run(args: &Args) -> Result<()> {
    on_device!(args.model.device(), device => run_on(device, args))
}

fn run_on<D: Planned>(device: D, args: &Args) -> Result<()> {
    let results = Results::at(&args.out)?;
    let opened = args.model.open(false)?;
    ensure!(
        opened.config.lora.is_none(),
        "--adapter: expected no adapter, since the gradients are those of the model's own weights"
    );
    let Opened {
        config, weights, ..
    } = opened;
    let tokens = read_tokens(&args.tokens, config.vocab_size)?;
    let tokens = args.breaks.over(tokens)?;
    ensure!(
        tokens.ids.len() >= 2,
        "{}: expected at least 2 tokens, got {}",
        args.tokens.display(),
        tokens.ids.len()
    );
    let streams = StreamConfig {
        tbptt: args.tbptt,
        segments_per_step: args.segments_per_step,
        recompute: args.recompute,
    };
    let (count, sequences) = (tokens.ids.len() - 1, [tokens]);
    device.plan(args.model.pool(), Purpose::Backward, |dry| {
        let model = Decoder::for_dry_run(dry, config.clone(), true)?;
        gradient(&model, &sequences, streams).map(|_| ())
    })?;
    let model = weights.load(device, config, true)?;
    let (mut gradients, scored) = gradient(&model, &sequences, streams)?;
    let loss = -scored.concat().iter().sum::<f64>() / count as f64;
    ensure!(
        loss.is_finite(),
        "loss: expected a finite number, got {loss}"
    );
    let tensors = named(&weights, &model, gradients.finish(&model.device)?)?;
    let views = tensors
        .iter()
        .map(|(name, shape, bytes)| {
            let view = TensorView::new(Dtype::F32, shape.clone(), bytes)?;
            Ok((name.as_str(), view))
        })
        .collect::<Result<Vec<_>>>()?;
    let metadata = HashMap::from([("loss".to_owned(), loss.to_string())]);
    results.write(&safetensors::serialize(views, Some(metadata))?)?;
    Ok(out!("loss {loss:.6}")?)
}

/// The gradient of the mean loss, and the log-probabilities.
fn gradient<D: Device>(
    model: &Decoder<D>,
    sequences: &[Tokens],
    streams: StreamConfig,
) -> Result<(Gradients<D>, Vec<Vec<f64>>)> {
    let mut gradients = Gradients::new(model)?;
    let count: usize = sequences.iter().map(|s| s.ids.len() - 1).sum();
    let scored = accumulate(
        model,
        sequences,
        streams,
        1.0 / count as f64,
        &mut gradients,
    )?;
    gradients.finish(&model.device)?;
    Ok((gradients, scored))
}

type Named = (String, Vec<usize>, Vec<u8>);

/// The gradients under the names of the checkpoint, which are parts of the model's tensors.
fn named<D: Device>(
    checkpoint: &Checkpoint,
    model: &Decoder<D>,
    gradients: &[D::Buffer],
) -> Result<Vec<Named>> {
    let held: HashSet<&str> = checkpoint.tensors().map(|(name, _)| name).collect();
    let mut all = Vec::new();
    for (spec, gradient) in model.specs.iter().zip(gradients) {
        let held = |(name, _): &(String, Vec<usize>)| held.contains(name.as_str());
        if !spec.parts.iter().any(held) {
            continue;
        }
        let mut all_parts = model.device.read(gradient, 0..spec.role.len())?;
        spec.for_file(&mut all_parts);
        let mut at = 0;
        for part @ (name, shape) in &spec.parts {
            let end = at + shape.iter().product::<usize>();
            if held(part) {
                let values = &all_parts[at..end];
                if let Some(i) = values.iter().position(|x| !x.is_finite()) {
                    bail!(
                        "gradient of `{name}`[{i}]: expected a finite number, got {}",
                        values[i]
                    );
                }
                let bytes = values.iter().flat_map(|x| x.to_le_bytes()).collect();
                all.push((name.clone(), shape.clone(), bytes));
            }
            at = end;
        }
    }
    Ok(all)
}
