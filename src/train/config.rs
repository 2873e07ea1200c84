//! Configuration of a training run: a TOML file, with every key also a command-line flag that wins.
//!
//! Overrides are laid over the file's value tree before it becomes a [`Config`], and the list of flags is
//! made from the default's own tree, so neither can drift from the structs. Defaults stand in the `Default`
//! of each section, explanations in the commented example, from which `--help` takes them too.

mod distillation;
mod flags;
mod lora;
mod mixture;
mod model;
mod overrides;

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

pub use distillation::{DistillationSection, TeacherExecution};
pub use flags::{EXAMPLE, Flag, flags};
pub use lora::LoraSection;
pub use mixture::{MixtureSection, RelaySection, TaskSection};
pub use model::{ModelSection, SegmentSection, ShapeSection};
pub(crate) use overrides::typed;

use super::error::{Result, TrainError};
use super::guard::{Guard, GuardConfig};
use super::schedule::{Schedule, ScheduleKind};

/// Largest configuration file that is read, in bytes.
const MAX_FILE_BYTES: u64 = 1 << 20;
/// Most sequences of a step, those of all its batches together.
const MAX_SEQUENCES: usize = 1 << 16;

/// Everything that defines a run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// What is trained.
    pub model: ModelSection,
    /// Adapters that are trained in place of the model's own weights.
    pub lora: LoraSection,
    /// Whose probabilities are learned.
    pub distillation: DistillationSection,
    /// What it is trained on.
    pub data: DataSection,
    /// How it is trained.
    pub training: TrainingSection,
    /// The update.
    pub optimizer: OptimizerSection,
    /// The learning rate.
    pub schedule: ScheduleSection,
    /// Which steps are skipped.
    pub guard: GuardConfig,
    /// When to save.
    pub checkpoint: CheckpointSection,
    /// What to report.
    pub log: LogSection,
}

/// Section `data`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DataSection {
    /// Files and folders to train on.
    pub train: Vec<PathBuf>,
    /// Files and folders to validate on; empty: a share of the training data is held out.
    pub validation: Vec<PathBuf>,
    /// Which files of a folder are read, by the end of their names.
    pub extensions: Vec<String>,
    /// Field of a JSONL line that holds its text (a string) or tokens (a list of ids). A line without it may have
    /// `messages`.
    pub jsonl_field: String,
    /// File with the chat template that writes the `messages` of JSONL lines. `None`: that of the tokenizer's folder.
    pub chat_template: Option<PathBuf>,
    /// Width of the ids in `.bin` files.
    pub bin_type: BinType,
    /// Id that ends a document inside a `.bin` file.
    pub document_end: Option<u32>,
    /// Puts before each text what the tokenizer puts there elsewhere (most: BOS).
    pub add_bos: bool,
    /// Puts an id at which generation ends after each text, where the model or its tokenizer names one.
    pub add_eos: bool,
    /// Folder that keeps the tokens of large texts, so that the next run on them begins at once. `None`: the folder
    /// `segattn-cache` beside the run's own. Empty: nothing is kept.
    pub cache: Option<PathBuf>,
    /// How the held-out share is chosen.
    pub split: Split,
    /// Size of the held-out share, from 0 to below 1.
    pub validation_share: f64,
    /// Parts that each sequence is drawn from. Empty: all of `train`, in one order.
    pub mixture: Vec<MixtureSection>,
}

impl Default for DataSection {
    fn default() -> Self {
        Self {
            train: Vec::new(),
            validation: Vec::new(),
            extensions: ["txt", "md", "jsonl", "parquet"].map(String::from).to_vec(),
            jsonl_field: "text".into(),
            chat_template: None,
            bin_type: BinType::U16,
            document_end: None,
            add_bos: true,
            add_eos: true,
            cache: None,
            split: Split::Auto,
            validation_share: 0.05,
            mixture: Vec::new(),
        }
    }
}

/// Width of the token ids in a `.bin` file, little endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BinType {
    /// Two bytes.
    U16,
    /// Four bytes.
    U32,
}

