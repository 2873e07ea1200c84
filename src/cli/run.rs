//! A training run under way: steps, validation, checkpoints, progress, and its end.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use segattn::model::config::{ModelConfig, PromptBreak};
use segattn::model::flops::training_flops;
use segattn::model::parameters::specs;
use segattn::train::TrainError;
use segattn::train::checkpoint::{Disk, Fingerprints, create_folder, remove_leftovers, save};
use segattn::train::config::{Config, DataSection, MixtureSection, TrainingSection};
use segattn::train::data::{Corpus, Example, Mixture, Reading, Sequences, split};
use segattn::train::folder::{CHECKPOINTS, METRICS_FILE, PICTURE_FILE};
use segattn::train::lock::RunLock;
use segattn::train::trainer::{StepReport, Trainer};

use super::device::Planned;
use super::files::Results;
use super::metrics::{Line, Metrics};
use super::out::note;
use super::plot;
use super::signals::{flag, interrupted, note_interrupts};
use super::teacher::Teacher;
use super::text::Text;

/// Weight of the newest step in the loss and speed that the progress bar shows.
const NEWEST: f64 = 0.1;
/// Most tokens of a step: a gigabyte of ids.
const MAX_STEP_TOKENS: u64 = 1 << 28;
/// Folder beside a run's own that keeps the tokens of large texts.
const CACHE: &str = "segattn-cache";

/// Where a run's checkpoints lie.
pub fn checkpoints(output: &Path) -> PathBuf {
    output.join(CHECKPOINTS)
}

/// Makes this process the one that works in a run's folder, until the lock is dropped. What a run before has left
/// half-written goes, and that a checkpoint can be written is tried now instead of after the first steps.
pub fn claim(output: &Path) -> Result<RunLock> {
    let lock = RunLock::take(output)?;
    let root = checkpoints(output);
    create_folder(&mut Disk, &root)?;
    remove_leftovers(&mut Disk, &root)?;
    tempfile::tempfile_in(&root).with_context(|| format!("cannot write in {}", root.display()))?;
    Ok(lock)
}

/// The data of a run.
pub struct Data<'a> {
    pub corpus: Corpus,
    /// Fingerprint of the weights that adapters are added to.
    pub base: Option<String>,
    /// The teacher, where the run has one.
    pub teacher: Option<Teacher>,
    train: Mixture<'a>,
    validation: Sequences,
}

impl<'a> Data<'a> {
    /// Reads the files that the configuration names. `output`: the run's folder.
    pub fn read(
        config: &Config,
        model: &ModelConfig,
        text: &'a Text,
        output: &Path,
        quiet: bool,
    ) -> Result<Self> {
        let section = &config.data;
        let (before, after) = text.around(model, section)?;
        let (bar, cache) = (bytes_bar(quiet), cache(section, output));
        let reading = Reading {
            section,
            vocab_size: model.vocab_size,
            before: &before,
            after: &after,
            encode: text,
            prompt_break: model.prompt_break(),
            tokenizer: &text.identity(),
            cache: cache.as_deref(),
            scratch: output,
            progress: &|done, total| {
                bar.set_length(total);
                bar.set_position(done);
            },
        };
        let mut groups: Vec<&[PathBuf]> = vec![&section.train, &section.validation];
        groups.extend(section.mixture.iter().map(|part| &part.paths[..]));
        let corpus = Corpus::read(&groups, &reading)?;
        bar.finish_and_clear();
        let (train, validation) = if section.validation.is_empty() {
            split(corpus.group(0), section.split, section.validation_share)
        } else {
            (corpus.group(0).to_vec(), corpus.group(1).to_vec())
        };
        let given = corpus.group(0).iter().any(|d| d.len >= 2);
        let cut = |documents| Sequences::new(documents, config.training.sequence_len);
        let parts = section.mixture.iter().enumerate();
        let parts = parts.map(|(i, part)| match part.paths.is_empty() {
            true => cut(train.clone()),
            false => cut(corpus.group(2 + i).to_vec()),
        });
        let parts = parts.collect();
        let (train, validation) = (cut(train), cut(validation));
        match (train.is_empty(), given) {
            (true, true) => bail!(
                "`data.validation_share` = {} leaves nothing to train on: expected a smaller share, or more data",
                section.validation_share
            ),
            (true, false) => {
                bail!(
                    "no document in `data.train` has two tokens or more, nothing can be predicted"
                )
            }
            _ => {}
        }
        let (sections, vocab_size) = (&section.mixture, model.vocab_size);
        let mut train = Mixture::new(train, sections, parts, text, vocab_size)?;
        if model.prompt_break() != PromptBreak::default() {
            train = train.with_break(model.prompt_break());
        }
        let data = Self {
            train,
            corpus,
            base: None,
            teacher: None,
            validation,
        };
        data.check_step(&config.training)?;
        Ok(data)
    }

