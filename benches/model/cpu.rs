//! The model on the CPU: a whole training step against JAX, decoding against the speed of memory, prefill.
//!
//! The step is compared with step_jax.py (same weights, tokens, gradient and update; the losses of the first steps must
//! agree). Without JAX that column stays empty. Decoding is compared with reading as many bytes in the same run.
//! Ratios are of best times, taken in turns.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use criterion::{Criterion, Throughput};
use segattn::device::cpu::Cpu;
use segattn::device::{Device, Kind};
use segattn::model::config::{ModelConfig, WeightType};
use segattn::model::decoder::Decoder;
use segattn::model::error::WeightsError;
use segattn::model::parameters::{Role, specs};
use segattn::model::session::{Feed, Session};
use segattn::model::weights::{SaveOptions, initial, save};
use segattn::train::config::Config;
use segattn::train::progress::Tensors;
use segattn::train::trainer::Trainer;
use serde_json::{Value, json};

use super::measure::{best, read_all};
use super::python::{Python, interpreter};

/// The default shape of `segattn train`: 3 million parameters, which fit the caches.
const SMALL: [(&str, &str); 4] = [
    ("model.segment.segment_len", "256"),
    ("model.segment.prior_len", "128"),
    ("model.segment.past_len", "0"),
    ("data.train", "none"),
];
/// Over SMALL: 127 million parameters, 509 MB, which fit none.
const LARGE: [(&str, &str); 6] = [
    ("model.shape.vocab_size", "32000"),
    ("model.shape.hidden_size", "1024"),
    ("model.shape.intermediate_size", "2816"),
    ("model.shape.num_hidden_layers", "8"),
    ("model.shape.num_attention_heads", "16"),
    ("model.shape.num_key_value_heads", "8"),
];
const VOCAB: usize = 256;
const BATCH: usize = 4;
const SEQUENCE: usize = 1024;
/// Steps whose losses are compared before anything is timed.
const COMPARED: usize = 4;
const LOSS_TOLERANCE: f64 = 1e-4;
/// Tokens decoded while timing, and those read before: half a segment is there on average.
const DECODED: usize = 32;
const CONTEXT: usize = 256 + 128 - DECODED / 2;

fn config(extra: &[(&str, &str)]) -> (Config, ModelConfig) {
    let steady = [
        ("schedule.kind", "constant"),
        ("schedule.warmup_steps", "0"),
    ];
    let all = SMALL.iter().chain(&steady).chain(extra);
    let all: Vec<_> = all.map(|(k, v)| (k.to_string(), v.to_string())).collect();
    let config = Config::parse("", &all).expect("a valid configuration");
    let model = config.model.new_config(VOCAB).expect("a valid shape");
    (config, model)
}

/// Text-like ids: few of them, in repeating runs, so that there is something to learn.
fn tokens(count: usize, seed: usize) -> Vec<u32> {
    let id = |i: usize| (i * i / 7 + i * seed) * 2_654_435_761 % 1_000_003 % 96 + 32;
    (0..count).map(|i| id(i) as u32).collect()
}

/// JAX in a process of its own, one step for each line sent.
struct Jax {
    python: Python,
    version: String,
    losses: Vec<f64>,
}

impl Jax {
    /// `None`, said on standard error, where there is no Python with JAX.
    fn start(
        config: &Config,
        model: &ModelConfig,
        tensors: &Tensors,
        batch: &[Vec<u32>],
    ) -> Option<Self> {
        let probe = Command::new(interpreter())
            .args(["-c", "import jax"])
            .output();
        if !probe.is_ok_and(|probe| probe.status.success()) {
            eprintln!(
                "No JAX for {:?}, so nothing to compare with. To have it: python3 -m venv jax && \
                 jax/bin/pip install jax, then SEGATTN_PYTHON=jax/bin/python cargo bench --bench model",
                interpreter()
            );
            return None;
        }
        let folder = tempfile::tempdir().expect("a temporary folder");
        write_inputs(folder.path(), config, model, tensors, batch);
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/model/step_jax.py");
        let python =
            Python::start(&script, &[folder.path().as_os_str()]).expect("step_jax.py starts");
        let version = python.hello["version"]
            .as_str()
            .expect("a version")
            .to_owned();
        Some(Jax {
            python,
            version,
            losses: Vec::new(),
        })
    }

    /// One more step; the seconds it took by its own clock.
    fn step(&mut self) -> f64 {
        let answer = self.python.ask(&Value::Null).expect("step_jax.py answers");
        self.losses.push(answer["loss"].as_f64().expect("a loss"));
        answer["seconds"].as_f64().expect("a time")
    }
}

