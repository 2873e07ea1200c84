//! Rows, kept in a dated file; tables and plots of all that is in it.

use std::io::Write;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use segattn::cuda::KERNEL_ARCHITECTURES;
use serde_json::{Map, Value, json};

use super::super::date::date;
use super::plot::{Chart, draw};
use super::{GIB, Result};

/// What tells rows apart, in the order in which it is shown.
const KEYS: [&str; 5] = ["part", "model", "who", "batch", "tokens"];

/// All rows of a day on a GPU.
pub struct Report {
    path: PathBuf,
    raw: Map<String, Value>,
    /// Whether rows are written: not those of a profile.
    kept: bool,
}

impl Report {
    /// The day's report, with the rows that it has already.
    pub fn open(gpu: &str, kept: bool) -> Result<Self> {
        let folder = std::env::var_os("SEGATTN_BENCH_RUNS").map(PathBuf::from);
        let folder = folder.unwrap_or(concat!(env!("CARGO_MANIFEST_DIR"), "/benches/runs").into());
        std::fs::create_dir_all(&folder)?;
        let today = date(unix_seconds() / 86_400);
        let name = gpu.split(" (").next().unwrap_or(gpu);
        let path = folder.join(format!(
            "{today}-model-{}.json",
            name.to_lowercase().replace(' ', "-")
        ));
        let raw = match std::fs::read_to_string(&path) {
            Ok(text) => serde_json::from_str(&text)?,
            Err(_) => {
                let head = json!({
                    "date": today, "gpu": gpu, "kernels": KERNEL_ARCHITECTURES, "rows": [],
                });
                head.as_object().cloned().unwrap_or_default()
            }
        };
        println!("{gpu}; kernels for {KERNEL_ARCHITECTURES}");
        Ok(Self { path, raw, kept })
    }

    /// A report made before, wherever.
    pub fn load(path: PathBuf) -> Result<Self> {
        let raw = serde_json::from_str(&std::fs::read_to_string(&path)?)?;
        let kept = true;
        Ok(Self { path, raw, kept })
    }

    fn rows(&self) -> &[Value] {
        self.raw["rows"].as_array().map_or(&[], Vec::as_slice)
    }

    /// Something else than a row.
    pub fn note(&mut self, name: &str, value: Value) {
        self.raw.insert(name.to_owned(), value);
    }

    /// Prints a row and keeps it: its figures beside or in place of what a row of the same key has.
    pub fn push(&mut self, key: Value, figures: Value) -> Result<()> {
        println!("{key} {figures}");
        // A run that is cut short still shows what it has.
        std::io::stdout().flush()?;
        let same = |row: &&mut Value| KEYS.iter().all(|k| row.get(k) == key.get(k));
        let rows = self.raw["rows"].as_array_mut().ok_or("rows are a list")?;
        let row = match rows.iter_mut().find(same) {
            Some(row) => row,
            None => {
                rows.push(key);
                rows.last_mut().ok_or("a row was just pushed")?
            }
        };
        let row = row.as_object_mut().ok_or("a row is an object")?;
        row.remove("failed");
        row.insert("at".into(), json!(unix_seconds()));
        row.extend(figures.as_object().cloned().unwrap_or_default());
        self.write()
    }

    fn write(&self) -> Result<()> {
        if self.kept {
            std::fs::write(&self.path, serde_json::to_string_pretty(&self.raw)? + "\n")?;
        }
        Ok(())
    }

    /// Prints the tables, writes rows and plots.
    pub fn finish(&self) -> Result<()> {
        let columns = [
            "first_token_s",
            "peak_bytes",
            "per_token_s",
            "decoding_peak_bytes",
        ];
        self.table("prefill", &columns);
        self.flatness();
        self.table("decode", &["tokens_per_s", "step_s", "peak_bytes"]);
        self.table("training", &["tokens_per_s", "step_s", "peak_bytes"]);
        if !self.kept {
            return Ok(());
        }
        self.write()?;
        println!("raw results: {}", self.path.display());
        for (figure, title, scale) in [
            ("peak_bytes", "Peak memory of prefill, GiB", 1.0 / GIB),
            ("first_token_s", "Time to first token, s", 1.0),
            ("per_token_s", "Time per token of decoding, ms", 1e3),
        ] {
            let name = figure
                .trim_end_matches("_s")
                .trim_end_matches("_bytes")
                .replace('_', "-");
            let path = self.path.with_extension(format!("{name}.svg"));
            let chart = self.chart(figure, title, scale);
            if !chart.lines.is_empty() {
                draw(&chart, &path)?;
                println!("plot: {}", path.display());
            }
        }
        Ok(())
    }