    /// Sequences of a step lie in memory together.
    fn check_step(&self, training: &TrainingSection) -> Result<()> {
        let longest = self.longest(training.sequence_len) as u64;
        let sequences = training.batch as u64 * training.accumulation as u64;
        let tokens = sequences.saturating_mul(longest);
        ensure!(
            tokens <= MAX_STEP_TOKENS,
            "`training.batch` x `training.accumulation` x the longest sequence: expected at most {MAX_STEP_TOKENS} \
             tokens a step, got {sequences} x {longest}"
        );
        Ok(())
    }

    pub fn fingerprints(&self) -> Fingerprints {
        Fingerprints {
            train: self.train.fingerprint(),
            validation: self.validation.fingerprint(),
            base: self.base.clone(),
            teacher: self
                .teacher
                .as_ref()
                .map(|teacher| teacher.fingerprint.clone()),
        }
    }

    /// Refuses to go on under `config` with a run that has come to its place in the data under `before`, if the place
    /// means something else now: other sequences, or another order of them.
    pub fn check_order(&self, before: &Config, now: &Config) -> Result<()> {
        // Whether the files are the same is known by their content.
        let parts = |config: &Config| -> Vec<MixtureSection> {
            let mut parts = config.data.mixture.clone();
            parts.iter_mut().for_each(|part| part.paths.clear());
            parts
        };
        ensure!(
            parts(before) == parts(now),
            "`data.mixture`: expected the names, weights, tasks and relays with which the run has come to its place in \
             the data; to train on with others, start a new run from the checkpoint's folder with --model.folder"
        );
        let (before, now) = (&before.training, &now.training);
        ensure!(
            self.train.same_cut(before.sequence_len),
            "`training.sequence_len`: expected {}, with which the run has come to its place in the data, got {}; to \
             train on with another, start a new run from the checkpoint's folder with --model.folder",
            before.sequence_len,
            now.sequence_len
        );
        ensure!(
            before.seed == now.seed,
            "`training.seed`: expected {}, which gives the order of the data, got {}; to train on with another, start \
             a new run from the checkpoint's folder with --model.folder",
            before.seed,
            now.seed
        );
        Ok(())
    }

    /// Tokens that the longest sequence predicts, where sequences are cut after `sequence_len` (0: not at all).
    pub fn longest(&self, sequence_len: usize) -> usize {
        let documents = self.corpus.documents().iter();
        let most = documents.map(|d| d.len as usize).max().unwrap_or(0);
        let predicted = most.saturating_sub(1).max(1);
        let read = match sequence_len {
            0 => predicted,
            len => len.min(predicted),
        };
        // What is made is never cut.
        read.max(self.train.longest_made())
    }

    /// The first sequences for validation.
    fn validation(&self, most: usize) -> Result<Vec<Example>> {
        let count = match most {
            0 => self.validation.len(),
            most => self.validation.len().min(most as u64),
        };
        let get = |i| Ok(self.validation.get(&self.corpus, i)?);
        (0..count).map(get).collect()
    }
}

