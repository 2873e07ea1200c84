//! Before anything is timed: ours and the peers compute the same. A small plain Llama goes to a folder, both read it,
//! and log-probabilities are compared with PyTorch's in f32.

use segattn::device::gpu::Gpu;
use segattn::device::gpu::cuda_driver::{Choice, Cuda};
use segattn::device::{Device, Kind};
use segattn::model::config::WeightType;
use segattn::model::decoder::Decoder;
use segattn::model::error::WeightsError;
use segattn::model::parameters::{Role, specs};
use segattn::model::session::score;
use segattn::model::weights::{SaveOptions, initial, save};
use serde_json::{Value, json};

use super::shapes::SMALL;
use super::{Bench, PEERS, Result, tokens};

const TOKENS: usize = 700;
/// Factor on the matrices of an untrained model, so that attention is not close to a mean.
const SPREAD: f32 = 3.0;
/// An error over the smallest, at most: the tolerance of the operation's tests.
const TOLERANCE: f64 = 1.5;

fn rms(x: impl Iterator<Item = f64> + Clone) -> f64 {
    (x.clone().map(|x| x * x).sum::<f64>() / x.count() as f64).sqrt()
}

fn numbers(value: &Value) -> Result<Vec<f64>> {
    let list = value.as_array().ok_or("a peer's answer without numbers")?;
    Ok(list
        .iter()
        .map(|x| x.as_f64().unwrap_or(f64::NAN))
        .collect())
}

/// Prints every implementation's error.
///
/// # Errors
/// One is larger than what bf16 explains.
pub fn run(bench: &mut Bench) -> Result<()> {
    let config = SMALL.config("plain");
    let (weights, specs) = (initial(&config, 1), specs(&config));
    let values = |i: usize| -> Vec<f32> {
        let mut values = weights.tensor(i);
        if matches!(specs[i].role, Role::Matrix { .. }) {
            values.iter_mut().for_each(|x| *x *= SPREAD);
        }
        values
    };
    let folder = tempfile::tempdir()?;
    let saved = |i| Ok::<_, WeightsError>(values(i));
    save(
        folder.path(),
        &config,
        saved,
        SaveOptions::new(WeightType::Bf16),
    )?;
    let ids = tokens(TOKENS, SMALL.vocab);
    let ours: Vec<f64> = {
        let gpu = Gpu::new(Cuda::open(0, Choice::SameBits)?);
        let upload = |i| {
            let values = values(i);
            let mut buffer = gpu.empty(Kind::Exact, values.len())?;
            gpu.write(&mut buffer, 0, &values)?;
            Ok(buffer)
        };
        let model = Decoder::new(gpu.clone(), config, upload, false)?;
        score(&model, &ids, 1)?.into_iter().map(f64::from).collect()
    };
    let question = json!({ "do": "check", "folder": folder.path(), "tokens": ids });
    let answer = match bench.ask(&question) {
        Ok(answer) => answer,
        Err(missing) => {
            println!("check: nothing to compare with: {missing}");
            return Ok(());
        }
    };
    bench.free();
    let reference = numbers(&answer["reference"])?;
    let mean = reference.iter().sum::<f64>() / reference.len() as f64;
    let spread = rms(reference.iter().map(|x| x - mean));
    let error = |x: &[f64]| rms(x.iter().zip(&reference).map(|(x, r)| x - r));
    let mut line = format!("ours {:.2e}", error(&ours));
    let mut peers = Vec::new();
    for name in PEERS {
        // What is not there has failed, and said so.
        if let Ok(theirs) = numbers(&answer[name]) {
            line += &format!(", {name} {:.2e}", error(&theirs));
            peers.push(error(&theirs));
        }
    }
    println!("check: error of log-probabilities (spread {spread:.2}) against f32: {line}");
    let figures = json!({ "spread": spread, "ours": error(&ours), "peers": peers });
    bench.report.note("check", figures);
    let theirs = peers.iter().copied().fold(f64::INFINITY, f64::min);
    let most = TOLERANCE * theirs;
    // A NaN is no agreement either.
    let agree = ours.len() == reference.len()
        && error(&ours) <= most
        && spread > 10.0 * most
        && peers.iter().all(|error| *error <= most);
    match agree {
        true => Ok(()),
        false => Err("ours and the peers do not compute the same".into()),
    }
}
