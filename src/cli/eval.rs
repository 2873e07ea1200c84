//! `segattn eval`: perplexity on documents and synthetic long-context tasks, as a table and as JSON.

mod choices;

use std::path::PathBuf;
use std::str::FromStr;

use anyhow::{Context, Result, bail, ensure};
use clap::builder::RangedU64ValueParser;
use indicatif::ProgressBar;
use segattn::device::Device;
use segattn::eval::choice::ChoiceReport;
use segattn::eval::run::Cell;
use segattn::eval::{
    Document, EvalError, Greedy, Oracle, PerplexityConfig, PerplexityReport, Report, RunConfig,
    TaskKind, perplexity, run as run_tasks,
};
use segattn::generate::dry_run::Reading;
use segattn::model::config::ModelConfig;
use segattn::model::decoder::Decoder;
use segattn::model::tokenizer::Tokenizer;
use serde::Serialize;

use choices::Choices;

use super::device::{DeviceArgs, Planned, on_device};
use super::documents::read_documents;
use super::files::{BreakArgs, Results as Place};
use super::generate::progress;
use super::model::{Adapt, ModelArgs};
use super::out::out;
use super::ranks::Party;
use super::stages::StageArgs;

/// The tasks that are no synthetic ones.
pub const PERPLEXITY: &str = "perplexity";
const LONGBENCH: &str = "longbench_v2";

/// Runs the tasks one after the other and prints a table of each kind.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    stages: StageArgs,
    /// Positions scaled by this object instead of the model's own `rope_scaling`, JSON with the keys of config.json and
    /// `rope_theta`
    #[arg(long, value_name = "JSON", value_parser = object)]
    rope_scaling: Option<Object>,
    /// perplexity (needs --data), passkey, ruler (all of RULER that needs no download), niah (its
    /// needle tasks), niah_single_1 to 3, niah_multikey_1 to 3, niah_multivalue, niah_multiquery,
    /// vt (tracked variables), cwe, fwe (common and frequent words), ordinal (the n-th of equal titles),
    /// multi_hop (three facts), relay (the letter stated first, for models trained on it), longbench_v2 (multiple
    /// choice, needs --questions)
    #[arg(
        short,
        long,
        value_name = "TASK,...",
        value_delimiter = ',',
        required = true
    )]
    task: Vec<String>,
    /// Lengths in tokens, answers included; of windows for perplexity [default: 4096; whole
    /// documents for perplexity]
    #[arg(short, long, value_name = "N,...", value_delimiter = ',')]
    lengths: Vec<usize>,
    /// Samples of each synthetic task and length
    #[arg(short = 'n', long, value_name = "N", default_value_t = 20, value_parser = count())]
    samples: usize,
    /// Seed of the samples
    #[arg(long, value_name = "S", default_value_t = 0)]
    seed: u64,
    /// Where needles lie, from 0 at the start to 1 at the end [default: anywhere]
    #[arg(long, value_name = "SHARE")]
    depth: Option<f64>,
    /// Let an oracle select the past rows that answers read: the statements asked for, alone or added to what a head
    /// has selected (what is missing then was not lost by retrieval), or what the whole prompt asks for. Not with
    /// `segment.pool_len`
    #[arg(long, value_enum, num_args = 0..=1, default_missing_value = "alone")]
    oracle: Option<OracleArg>,
    /// Text files or folders, JSONL with a `text` field, both also compressed (.zst), Parquet with a column `text`, or
    /// token ids in JSON (an array, or an object with `tokens` and `breaks`)
    #[arg(long, value_name = "PATH")]
    data: Vec<PathBuf>,
    /// Questions of LongBench v2, a JSON array or one a line; of longer ones than --lengths the middle of the text is
    /// left out
    #[arg(long, value_name = "FILE")]
    questions: Option<PathBuf>,
    #[command(flatten)]
    breaks: BreakArgs,
    /// Tokens between the starts of two windows of perplexity [default: windows share one token]
    #[arg(long, value_name = "N")]
    stride: Option<usize>,
    /// Samples or windows computed side by side; changes no result
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = count())]
    batch: usize,
    /// Segments computed side by side; changes no result
    #[arg(long, value_name = "N", default_value_t = 1)]
    segments_per_step: usize,
    /// Where the results go, with every answer, JSON
    #[arg(short, long, value_name = "FILE", default_value = "eval.json")]
    out: PathBuf,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum OracleArg {
    /// The statements asked for
    Alone,
    /// They, and what a head has selected
    Added,
    /// What a head selects once the prompt is read to its end: the prompt's suffix reads what its own queries ask for
    Prompt,
}

type Object = serde_json::Map<String, serde_json::Value>;

fn object(text: &str) -> Result<Object, String> {
    serde_json::from_str(text).map_err(|error| format!("expected an object in JSON: {error}"))
}