fn write_inputs(
    folder: &Path,
    config: &Config,
    model: &ModelConfig,
    tensors: &Tensors,
    batch: &[Vec<u32>],
) {
    let options = SaveOptions::new(WeightType::F32);
    let values = |i: usize| Ok::<_, WeightsError>(tensors.values[i].clone());
    save(folder, model, values, options).expect("weights can be written");
    let (adamw, tbptt) = (&config.optimizer, config.training.tbptt);
    let settings = json!({
        "tokens": batch,
        "tbptt": (tbptt < SEQUENCE).then_some(tbptt),
        "lr": config.schedule.lr,
        "betas": adamw.betas,
        "eps": adamw.eps,
        "weight_decay": adamw.weight_decay,
        "clip_norm": adamw.clip_norm.expect("the default has a limit"),
    });
    let path = folder.join("bench.json");
    std::fs::write(path, settings.to_string()).expect("settings can be written");
}

/// A training step of `tbptt`, one segment of each sequence at a time and all at once, and JAX's.
fn training(criterion: &mut Criterion, name: &str, tbptt: &str) -> Value {
    let batch: Vec<Vec<u32>> = (0..BATCH).map(|b| tokens(SEQUENCE + 1, b)).collect();
    let batches = [batch];
    let with = |segments| {
        [
            ("training.tbptt", tbptt),
            ("training.segments_per_step", segments),
        ]
    };
    let trainer = |segments| {
        let (config, model) = config(&with(segments));
        let tensors = Tensors::initial(&model, 1);
        Trainer::new(Cpu, model, config, &tensors, None).expect("a trainer")
    };
    let (mut one, mut all) = (trainer("1"), trainer("0"));
    let (settings, model) = config(&with("0"));
    let mut jax = Jax::start(&settings, &model, &Tensors::initial(&model, 1), &batches[0]);
    for step in 0..COMPARED {
        let losses = [&mut one, &mut all].map(|t| t.step_on(&batches).expect("a step").loss);
        assert_eq!(
            losses[0].to_bits(),
            losses[1].to_bits(),
            "equal bits for any segments per step"
        );
        if let Some(jax) = &mut jax {
            jax.step();
            let (ours, theirs) = (losses[0], jax.losses[step]);
            let close = (ours - theirs).abs() <= LOSS_TOLERANCE * ours;
            assert!(close, "step {step} of {name}: loss {ours}, JAX {theirs}");
        }
    }
    let tokens = (BATCH * SEQUENCE) as u64;
    let mut group = criterion.benchmark_group(format!("training step, {name}"));
    group.throughput(Throughput::Elements(tokens));
    for (label, trainer) in [("one segment", &mut one), ("all segments", &mut all)] {
        group.bench_function(label, |b| b.iter(|| trainer.step_on(&batches)));
    }
    group.finish();
    let mut theirs = f64::INFINITY;
    let [one, all, _] = best(
        8,
        Duration::ZERO,
        [
            &mut || drop(one.step_on(&batches)),
            &mut || drop(all.step_on(&batches)),
            &mut || {
                if let Some(jax) = &mut jax {
                    theirs = theirs.min(jax.step());
                }
            },
        ],
    );
    let speed = |seconds: f64| tokens as f64 / seconds;
    json!({
        "what": format!("training step, {name}"),
        "one_segment_tokens_per_s": speed(one),
        "all_segments_tokens_per_s": speed(all),
        "jax_tokens_per_s": jax.as_ref().map(|_| speed(theirs)),
        "jax_version": jax.as_ref().map(|jax| &jax.version),
        "ratio": jax.as_ref().map(|_| theirs / all.min(one)),
        "compared_losses": jax.as_ref().map(|jax| &jax.losses[..COMPARED]),
    })
}

fn decoder(model: &ModelConfig) -> Decoder<Cpu> {
    let weights = initial(model, 1);
    let values = |i: usize| {
        let values = weights.tensor(i);
        let mut buffer = Cpu.empty(Kind::Exact, values.len())?;
        Cpu.write(&mut buffer, 0, &values)?;
        Ok(buffer)
    };
    Decoder::new(Cpu, model.clone(), values, false).expect("enough memory")
}

/// The weights of every GEMM once, and the keys and values that each sequence's next token sees.
fn bytes_read(model: &ModelConfig, batch: usize) -> usize {
    let matrices = specs(model)
        .into_iter()
        .filter(|s| matches!(s.role, Role::Matrix { .. }));
    let weights: usize = matrices.map(|s| s.role.len()).sum();
    let segment = model
        .segment
        .as_ref()
        .expect("the bench's models have segments");
    let rows = segment.segment_len / 2 + segment.prior_len;
    4 * (weights + batch * 2 * rows * model.kv_dim() * model.num_hidden_layers)
}

