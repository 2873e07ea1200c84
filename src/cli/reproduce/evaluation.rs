//! Evaluations of an arm: `segattn eval` with the flags of the definition, its results as rows.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::Parser;
use segattn::eval::run::Cell;
use segattn::experiment::rows::{Context as ByContext, NATS, SCORE};
use segattn::experiment::{Evaluation, Row, Rows};
use toml::Value;

use super::plan::Planned;
use super::{STOPPED, Session, State, stop_if_interrupted};
use crate::cli::eval::{self, Found, Watch, WindowResult};
use crate::cli::out::note;
use crate::cli::past_heads;
use crate::cli::ranks::Party;
use crate::cli::signals::interrupted;

/// The flags of `segattn eval` by themselves.
#[derive(Debug, Parser)]
#[command(name = "eval", disable_help_flag = true)]
struct Flags {
    #[command(flatten)]
    args: eval::Args,
}

/// Flags that the command itself sets.
const OWNED: [&str; 7] = [
    "model",
    "device",
    "pool",
    "out",
    "stages",
    "rank_timeout",
    "rank_engine",
];

/// The arguments of an evaluation of the model in `folder`. Test samples have the run's seed, unless the definition
/// names one.
pub fn parse(evaluation: &Evaluation, seed: u64, folder: &Path) -> Result<eval::Args> {
    let mut line = vec!["eval".into(), "--model".into(), folder.into()];
    if !evaluation.flags.contains_key("seed") {
        line.extend(["--seed".into(), seed.to_string().into()]);
    }
    for (name, value) in &evaluation.flags {
        let flag = format!("--{}", name.replace('_', "-"));
        if OWNED.contains(&name.as_str()) {
            bail!(
                "`{name}`: expected a flag that belongs to the evaluation, got one that the command sets"
            );
        }
        let values = match value {
            Value::Boolean(true) => {
                line.push(flag.into());
                continue;
            }
            Value::Boolean(false) => continue,
            Value::Array(values) => &values[..],
            value => std::slice::from_ref(value),
        };
        for value in values {
            let text = match value {
                Value::String(text) => text.clone(),
                other => other.to_string(),
            };
            line.push(format!("{flag}={text}").into());
        }
    }
    let line: Vec<std::ffi::OsString> = line;
    match Flags::try_parse_from(line) {
        Ok(flags) => Ok(flags.args),
        // Without the usage, which is that of another command.
        Err(error) => {
            let text = error.to_string();
            let first = text.lines().next().unwrap_or_default();
            bail!(
                "{}; `segattn eval --help` lists the flags",
                first.trim_start_matches("error: ")
            )
        }
    }
}

impl Session<'_> {
    /// Makes the results that are not there yet.
    pub fn evaluate(&mut self, run: &Planned) -> Result<State> {
        let weights = self.weights(run.arm, run.seed);
        let weights = weights.context("its weights are not trained yet")?;
        let (tokens, gpu_seconds) = self.spent(run.arm, run.seed);
        let section = &run.config.model;
        for evaluation in &run.arm.evaluations {
            let pending = run.pending(self.rows.rows());
            if !pending.iter().any(|cell| cell.evaluation == evaluation) {
                continue;
            }
            if self.time_left().is_some_and(|left| left.is_zero()) {
                return Ok(State::OutOfTime);
            }
            let args = parse(evaluation, run.seed, &weights)?.on(self.device);
            let mut collect = Collect {
                rows: self.rows,
                evaluation,
                base: Row {
                    experiment: self.definition.name.clone(),
                    arm: run.arm.name.clone(),
                    seed: run.seed,
                    tokens,
                    gpu_seconds,
                    fingerprint: Some(self.definition.fingerprint(run.arm, evaluation)),
                    ..Row::default()
                },
                began: Instant::now(),
            };
            // The arm's own segments, which are not the checkpoint's where an arm only runs another's weights.
            let adapt = |model: &mut _| {
                let named = past_heads::named(section, &weights, model)?;
                Ok(named.apply(model)?)
            };
            eval::evaluate(&args, &adapt, &mut collect, &Party::alone(), self.quiet)
                .with_context(|| format!("evaluation `{}`", evaluation.name))?;
        }
        Ok(State::Done)
    }
}

/// Takes results as rows.
struct Collect<'a> {
    rows: &'a mut Rows,
    evaluation: &'a Evaluation,
    base: Row,
    began: Instant,
}

impl Watch for Collect<'_> {
    fn wants(&self, task: &str, length: Option<usize>) -> bool {
        let task = self.evaluation.task(task);
        let length = length.unwrap_or(0) as u64;
        !self.rows.has(&self.base.arm, self.base.seed, &task, length)
    }

    fn found(&mut self, found: Found) -> Result<()> {
        let row = match found {
            Found::Perplexity(result) => self.loss(&result),
            Found::Task(cell) => self.score(&cell),
            // A definition names no file of questions.
            Found::Choices(_) => return Ok(()),
        };
        let seconds = self.began.elapsed().as_secs_f64();
        self.began = Instant::now();
        self.rows.append(Row {
            eval_seconds: Some(rounded(seconds)),
            ..row
        })?;
        stop_if_interrupted()
    }

    /// Between two results nothing is lost: every row that is there is durable.
    fn working(&self) {
        if interrupted() {
            note!("error: {STOPPED}");
            std::process::exit(1);
        }
    }
}

impl Collect<'_> {
    fn loss(&self, WindowResult { config, result }: &WindowResult) -> Row {
        let windows = &result.by_window;
        let contexts = result.by_context.iter().map(|c| ByContext {
            from: c.context.start as u64,
            to: c.context.end as u64,
            tokens: c.tokens,
            loss: rounded(c.loss),
        });
        Row {
            task: self.evaluation.task(eval::PERPLEXITY),
            length: config.window.unwrap_or(0) as u64,
            metric: NATS.into(),
            value: Some(result.loss),
            samples: result.tokens,
            by_context: Some(contexts.collect()),
            values: Some(windows.iter().map(|w| rounded(w.loss)).collect()),
            weights: Some(windows.iter().map(|w| w.tokens as f64).collect()),
            groups: Some(windows.iter().map(|w| w.document as u64).collect()),
            ..self.base.clone()
        }
    }

    fn score(&self, cell: &Cell) -> Row {
        Row {
            task: self.evaluation.task(cell.task.name()),
            length: cell.length as u64,
            metric: SCORE.into(),
            value: cell.score.map(|percent| percent / 100.0),
            samples: cell.samples.len() as u64,
            skipped: cell.skipped.clone(),
            recall: cell.recalled().map(rounded),
            values: Some(cell.samples.iter().map(|s| rounded(s.score)).collect()),
            ..self.base.clone()
        }
    }
}

/// To six digits after the point, so that rows stay short.
fn rounded(x: f64) -> f64 {
    (1e6 * x).round() / 1e6
}