/// Samples are kept with their answers, so there is a bound to their number.
fn count() -> RangedU64ValueParser<usize> {
    RangedU64ValueParser::new().range(1..=1 << 20)
}

/// Everything that was found, as it lies in the `--out` file.
#[derive(Serialize)]
struct Results {
    /// Its folder; of a name that is not UTF-8 what can be shown.
    model: String,
    device: String,
    execution: String,
    /// The segments the model ran with.
    segment: Option<serde_json::Value>,
    /// As asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    rope_scaling: Option<Object>,
    perplexity: Vec<WindowResult>,
    tasks: Option<Report>,
    #[serde(skip_serializing_if = "Option::is_none")]
    choices: Option<ChoiceReport>,
}

/// Perplexity with windows of one length.
#[derive(Debug, Serialize)]
pub struct WindowResult {
    pub config: PerplexityConfig,
    pub result: PerplexityReport,
}

/// A part of an evaluation's results.
pub enum Found {
    Perplexity(WindowResult),
    Task(Cell),
    Choices(ChoiceReport),
}

/// Who asks for an evaluation: which parts, and where they go as soon as they are there.
pub trait Watch {
    /// Whether a task (or `perplexity`) at a length is wanted.
    fn wants(&self, _task: &str, _length: Option<usize>) -> bool {
        true
    }

    /// Takes a part.
    fn found(&mut self, found: Found) -> Result<()>;

    /// Called often while a part is made.
    fn working(&self) {}
}

/// The command's own: everything is wanted and kept.
#[derive(Default)]
struct Everything {
    perplexity: Vec<WindowResult>,
    cells: Vec<Cell>,
    choices: Option<ChoiceReport>,
}

impl Watch for Everything {
    fn found(&mut self, found: Found) -> Result<()> {
        match found {
            Found::Perplexity(result) => self.perplexity.push(result),
            Found::Task(cell) => self.cells.push(cell),
            Found::Choices(report) => self.choices = Some(report),
        }
        Ok(())
    }
}

/// What ran.
pub struct Ran {
    pub device: String,
    /// The segments the model ran with.
    pub segment: Option<serde_json::Value>,
}

pub fn run(args: &Args, quiet: bool) -> Result<()> {
    args.stages
        .run(&args.model, |party| report(args, party, quiet))
}

/// Evaluates, and says what was found.
fn report(args: &Args, party: &Party, quiet: bool) -> Result<()> {
    let place = Place::at(&args.out)?;
    let mut everything = Everything::default();
    let ran = evaluate(args, &|_| Ok(()), &mut everything, party, quiet)?;
    let (tasks, _) = parse_tasks(&args.task)?;
    let tasks = (!tasks.is_empty()).then(|| Report {
        config: args.run_config(tasks),
        cells: everything.cells,
    });
    let results = Results {
        model: args.model.path().to_string_lossy().into_owned(),
        device: ran.device,
        execution: args.model.execution().to_string(),
        segment: ran.segment,
        rope_scaling: args.rope_scaling.clone(),
        perplexity: everything.perplexity,
        tasks,
        choices: everything.choices,
    };
    // Before the tables, whose reader may leave.
    place.write(&serde_json::to_vec_pretty(&results)?)?;
    tracing::info!("every answer: {}", args.out.display());
    print_perplexity(&results.perplexity)?;
    if let Some(report) = &results.choices {
        choices::print(report)?;
    }
    if let Some(report) = &results.tasks {
        out!("{}", report.table())?;
        ensure!(
            report.cells.iter().any(|cell| cell.score.is_some()),
            "every task was skipped, there is no result"
        );
    }
    Ok(())
}

/// Loads the model, its configuration changed by `adapt` and its layers spread over `party`, and gives `watch` every
/// part that it wants.
pub fn evaluate(
    args: &Args,
    adapt: Adapt<'_>,
    watch: &mut dyn Watch,
    party: &Party,
    quiet: bool,
) -> Result<Ran> {
    on_device!(args.model.device(), party.local_rank(), device => {
        evaluate_on(device, args, adapt, watch, party, quiet)
    })
}