/// How validation data are held out of the training data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Split {
    /// By document where that leaves both sides some, by tail otherwise.
    Auto,
    /// Whole documents, chosen by a hash of their tokens: equal documents are on one side, and new
    /// documents move no old one.
    Document,
    /// The end of every document.
    Tail,
}

/// Section `training`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrainingSection {
    /// Folder for checkpoints, metrics and the plot.
    pub output: PathBuf,
    /// Steps of the run, skipped ones included.
    pub steps: u64,
    /// Saves and stops after this time, in minutes, counted anew by `resume`.
    pub time_limit_minutes: Option<f64>,
    /// Seed of initial weights and of the data's order.
    pub seed: u64,
    /// Sequences computed side by side.
    pub batch: usize,
    /// Batches whose gradients are added up in one step.
    pub accumulation: usize,
    /// Sequences whose gradients are one sum, a power of two; by default [`group`](Self::group) of the batch. The sums
    /// of groups are added by a tree, and groups are spread over ranks.
    pub group: Option<usize>,
    /// Tokens predicted in a sequence at most; longer documents are cut. 0: documents run whole.
    pub sequence_len: usize,
    /// Segments that a loss reaches back (TBPTT); 0 detaches the state.
    pub tbptt: usize,
    /// Segments of a sequence computed side by side; 0 for all.
    pub segments_per_step: usize,
    /// Whether activations are computed again in the backward instead of kept.
    pub recompute: bool,
    /// Whether past gates are learned.
    pub learn_gates: bool,
    /// Parts of names of the tensors that are updated; all others keep their bits. Empty: all tensors, and gates as
    /// `learn_gates` says.
    pub train_only: Vec<String>,
    /// Price of open gates: the objective has this times the mean of all past gates that are read. 0 for none.
    pub gate_l1: f64,
    /// Steps between two validations; 0 for none.
    pub validate_every: u64,
    /// Sequences of a validation, always the same; 0 for all.
    pub validation_sequences: usize,
}

impl Default for TrainingSection {
    fn default() -> Self {
        Self {
            output: PathBuf::from("run"),
            steps: 1000,
            time_limit_minutes: None,
            seed: 0,
            batch: 8,
            accumulation: 1,
            group: None,
            sequence_len: 4096,
            tbptt: 1,
            segments_per_step: 1,
            recompute: false,
            learn_gates: false,
            train_only: Vec::new(),
            gate_l1: 0.0,
            validate_every: 100,
            validation_sequences: 32,
        }
    }
}

/// Section `optimizer`: AdamW.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OptimizerSection {
    /// Decay of the first and second moment.
    pub betas: [f64; 2],
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay of matrices.
    pub weight_decay: f64,
    /// Whether it applies to the embedding.
    pub decay_embeddings: bool,
    /// Gradients are scaled down to this global norm.
    pub clip_norm: Option<f64>,
    /// Factor on the learning rate of learned past gates.
    pub gate_lr_scale: f64,
}

impl Default for OptimizerSection {
    fn default() -> Self {
        Self {
            betas: [0.9, 0.95],
            eps: 1e-8,
            weight_decay: 0.1,
            decay_embeddings: false,
            clip_norm: Some(1.0),
            gate_lr_scale: 1.0,
        }
    }
}

/// Section `schedule`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ScheduleSection {
    /// Shape after the warm-up.
    pub kind: ScheduleKind,
    /// Highest learning rate.
    pub lr: f64,
    /// Lowest, as a share of the highest.
    pub min_lr_ratio: f64,
    /// Steps of the linear warm-up; by default 50, or a tenth of a run shorter than 500 steps.
    pub warmup_steps: Option<u64>,
    /// Steps of the fall; by default all after the warm-up (cosine), or the last fifth (wsd).
    pub decay_steps: Option<u64>,
}

impl Default for ScheduleSection {
    fn default() -> Self {
        Self {
            kind: ScheduleKind::Cosine,
            lr: 3e-4,
            min_lr_ratio: 0.1,
            warmup_steps: None,
            decay_steps: None,
        }
    }
}

/// Section `checkpoint`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CheckpointSection {
    /// Steps between two checkpoints; 0 saves at the end and at Ctrl-C only.
    pub every: u64,
    /// Checkpoints that are kept.
    pub keep: usize,
}