/// How a run came to its end.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum End {
    Complete,
    Interrupted,
    OutOfTime,
    TooManySkipped,
}

/// A run that has ended and is saved.
#[derive(Debug)]
pub struct Ended {
    pub how: End,
    /// Steps done.
    pub step: u64,
    /// Tokens predicted.
    pub tokens: u64,
    /// Folder of the model.
    pub model: PathBuf,
    output: PathBuf,
    loss: Option<f64>,
    validation: Option<f64>,
    /// Whether this process speaks for the run.
    leads: bool,
}

/// A run.
pub struct Run<'a, D: Planned> {
    /// Its folder.
    output: PathBuf,
    trainer: Trainer<D>,
    data: Data<'a>,
    extra: Vec<(String, Vec<u8>)>,
    validation: Vec<Example>,
    /// Rank 0's.
    metrics: Option<Metrics>,
    bar: ProgressBar,
    quiet: bool,
    /// Smoothed loss, and seconds a token.
    shown: Option<(f64, f64)>,
    /// The last validation's loss.
    validated: Option<f64>,
    saved: Option<(u64, PathBuf)>,
    /// The model's operations for a token over the measured speed of all ranks' devices: seconds a token at full use.
    full_use: Option<f64>,
}

impl<'a, D: Planned> Run<'a, D> {
    /// A run in the folder `output` that goes on where `trainer` is, on a device whose GEMMs have this measured
    /// speed.
    pub fn new(
        output: &Path,
        trainer: Trainer<D>,
        data: Data<'a>,
        extra: Vec<(String, Vec<u8>)>,
        peak_flops: Option<f64>,
        quiet: bool,
    ) -> Result<Self> {
        let training = &trainer.config().training;
        let step = trainer.progress().step;
        let leads = trainer.ranks().rank() == 0;
        if leads && trainer.config().log.plot {
            Results::at(&output.join(PICTURE_FILE))?;
        }
        let metrics = leads.then(|| Metrics::open(&output.join(METRICS_FILE), step));
        let mut metrics = metrics.transpose()?;
        if trainer.config().log.tensorboard {
            metrics = metrics
                .map(|metrics| metrics.with_events(step))
                .transpose()?;
        }
        let validation = data.validation(training.validation_sequences)?;
        let bar = progress_bar(training.steps, step, quiet);
        let flops = training_flops(trainer.model_config(), data.longest(training.sequence_len));
        let world = trainer.ranks().world() as f64;
        // Whatever a checkpoint could not hold is found before the work.
        trainer.config().to_toml()?;
        Ok(Self {
            output: output.to_owned(),
            trainer,
            data,
            extra,
            validation,
            metrics,
            bar,
            quiet,
            shown: None,
            validated: None,
            saved: None,
            full_use: peak_flops.map(|peak| flops / (peak * world)),
        })
    }

    /// Trains to the end of the run, to Ctrl-C or to the time limit; saves, and draws the plot.
    pub fn go(mut self) -> Result<Ended> {
        let said = "stopping after this step; once more to stop at once";
        note_interrupts((!self.quiet).then_some(said));
        self.trainer.interrupt_by(flag());
        self.introduce();
        let mut end = self.steps()?;
        let done = self.trainer.progress();
        // A model that is what it was before is no result.
        if end == End::Complete && done.step > 0 && done.updates == 0 {
            end = End::TooManySkipped;
        }
        self.bar.finish_and_clear();
        self.save()?;
        let config = self.trainer.config();
        if let (true, Some(metrics)) = (config.log.plot, &self.metrics) {
            let picture = self.output.join(PICTURE_FILE);
            plot::draw(metrics.path(), &picture)?;
        }
        let progress = self.trainer.progress();
        Ok(Ended {
            how: end,
            step: progress.step,
            tokens: progress.tokens,
            model: self.saved.map(|s| s.1).unwrap_or_default(),
            output: self.output,
            loss: self.shown.map(|s| s.0),
            validation: self.validated,
            leads: self.metrics.is_some(),
        })
    }

