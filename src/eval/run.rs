//! Runs synthetic tasks over lengths and samples and reports the scores.

use super::error::EvalError;
use super::kind::TaskKind;
use super::recall::{self, HeadRecall, Oracle};
use super::score::{first_word_match, interval, string_match_all, string_match_part};
use super::task::{Sample, TaskOptions, generate};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::fmt::Write;
use std::ops::Range;

/// What is run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunConfig {
    /// The tasks.
    pub tasks: Vec<TaskKind>,
    /// Lengths in tokens, answers included.
    pub lengths: Vec<usize>,
    /// Samples of each task and length.
    pub samples: usize,
    /// Seed of all samples.
    pub seed: u64,
    /// Samples answered side by side.
    pub batch: usize,
    /// Share of the filler before the statements asked for, see [`TaskOptions::depth`].
    pub depth: Option<f64>,
    /// Whether an oracle selects the past rows that the answer reads. The prompt's end must be a break, and pools must
    /// hold all of the prompt.
    #[serde(default)]
    pub oracle: Option<Oracle>,
}

/// An answer to a sample.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Answer {
    /// Its text, without the prompt.
    pub text: String,
    /// How much of the statements asked for each head had selected when the prompt had been read; empty for a model
    /// without a past, where all of them were in the tail or the last segment, and where pools have dropped tokens.
    pub recall: Vec<HeadRecall>,
}

impl From<String> for Answer {
    fn from(text: String) -> Self {
        Self {
            text,
            recall: Vec::new(),
        }
    }
}

/// Answers samples; a model with its tokenizer, or anything else in tests.
pub trait Respond: Sync {
    /// Tokens of a whole prompt, with whatever the model wants at its start.
    ///
    /// # Errors
    /// [`EvalError::Model`] if the tokenizer fails.
    fn encode(&self, text: &str) -> Result<Vec<u32>, EvalError>;

    /// The answers to samples of one task, without their prompts, in their order.
    ///
    /// # Errors
    /// [`EvalError::Model`] if the model fails.
    fn respond(&mut self, samples: &[Sample]) -> Result<Vec<Answer>, EvalError>;
}

/// One sample's outcome.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SampleResult {
    /// Its number.
    pub index: usize,
    /// Tokens of its prompt.
    pub prompt_tokens: usize,
    /// Share of the filler before each statement asked for.
    pub depths: Vec<f64>,
    /// What the answer had to contain.
    pub references: Vec<String>,
    /// The answer.
    pub prediction: String,
    /// Its score, 0 to 1.
    pub score: f64,
    /// See [`Answer::recall`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub recall: Vec<HeadRecall>,
}

/// A task at a length.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Cell {
    /// The task.
    pub task: TaskKind,
    /// The length in tokens.
    pub length: usize,
    /// Mean score in percent, as RULER reports it; `None` where the task does not fit the length.
    pub score: Option<f64>,
    /// 95% confidence interval of the score, in percent.
    pub interval: Option<(f64, f64)>,
    /// Why there is no score.
    pub skipped: Option<String>,
    /// How much of the statements asked for each head had selected: means over the samples, by layer and head.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub recall: Vec<HeadRecall>,
    /// The samples.
    pub samples: Vec<SampleResult>,
}

/// Scores of all tasks and lengths.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// What was run.
    pub config: RunConfig,
    /// By task, then length, in the order asked for.
    pub cells: Vec<Cell>,
}

/// Where a run stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// The task at work.
    pub task: TaskKind,
    /// Its length.
    pub length: usize,
    /// Samples answered, of all tasks and lengths.
    pub done: usize,
    /// Samples there are.
    pub total: usize,
}

/// Runs every task at every length. A length too short for a task makes a cell without a score.
/// `progress` hears before each batch where the run stands.
///
/// # Errors
/// [`EvalError::Argument`] for settings out of range, and what `respond` returns.
pub fn run(
    config: &RunConfig,
    model: &mut dyn Respond,
    mut progress: impl FnMut(Progress),
) -> Result<Report, EvalError> {
    check(config)?;
    let mut cells = Vec::new();
    let cells_of_all = config.tasks.len().saturating_mul(config.lengths.len());
    let total = cells_of_all.saturating_mul(config.samples);
    for task in &config.tasks {
        for length in &config.lengths {
            let before = cells.len().saturating_mul(config.samples);
            let cell = run_cell(config, *task, *length, model, &mut |done| {
                progress(Progress {
                    task: *task,
                    length: *length,
                    done: before.saturating_add(done),
                    total,
                });
            })?;
            cells.push(cell);
        }
    }
    Ok(Report {
        config: config.clone(),
        cells,
    })
}

fn check(config: &RunConfig) -> Result<(), EvalError> {
    let some = |name, count: usize| {
        if count > 0 {
            return Ok(());
        }
        Err(EvalError::argument(name, "at least one", "none"))
    };
    some("tasks", config.tasks.len())?;
    some("lengths", config.lengths.len())?;
    some("samples", config.samples)?;
    some("batch", config.batch)?;
    match config.depth {
        Some(depth) => config
            .tasks
            .iter()
            .try_for_each(|t| super::task::check_depth(*t, depth)),
        None => Ok(()),
    }
}

