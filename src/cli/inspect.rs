//! `segattn inspect`: what a model folder holds, and the memory it will take.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::builder::RangedU64ValueParser;
use segattn::model::config::ModelConfig;
use segattn::model::memory::{Memory, Use, memory};
use segattn::model::parameters::parameters;
use segattn::model::tokenizer::{Tokenizer, end_ids};
use segattn::model::weights::Checkpoint;
use serde_json::{Value, json};

use super::device::{DeviceArgs, DeviceName};
use super::model::load_config;
use super::out::{out, out_part};
use super::plan::{self, Place, Planner};

/// Bytes of a number on the CPU.
const ELEMENT_BYTES: usize = 4;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Folder of the model: config.json, *.safetensors, tokenizer.json
    #[arg(value_name = "DIR")]
    model: PathBuf,
    /// Sequence lengths to estimate the memory for
    #[arg(
        long,
        value_name = "TOKENS,...",
        value_delimiter = ',',
        default_values_t = [4096, 32_768, 262_144, 1_048_576],
        value_parser = at_least_one()
    )]
    context: Vec<usize>,
    #[command(flatten)]
    device: DeviceArgs,
    /// Sequences side by side, for the memory of a GPU
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = at_least_one())]
    batch: usize,
    /// Segments that a loss reaches back, for the memory of training
    #[arg(long, value_name = "K", default_value_t = 1)]
    tbptt: usize,
    /// Segments computed side by side, for the memory of training, and of a GPU; 0 for all
    #[arg(long, value_name = "N", default_value_t = 1)]
    segments_per_step: usize,
    /// Activations computed again instead of kept, for the memory of training
    #[arg(long)]
    recompute: bool,
    /// Ranks that train together, each on --batch sequences, for the memory of training on one of them
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = at_least_one())]
    ranks: usize,
    /// Sequences of one gradient sum, for the memory of training [default: as training.group]
    #[arg(long, value_name = "N", value_parser = at_least_one())]
    group: Option<usize>,
    /// Stages that share the layers, for the memory on the one that takes most
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = at_least_one())]
    stages: usize,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

fn at_least_one() -> RangedU64ValueParser<usize> {
    RangedU64ValueParser::new().range(1..1 << 32)
}

pub fn run(args: &Args) -> Result<()> {
    let config = load_config(&args.model)?;
    let layers = config.num_hidden_layers;
    ensure!(
        args.stages <= layers,
        "--stages: expected at most {layers}, the model's layers, got {}",
        args.stages
    );
    ensure!(
        args.stages == 1 || args.ranks == 1,
        "--ranks, --stages: expected one of them, since training is spread by sequences or by layers; got {} and {}",
        args.ranks,
        args.stages
    );
    let rows = estimates(&config, args);
    let planned = match args.device.device {
        DeviceName::Cpu => None,
        DeviceName::Cuda => Some(plan::rows(&args.planner(&config), &args.context)?),
    };
    let weights = Checkpoint::open(&args.model);
    let fits = match &weights {
        Ok(weights) => weights.check(&config),
        Err(_) => Ok(()),
    };
    let mut report = json!({
        "folder": args.model.to_string_lossy(),
        "architecture": architecture(&config),
        "parameters": counts(&config),
        "weights": weights.as_ref().map(stored).unwrap_or(Value::Null),
        "tokenizer": tokenizer(&args.model, &config),
        "segment": segment(&config),
        "memory": rows.iter().map(row_json).collect::<Vec<_>>(),
    });
    if let (Ok(ids), Some(object)) = (end_ids(&args.model, &config), report.as_object_mut()) {
        object.insert("end_ids".into(), json!(ids));
    }
    if let Some((place, rows)) = &planned {
        report["memory"] = json!({"place": place, "rows": rows});
    }
    match (args.json, &planned) {
        (true, _) => out!("{report:#}")?,
        (false, None) => out_part!("{}{}", text(&report), estimated(args, &rows))?,
        (false, Some((place, rows))) => {
            out_part!("{}{}", text(&report), planned_text(args, place, rows))?
        }
    }
    fits.and(weights.map(drop))
        .context("the weights cannot be used")
}