impl Default for CheckpointSection {
    fn default() -> Self {
        Self {
            every: 250,
            keep: 2,
        }
    }
}

/// Section `log`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LogSection {
    /// Steps between two lines of metrics.
    pub every: u64,
    /// Whether to draw the loss at the end.
    pub plot: bool,
    /// Whether to write the metrics for TensorBoard too.
    pub tensorboard: bool,
}

impl Default for LogSection {
    fn default() -> Self {
        Self {
            every: 1,
            plot: true,
            tensorboard: true,
        }
    }
}

impl Config {
    /// Reads a TOML file, lays `overrides` (dotted key, value) over it, and checks the result.
    ///
    /// # Errors
    /// [`TrainError::Io`] if the file cannot be read, [`TrainError::Data`] where it is not TOML,
    /// [`TrainError::Config`] with the key, what it expects and what it got.
    pub fn load(path: &Path, overrides: &[(String, String)]) -> Result<Self> {
        let read = |source| TrainError::Io {
            action: "read",
            path: path.to_owned(),
            source,
        };
        let size = std::fs::metadata(path).map_err(read)?.len();
        if size > MAX_FILE_BYTES {
            let expected = format!("a file of at most {MAX_FILE_BYTES} bytes");
            return Err(TrainError::config(
                path.display().to_string(),
                expected,
                size,
            ));
        }
        let text = std::fs::read_to_string(path).map_err(read)?;
        Self::parse(&text, overrides).map_err(|error| error.at(path))
    }

    /// [`Config::load`] on the file's text.
    ///
    /// # Errors
    /// [`TrainError::Data`] or [`TrainError::Config`].
    pub fn parse(text: &str, overrides: &[(String, String)]) -> Result<Self> {
        let config = overrides::parse(text, overrides)?;
        config.validate()?;
        Ok(config)
    }

    /// The configuration as TOML, every key written out that has a value.
    ///
    /// # Errors
    /// [`TrainError::Config`] for what TOML cannot hold: a path that is not UTF-8, a number beyond 63 bits.
    pub fn to_toml(&self) -> Result<String> {
        toml::to_string(self).map_err(|error| {
            let expected = "paths that are UTF-8 and numbers below 2^63";
            TrainError::config("configuration", expected, error)
        })
    }

    /// Checks what types cannot.
    ///
    /// # Errors
    /// [`TrainError::Config`] for the first key out of range.
    pub fn validate(&self) -> Result<()> {
        self.model.validate()?;
        self.lora.validate(&self.model, &self.training)?;
        self.distillation.validate()?;
        self.data.validate()?;
        mixture::validate(&self.data.mixture, self.training.sequence_len)?;
        self.training.validate()?;
        self.optimizer.validate()?;
        if self.checkpoint.keep < 2 {
            let expected = "at least 2, so that one is whole while the next is written";
            let key = "checkpoint.keep";
            return Err(TrainError::config(key, expected, self.checkpoint.keep));
        }
        at_least_one("log.every", self.log.every)?;
        self.schedule()?;
        Guard::new(self.guard.clone())?;
        Ok(())
    }

    /// Checks that a run saved under the configuration `before` can go on under this one: the model and the adapters
    /// stay, and only the folders of the weights under adapters and of the teacher may be others, as they may have been
    /// moved.
    ///
    /// # Errors
    /// [`TrainError::Config`] for `lora`, `distillation` or `model`.
    pub fn check_resumed(&self, before: &Config) -> Result<()> {
        if self.lora != before.lora {
            let expected = "the keys of the saved run; for other adapters start a new one";
            return Err(TrainError::config("lora", expected, "others"));
        }
        if self.distillation.is_on() != before.distillation.is_on() {
            let expected = "a teacher where the saved run has one, and none where it has none; for the other start a \
                            new run with `model.folder`";
            let got = self.distillation.model.as_ref();
            let got = got.map_or("none".into(), |folder| folder.display().to_string());
            return Err(TrainError::config("distillation.model", expected, got));
        }
        let mut model = self.model.clone();
        if self.lora.is_on() {
            model.folder = before.model.folder.clone();
        }
        if model != before.model {
            let expected = "the keys of the saved run, which goes on with the same model; for another start a new run \
                            with `model.folder`";
            return Err(TrainError::config("model", expected, "others"));
        }
        Ok(())
    }

