//! `segattn reproduce`: runs the arms of an experiment, and appends their results as rows.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use segattn::experiment::{Arm, Definition, Model, Rows};
use segattn::train::lock::RunLock;

use super::device::DeviceArgs;
use super::out::{note, out};
use super::signals::{interrupted, note_interrupts};

mod arms;
mod evaluation;
mod plan;

use plan::{Plan, Planned};

/// What is said where a signal has stopped the work.
const STOPPED: &str = "stopped by a signal; the same command goes on from here";
/// Where definitions lie.
pub const FOLDER: &str = "experiments";

/// Runs the arms of an experiment one after the other, in the order of its definition, and appends each result to a
/// file as soon as it is there. The same command goes on where it stopped.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Name of an experiment in experiments/, or a TOML file
    #[arg(value_name = "NAME|FILE")]
    experiment: PathBuf,
    #[command(flatten)]
    device: DeviceArgs,
    /// The experiment made small by its section `smoke`: to see that it runs
    #[arg(long)]
    smoke: bool,
    /// Stops after this time; an arm that would not fit into what is left of it is not started
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    minutes: Option<f64>,
    /// File of rows [default: experiments/results/NAME.jsonl; with --smoke: rows.jsonl in the folder --work]
    #[arg(short, long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Folder for runs and their checkpoints [default: experiments/runs/NAME, with --smoke NAME-smoke]
    #[arg(long, value_name = "DIR")]
    work: Option<PathBuf>,
    /// Another value for a key of the definition, as in model=models/smollm2; may be repeated
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Lists arms, tokens and estimates, and runs nothing
    #[arg(long)]
    dry_run: bool,
}

pub fn run(args: &Args, quiet: bool) -> Result<()> {
    let minutes = args.minutes.map(|minutes| {
        let time = Duration::try_from_secs_f64(60.0 * minutes);
        time.map_err(|_| anyhow::anyhow!("--minutes: expected a number from 0 on, got {minutes}"))
    });
    // A time that is too long for the type is no limit.
    let limit = minutes
        .transpose()?
        .and_then(|time| Instant::now().checked_add(time));
    let definition = args.definition()?;
    let work = args.work(&definition);
    let plan = Plan::new(&definition)?;
    let out = args.rows(&definition, &work);
    if args.dry_run {
        let rows = match out.exists() {
            true => segattn::experiment::rows::read(&out)?,
            false => Vec::new(),
        };
        return Ok(out!("{}", plan.table(&definition, &rows))?);
    }
    if let Model::Folder(folder) = &definition.model {
        ensure!(
            folder.is_dir(),
            "experiment key `model`: expected a model folder, got {}, which is not there; make it as \
             experiments/README.md says, or name another with --set model=DIR",
            folder.display()
        );
    }
    let _lock = RunLock::take(&work)?;
    let mut rows = Rows::open(&out)?;
    plan.check_rows(&definition, rows.rows(), &out)?;
    let said = "stopping at the next place to go on from; once more to stop at once";
    note_interrupts((!quiet).then_some(said));
    let mut session = Session {
        definition: &definition,
        work: &work,
        device: args.device,
        limit,
        quiet,
        rows: &mut rows,
    };
    let left = session.all(&plan)?;
    conclude(&left, &out, quiet)
}

impl Args {
    fn definition(&self) -> Result<Definition> {
        let named = Path::new(FOLDER).join(&self.experiment);
        let path = match self.experiment.extension() {
            Some(_) => self.experiment.clone(),
            None => named.with_extension("toml"),
        };
        ensure!(
            path.is_file(),
            "{}: expected the name of an experiment or a TOML file, got no such file; run from the folder that has \
             {FOLDER}/",
            path.display()
        );
        let overrides = self.set.iter().map(|text| {
            let (key, value) = text
                .split_once('=')
                .with_context(|| format!("--set: expected KEY=VALUE, got {text:?}"))?;
            Ok((key.to_owned(), value.to_owned()))
        });
        let overrides: Vec<_> = overrides.collect::<Result<_>>()?;
        Definition::load(&path, self.smoke, &overrides).with_context(|| path.display().to_string())
    }

    fn work(&self, definition: &Definition) -> PathBuf {
        let small = if self.smoke { "-smoke" } else { "" };
        let usual = || Path::new(FOLDER).join(format!("runs/{}{small}", definition.name));
        self.work.clone().unwrap_or_else(usual)
    }