impl Args {
    fn planner<'a>(&self, config: &'a ModelConfig) -> Planner<'a> {
        Planner {
            config,
            pool: self.device.pool.0,
            batch: self.batch,
            segments_per_step: self.side_by_side(),
            tbptt: self.tbptt,
            recompute: self.recompute,
            ranks: self.ranks,
            group: self.group,
            stages: self.stages,
        }
    }

    /// Over how many processes, where they are several.
    fn spread(&self) -> String {
        let named = [("stages", self.stages), ("ranks", self.ranks)];
        let many = named.into_iter().filter(|(_, count)| *count > 1);
        many.map(|(name, count)| format!(", on one of {count} {name}"))
            .collect()
    }

    fn side_by_side(&self) -> usize {
        match self.segments_per_step {
            0 => usize::MAX,
            n => n,
        }
    }
}

fn architecture(config: &ModelConfig) -> Value {
    json!({
        "family": config.family.model_type,
        "layers": config.num_hidden_layers,
        "hidden": config.hidden_size,
        "inner": config.intermediate_size,
        "q_heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "head_dim": config.file_head_dim,
        "vocabulary": config.vocab_size,
        "tied": config.tie_word_embeddings,
    })
}

/// Numbers of parameters by kind. Gates count only where a layer reads the past.
fn counts(config: &ModelConfig) -> Value {
    let mut kinds = BTreeMap::new();
    let mut total = 0;
    for parameter in parameters(config) {
        let kind = match parameter.name.as_str() {
            name if name.ends_with(".self_attn.past_gate") => "past gates",
            name if name.ends_with(".self_attn.sink_logits") => "sink logits",
            name if name.contains(".self_attn.") => "attention",
            name if name.contains(".mlp.") => "mlp",
            name if name.contains("norm") => "norms",
            name if name.starts_with("lm_head") => "head",
            _ => "embedding",
        };
        *kinds.entry(kind).or_insert(0) += parameter.numel();
        total += parameter.numel();
    }
    json!({"total": total, "by_kind": kinds})
}

fn stored(weights: &Checkpoint) -> Value {
    let (mut formats, mut bytes) = (BTreeMap::new(), 0);
    for (_, entry) in weights.tensors() {
        *formats.entry(entry.format.name()).or_insert(0u64) += 1;
        bytes += entry.bytes;
    }
    json!({"files": weights.shards().len(), "bytes": bytes, "tensors_by_format": formats})
}

fn tokenizer(folder: &Path, config: &ModelConfig) -> Value {
    match Tokenizer::open(folder, config) {
        Ok(tokenizer) if tokenizer.is_bytes() => {
            json!({"kind": "bytes", "ids": tokenizer.vocab_size()})
        }
        Ok(tokenizer) => json!({"kind": "tokenizer.json", "ids": tokenizer.vocab_size()}),
        Err(error) => json!({"kind": "none", "problem": error.to_string()}),
    }
}

/// The segment object, with one letter for each KV head of a layer.
fn segment(config: &ModelConfig) -> Value {
    let Some(segment) = &config.segment else {
        return Value::Null;
    };
    let letter = |l: usize, g: usize| match (config.reads_prior(l, g), config.reads_past(l, g)) {
        (false, false) => '.',
        (true, false) => 'r',
        (false, true) => 'a',
        (true, true) => 'B',
    };
    let roles = |l: usize| {
        (0..config.num_key_value_heads)
            .map(|g| letter(l, g))
            .collect::<String>()
    };
    json!({
        "segment_len": segment.segment_len,
        "prior_len": segment.prior_len,
        "past_len": segment.past_len,
        "sink_len": segment.sink_len,
        "pool_bits": segment.pool_bits.count(),
        "pool_len": segment.pool_len,
        "retrieval": segment.retrieval.to_json(),
        "break_ids": segment.break_ids,
        "break_after_prompt": segment.break_after_prompt,
        "prompt_suffix_len": segment.prompt_suffix_len,
        "reread_suffix": segment.reread_suffix,
        "layers": (0..config.num_hidden_layers).map(roles).collect::<Vec<_>>(),
    })
}

/// Memory at one length: to read (score, generate) and to train.
struct Row {
    tokens: usize,
    read: Memory,
    train: Memory,
}