fn evaluate_on<D: Planned>(
    device: D,
    args: &Args,
    adapt: Adapt<'_>,
    watch: &mut dyn Watch,
    party: &Party,
    quiet: bool,
) -> Result<Ran> {
    let (tasks, with_perplexity) = args.parts()?;
    let needs_text = !tasks.is_empty() || args.questions.is_some();
    let adapt = |config: &mut ModelConfig| {
        adapt(config)?;
        let scaling = args.rope_scaling.clone();
        let scaled = scaling.map_or(Ok(()), |scaling| config.scale_positions(scaling));
        scaled.context("--rope-scaling")
    };
    let opened = args.model.open_as(needs_text, &adapt)?.shared(party);
    let segment = opened.config.segment.as_ref();
    ensure!(
        args.oracle.is_none() || segment.is_some_and(|s| s.break_after_prompt),
        "--oracle: expected a model whose segments end with the prompt (`segment.break_after_prompt` in config.json)"
    );
    ensure!(
        args.oracle.is_none() || segment.is_some_and(|s| s.pool_len == 0),
        "--oracle: expected a model whose pools hold every token, got `segment.pool_len` in config.json"
    );
    let (text, vocab_size) = (opened.text.as_ref(), opened.config.vocab_size);
    let mut documents = match with_perplexity {
        true => read_documents(&args.data, text, vocab_size)?,
        false => Vec::new(),
    };
    args.breaks.over_only(&mut documents)?;
    let choices = args.choices()?;
    let mut readings = args.readings(&documents, &tasks);
    if let (Some(choices), Some(text)) = (&choices, text) {
        readings.push(Reading {
            sequences: vec![[0, choices.longest_prompt(text)?]],
            scored: false,
            new: 0,
            segments_per_step: args.segments_per_step,
        });
    }
    let model = opened.load(device, &readings)?;
    if with_perplexity {
        args.perplexity(&model, &documents, watch, quiet)?;
    }
    if let (Some(choices), Some(text)) = (&choices, text) {
        let report = choices.run(&model, text, &|| watch.working(), quiet)?;
        watch.found(Found::Choices(report))?;
    }
    if !tasks.is_empty() {
        let text = text.context("the model has no tokenizer, which these tasks need")?;
        args.tasks(&model, text, &tasks, watch, quiet)?;
    }
    Ok(Ran {
        device: model.device.description(),
        segment: opened.config.to_json().get("segment").cloned(),
    })
}

/// The synthetic tasks named, each once, and whether perplexity is among the names.
fn parse_tasks(names: &[String]) -> Result<(Vec<TaskKind>, bool)> {
    let (mut tasks, mut perplexity) = (Vec::new(), false);
    for name in names {
        let more: &[TaskKind] = match name.as_str() {
            PERPLEXITY => {
                perplexity = true;
                &[]
            }
            LONGBENCH => &[],
            "ruler" => TaskKind::ruler(),
            "niah" => TaskKind::niah(),
            name => match TaskKind::from_str(name) {
                Ok(task) => &[task],
                Err(error) => bail!("{error}; or perplexity, ruler, niah, {LONGBENCH}"),
            },
        };
        for task in more {
            if !tasks.contains(task) {
                tasks.push(*task);
            }
        }
    }
    Ok((tasks, perplexity))
}

impl Args {
    /// The same on another device.
    pub fn on(self, device: DeviceArgs) -> Self {
        let model = self.model.on(device);
        Self { model, ..self }
    }

    /// The synthetic tasks, and whether perplexity is asked for.
    fn parts(&self) -> Result<(Vec<TaskKind>, bool)> {
        let (tasks, with_perplexity) = parse_tasks(&self.task)?;
        ensure!(
            self.data.is_empty() != with_perplexity,
            "--data and the task perplexity go together"
        );
        let with_choices = self.task.iter().any(|task| task == LONGBENCH);
        ensure!(
            self.questions.is_some() == with_choices,
            "--questions and the task {LONGBENCH} go together"
        );
        Ok((tasks, with_perplexity))
    }

    fn choices(&self) -> Result<Option<Choices>> {
        let longest = self.lengths.iter().copied().max();
        let read = |path: &PathBuf| Choices::read(path, longest, self.segments_per_step);
        self.questions.as_ref().map(read).transpose()
    }

    /// Every task (or `perplexity`) and length of which there will be a part.
    pub fn cells(&self) -> Result<Vec<(&'static str, Option<usize>)>> {
        let (tasks, with_perplexity) = self.parts()?;
        let windows = self.windows().into_iter().filter(|_| with_perplexity);
        let mut cells: Vec<_> = windows.map(|w| (PERPLEXITY, w)).collect();
        for task in tasks {
            let lengths = self.task_lengths().into_iter();
            cells.extend(lengths.map(|length| (task.name(), Some(length))));
        }
        Ok(cells)
    }

    /// The largest readings that there will be.
    fn readings(&self, documents: &[Document], tasks: &[TaskKind]) -> Vec<Reading> {
        let longest = documents.iter().map(|d| d.tokens.len()).max();
        let window = self.lengths.iter().copied().max().unwrap_or(usize::MAX);
        let stride = self.stride.unwrap_or(window.saturating_sub(1)).max(1);
        let windows = documents.iter().map(|d| d.tokens.len().div_ceil(stride));
        let side_by_side = self.batch.min(windows.sum()).max(1);
        let scored = longest.map(|longest| Reading {
            sequences: vec![[0, longest.min(window).saturating_sub(1)]; side_by_side],
            scored: true,
            new: 0,
            segments_per_step: self.segments_per_step,
        });
        let length = self.task_lengths().into_iter().max();
        let answered = tasks.iter().map(|task| {
            // The answer is part of the length.
            let (length, new) = (length.unwrap_or(0), task.max_new());
            Reading {
                sequences: vec![
                    [0, length.saturating_sub(new).max(1)];
                    self.batch.min(self.samples).max(1)
                ],
                scored: false,
                new,
                segments_per_step: self.segments_per_step,
            }
        });
        scored.into_iter().chain(answered).collect()
    }

