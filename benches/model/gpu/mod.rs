//! Whole models on a GPU against PyTorch on the same GPU in the same run, with random weights.
//!
//! - check: log-probabilities of a small plain Llama, ours and the peers' from one safetensors file;
//! - prefill: time to first token and peak memory of a Llama-2-7B by context, then time per token of decoding;
//! - decode: tokens a second by batch, at equal context;
//! - training: tokens a second and peak memory of a Llama-3.2-1B by context.
//!
//! "segment" is the model with segments of 4096, prior and past of 512, "segment-host" the same with its pool in host
//! memory; "plain" is the same code without segments, full attention by our kernels. "flash" and "cudnn" are
//! Transformers' Llama with these kernels of PyTorch, "compiled" a Llama of few lines under torch.compile with the
//! faster of them. Whatever does not fit is "out of memory", and the bench goes on.
//!
//! Every row is written as it comes to a dated file in `SEGATTN_BENCH_RUNS` (by default benches/runs/), where a later
//! run of the same day puts its rows beside or in place of the earlier ones; tables and plots are of the whole file.
//! So a run can be had in pieces:
//!
//! | variable | picks |
//! |---|---|
//! | `SEGATTN_BENCH_PARTS` | of `check,prefill,decode,training`, run in the order given |
//! | `SEGATTN_BENCH_WHO` | of `segment,segment-host,plain,flash,cudnn,compiled` |
//! | `SEGATTN_BENCH_CONTEXTS` | tokens of the prompts |
//! | `SEGATTN_BENCH_LENGTHS` | tokens of the sequences trained on |
//! | `SEGATTN_BENCH_DECODE` | `model:batch:context`, as in `7B:8:6144` |
//! | `SEGATTN_BENCH_SECONDS` | no row begins later |
//! | `SEGATTN_BENCH_REPORT` | nothing: tables and plots of a file of earlier rows, for which no GPU is needed |
//! | `SEGATTN_BENCH_LAYERS` | so many layers, for a profiler: nothing is written then |

mod check;
mod decode;
mod peers;
mod plot;
mod prefill;
mod report;
mod shapes;
mod training;
mod weights;

use std::error::Error;
use std::time::{Duration, Instant};

use segattn::device::gpu::cuda_driver::{Choice, Cuda};
use segattn::device::gpu::{Driver, DryRun, Gpu, PoolPlacement};
use segattn::device::{Device, DeviceError, Purpose};
use segattn::generate::GenerateError;
use segattn::train::error::TrainError;
use serde_json::{Value, json};

use peers::Peers;
use report::Report;

/// Why there is no result.
pub enum Failed {
    /// Nothing to measure on.
    NoGpu(String),
    /// The bench failed.
    Other(Box<dyn Error>),
}

type Result<T> = std::result::Result<T, Box<dyn Error>>;

impl<E: Into<Box<dyn Error>>> From<E> for Failed {
    fn from(error: E) -> Self {
        Failed::Other(error.into())
    }
}

/// What a row says that does not fit.
const OUT_OF_MEMORY: &str = "out of memory";
const GIB: f64 = (1u64 << 30) as f64;

/// What this run measures.
struct Options {
    parts: Vec<String>,
    who: Vec<String>,
    contexts: Vec<usize>,
    lengths: Vec<usize>,
    decode: Vec<String>,
    until: Option<Instant>,
    layers: Option<usize>,
}

impl Options {
    fn from_environment() -> Self {
        let texts = |name: &str, default: &str| -> Vec<String> {
            let text = std::env::var(name).unwrap_or(default.into());
            text.split(',').map(|part| part.trim().to_owned()).collect()
        };
        let number = |name: &str| std::env::var(name).ok()?.trim().parse::<usize>().ok();
        let numbers = |name: &str, default: &[usize]| match std::env::var(name) {
            Ok(text) => text
                .split(',')
                .filter_map(|n| n.trim().parse().ok())
                .collect(),
            Err(_) => default.to_vec(),
        };
        let seconds = number("SEGATTN_BENCH_SECONDS");
        Self {
            parts: texts("SEGATTN_BENCH_PARTS", "check,prefill,decode,training"),
            who: texts("SEGATTN_BENCH_WHO", &[&OURS[..], &PEERS].concat().join(",")),
            contexts: numbers("SEGATTN_BENCH_CONTEXTS", &prefill::CONTEXTS),
            lengths: numbers("SEGATTN_BENCH_LENGTHS", &training::LENGTHS),
            decode: texts("SEGATTN_BENCH_DECODE", decode::CASES),
            until: seconds.map(|s| Instant::now() + Duration::from_secs(s as u64)),
            layers: number("SEGATTN_BENCH_LAYERS"),
        }
    }