/// One token for each of `batch` sequences at a time, against reading as many bytes.
fn decoding(criterion: &mut Criterion, name: &str, model: &Decoder<Cpu>, batch: usize) -> Value {
    let mut session = Session::new(model, batch, usize::MAX, 1).expect("a session");
    let prompts: Vec<Vec<u32>> = (0..batch).map(|b| tokens(CONTEXT, b)).collect();
    let feed = |(sequence, tokens)| Feed {
        sequence,
        tokens,
        targets: &[],
        breaks: &[],
        rereads: &[],
    };
    let prompts: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
    let prompts: Vec<Feed<'_>> = prompts.into_iter().enumerate().map(feed).collect();
    session.feed(&prompts).expect("a valid feed");
    let next: Vec<Feed<'_>> = (0..batch).map(|b| feed((b, &[65]))).collect();
    let bytes = bytes_read(&model.config, batch);
    let memory = vec![1.0; bytes / 4];
    let mut step = || drop(session.feed(&next).expect("a valid feed"));
    let [token, read] = best(
        DECODED,
        Duration::ZERO,
        [&mut step, &mut || read_all(&memory)],
    );
    drop(memory);
    let mut group = criterion.benchmark_group(format!("decoding, {name}"));
    group.throughput(Throughput::Elements(batch as u64));
    group.bench_function(format!("batch {batch}"), |b| b.iter(&mut step));
    group.finish();
    json!({
        "what": format!("decoding, {name}, batch {batch}"),
        "tokens_per_s": batch as f64 / token,
        "bytes": bytes,
        "read_gb_per_s": bytes as f64 / read / 1e9,
        "share_of_read": read / token,
    })
}

/// A prompt read at once.
fn prefill(criterion: &mut Criterion, name: &str, model: &Decoder<Cpu>) -> Value {
    let prompt = tokens(SEQUENCE, 0);
    let run = || {
        let mut session = Session::new(model, 1, usize::MAX, 1).expect("a session");
        let feed = Feed {
            sequence: 0,
            tokens: &prompt,
            targets: &[],
            breaks: &[],
            rereads: &[],
        };
        session.feed(&[feed]).expect("a valid feed")
    };
    let [seconds] = best(3, Duration::from_secs(1), [&mut || drop(run())]);
    let mut group = criterion.benchmark_group(format!("prefill, {name}"));
    group.throughput(Throughput::Elements(SEQUENCE as u64));
    group.bench_function(format!("{SEQUENCE} tokens"), |b| b.iter(run));
    group.finish();
    json!({ "what": format!("prefill, {name}"), "tokens_per_s": SEQUENCE as f64 / seconds })
}

/// One line of the table; what was not measured is a dash.
fn line(result: &Value) -> String {
    let number = |key: &str, digits: usize| match result[key].as_f64() {
        Some(x) => format!("{x:.digits$}"),
        None => "-".to_owned(),
    };
    let what = result["what"].as_str().unwrap_or_default();
    if result.get("bytes").is_some() {
        let (speed, share) = (number("tokens_per_s", 1), number("share_of_read", 2));
        let read = number("read_gb_per_s", 1);
        return format!("{what:34} {speed:>9} tokens/s   {share} of reading at {read} GB/s");
    }
    if result.get("tokens_per_s").is_some() {
        return format!("{what:34} {:>9} tokens/s", number("tokens_per_s", 0));
    }
    let [one, all, jax] =
        ["one_segment", "all_segments", "jax"].map(|who| number(&format!("{who}_tokens_per_s"), 0));
    let ratio = number("ratio", 2);
    format!(
        "{what:34} {one:>9} tokens/s one segment at a time, {all} all, JAX {jax}: ratio {ratio}"
    )
}

/// Measures everything, or the rows that `$SEGATTN_BENCH_ONLY` names.
pub fn run() {
    let mut criterion = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(2))
        .configure_from_args();
    let only = std::env::var("SEGATTN_BENCH_ONLY").unwrap_or_default();
    let mut results = Vec::new();
    for (name, tbptt) in [("TBPTT(1)", "1"), ("full BPTT", "1000000")] {
        if name.contains(&only) {
            results.push(training(&mut criterion, name, tbptt));
        }
    }
    for (name, shape) in [("12 MB", &[][..]), ("500 MB", &LARGE[..])] {
        if name.contains(&only) {
            let model = decoder(&config(shape).1);
            results.push(prefill(&mut criterion, name, &model));
            for batch in [1, 8] {
                results.push(decoding(&mut criterion, name, &model, batch));
            }
        }
    }
    criterion.final_summary();
    println!("\n{}", Cpu.description());
    results
        .iter()
        .for_each(|result| println!("{}", line(result)));
    if let Ok(path) = std::env::var("SEGATTN_BENCH_OUT") {
        let raw = json!({ "device": Cpu.description(), "results": results });
        std::fs::write(&path, format!("{raw:#}\n")).expect("the results can be written");
    }
}