    fn steps(&mut self) -> Result<End> {
        let training = self.trainer.config().training.clone();
        let every = self.trainer.config().checkpoint.every;
        let limit = training.time_limit_minutes;
        // A time that is too long for the type is no limit.
        let limit = limit.and_then(|minutes| Duration::try_from_secs_f64(60.0 * minutes).ok());
        let started = Instant::now();
        if self.trainer.progress().step == 0 {
            self.validate()?;
        }
        while self.trainer.progress().step < training.steps {
            let began = Instant::now();
            let report = match self.trainer.step(&self.data.corpus, &self.data.train) {
                Err(TrainError::Interrupted) => return Ok(End::Interrupted),
                report => report?,
            };
            self.report(&report, began.elapsed())?;
            let step = self.trainer.progress().step;
            let due = |every: u64| every > 0 && step.is_multiple_of(every);
            if due(training.validate_every) || step == training.steps {
                self.validate()?;
            }
            if report.stop {
                return Ok(End::TooManySkipped);
            }
            let late = limit.is_some_and(|limit| started.elapsed() >= limit);
            match self.trainer.any([interrupted(), late])? {
                [true, _] => return Ok(End::Interrupted),
                [_, true] => return Ok(End::OutOfTime),
                _ => {}
            }
            if due(every) {
                self.save()?;
            }
        }
        Ok(End::Complete)
    }

    fn report(&mut self, report: &StepReport, took: Duration) -> Result<()> {
        let seconds = took.as_secs_f64();
        let pace = seconds / report.tokens as f64;
        if let Some(reason) = &report.skipped {
            tracing::warn!("step {} skipped: {reason}", report.step);
        }
        let (loss, pace) = match self.shown {
            _ if !report.loss.is_finite() => self.shown.unwrap_or((f64::NAN, pace)),
            None => (report.loss, pace),
            Some((l, p)) => (l + NEWEST * (report.loss - l), p + NEWEST * (pace - p)),
        };
        self.shown = Some((loss, pace)).filter(|s| s.0.is_finite());
        self.bar.set_message(self.message(loss, pace));
        self.bar.set_position(report.step + 1);
        let every = self.trainer.config().log.every;
        if report.skipped.is_some() || (report.step + 1).is_multiple_of(every) {
            let utilisation = self
                .full_use
                .map(|full| full / (seconds / report.tokens as f64));
            let line = Line {
                model_flops_utilisation: utilisation,
                ..Line::step(report, seconds)
            };
            self.write(&line)?;
        }
        Ok(())
    }

    /// What the progress bar says: loss, speed, and of a GPU the share of its speed that the model's own operations
    /// take and the memory that is taken.
    fn message(&self, loss: f64, pace: f64) -> String {
        let mut message = format!("loss {loss:.4}  {:.0} tokens/s", 1.0 / pace.max(1e-9));
        if let Some(full) = self.full_use {
            message += &format!("  MFU {:.0}%", 100.0 * full / pace.max(1e-12));
        }
        if let Some(bytes) = self.trainer.model().device.memory_taken() {
            message += &format!("  {:.1} GiB", bytes as f64 / f64::from(1 << 30));
        }
        message
    }

    fn write(&mut self, line: &Line) -> Result<()> {
        match &mut self.metrics {
            Some(metrics) => metrics.write(line),
            None => Ok(()),
        }
    }

    fn validate(&mut self) -> Result<()> {
        let loss = match self.trainer.validate(&self.validation) {
            // Seen again after it.
            Err(TrainError::Interrupted) => return Ok(()),
            loss => loss?,
        };
        if let Some(loss) = loss {
            let step = self.trainer.progress().step;
            self.write(&Line::validation(step, loss))?;
            self.bar.set_prefix(format!("validation {loss:.4}"));
            self.validated = Some(loss);
        }
        Ok(())
    }

