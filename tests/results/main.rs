//! The pages of `docs/results/` and the table of the README are made from the raw results in `benches/runs/`.
//!
//! `SEGATTN_WRITE_RESULTS=1 cargo test --test results` writes them. Without it the test compares what is committed
//! with what the raw results give, so that no figure is typed by hand.

mod attention;
mod headline;
mod model;
mod table;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::Value;

const RUNS: &str = "benches/runs";
const PAGES: &str = "docs/results";
/// The first line of every page that this test owns; other pages of the folder are left alone.
const MARK: &str =
    "<!-- Made from benches/runs by `SEGATTN_WRITE_RESULTS=1 cargo test --test results`. -->\n";

/// A file of raw results.
pub struct Run {
    /// Its name without extension: date, bench, GPU.
    pub name: String,
    pub raw: Raw,
}

/// What a file holds.
pub enum Raw {
    /// `cargo bench --bench attention` on a GPU.
    Attention(Value),
    /// `cargo bench --bench model` on a GPU.
    Model(Value),
    /// `cargo bench --bench model` on a CPU.
    Cpu(Value),
    /// The output of a bench that keeps no figures.
    Text(String),
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// All raw results, the oldest first.
fn runs() -> Vec<Run> {
    let mut runs = Vec::new();
    for entry in std::fs::read_dir(root().join(RUNS)).expect(RUNS) {
        let path = entry.expect(RUNS).path();
        let name = path
            .file_stem()
            .expect("a name")
            .to_string_lossy()
            .into_owned();
        let raw = match path.extension().and_then(|e| e.to_str()) {
            Some("svg") => continue,
            Some("txt") => Raw::Text(read(&path)),
            Some("json") => {
                let value: Value = serde_json::from_str(&read(&path)).expect("valid JSON");
                match (
                    &value["rows"][0]["case"],
                    &value["rows"][0]["part"],
                    &value["results"],
                ) {
                    (Value::String(_), ..) => Raw::Attention(value),
                    (_, Value::String(_), _) => Raw::Model(value),
                    (.., Value::Array(_)) => Raw::Cpu(value),
                    _ => panic!("{}: no bench known here writes such a file", path.display()),
                }
            }
            _ => panic!("{}: expected .json, .txt or .svg", path.display()),
        };
        runs.push(Run { name, raw });
    }
    runs.sort_by(|a, b| a.name.cmp(&b.name));
    runs
}

/// The page of one run.
fn page(run: &Run) -> String {
    let body = match &run.raw {
        Raw::Attention(raw) => attention::page(raw),
        Raw::Model(raw) => model::gpu(&run.name, raw),
        Raw::Cpu(raw) => model::cpu(raw),
        Raw::Text(text) => format!("```text\n{}\n```\n", text.trim()),
    };
    format!("{MARK}\n# {}\n\n{body}", run.name)
}

/// The list of all runs, the newest first.
fn index(runs: &[Run]) -> String {
    let rows = runs.iter().rev().map(|run| {
        let (bench, device) = match &run.raw {
            Raw::Attention(raw) => ("attention", raw["gpu"].as_str()),
            Raw::Model(raw) => ("model", raw["gpu"].as_str()),
            Raw::Cpu(raw) => ("model", raw["device"].as_str()),
            Raw::Text(_) => ("printed output", None),
        };
        let link = format!("[{0}]({0}.md)", run.name);
        vec![link, bench.into(), device.unwrap_or("").into()]
    });
    let list = table::markdown(&["run", "bench", "device"], rows.collect());
    let newest = headline::table(runs, "");
    let experiments: String = experiments()
        .iter()
        .map(|name| format!("- [{name}]({name}.md)\n"))
        .collect();
    format!(
        "{MARK}\n# Results\n\nMade from the raw results in `benches/runs/`, one page for each file. A run is dated, \
         and a later\nrun does not replace an earlier one. How to run the benches: \
         [docs/gpu.md](../gpu.md).\n\n\
         ## The newest figures in short\n\n{newest}\n## Experiments\n\n\
         Made by `segattn report` from the rows in `experiments/results/`.\n\n\
         {experiments}\n## Planted bugs\n\n\
         [planted-bugs](planted-bugs.md): which bugs planted into the kernels their tests catch, by `sim/planted`.\n\n\
         ## All runs\n\n{list}"
    )
}

/// Pages of experiments, which `tests/experiments.rs` compares with their rows; the newest first.
fn experiments() -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(root().join("experiments/results"))
        .expect("experiments/results")
        .map(|entry| entry.expect("an entry").path())
        .filter(|path| path.extension().is_some_and(|ending| ending == "jsonl"))
        .map(|path| {
            format!(
                "experiment-{}",
                path.file_stem().expect("a name").to_string_lossy()
            )
        })
        .collect();
    names.sort_unstable_by(|a, b| b.cmp(a));
    names
}

/// The README with the newest figures between its two marks.
fn readme(runs: &[Run]) -> String {
    let text = read(&root().join("README.md"));
    let [begin, end] = ["<!-- results: begin -->\n", "<!-- results: end -->"];
    let (before, rest) = text.split_once(begin).expect("README.md has a begin mark");
    let (_, after) = rest.split_once(end).expect("README.md has an end mark");
    format!(
        "{before}{begin}{}{end}{after}",
        headline::table(runs, "docs/results/")
    )
}

/// Every file that this test owns, with its text.
fn pages() -> BTreeMap<PathBuf, String> {
    let runs = runs();
    let folder = root().join(PAGES);
    let mut pages: BTreeMap<_, _> = runs
        .iter()
        .map(|run| (folder.join(format!("{}.md", run.name)), page(run)))
        .collect();
    pages.insert(folder.join("README.md"), index(&runs));
    pages.insert(root().join("README.md"), readme(&runs));
    pages
}

#[test]
fn committed_results_are_what_the_raw_results_give() {
    let pages = pages();
    if std::env::var_os("SEGATTN_WRITE_RESULTS").is_some() {
        std::fs::create_dir_all(root().join(PAGES)).expect(PAGES);
        for (path, text) in &pages {
            std::fs::write(path, text)
                .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        }
    }
    for (path, text) in &pages {
        let committed = std::fs::read_to_string(path).unwrap_or_default();
        assert!(
            committed == *text,
            "{} differs from {RUNS}: SEGATTN_WRITE_RESULTS=1 cargo test --test results",
            path.display()
        );
    }
    for entry in std::fs::read_dir(root().join(PAGES)).expect(PAGES) {
        let path = entry.expect(PAGES).path();
        let ours = path.extension().is_some_and(|e| e == "md") && read(&path).starts_with(MARK);
        assert!(
            !ours || pages.contains_key(&path),
            "{}: its run is gone",
            path.display()
        );
    }
}