    fn task_lengths(&self) -> Vec<usize> {
        match &self.lengths[..] {
            [] => vec![4096],
            lengths => lengths.to_vec(),
        }
    }

    /// Windows of perplexity; `None` for whole documents.
    fn windows(&self) -> Vec<Option<usize>> {
        match &self.lengths[..] {
            [] => vec![None],
            lengths => lengths.iter().copied().map(Some).collect(),
        }
    }

    fn perplexity<D: Device>(
        &self,
        model: &Decoder<D>,
        documents: &[Document],
        watch: &mut dyn Watch,
        quiet: bool,
    ) -> Result<()> {
        let mut windows = self.windows();
        windows.retain(|window| watch.wants(PERPLEXITY, *window));
        for window in windows {
            let config = PerplexityConfig {
                window,
                stride: self.stride,
                batch: self.batch,
                segments_per_step: self.segments_per_step,
            };
            let bar = progress(!quiet, 0, "tokens");
            let result = perplexity(model, documents, &config, |done, total| {
                watch.working();
                bar.set_length(total);
                bar.set_position(done);
            });
            bar.finish_and_clear();
            let result = result?;
            watch.found(Found::Perplexity(WindowResult { config, result }))?;
        }
        Ok(())
    }

    fn oracle(&self) -> Option<Oracle> {
        self.oracle.map(|oracle| match oracle {
            OracleArg::Alone => Oracle::Alone,
            OracleArg::Added => Oracle::Added,
            OracleArg::Prompt => Oracle::Prompt,
        })
    }

    fn run_config(&self, tasks: Vec<TaskKind>) -> RunConfig {
        RunConfig {
            tasks,
            lengths: self.task_lengths(),
            samples: self.samples,
            seed: self.seed,
            batch: self.batch,
            depth: self.depth,
            oracle: self.oracle(),
        }
    }

    fn tasks<D: Device>(
        &self,
        model: &Decoder<D>,
        text: &Tokenizer,
        tasks: &[TaskKind],
        watch: &mut dyn Watch,
        quiet: bool,
    ) -> Result<()> {
        let encode = |s: &str| text.encode(s, true).map_err(EvalError::model);
        let decode = |tokens: &[u32]| text.decode(tokens, true).map_err(EvalError::model);
        let mut greedy = Greedy {
            model,
            encode: &encode,
            decode: &decode,
            segments_per_step: self.segments_per_step,
            oracle: self.oracle(),
        };
        let lengths = self.task_lengths();
        let all = tasks.iter().flat_map(|t| lengths.iter().map(|l| (*t, *l)));
        let wanted: Vec<_> = all
            .filter(|(task, length)| watch.wants(task.name(), Some(*length)))
            .collect();
        let total = wanted.len().saturating_mul(self.samples);
        let bar: ProgressBar = progress(!quiet, total as u64, "samples");
        for (i, (task, length)) in wanted.into_iter().enumerate() {
            let config = RunConfig {
                lengths: vec![length],
                ..self.run_config(vec![task])
            };
            let report = run_tasks(&config, &mut greedy, |at| {
                watch.working();
                bar.set_position((i * self.samples + at.done) as u64);
                bar.set_message(format!("{} at {}", at.task, at.length));
            })?;
            for cell in report.cells {
                watch.found(Found::Task(cell))?;
            }
        }
        bar.finish_and_clear();
        Ok(())
    }
}

fn print_perplexity(results: &[WindowResult]) -> Result<()> {
    if results.is_empty() {
        return Ok(());
    }
    out!(
        "{:<16}{:>9}{:>12}{:>10}{:>12}{:>12}",
        "perplexity",
        "window",
        "tokens",
        "loss",
        "perplexity",
        "bits/byte"
    )?;
    for WindowResult { config, result } in results {
        let window = config.window.map_or("whole".to_owned(), |w| w.to_string());
        let bits = result
            .bits_per_byte
            .map_or("-".to_owned(), |b| format!("{b:.4}"));
        out!(
            "{:<16}{window:>9}{:>12}{:>10.4}{:>12.3}{bits:>12}",
            "",
            result.tokens,
            result.loss,
            result.perplexity
        )?;
    }
    Ok(())
}