    fn save(&mut self) -> Result<()> {
        let (config, step) = (self.trainer.config(), self.trainer.progress().step);
        if self.saved.as_ref().is_some_and(|s| s.0 == step) {
            return Ok(());
        }
        let data = self.data.fingerprints();
        let checkpoint = self.trainer.checkpoint(&data, &self.extra)?;
        // The others have sent what they own; one of them writes.
        let Some(metrics) = &mut self.metrics else {
            self.saved = Some((step, PathBuf::new()));
            return Ok(());
        };
        metrics.sync()?;
        let root = checkpoints(&self.output);
        let folder = save(&mut Disk, &root, &checkpoint, config.checkpoint.keep)?;
        self.saved = Some((step, folder));
        Ok(())
    }

    fn introduce(&self) {
        if self.quiet || !std::io::stderr().is_terminal() {
            return;
        }
        let specs = specs(self.trainer.model_config());
        let weights: usize = specs.iter().map(|s| s.role.len()).sum();
        note!(
            "{:.2} million weights; {} tokens in {} sequences to train on, {} sequences to validate",
            weights as f64 / 1e6,
            self.data.train.tokens(),
            self.data.train.len(),
            self.validation.len()
        );
    }
}

impl Ended {
    /// Says how the run ended, and how to go on with it.
    ///
    /// # Errors
    /// If it has not come to its end: a script that waits for that must not take this for it.
    pub fn conclude(&self, quiet: bool) -> Result<()> {
        let resume = format!("segattn resume {}", self.output.display());
        let step = self.step;
        match self.how {
            _ if !self.leads => {}
            End::TooManySkipped => bail!(
                "stopped after step {step}: too many steps were skipped (see metrics.jsonl); lower the learning \
                 rate and go on with `{resume} --schedule.lr ...`"
            ),
            End::Interrupted => {
                bail!("stopped by a signal after step {step} and saved; go on with `{resume}`")
            }
            _ if quiet => {}
            End::Complete => {
                let shown = |name: &str, loss: Option<f64>| {
                    loss.map_or(String::new(), |loss| format!(", {name} {loss:.4}"))
                };
                note!(
                    "done after {step} steps{}{}; the model is {}",
                    shown("loss", self.loss),
                    shown("validation", self.validation),
                    self.model.display()
                );
            }
            End::OutOfTime => {
                note!("time is up after step {step}, saved; go on with `{resume}`")
            }
        }
        Ok(())
    }
}

/// The folder that keeps tokens; none if nothing is to be kept.
fn cache(section: &DataSection, output: &Path) -> Option<PathBuf> {
    match &section.cache {
        Some(folder) => Some(folder.clone()).filter(|folder| !folder.as_os_str().is_empty()),
        // Of a folder such as `.` nothing is beside it in sight.
        None => match (output.parent(), output.file_name()) {
            (Some(above), Some(_)) => Some(above.join(CACHE)),
            _ => Some(output.join(CACHE)),
        },
    }
}

fn bytes_bar(quiet: bool) -> ProgressBar {
    if quiet || !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = "reading data {bytes}/{total_bytes} {bar:24.cyan/blue} {bytes_per_sec}  {eta} left";
    let style = ProgressStyle::with_template(style).expect("a template that is constant");
    let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
    bar.with_style(style)
}

fn progress_bar(steps: u64, at: u64, quiet: bool) -> ProgressBar {
    if quiet || !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = "{pos}/{len} {bar:24.cyan/blue} {msg}  {prefix}  {eta} left";
    let style = ProgressStyle::with_template(style).expect("a template that is constant");
    let bar = ProgressBar::with_draw_target(Some(steps), ProgressDrawTarget::stderr());
    let bar = bar.with_style(style).with_position(at);
    bar.reset_eta();
    bar
}