fn run_cell(
    config: &RunConfig,
    task: TaskKind,
    length: usize,
    model: &mut dyn Respond,
    progress: &mut dyn FnMut(usize),
) -> Result<Cell, EvalError> {
    let (mut samples, mut made) = (Vec::new(), VecDeque::new());
    while samples.len() < config.samples {
        progress(samples.len());
        if made.is_empty() {
            // Making prompts takes as long as reading them where one thread does it.
            let wanted = config.batch.max(rayon::current_num_threads());
            let end = config.samples.min(samples.len().saturating_add(wanted));
            made = match make(config, task, length, samples.len()..end, model) {
                Ok(made) => made.into(),
                Err(error @ EvalError::TooShort { .. }) => {
                    return Ok(skipped(task, length, &error));
                }
                Err(error) => return Err(error),
            };
        }
        let batch: Vec<Sample> = made.drain(..config.batch.min(made.len())).collect();
        let answers = model.respond(&batch)?;
        if answers.len() != batch.len() {
            let expected = format!("one for each of {} samples", batch.len());
            return Err(EvalError::argument("answers", expected, answers.len()));
        }
        samples.extend(batch.into_iter().zip(answers).map(outcome));
    }
    let mean = samples.iter().map(|s| s.score).sum::<f64>() / samples.len() as f64;
    let (low, high) = interval(mean, samples.len());
    let recalls: Vec<&[HeadRecall]> = samples.iter().map(|s| &s.recall[..]).collect();
    Ok(Cell {
        recall: recall::mean(&recalls),
        task,
        length,
        score: Some(100.0 * mean),
        interval: Some((100.0 * low, 100.0 * high)),
        skipped: None,
        samples,
    })
}

fn make(
    config: &RunConfig,
    task: TaskKind,
    length: usize,
    batch: Range<usize>,
    model: &dyn Respond,
) -> Result<Vec<Sample>, EvalError> {
    let options = TaskOptions {
        depth: config.depth,
        reserve_answer: true,
    };
    let encode = |text: &str| model.encode(text);
    let made: Vec<_> = batch
        .into_par_iter()
        .map(|i| generate(task, length, i, config.seed, options, &encode))
        .collect();
    // The error is that of the first that has one, whatever the threads do.
    made.into_iter().collect()
}

fn skipped(task: TaskKind, length: usize, error: &EvalError) -> Cell {
    Cell {
        task,
        length,
        score: None,
        interval: None,
        skipped: Some(error.to_string()),
        recall: Vec::new(),
        samples: Vec::new(),
    }
}

fn outcome((sample, answer): (Sample, Answer)) -> SampleResult {
    let prediction = answer.text;
    // A passkey is one answer, found or not; RULER's synthetic tasks all count shares. A single letter may be in any
    // answer.
    let score = match sample.task {
        TaskKind::Passkey => string_match_part(&prediction, &sample.references),
        TaskKind::Relay => first_word_match(&prediction, &sample.references),
        _ => string_match_all(&prediction, &sample.references),
    };
    SampleResult {
        index: sample.index,
        prompt_tokens: sample.tokens.len(),
        depths: sample.depths,
        references: sample.references,
        prediction,
        score,
        recall: answer.recall,
    }
}

impl Cell {
    /// The largest share of the statements asked for that a head had selected: a single head is enough to read them.
    pub fn recalled(&self) -> Option<f64> {
        let shares = self.recall.iter().map(|head| head.share);
        shares.max_by(f64::total_cmp)
    }
}

impl Report {
    /// A table for people: a row for each task, a column for each length, scores in percent; then the same of the
    /// largest share of the statements asked for that a head had selected; below it why there is no score where there
    /// is none.
    pub fn table(&self) -> String {
        let mut table = format!("{:<16}", "task");
        for length in &self.config.lengths {
            let _ = write!(table, "{length:>9}");
        }
        let row = |table: &mut String, name: &str, scores: &[Option<f64>]| {
            let _ = write!(table, "\n{name:<16}");
            for score in scores {
                let shown = score.map_or("-".to_owned(), |s| format!("{s:.1}"));
                let _ = write!(table, "{shown:>9}");
            }
        };
        let columns = self.config.lengths.len().max(1);
        for cells in self.cells.chunks(columns) {
            let scores: Vec<Option<f64>> = cells.iter().map(|c| c.score).collect();
            row(&mut table, cells[0].task.name(), &scores);
        }
        if self.config.tasks.len() > 1 {
            let means: Vec<Option<f64>> = (0..columns).map(|c| self.mean(c, columns)).collect();
            row(&mut table, "mean", &means);
        }
        let percent = |cell: &Cell| cell.recalled().map(|share| 100.0 * share);
        let recalls: Vec<Option<f64>> = self.cells.iter().map(percent).collect();
        if recalls.iter().any(Option::is_some) {
            let _ = write!(table, "\n\n{:<16}", "of it selected");
            for (cells, recalls) in self.cells.chunks(columns).zip(recalls.chunks(columns)) {
                row(&mut table, cells[0].task.name(), recalls);
            }
        }
        for reason in self.cells.iter().filter_map(|cell| cell.skipped.as_ref()) {
            let _ = write!(table, "\n- {reason}");
        }
        table
    }

    fn mean(&self, column: usize, columns: usize) -> Option<f64> {
        let cells = self.cells.iter().skip(column).step_by(columns);
        let scores: Vec<f64> = cells.filter_map(|c| c.score).collect();
        (!scores.is_empty()).then(|| scores.iter().sum::<f64>() / scores.len() as f64)
    }
}
