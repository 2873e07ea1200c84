//! The newest figures of a GPU in at most ten rows: ours and the best peer's.

use serde_json::Value;

use crate::attention::{PEERS, case, speed};
use crate::model::{GIB, name, tokens_a_second};
use crate::table::{markdown, number};
use crate::{Raw, Run};

/// A figure of the model's bench.
struct ModelFigure {
    what: &'static str,
    part: &'static str,
    model: &'static str,
    tokens: u64,
    batch: Option<u64>,
    value: fn(&Value) -> Option<f64>,
    more_is_better: bool,
}

const LLAMA_7B: &str = "Llama-2-7B";
const LLAMA_1B: &str = "Llama-3.2-1B";

const MODEL: [ModelFigure; 7] = [
    prefill("7B, first token after 32K tokens, s", 32_768, |row| {
        row["first_token_s"].as_f64()
    }),
    prefill("7B, first token after 128K tokens, s", 131_072, |row| {
        row["first_token_s"].as_f64()
    }),
    prefill(
        "7B, peak memory of reading 128K tokens, GiB",
        131_072,
        |row| Some(row["peak_bytes"].as_f64()? / GIB),
    ),
    throughput(
        "7B, decoding 8 sequences after 6K, tokens/s",
        "decode",
        LLAMA_7B,
        6144,
        Some(8),
    ),
    throughput(
        "1B, decoding 1 sequence after 6K, tokens/s",
        "decode",
        LLAMA_1B,
        6144,
        Some(1),
    ),
    throughput(
        "1B, training at 8K, tokens/s",
        "training",
        LLAMA_1B,
        8192,
        None,
    ),
    throughput(
        "1B, training at 128K, tokens/s",
        "training",
        LLAMA_1B,
        131_072,
        None,
    ),
];

const fn prefill(what: &'static str, tokens: u64, value: fn(&Value) -> Option<f64>) -> ModelFigure {
    ModelFigure {
        what,
        part: "prefill",
        model: LLAMA_7B,
        tokens,
        batch: None,
        value,
        more_is_better: false,
    }
}

const fn throughput(
    what: &'static str,
    part: &'static str,
    model: &'static str,
    tokens: u64,
    batch: Option<u64>,
) -> ModelFigure {
    ModelFigure {
        what,
        part,
        model,
        tokens,
        batch,
        value: tokens_a_second,
        more_is_better: true,
    }
}

/// Cases of the operation's bench, passes and words for them.
const ATTENTION: [[&str; 3]; 3] = [
    [
        "D128 S4096 M4096 R0",
        "forward",
        "attention forward, segments of 4096, TFLOP/s",
    ],
    [
        "D128 S4096 M4096 R0",
        "backward",
        "attention backward, segments of 4096, TFLOP/s",
    ],
    [
        "D128 S2048 M256 R32768",
        "backward",
        "attention backward, 32K past rows on a quarter of the heads, TFLOP/s",
    ],
];

/// The table; a figure comes from the newest run that has it. `pages` is the path of the runs' pages.
pub fn table(runs: &[Run], pages: &str) -> String {
    let model = MODEL
        .iter()
        .filter_map(|figure| newest(runs, |run| model_row(run, figure)));
    let attention = ATTENTION
        .iter()
        .filter_map(|figure| newest(runs, |run| attention_row(run, figure)));
    let rows: Vec<_> = model.chain(attention).collect();
    assert!(rows.len() <= 10, "at most ten rows");
    markdown(
        &["on an H200, bf16", "segattn", "best peer", "ratio", "run"],
        with_ratio(rows, pages),
    )
}

/// What, ours, the best peer's, the peer's name, whether more is better, the run.
type Row = (String, f64, f64, String, bool, String);

fn with_ratio(rows: Vec<Row>, pages: &str) -> Vec<Vec<String>> {
    let cells = |(what, ours, peer, who, more, run): Row| {
        let times = if more { ours / peer } else { peer / ours };
        let date = run
            .get(..10)
            .expect("a run's name begins with its date")
            .to_owned();
        let link = format!("[{date}]({pages}{run}.md)");
        vec![
            what,
            number(ours),
            format!("{} ({who})", number(peer)),
            format!("{times:.2}x"),
            link,
        ]
    };
    rows.into_iter().map(cells).collect()
}

fn newest(runs: &[Run], row: impl Fn(&Run) -> Option<Row>) -> Option<Row> {
    runs.iter().rev().find_map(row)
}

fn on_h200(raw: &Value) -> Option<()> {
    raw["gpu"]
        .as_str()?
        .starts_with("NVIDIA H200")
        .then_some(())
}

fn model_row(run: &Run, figure: &ModelFigure) -> Option<Row> {
    let Raw::Model(raw) = &run.raw else {
        return None;
    };
    on_h200(raw)?;
    let same = |row: &&Value| {
        row["part"] == figure.part
            && row["model"] == figure.model
            && row["tokens"] == figure.tokens
            && row["batch"].as_u64() == figure.batch
    };
    let mut ours = None;
    let mut best: Option<(f64, &str)> = None;
    for row in raw["rows"].as_array()?.iter().filter(same) {
        let Some(value) = (figure.value)(row) else {
            continue;
        };
        match row["who"].as_str()? {
            "segment" => ours = Some(value),
            "segment-host" | "plain" => {}
            who => {
                let better = |(best, _): (f64, &str)| {
                    if figure.more_is_better {
                        value > best
                    } else {
                        value < best
                    }
                };
                if best.is_none_or(better) {
                    best = Some((value, who));
                }
            }
        }
    }
    let (peer, who) = best?;
    let who = name(who).to_owned();
    Some((
        figure.what.into(),
        ours?,
        peer,
        who,
        figure.more_is_better,
        run.name.clone(),
    ))
}

fn attention_row(run: &Run, [wanted, pass, what]: &[&str; 3]) -> Option<Row> {
    let Raw::Attention(raw) = &run.raw else {
        return None;
    };
    on_h200(raw)?;
    let same = |row: &&Value| {
        case(row) == *wanted && row["pass"] == *pass && row["peers"]["cudnn"].is_f64()
    };
    let row = raw["rows"].as_array()?.iter().find(same)?;
    let seconds = |key: &str| row["peers"][key].as_f64();
    let (best, who) = PEERS
        .into_iter()
        .filter_map(|(key, name)| Some((seconds(key)?, name)))
        .min_by(|a, b| a.0.total_cmp(&b.0))?;
    let ours = speed(row);
    let peer = row["operations"].as_f64()? / best;
    Some((
        (*what).into(),
        ours / 1e12,
        peer / 1e12,
        who.into(),
        true,
        run.name.clone(),
    ))
}