fn estimates(config: &ModelConfig, args: &Args) -> Vec<Row> {
    let train = |behind: usize| Use::Train {
        tbptt: args.tbptt,
        segments_per_step: args.side_by_side(),
        recompute: args.recompute,
        // The estimate is of one sequence.
        gradient_sets: 1,
        ranks: args.ranks,
        behind,
    };
    let parts = config.stages(args.stages, true);
    let parts: Vec<_> = parts.into_iter().map(|l| config.part_of(l)).collect();
    let most = |tokens: usize, run: &dyn Fn(usize) -> Use| {
        let each = parts.iter().rev().enumerate();
        let each = each.map(|(behind, part)| memory(part, tokens, run(behind), ELEMENT_BYTES));
        each.max_by_key(Memory::total).expect("a stage")
    };
    let row = |tokens: &usize| Row {
        tokens: *tokens,
        read: most(*tokens, &|_| Use::Read),
        train: most(*tokens, &train),
    };
    args.context.iter().map(row).collect()
}

fn row_json(row: &Row) -> Value {
    let memory = |m: &Memory| {
        json!({
            "weights": m.weights, "slots": m.slots, "state": m.state, "pool": m.pool,
            "activations": m.activations, "total": m.total(),
        })
    };
    json!({"tokens": row.tokens, "read": memory(&row.read), "train": memory(&row.train)})
}

/// A line of the report.
fn push_line(out: &mut String, name: &str, text: &str) {
    let text = format!("{name:<11} {text}");
    out.push_str(text.trim_end());
    out.push('\n');
}

fn text(report: &Value) -> String {
    let mut out = String::new();
    let a = &report["architecture"];
    let mut line = |name: &str, text: String| push_line(&mut out, name, &text);
    line(
        "model",
        report["folder"].as_str().unwrap_or_default().to_owned(),
    );
    line(
        "shape",
        format!(
            "{}, {} layers, hidden {}, MLP {}, {} query / {} KV heads of {}, vocabulary {}{}",
            a["family"].as_str().unwrap_or_default(),
            a["layers"],
            a["hidden"],
            a["inner"],
            a["q_heads"],
            a["kv_heads"],
            a["head_dim"],
            a["vocabulary"],
            if a["tied"] == true { ", tied" } else { "" },
        ),
    );
    let p = &report["parameters"];
    line(
        "parameters",
        format!("{}: {}", p["total"], pairs(&p["by_kind"])),
    );
    match &report["weights"] {
        Value::Null => line("weights", "none that can be read".into()),
        w => {
            let bytes = size(w["bytes"].as_u64().unwrap_or(0));
            let formats = pairs(&w["tensors_by_format"]);
            line(
                "weights",
                format!("{} file(s), {bytes}, tensors: {formats}", w["files"]),
            );
        }
    }
    let t = &report["tokenizer"];
    let kind = t["kind"].as_str().unwrap_or_default();
    line(
        "tokenizer",
        match t["problem"].as_str() {
            Some(problem) => format!("{kind}: {problem}"),
            None => format!("{kind}, {} ids", t["ids"]),
        },
    );
    match &report["segment"] {
        Value::Null => line("segments", "none: full attention".into()),
        s => {
            let lens = format!(
                "segment_len {}, prior_len {}, past_len {}, sink_len {}, pool_bits {}, pool_len {}",
                s["segment_len"],
                s["prior_len"],
                s["past_len"],
                s["sink_len"],
                s["pool_bits"],
                match &s["pool_len"] {
                    len if *len == 0 => json!("unbounded"),
                    len => len.clone(),
                },
            );
            line("segments", lens);
            line("retrieval", pairs(&s["retrieval"]));
            if s["break_ids"] != json!([]) {
                line("", format!("end early after the tokens {}", s["break_ids"]));
            }
            if s["break_after_prompt"] == true {
                let after = match s["prompt_suffix_len"].as_u64() {
                    None | Some(0) => "after a prompt".into(),
                    Some(len) => format!("{len} tokens before the end of a prompt"),
                };
                let again = match s["reread_suffix"].as_u64() {
                    None | Some(0) => String::new(),
                    Some(times) => format!("; these are read again, times: {times}"),
                };
                line("", format!("end early {after}{again}"));
            }
            let roles = s["layers"]
                .as_array()
                .map(Vec::as_slice)
                .unwrap_or_default();
            for (name, roles) in role_map(roles) {
                line("", format!("{name:<9} {roles}"));
            }
            line(
                "",
                "a letter a KV head: r prior, a past, B both, . neither".into(),
            );
        }
    }
    line("", String::new());
    out
}