    /// Those of `names` that are asked for.
    fn who<const N: usize>(&self, names: [&'static str; N]) -> Vec<&'static str> {
        let asked = |name: &&str| self.who.iter().any(|who| who == name);
        names.into_iter().filter(asked).collect()
    }
}

/// What all parts share.
struct Bench {
    options: Options,
    report: Report,
    /// Started when first asked.
    peers: Option<std::result::Result<Peers, String>>,
}

impl Bench {
    /// A row of ours or of a peer's, unless time is up: `measure` returns its figures.
    fn row(&mut self, key: Value, measure: impl FnOnce(&mut Self) -> Result<Value>) -> Result<()> {
        if self
            .options
            .until
            .is_some_and(|until| Instant::now() > until)
        {
            println!("left out for lack of time: {key}");
            return Ok(());
        }
        let figures = match measure(self) {
            Ok(figures) => figures,
            Err(error) => json!({ "failed": reason(error.as_ref()) }),
        };
        self.report.push(key, figures)
    }

    /// What a peer answers.
    fn ask(&mut self, question: &Value) -> Result<Value> {
        if self.peers.is_none() {
            let peers = Peers::start();
            if let Ok(peers) = &peers {
                self.report.note("peers", peers.hello().clone());
            }
            self.peers = Some(peers);
        }
        let peers = self.peers.as_mut().expect("just started");
        let answer = peers
            .as_mut()
            .map_err(|missing| missing.clone())?
            .ask(question)?;
        match answer["failed"].as_str() {
            Some(failed) => Err(failed.into()),
            None => Ok(answer),
        }
    }

    /// Peers give the GPU's memory back.
    fn free(&mut self) {
        if let Some(Ok(peers)) = &mut self.peers {
            // A child that has ended holds nothing either.
            let _ = peers.ask(&json!({ "do": "free" }));
        }
    }
}

/// "out of memory" where that is it, else the error.
fn reason(error: &(dyn Error + 'static)) -> String {
    let device = match error.downcast_ref::<GenerateError>() {
        Some(GenerateError::Device(error)) => Some(error),
        _ => match error.downcast_ref::<TrainError>() {
            Some(TrainError::Device(error)) => Some(error),
            _ => error.downcast_ref::<DeviceError>(),
        },
    };
    match device {
        Some(DeviceError::OutOfMemory { .. }) => OUT_OF_MEMORY.into(),
        _ => error.to_string(),
    }
}

/// Implementations of ours: with segments and the pool on the device or in host memory, and without segments.
const OURS: [&str; 3] = ["segment", "segment-host", "plain"];
const PEERS: [&str; 3] = ["flash", "cudnn", "compiled"];

/// The GPU, with the memory taken that a dry run of `run` needs; or that there is less.
fn planned(
    who: &str,
    run: impl Fn(Gpu<DryRun<<Cuda as Driver>::Kernels>>) -> Result<()>,
) -> Result<Gpu<Cuda>> {
    let gpu = Gpu::new(Cuda::open(0, Choice::SameBits)?);
    let pool = match who {
        "segment-host" => PoolPlacement::AtMost(0),
        _ => PoolPlacement::AtMost(usize::MAX),
    };
    let kernels = gpu.driver().shared_kernels().clone();
    gpu.reserve_for(&kernels, pool, Purpose::Segments, run)?;
    Ok(gpu)
}

/// The most memory that there was, as PyTorch counts its own: in buffers, and taken from the driver.
fn memory(gpu: &Gpu<Cuda>) -> Value {
    let used = gpu.memory_use();
    json!({
        "peak_bytes": used.buffers.peak + used.pool.peak,
        "reserved_bytes": used.on_device(),
        "host_bytes": used.host.peak,
    })
}

/// Waits for all work on a device.
fn wait(gpu: &Gpu<Cuda>) -> Result<()> {
    Ok(gpu.driver().stream().synchronize()?)
}

/// Token ids, as good as any.
fn tokens(count: usize, vocab: usize) -> Vec<u32> {
    let id = |i: usize| (i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 33;
    (0..count).map(|i| (id(i) % vocab as u64) as u32).collect()
}

/// Runs what the environment asks for.
pub fn run() -> std::result::Result<(), Failed> {
    if let Some(path) = std::env::var_os("SEGATTN_BENCH_REPORT") {
        return Ok(Report::load(path.into())?.finish()?);
    }
    let gpu = match Cuda::open(0, Choice::SameBits) {
        Ok(cuda) => Gpu::new(cuda).description(),
        Err(error) => return Err(Failed::NoGpu(error.to_string())),
    };
    let options = Options::from_environment();
    let report = Report::open(&gpu, options.layers.is_none())?;
    let mut bench = Bench {
        options,
        report,
        peers: None,
    };
    for part in bench.options.parts.clone() {
        match part.as_str() {
            "check" => check::run(&mut bench),
            "prefill" => prefill::run(&mut bench),
            "decode" => decode::run(&mut bench),
            "training" => training::run(&mut bench),
            _ => Err(format!("SEGATTN_BENCH_PARTS: {part} is no part").into()),
        }?;
    }
    Ok(bench.report.finish()?)
}