    /// A figure of the prefills by context, a line for each implementation.
    fn chart(&self, figure: &str, title: &str, scale: f64) -> Chart {
        let mut chart = Chart::new(title);
        for (who, label) in [
            ("segment", "segment attention"),
            ("segment-host", "segment attention, pool on the host"),
            ("plain", "full attention, our kernels"),
            ("flash", "Transformers, FlashAttention-2"),
            ("cudnn", "Transformers, cuDNN"),
            ("compiled", "PyTorch, compiled"),
        ] {
            let of = |row: &&Value| row["part"] == "prefill" && row["who"] == who;
            let point =
                |row: &Value| Some((row["tokens"].as_f64()?, scale * row[figure].as_f64()?));
            let mut line: Vec<_> = self.rows().iter().filter(of).filter_map(point).collect();
            line.sort_by(|a, b| a.0.total_cmp(&b.0));
            if !line.is_empty() {
                chart.lines.push((label.to_owned(), line));
            }
        }
        chart
    }

    /// Time per token of decoding at the longest context over that at 32K.
    fn flatness(&self) {
        for (who, line) in &self.chart("per_token_s", "", 1.0).lines {
            let base = line.iter().find(|at| at.0 == 32_768.0);
            if let (Some((from, base)), Some((to, last))) = (base, line.last()) {
                println!(
                    "time per token at {to} over {from}: {:.3}, {who}",
                    last / base
                );
            }
        }
    }

    /// A figure over that of segment attention at the same context: "3.1x".
    fn over_ours(&self, row: &Value, figure: &str) -> Option<String> {
        let same = |r: &&Value| {
            let keys = ["part", "model", "batch", "tokens"];
            r["who"] == "segment" && keys.iter().all(|k| r.get(k) == row.get(k))
        };
        let ours = self.rows().iter().find(same)?[figure].as_f64()?;
        (row["who"] != "segment").then_some(())?;
        Some(format!("{:.2}x", row[figure].as_f64()? / ours))
    }

    fn table(&self, part: &str, figures: &[&str]) {
        let rows: Vec<&Value> = self.rows().iter().filter(|r| r["part"] == part).collect();
        if rows.is_empty() {
            return;
        }
        println!("\n{part}");
        let heads = figures.iter().map(|f| format!("{:>14}{:8}", head(f), ""));
        println!("{:46}{}", "", heads.collect::<String>());
        for row in rows {
            let text = |key: &str| row[key].as_str().unwrap_or_default().to_owned();
            let batch = row["batch"]
                .as_u64()
                .map_or(String::new(), |b| format!("batch {b}, "));
            let tokens = row["tokens"].as_u64().unwrap_or_default();
            let name = format!("{} {:12} {batch}{tokens}", text("model"), text("who"));
            let shown = |figure: &&str| {
                let over = self.over_ours(row, figure).unwrap_or_default();
                format!("{:>14}{over:>8}", cell(row, figure))
            };
            let cells: String = match row["failed"].as_str() {
                Some(failed) => format!("  {failed}"),
                None => figures.iter().map(shown).collect(),
            };
            println!("{name:46}{cells}");
        }
    }
}

/// When a row was measured: rows of a file may be of several runs.
fn unix_seconds() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |time| time.as_secs())
}

fn head(figure: &str) -> &'static str {
    match figure {
        "first_token_s" => "first token s",
        "peak_bytes" => "peak GiB",
        "decoding_peak_bytes" => "decoding GiB",
        "per_token_s" => "ms a token",
        "tokens_per_s" => "tokens/s",
        _ => "step ms",
    }
}

fn cell(row: &Value, figure: &str) -> String {
    let number = |key: &str| row[key].as_f64();
    let shown = match figure {
        "first_token_s" => number(figure).map(|x| format!("{x:.3}")),
        "peak_bytes" | "decoding_peak_bytes" => number(figure).map(|x| format!("{:.2}", x / GIB)),
        "per_token_s" | "step_s" => number(figure).map(|x| format!("{:.3}", 1e3 * x)),
        // Of a step: one for each sequence where there is a batch, else the whole sequence.
        _ => number("step_s").and_then(|seconds| {
            let tokens = number("batch").or(number("tokens"))?;
            Some(format!("{:.1}", tokens / seconds))
        }),
    };
    shown.unwrap_or("-".into())
}