/// The memory on the CPU.
fn estimated(args: &Args, rows: &[Row]) -> String {
    let mut out = String::new();
    let mut line = |name: &str, text: String| push_line(&mut out, name, &text);
    line(
        "memory",
        format!(
            "of one sequence in f32{}; pool: the part that grows",
            args.spread()
        ),
    );
    let head = [
        "tokens",
        "weights",
        "state",
        "pool",
        "score/generate",
        "train",
    ];
    line("", head.map(|h| format!("{h:>15}")).concat());
    for row in rows {
        let state = row.read.slots + row.read.state;
        let cells = [
            row.read.weights,
            state,
            row.read.pool,
            row.read.total(),
            row.train.total(),
        ];
        let cells = cells.map(|bytes| format!("{:>15}", size(bytes))).concat();
        line("", format!("{:>15}{cells}", row.tokens));
    }
    out
}

/// The memory on a GPU.
fn planned_text(args: &Args, place: &Place, rows: &[plan::Row]) -> String {
    let mut out = String::new();
    let mut line = |name: &str, text: String| push_line(&mut out, name, &text);
    let step = match args.segments_per_step {
        0 => "all segments".to_owned(),
        n => format!("{n} segment(s)"),
    };
    let run = format!(
        "batch {}, {step} per step, tbptt {}{}",
        args.batch,
        args.tbptt,
        args.spread()
    );
    line("memory", format!("on the GPU ({}), {run}", place.gpu));
    line(
        "",
        "device: what is taken at once before the run; host: pinned memory of pools".into(),
    );
    if let Some(bytes) = place.elsewhere {
        let bytes = size(bytes as u64);
        line(
            "",
            format!("beside it, the driver, loaded kernels and other programs: {bytes}"),
        );
    }
    let head = [
        "weights",
        "optimizer",
        "state",
        "activations",
        "pool",
        "device",
        "host",
    ];
    let cells = |cells: [String; 7]| cells.map(|c| format!("{c:>13}")).concat();
    line(
        "",
        format!(
            "{:>9} {:<8}{}",
            "tokens",
            "for",
            cells(head.map(str::to_owned))
        ),
    );
    for row in rows {
        let bytes = [
            row.weights,
            row.optimizer,
            row.state,
            row.activations,
            row.pool,
            row.device,
            row.host,
        ];
        let bytes = cells(bytes.map(|bytes| size(bytes as u64)));
        line("", format!("{:>9} {:<8}{bytes}", row.tokens, row.run));
        if !row.stages.is_empty() {
            let each = row.stages.iter().map(|bytes| size(*bytes as u64));
            let each = each.collect::<Vec<_>>().join(", ");
            line("", format!("{:>18}device of each stage: {each}", ""));
        }
    }
    out
}

fn pairs(object: &Value) -> String {
    let entries = object.as_object().into_iter().flatten();
    entries
        .map(|(name, n)| format!("{name} {n}"))
        .collect::<Vec<_>>()
        .join(", ")
}

/// Runs of layers whose heads read the same.
fn role_map(roles: &[Value]) -> Vec<(String, String)> {
    let mut map: Vec<(usize, usize, &str)> = Vec::new();
    for (l, roles) in roles.iter().enumerate() {
        let roles = roles.as_str().unwrap_or_default();
        match map.last_mut() {
            Some((_, last, same)) if *same == roles => *last = l,
            _ => map.push((l, l, roles)),
        }
    }
    let name = |(first, last, roles): (usize, usize, &str)| {
        let layers = if first == last {
            format!("{first}")
        } else {
            format!("{first}-{last}")
        };
        (format!("layer {layers}"), roles.to_owned())
    };
    map.into_iter().map(name).collect()
}

fn size(bytes: u64) -> String {
    let mut value = bytes as f64;
    for unit in ["B", "KiB", "MiB", "GiB"] {
        if value < 1024.0 {
            return format!("{value:.1} {unit}");
        }
        value /= 1024.0;
    }
    format!("{value:.1} TiB")
}
