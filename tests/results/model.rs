//! Results of whole models, on a GPU and on a CPU.

use serde_json::Value;

use crate::attention::machine;
use crate::table::{markdown, number, tokens};

pub const GIB: f64 = (1u64 << 30) as f64;

/// Who was measured, by the name in the raw results.
pub fn name(who: &str) -> &str {
    match who {
        "segment" => "segattn",
        "segment-host" => "segattn, pool in host memory",
        "plain" => "segattn, full attention",
        "flash" => "Transformers, FlashAttention-2",
        "cudnn" => "Transformers, cuDNN",
        "compiled" => "PyTorch, compiled",
        other => other,
    }
}

pub fn gpu(run: &str, raw: &Value) -> String {
    let rows = raw["rows"].as_array().expect("rows");
    let mut text = machine(raw);
    for (part, title) in [
        ("prefill", "Reading a prompt, and the tokens after it"),
        ("decode", "Decoding"),
        ("training", "Training one sequence a step"),
    ] {
        let mut rows: Vec<&Value> = rows.iter().filter(|row| row["part"] == part).collect();
        if rows.is_empty() {
            continue;
        }
        let key = |row: &&Value| {
            (
                row["model"].to_string(),
                row["batch"].as_u64(),
                row["tokens"].as_u64(),
            )
        };
        rows.sort_by_key(key);
        let heads = [
            "model",
            "tokens",
            "batch",
            "who",
            "first token, s",
            "ms a token",
            "ms a step",
            "tokens/s",
            "peak GiB",
        ];
        text += &format!("\n## {title}\n\n");
        text += &markdown(&heads, rows.into_iter().map(cells).collect());
        text += &plots(run, part);
    }
    text
}

fn plots(run: &str, part: &str) -> String {
    let figures: &[[&str; 2]] = match part {
        "prefill" => &[
            ["first-token", "Time to first token against tokens read"],
            ["peak", "Peak memory against tokens read"],
            ["per-token", "Time per token against tokens read"],
        ],
        _ => &[],
    };
    let plot = |[figure, title]: &[&str; 2]| {
        let path = format!("benches/runs/{run}.{figure}.svg");
        let exists = crate::root().join(&path).exists();
        exists.then(|| format!("\n![{title}](../../{path})\n"))
    };
    figures.iter().filter_map(plot).collect()
}

/// Tokens a second of a row with a step.
pub fn tokens_a_second(row: &Value) -> Option<f64> {
    // A step is a token for each sequence where there is a batch, else the whole sequence.
    Some(row["batch"].as_f64().or(row["tokens"].as_f64())? / row["step_s"].as_f64()?)
}

fn cells(row: &Value) -> Vec<String> {
    let text = |key: &str| row[key].as_str().unwrap_or_default().to_owned();
    let figure = |key: &str, scale: f64| {
        row[key]
            .as_f64()
            .map_or(String::new(), |x| number(scale * x))
    };
    vec![
        text("model"),
        row["tokens"].as_u64().map_or(String::new(), tokens),
        row["batch"]
            .as_u64()
            .map_or(String::new(), |batch| batch.to_string()),
        name(&text("who")).to_owned(),
        row["failed"]
            .as_str()
            .map_or(figure("first_token_s", 1.0), str::to_owned),
        figure("per_token_s", 1e3),
        figure("step_s", 1e3),
        tokens_a_second(row).map_or(String::new(), number),
        figure("peak_bytes", 1.0 / GIB),
    ]
}

pub fn cpu(raw: &Value) -> String {
    let heads = [
        "what",
        "tokens/s",
        "one segment a step",
        "JAX",
        "times JAX",
        "reading, GB/s",
        "share of reading",
    ];
    let rows = raw["results"]
        .as_array()
        .expect("results")
        .iter()
        .map(|row| {
            let figure = |key: &str| row[key].as_f64().map_or(String::new(), number);
            let all = [figure("tokens_per_s"), figure("all_segments_tokens_per_s")].concat();
            vec![
                row["what"].as_str().expect("what").to_owned(),
                all,
                figure("one_segment_tokens_per_s"),
                figure("jax_tokens_per_s"),
                figure("ratio"),
                figure("read_gb_per_s"),
                figure("share_of_read"),
            ]
        });
    let device = raw["device"].as_str().expect("device");
    format!("{device}.\n\n{}", markdown(&heads, rows.collect()))
}
