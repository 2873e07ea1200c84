//! What an experiment will do: its runs, what each evaluates, and how long that takes.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use segattn::experiment::{Arm, Definition, Evaluation, Minutes, Row};
use segattn::train::config::Config;

use super::evaluation::parse;

/// All runs, in their order.
pub struct Plan<'a> {
    pub runs: Vec<Planned<'a>>,
}

/// An arm with a seed.
pub struct Planned<'a> {
    pub arm: &'a Arm,
    pub seed: u64,
    pub config: Config,
    pub cells: Vec<Cell<'a>>,
}

/// A result that a run gives.
#[derive(Clone, Debug)]
pub struct Cell<'a> {
    pub evaluation: &'a Evaluation,
    /// As results call it.
    pub task: String,
    pub length: u64,
}

impl<'a> Plan<'a> {
    /// # Errors
    /// For flags that `segattn eval` does not have, and for results that cannot be told apart.
    pub fn new(definition: &'a Definition) -> Result<Self> {
        let runs = definition.runs().into_iter();
        let runs = runs.map(|(arm, seed)| Planned::new(arm, seed));
        Ok(Self {
            runs: runs.collect::<Result<_>>()?,
        })
    }

    /// Refuses rows that other settings gave.
    pub fn check_rows(&self, definition: &Definition, rows: &[Row], path: &Path) -> Result<()> {
        for run in &self.runs {
            for cell in &run.cells {
                let Some(row) = rows.iter().find(|row| cell.is(run, row)) else {
                    continue;
                };
                let now = definition.fingerprint(run.arm, cell.evaluation);
                ensure!(
                    row.experiment == definition.name && row.fingerprint.as_ref() == Some(&now),
                    "{}: the rows of arm `{}` come from other settings than the definition's; name another file \
                     with --out, or remove these rows",
                    path.display(),
                    run.arm.name
                );
            }
        }
        Ok(())
    }

    /// Estimates of what is left of a run, of whose training this share is done: those of the definition, scaled by
    /// what the rows show.
    pub fn minutes_left(&self, run: &Planned, rows: &[Row], trained: f64) -> Minutes {
        let pending = run.pending(rows).len() as f64 / run.cells.len().max(1) as f64;
        let scale = self.scale(rows);
        Minutes {
            train: scale.train * run.arm.minutes.train * (1.0 - trained),
            eval: scale.eval * run.arm.minutes.eval * pending,
        }
    }

    /// What runs took over what the definition estimates; 1 where nothing has run yet.
    fn scale(&self, rows: &[Row]) -> Minutes {
        let (mut took, mut estimated) = (Minutes::default(), Minutes::default());
        for run in &self.runs {
            let done: Vec<_> = run.cells.iter().filter_map(|c| c.find(run, rows)).collect();
            let seconds: f64 = done.iter().filter_map(|row| row.eval_seconds).sum();
            took.eval += seconds / 60.0;
            estimated.eval += run.arm.minutes.eval * done.len() as f64 / run.cells.len() as f64;
            // Only runs whose seconds are those of their own training.
            if let (true, None, Some(row)) = (run.arm.trains, &run.arm.parent, done.first()) {
                took.train += row.gpu_seconds / 60.0;
                estimated.train += run.arm.minutes.train;
            }
        }
        let ratio = |took: f64, estimated: f64| match took > 0.0 && estimated > 0.0 {
            true => took / estimated,
            false => 1.0,
        };
        Minutes {
            train: ratio(took.train, estimated.train),
            eval: ratio(took.eval, estimated.eval),
        }
    }

    /// The runs as a table for people.
    pub fn table(&self, definition: &Definition, rows: &[Row]) -> String {
        let name = |run: &Planned| run.arm.name.chars().count();
        let width = self.runs.iter().map(name).max().unwrap_or(0).max(3);
        let mut text = format!("{}\n\n", definition.description.trim());
        let head = ["seed", "tokens", "train min", "eval min", "results"];
        text += &format!("{:<width$}", "arm");
        head.iter().for_each(|h| text += &format!("{h:>12}"));
        let (mut tokens, mut minutes) = (0, Minutes::default());
        for run in &self.runs {
            let left = self.minutes_left(run, rows, 0.0);
            let (pending, all) = (run.pending(rows).len(), run.cells.len());
            let left = match pending {
                0 => Minutes::default(),
                _ => left,
            };
            let train = if run.arm.trains { left.train } else { 0.0 };
            let own = run.tokens();
            text += &format!("\n{:<width$}{:>12}{own:>12}", run.arm.name, run.seed);
            text += &format!("{train:>12.1}{:>12.1}", left.eval);
            text += &format!("{:>12}", format!("{} of {all}", all - pending));
            tokens += own;
            minutes.train += train;
            minutes.eval += left.eval;
        }
        text += &format!("\n{:<width$}{:>12}{tokens:>12}", "all", "");
        text + &format!("{:>12.1}{:>12.1}", minutes.train, minutes.eval)
    }
}

impl<'a> Planned<'a> {
    fn new(arm: &'a Arm, seed: u64) -> Result<Self> {
        let mut cells: Vec<Cell> = Vec::new();
        for evaluation in &arm.evaluations {
            let context = || format!("arm `{}`, evaluation `{}`", arm.name, evaluation.name);
            let args = parse(evaluation, seed, Path::new(".")).with_context(context)?;
            for (task, length) in args.cells().with_context(context)? {
                let Some(length) = length else {
                    bail!("{}: expected `lengths` for {task}, got none", context());
                };
                let (task, length) = (evaluation.task(task), length as u64);
                ensure!(
                    !cells.iter().any(|c| c.task == task && c.length == length),
                    "{}: expected each task and length once, got {task} at {length} twice; tell them apart with \
                     `label`",
                    context()
                );
                cells.push(Cell {
                    evaluation,
                    task,
                    length,
                });
            }
        }
        let any = Path::new(".");
        Ok(Self {
            arm,
            seed,
            config: arm.config(seed, any, Some(any), Path::new("run"))?,
            cells,
        })
    }

    /// The results that are not there yet.
    pub fn pending(&self, rows: &[Row]) -> Vec<&Cell<'a>> {
        let cells = self.cells.iter();
        cells.filter(|c| c.find(self, rows).is_none()).collect()
    }

    /// Most tokens that its own training predicts.
    fn tokens(&self) -> u64 {
        let t = &self.config.training;
        let step = (t.batch * t.accumulation * t.sequence_len) as u64;
        if self.arm.trains { t.steps * step } else { 0 }
    }
}

impl Cell<'_> {
    fn is(&self, run: &Planned, row: &Row) -> bool {
        row.arm == run.arm.name
            && row.run_as.is_none()
            && row.seed == run.seed
            && row.task == self.task
            && row.length == self.length
    }

    fn find<'r>(&self, run: &Planned, rows: &'r [Row]) -> Option<&'r Row> {
        rows.iter().find(|row| self.is(run, row))
    }
}