    fn rows(&self, definition: &Definition, work: &Path) -> PathBuf {
        let usual = || match self.smoke {
            true => work.join("rows.jsonl"),
            false => Path::new(FOLDER).join(format!("results/{}.jsonl", definition.name)),
        };
        self.out.clone().unwrap_or_else(usual)
    }
}

/// An experiment under way.
struct Session<'a> {
    definition: &'a Definition,
    /// Folder of the runs.
    work: &'a Path,
    device: DeviceArgs,
    /// When the time is up.
    limit: Option<Instant>,
    quiet: bool,
    rows: &'a mut Rows,
}

/// How far a run got.
#[derive(Clone, Copy, Debug, PartialEq)]
enum State {
    Done,
    /// What was done of it is saved.
    OutOfTime,
}

impl Session<'_> {
    /// Runs what is not done yet, and returns the runs that did not fit into the time.
    fn all(&mut self, plan: &Plan) -> Result<Vec<String>> {
        let mut left = Vec::new();
        for (i, run) in plan.runs.iter().enumerate() {
            if run.pending(self.rows.rows()).is_empty() && !self.trains_again(plan, run) {
                continue;
            }
            let name = format!("{}, seed {}", run.arm.name, run.seed);
            if let Some(reason) = self.reason_against(plan, run) {
                note!("{name}: not started, {reason}");
                left.push(name);
                continue;
            }
            if !self.quiet {
                note!("[{}/{}] {name}", i + 1, plan.runs.len());
            }
            let state = self.one(plan, run);
            if state.with_context(|| name.clone())? == State::OutOfTime {
                left.push(name);
            }
        }
        Ok(left)
    }

    /// Whether an arm's weights are gone and an arm that begins with them or learns from them has results to make.
    fn trains_again(&self, plan: &Plan, run: &Planned) -> bool {
        let begins_with = |other: &Planned| {
            let mut needed = self.definition.needed(other.arm).into_iter();
            other.seed == run.seed && needed.any(|arm| arm.name == run.arm.name)
        };
        let pending = |other: &&Planned| !other.pending(self.rows.rows()).is_empty();
        run.arm.trains
            && self.trained(run.arm, run.seed).is_none()
            && plan.runs.iter().filter(pending).any(begins_with)
    }

    /// Why a run cannot begin now.
    fn reason_against(&self, plan: &Plan, run: &Planned) -> Option<String> {
        for (what, name) in [("parent", &run.arm.parent), ("teacher", &run.arm.teacher)] {
            let arm = name.as_deref().and_then(|name| self.definition.arm(name));
            if let Some(arm) = arm
                && self.weights(arm, run.seed).is_none()
            {
                return Some(format!("its {what} `{}` is not trained yet", arm.name));
            }
        }
        let left = self.time_left()?;
        let needed = plan.minutes_left(run, self.rows.rows(), self.trained_share(run));
        let (left, needed) = (left.as_secs_f64() / 60.0, needed.train + needed.eval);
        (left <= 0.0 || needed > left)
            .then(|| format!("it takes about {needed:.1} minutes, and {left:.1} are left"))
    }

    fn time_left(&self) -> Option<Duration> {
        let limit = self.limit?;
        Some(limit.saturating_duration_since(Instant::now()))
    }

    fn one(&mut self, plan: &Plan, run: &Planned) -> Result<State> {
        if run.arm.trains && self.trained(run.arm, run.seed).is_none() {
            let eval = plan.minutes_left(run, self.rows.rows(), 1.0).eval;
            if self.train(run.arm, run.seed, eval)? == State::OutOfTime {
                return Ok(State::OutOfTime);
            }
        }
        self.evaluate(run)
    }
}

/// A script that waits for the end must not take a signal for it.
fn stop_if_interrupted() -> Result<()> {
    match interrupted() {
        true => bail!(STOPPED),
        false => Ok(()),
    }
}

fn conclude(left: &[String], out: &Path, quiet: bool) -> Result<()> {
    match left {
        _ if quiet => {}
        [] => note!("done; the rows are in {}", out.display()),
        left => note!(
            "time is up; not done: {}; the same command goes on from here, and the rows are in {}",
            left.join("; "),
            out.display()
        ),
    }
    Ok(())
}

/// A name as part of a file's name.
fn file_name(name: &str) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() { c } else { '-' };
    name.to_lowercase().chars().map(plain).collect()
}

/// An arm in messages and folders.
fn folder_name(definition: &Definition, arm: &Arm, seed: u64) -> String {
    format!(
        "{}-seed{seed}-{}",
        file_name(&arm.name),
        definition.weights(arm)
    )
}