    /// The learning-rate schedule.
    ///
    /// # Errors
    /// [`TrainError::Config`] where the numbers do not fit together.
    pub fn schedule(&self) -> Result<Schedule> {
        let s = &self.schedule;
        Schedule::new(
            s.kind,
            s.lr,
            self.training.steps,
            s.warmup_steps.unwrap_or(50.min(self.training.steps / 10)),
            s.decay_steps,
            s.min_lr_ratio,
        )
    }
}

impl DataSection {
    fn validate(&self) -> Result<()> {
        if self.train.is_empty() {
            let expected = "at least one file or folder";
            return Err(TrainError::config("data.train", expected, "none"));
        }
        if !(0.0..1.0).contains(&self.validation_share) {
            let expected = "a number from 0 to below 1";
            let key = "data.validation_share";
            return Err(TrainError::config(key, expected, self.validation_share));
        }
        Ok(())
    }
}

impl TrainingSection {
    /// Sequences of a group: by default the largest power of two up to `batch`, so that a batch needs one set of
    /// gradients.
    pub fn group(&self) -> usize {
        self.group.unwrap_or(1 << self.batch.max(1).ilog2())
    }

    fn validate(&self) -> Result<()> {
        at_least_one("training.steps", self.steps)?;
        at_least_one("training.batch", self.batch as u64)?;
        at_least_one("training.accumulation", self.accumulation as u64)?;
        at_most("training.batch", self.batch, MAX_SEQUENCES)?;
        if let Some(group) = self.group
            && !group.is_power_of_two()
        {
            let (key, expected) = ("training.group", "a power of two, such as 1 or 8");
            return Err(TrainError::config(key, expected, group));
        }
        if !(self.gate_l1.is_finite() && self.gate_l1 >= 0.0) {
            let (key, expected) = ("training.gate_l1", "a finite number >= 0");
            return Err(TrainError::config(key, expected, self.gate_l1));
        }
        at_most(
            "training.accumulation",
            self.accumulation,
            MAX_SEQUENCES / self.batch,
        )?;
        positive(
            "training.time_limit_minutes",
            self.time_limit_minutes.unwrap_or(1.0),
        )
    }
}

impl OptimizerSection {
    fn validate(&self) -> Result<()> {
        if self.betas.iter().any(|b| !(0.0..1.0).contains(b)) {
            let got = format!("{:?}", self.betas);
            return Err(TrainError::config(
                "optimizer.betas",
                "two numbers in [0, 1)",
                got,
            ));
        }
        if !(self.eps.is_finite() && self.eps as f32 > 0.0) {
            let expected = "a finite number > 0 (as f32)";
            return Err(TrainError::config("optimizer.eps", expected, self.eps));
        }
        if !(self.weight_decay.is_finite() && self.weight_decay >= 0.0) {
            let (key, expected) = ("optimizer.weight_decay", "a finite number >= 0");
            return Err(TrainError::config(key, expected, self.weight_decay));
        }
        positive("optimizer.clip_norm", self.clip_norm.unwrap_or(1.0))?;
        positive("optimizer.gate_lr_scale", self.gate_lr_scale)
    }
}

fn positive(key: &str, value: f64) -> Result<()> {
    if value.is_finite() && value > 0.0 {
        return Ok(());
    }
    Err(TrainError::config(key, "a finite number > 0", value))
}

fn at_most(key: &str, value: usize, most: usize) -> Result<()> {
    if value <= most {
        return Ok(());
    }
    let expected =
        format!("at most {most}, so that a step has no more than {MAX_SEQUENCES} sequences");
    Err(TrainError::config(key, expected, value))
}

fn at_least_one(key: &str, value: u64) -> Result<()> {
    if value >= 1 {
        return Ok(());
    }
    Err(TrainError::config(key, "at least 1", value))
}
