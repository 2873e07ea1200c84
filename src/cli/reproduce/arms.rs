//! Weights of the arms: where they lie, and the training that makes them.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use segattn::experiment::{Arm, Model};
use segattn::train::checkpoint::{Checkpoint, Disk, Fingerprints, list, save};
use segattn::train::config::Config;
use segattn::train::data::Position;
use segattn::train::folder::METRICS_FILE;
use segattn::train::guard::Guard;
use segattn::train::progress::{Progress, Tensors};
use serde::{Deserialize, Serialize};

use super::plan::Planned;
use super::{STOPPED, Session, State, folder_name, stop_if_interrupted};
use crate::cli::files::write_atomically;
use crate::cli::metrics;
use crate::cli::ranks::Party;
use crate::cli::run::{End, checkpoints};
use crate::cli::{resume, train};

/// File in a run's folder that says that its training is complete.
const TRAINED: &str = "trained.json";
/// Key that limits a training's time.
const TIME_LIMIT: &str = "training.time_limit_minutes";

/// A complete training.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Trained {
    /// Folder of its model, inside the run's.
    model: PathBuf,
    /// Tokens predicted.
    pub tokens: u64,
    /// Seconds of its steps.
    pub seconds: f64,
}

impl Session<'_> {
    fn folder(&self, arm: &Arm, seed: u64) -> PathBuf {
        self.work.join(folder_name(self.definition, arm, seed))
    }

    /// The arm's own training, where it is complete and its model is there.
    pub fn trained(&self, arm: &Arm, seed: u64) -> Option<Trained> {
        let folder = self.folder(arm, seed);
        let text = std::fs::read(folder.join(TRAINED)).ok()?;
        let trained: Trained = serde_json::from_slice(&text).ok()?;
        folder.join(&trained.model).is_dir().then_some(trained)
    }

    /// The folder of an arm's weights; `None` where they are not trained yet.
    pub fn weights(&self, arm: &Arm, seed: u64) -> Option<PathBuf> {
        match (arm.trains, &arm.parent, &self.definition.model) {
            (true, ..) => {
                let trained = self.trained(arm, seed)?;
                Some(self.folder(arm, seed).join(trained.model))
            }
            (false, Some(parent), _) => self.weights(self.definition.arm(parent)?, seed),
            (false, None, Model::Folder(folder)) => Some(folder.clone()),
            (false, None, Model::Tiny) => self.tiny(arm, seed).ok(),
        }
    }

    /// Tokens and seconds of all trainings behind an arm's weights.
    pub fn spent(&self, arm: &Arm, seed: u64) -> (u64, f64) {
        let line = self.definition.line(arm).into_iter();
        let trained = line.filter(|arm| arm.trains);
        trained
            .filter_map(|arm| self.trained(arm, seed))
            .fold((0, 0.0), |sum, t| (sum.0 + t.tokens, sum.1 + t.seconds))
    }

    /// The share of a run's own training that is done.
    pub fn trained_share(&self, run: &Planned) -> f64 {
        if !run.arm.trains || self.trained(run.arm, run.seed).is_some() {
            return 1.0;
        }
        let root = checkpoints(&self.folder(run.arm, run.seed));
        let newest = list(&root).ok().and_then(|all| Some(all.first()?.0));
        newest.unwrap_or(0) as f64 / run.config.training.steps as f64
    }

    /// Trains an arm to its end, or until so many minutes are left.
    pub fn train(&self, arm: &Arm, seed: u64, minutes_after: f64) -> Result<State> {
        let folder = self.folder(arm, seed);
        let parent = arm.parent.as_deref().and_then(|p| self.definition.arm(p));
        let before = match (parent, &self.definition.model) {
            (Some(parent), _) => self
                .weights(parent, seed)
                .context("its parent is not trained yet")?,
            (None, Model::Folder(folder)) => folder.clone(),
            (None, Model::Tiny) => self.tiny(arm, seed)?,
        };
        let teacher = arm.teacher.as_deref().and_then(|t| self.definition.arm(t));
        let teacher = teacher.map(|teacher| {
            let weights = self.weights(teacher, seed);
            weights.context("its teacher is not trained yet")
        });
        let teacher = teacher.transpose()?;
        let limit = self.time_left().map(|left| {
            let minutes = left.as_secs_f64() / 60.0 - minutes_after;
            minutes.max(f64::MIN_POSITIVE)
        });
        let begun = !list(&checkpoints(&folder))?.is_empty();
        let ended = match begun {
            true => {
                let limit = limit.map_or("none".to_owned(), |limit| limit.to_string());
                let overrides = [(TIME_LIMIT.to_owned(), limit)];
                resume::go_on(
                    &folder,
                    &overrides,
                    self.device,
                    &Party::alone(),
                    self.quiet,
                )?
            }
            false => {
                let seed = self.definition.training_seed(arm, seed);
                let mut config = arm.config(seed, &before, teacher.as_deref(), &folder)?;
                config.training.time_limit_minutes = limit;
                train::begin(&config, self.device, &Party::alone(), self.quiet)?
            }
        };
        match ended.how {
            End::Complete => {}
            End::OutOfTime => return Ok(State::OutOfTime),
            End::Interrupted => bail!(STOPPED),
            End::TooManySkipped => bail!(
                "the training stopped after step {}: too many steps were skipped, see {}",
                ended.step,
                folder.join(METRICS_FILE).display()
            ),
        }
        let trained = Trained {
            model: ended.model.strip_prefix(&folder)?.to_owned(),
            tokens: ended.tokens,
            seconds: step_seconds(&folder, ended.step)?,
        };
        write_atomically(&folder.join(TRAINED), &serde_json::to_vec(&trained)?)?;
        keep_only(&folder, &ended.model)?;
        stop_if_interrupted()?;
        Ok(State::Done)
    }

    /// A folder with random weights of the arm's shape.
    fn tiny(&self, arm: &Arm, seed: u64) -> Result<PathBuf> {
        let any = Path::new(".");
        let mut config = arm.config(seed, any, Some(any), self.work)?;
        config.model.folder = None;
        config.distillation = Default::default();
        config.model.segment = Default::default();
        let model = config.model.new_config(segattn::model::tokenizer::BYTES)?;
        let shape = model.to_json();
        let folder = self.work.join(format!("tiny-seed{seed}"));
        let progress = Progress {
            step: 0,
            updates: 0,
            tokens: 0,
            position: Position::default(),
            guard: Guard::new(config.guard.clone())?,
        };
        if let Some((_, found)) = list(&folder)?.first() {
            let same = crate::cli::model::load_config(found)?.to_json() == shape;
            if same {
                return Ok(found.clone());
            }
        }
        let checkpoint = Checkpoint {
            tensors: Tensors::initial(&model, seed),
            config: Config { ..config },
            model,
            progress,
            data: Fingerprints::default(),
            extra: Vec::new(),
        };
        Ok(save(&mut Disk, &folder, &checkpoint, 2)?)
    }
}

/// Seconds of all steps: their mean, where only some were written down, times their number.
fn step_seconds(folder: &Path, steps: u64) -> Result<f64> {
    let lines = metrics::read(&folder.join(METRICS_FILE))?;
    let seconds: Vec<f64> = lines.iter().filter_map(|line| line.seconds).collect();
    Ok(steps as f64 * seconds.iter().sum::<f64>() / seconds.len().max(1) as f64)
}

/// Removes the checkpoints before the last one: nothing goes on from them.
fn keep_only(folder: &Path, last: &Path) -> Result<()> {
    for (_, old) in list(&checkpoints(folder))? {
        if old != last {
            std::fs::remove_dir_all(&old)
                .with_context(|| format!("cannot remove {}", old.display()))?;
        }
    }
    Ok(())
}
