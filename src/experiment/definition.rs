//! Definitions of experiments: `experiments/NAME.toml`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde::Deserialize;
use sha2::{Digest, Sha256};
use toml::{Table, Value};

use super::error::{ExperimentError, Result};
use super::merge::{lay_over, lay_over_named, set};
use crate::train::config::{Config, typed};

/// Largest definition that is read, in bytes.
const MAX_FILE_BYTES: u64 = 1 << 20;
/// Keys of the training configuration that belong to the command that runs the arms.
const OWNED: [[&str; 2]; 5] = [
    ["training", "output"],
    ["training", "seed"],
    ["training", "time_limit_minutes"],
    ["model", "folder"],
    ["distillation", "model"],
];
/// Added to the seed for each training that an arm's weights have had before its own.
const GENERATION: u64 = 1_000_000;
/// The task that has its evaluation's name in results.
const PERPLEXITY: &str = "perplexity";
/// Flags that change no result of a task at a length.
const NEUTRAL: [&str; 4] = ["task", "lengths", "batch", "segments_per_step"];
/// The value of `model` that stands for random weights.
const TINY: &str = "tiny";

/// An experiment.
#[derive(Clone, Debug, PartialEq)]
pub struct Definition {
    /// Its name: that of its file.
    pub name: String,
    /// What it asks, for people.
    pub description: String,
    /// Where all arms begin.
    pub model: Model,
    /// Seeds of the data's order, of random weights and of the test samples; every arm has every seed.
    pub seeds: Vec<u64>,
    /// The arm that reports compare with.
    pub baseline: Option<String>,
    /// By metric, the difference from the baseline that counts as none, fixed before the run.
    pub margins: BTreeMap<String, f64>,
    /// What is evaluated.
    pub evaluations: Vec<Evaluation>,
    /// The arms, in the order in which they run: most valuable first.
    pub arms: Vec<Arm>,
}

/// The weights that all arms begin with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Model {
    /// Those of a model folder.
    Folder(PathBuf),
    /// Random ones of the shape that `[train.model.shape]` says.
    Tiny,
}

/// Keys of an evaluation: flags of `segattn eval`, whose `task` and `lengths` are among them.
#[derive(Clone, Debug, PartialEq)]
pub struct Evaluation {
    /// Its name, by which arms ask for it.
    pub name: String,
    /// Goes before the names of its tasks in results, so that they differ from those of another evaluation.
    pub label: Option<String>,
    /// The flags, `_` for `-`.
    pub flags: Table,
}

/// An arm.
#[derive(Clone, Debug, PartialEq)]
pub struct Arm {
    /// Its name.
    pub name: String,
    /// What it is, for people.
    pub description: String,
    /// The arm whose last weights it begins with, in place of the experiment's model.
    pub parent: Option<String>,
    /// The arm whose last weights its teacher has, where it trains with one.
    pub teacher: Option<String>,
    /// Whether it trains, or only runs the weights it begins with.
    pub trains: bool,
    /// The training configuration, with the arm's keys over the experiment's.
    pub train: Table,
    /// Evaluations that it takes part in, the arm's flags over theirs.
    pub evaluations: Vec<Evaluation>,
    /// Estimates.
    pub minutes: Minutes,
}

/// Estimated minutes of a run on the accelerator.
#[derive(Clone, Copy, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Minutes {
    /// Of its training.
    pub train: f64,
    /// Of all its evaluations.
    pub eval: f64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    description: String,
    model: String,
    seeds: Vec<u64>,
    baseline: Option<String>,
    #[serde(default)]
    margins: BTreeMap<String, f64>,
    #[serde(default)]
    minutes: Minutes,
    #[serde(default)]
    train: Table,
    eval: Vec<Table>,
    arm: Vec<FileArm>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileArm {
    name: String,
    #[serde(default)]
    description: String,
    parent: Option<String>,
    teacher: Option<String>,
    #[serde(default = "yes")]
    trains: bool,
    #[serde(default)]
    train: Table,
    #[serde(default)]
    eval: Table,
    evals: Option<Vec<String>>,
    minutes: Option<Minutes>,
}

fn hash(text: &str) -> String {
    let digest = Sha256::digest(text);
    digest[..6]
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

fn yes() -> bool {
    true
}

impl Definition {
    /// Reads a definition; with `smoke` its section `smoke` goes over the rest, and `overrides` (dotted key, TOML or
    /// text) over both.
    ///
    /// # Errors
    /// [`ExperimentError::Io`]; [`ExperimentError::Key`] with the key, what it expects and what it got;
    /// [`ExperimentError::Train`] for keys of an arm's training configuration.
    pub fn load(path: &Path, smoke: bool, overrides: &[(String, String)]) -> Result<Self> {
        let read = |path: &Path| {
            let size = std::fs::metadata(path)?.len();
            if size > MAX_FILE_BYTES {
                let most = format!("{size} bytes, expected at most {MAX_FILE_BYTES}");
                return Err(std::io::Error::other(most));
            }
            std::fs::read_to_string(path)
        };
        let text = read(path).map_err(ExperimentError::io("read", path))?;
        let stem = path.file_stem().unwrap_or_default();
        Self::parse(&stem.to_string_lossy(), &text, smoke, overrides)
    }

    /// [`Definition::load`] on the file's text.
    ///
    /// # Errors
    /// The same, but for those of files.
    pub fn parse(
        name: &str,
        text: &str,
        smoke: bool,
        overrides: &[(String, String)],
    ) -> Result<Self> {
        let mut tree: Table = text
            .parse()
            .map_err(|e: toml::de::Error| syntax(name, text, &e))?;
        let section = tree.remove("smoke");
        if smoke {
            small(&mut tree, section)?;
        }
        for (key, text) in overrides {
            set(&mut tree, key, text)?;
        }
        let file: File = serde_path_to_error::deserialize(Value::Table(tree)).map_err(|error| {
            let path = error.path().to_string();
            ExperimentError::from(typed(path, error.into_inner().message()))
        })?;
        let definition = file.definition(name)?;
        definition.check()?;
        Ok(definition)
    }

    /// The arm of this name.
    pub fn arm(&self, name: &str) -> Option<&Arm> {
        self.arms.iter().find(|arm| arm.name == name)
    }

    /// An arm and those it descends from, the first of them first.
    pub fn line<'a>(&'a self, arm: &'a Arm) -> Vec<&'a Arm> {
        let mut line = vec![arm];
        while let Some(parent) = line[0].parent.as_deref().and_then(|name| self.arm(name)) {
            line.insert(0, parent);
        }
        line
    }

    /// An arm and all whose weights its own come from, as parents or teachers, in their order.
    pub fn needed<'a>(&'a self, arm: &'a Arm) -> Vec<&'a Arm> {
        let mut names = BTreeSet::from([&arm.name]);
        // Parents and teachers stand above.
        for arm in self.arms.iter().rev() {
            if names.contains(&arm.name) {
                names.extend(arm.parent.iter().chain(&arm.teacher));
            }
        }
        let arms = self.arms.iter();
        arms.filter(|arm| names.contains(&arm.name)).collect()
    }

    /// The seeds that an arm runs with: the first alone where nothing in its line is trained.
    pub fn seeds_of(&self, arm: &Arm) -> &[u64] {
        let trained = self.needed(arm).iter().any(|arm| arm.trains);
        match (&self.model, trained) {
            (Model::Folder(_), false) => &self.seeds[..1],
            _ => &self.seeds,
        }
    }

    /// The seed of an arm's training. Each training of a line has another: where an arm goes on with its parent's
    /// settings, it reads other sequences than those it has just read.
    pub fn training_seed(&self, arm: &Arm, seed: u64) -> u64 {
        let line = self.line(arm);
        let trained = line.iter().filter(|arm| arm.trains).count();
        let before = trained - usize::from(arm.trains);
        seed.wrapping_add(before as u64 * GENERATION)
    }

    /// All runs, in their order: every arm with the first seed, then with the next.
    pub fn runs(&self) -> Vec<(&Arm, u64)> {
        let with = |seed: &u64| {
            let seed = *seed;
            let arms = self.arms.iter();
            arms.filter(move |arm| self.seeds_of(arm).contains(&seed))
                .map(move |arm| (arm, seed))
        };
        self.seeds.iter().flat_map(with).collect()
    }

    /// Identifies the weights of an arm: how they were trained, and from what.
    pub fn weights(&self, arm: &Arm) -> String {
        let trained = self.line(arm).into_iter().filter(|arm| arm.trains);
        let settings: Vec<_> = trained.clone().map(|arm| &arm.train).collect();
        let mut text = format!("{:?} {settings:?}", self.model);
        if trained.clone().any(|arm| arm.teacher.is_some()) {
            for arm in self.needed(arm) {
                let settings = arm.trains.then_some(&arm.train);
                let (name, parent, teacher) = (&arm.name, &arm.parent, &arm.teacher);
                text += &format!(" {name:?} {parent:?} {teacher:?} {settings:?}");
            }
        }
        hash(&text)
    }

    /// Identifies an arm's results in an evaluation: its weights, its settings, and those of the evaluation.
    pub fn fingerprint(&self, arm: &Arm, evaluation: &Evaluation) -> String {
        let mut flags = evaluation.flags.clone();
        flags.retain(|name, _| !NEUTRAL.contains(&name));
        hash(&format!("{} {:?} {flags:?}", self.weights(arm), arm.train))
    }

    fn check(&self) -> Result<()> {
        if self.seeds.is_empty() {
            return Err(ExperimentError::key("seeds", "at least one", "none"));
        }
        if self.seeds.iter().collect::<BTreeSet<_>>().len() < self.seeds.len() {
            let got = format!("{:?}", self.seeds);
            return Err(ExperimentError::key("seeds", "each seed once", got));
        }
        if let Some(name) = self.baseline.as_ref().filter(|n| self.arm(n).is_none()) {
            let expected = "the name of an arm";
            return Err(ExperimentError::key("baseline", expected, name));
        }
        for (i, arm) in self.arms.iter().enumerate() {
            let before = &self.arms[..i];
            arm.check(before)?;
            // With any weights: which folder they lie in is known when the arm runs.
            let any = Path::new(".");
            arm.config(self.seeds[0], any, Some(any), Path::new("run"))?;
        }
        Ok(())
    }
}

impl Arm {
    fn check(&self, before: &[Arm]) -> Result<()> {
        let key = |name: &str| format!("arm.{}.{name}", self.name);
        let plain = |c: char| c.is_alphanumeric() || " -_.=".contains(c);
        if self.name.is_empty() || !self.name.chars().all(plain) {
            let expected = "letters, digits, spaces and - _ . =";
            return Err(ExperimentError::key("arm.name", expected, &self.name));
        }
        if before.iter().any(|arm| arm.name == self.name) {
            return Err(ExperimentError::key(
                "arm.name",
                "each name once",
                &self.name,
            ));
        }
        for (name, arm) in [("parent", &self.parent), ("teacher", &self.teacher)] {
            if let Some(arm) = arm
                && !before.iter().any(|other| other.name == *arm)
            {
                let expected = "the name of an arm above it";
                return Err(ExperimentError::key(key(name), expected, arm));
            }
        }
        if let Some(teacher) = self.teacher.as_ref().filter(|_| !self.trains) {
            let expected = "none, since the arm does not train";
            return Err(ExperimentError::key(key("teacher"), expected, teacher));
        }
        for [section, name] in OWNED {
            let value = self.train.get(section).and_then(|s| s.get(name));
            if let Some(value) = value {
                let expected = "nothing, it is set by the command (`model`, `seeds`, `teacher`, --work, --minutes)";
                let key = key(&format!("train.{section}.{name}"));
                return Err(ExperimentError::key(key, expected, value));
            }
        }
        Ok(())
    }

    /// The training configuration of the arm by [`Definition::training_seed`], from the weights in `folder` to a run in
    /// `output`, with a teacher in `teacher` where it has one.
    ///
    /// # Errors
    /// [`ExperimentError::Train`].
    pub fn config(
        &self,
        seed: u64,
        folder: &Path,
        teacher: Option<&Path>,
        output: &Path,
    ) -> Result<Config> {
        let failed = |error| ExperimentError::Train {
            arm: self.name.clone(),
            error: Box::new(error),
        };
        let text = self.train.to_string();
        let given = |key: &str, path: &Path| (key.to_owned(), path.to_string_lossy().into_owned());
        let mut overrides = vec![
            given("model.folder", folder),
            given("training.output", output),
            ("training.seed".to_owned(), seed.to_string()),
        ];
        let teacher = teacher.filter(|_| self.teacher.is_some());
        overrides.extend(teacher.map(|folder| given("distillation.model", folder)));
        Config::parse(&text, &overrides).map_err(failed)
    }
}

impl File {
    fn definition(self, name: &str) -> Result<Definition> {
        let evaluations = self.eval.into_iter().enumerate().map(evaluation);
        let evaluations = evaluations.collect::<Result<Vec<_>>>()?;
        for (i, evaluation) in evaluations.iter().enumerate() {
            if evaluations[..i].iter().any(|e| e.name == evaluation.name) {
                let expected = "each name once";
                return Err(ExperimentError::key(
                    "eval.name",
                    expected,
                    &evaluation.name,
                ));
            }
        }
        let arms = self.arm.into_iter();
        let arms = arms.map(|arm| arm.arm(&self.train, &evaluations, self.minutes));
        Ok(Definition {
            arms: arms.collect::<Result<_>>()?,
            name: name.to_owned(),
            description: self.description,
            model: match self.model.as_str() {
                TINY => Model::Tiny,
                folder => Model::Folder(folder.into()),
            },
            seeds: self.seeds,
            baseline: self.baseline,
            margins: self.margins,
            evaluations,
        })
    }
}

impl FileArm {
    fn arm(self, train: &Table, all: &[Evaluation], minutes: Minutes) -> Result<Arm> {
        let mut keys = train.clone();
        lay_over(&mut keys, &self.train);
        let named = |name: &String| {
            let found = all.iter().find(|e| e.name == *name);
            found.ok_or_else(|| {
                let key = format!("arm.{}.evals", self.name);
                ExperimentError::key(key, "names of evaluations", name)
            })
        };
        let asked = match &self.evals {
            Some(names) => names.iter().map(named).collect::<Result<Vec<_>>>()?,
            None => all.iter().collect(),
        };
        let with_own = |evaluation: &Evaluation| {
            let mut evaluation = evaluation.clone();
            lay_over(&mut evaluation.flags, &self.eval);
            evaluation
        };
        Ok(Arm {
            evaluations: asked.into_iter().map(with_own).collect(),
            name: self.name,
            description: self.description,
            parent: self.parent,
            teacher: self.teacher,
            trains: self.trains,
            train: keys,
            minutes: self.minutes.unwrap_or(minutes),
        })
    }
}

fn evaluation((i, mut flags): (usize, Table)) -> Result<Evaluation> {
    let mut text = |name: &str| match flags.remove(name) {
        Some(Value::String(text)) => Ok(Some(text)),
        None => Ok(None),
        Some(other) => {
            let key = format!("eval[{i}].{name}");
            Err(ExperimentError::key(key, "a string", other.type_str()))
        }
    };
    let (name, label) = (text("name")?, text("label")?);
    let missing = || ExperimentError::key(format!("eval[{i}].name"), "a string", "none");
    Ok(Evaluation {
        name: name.ok_or_else(missing)?,
        label,
        flags,
    })
}

impl Evaluation {
    /// What results call a task; perplexity has the evaluation's own name.
    pub fn task(&self, name: &str) -> String {
        let name = match name {
            PERPLEXITY => &self.name,
            task => task,
        };
        match &self.label {
            Some(label) => format!("{label} {name}"),
            None => name.to_owned(),
        }
    }
}

/// Lays the section `smoke` over the definition.
fn small(tree: &mut Table, section: Option<Value>) -> Result<()> {
    let Some(Value::Table(mut smoke)) = section else {
        let expected = "a section that makes the experiment small";
        return Err(ExperimentError::key("smoke", expected, "none"));
    };
    let arms = smoke.remove("arms");
    lay_over_named(tree, &smoke, "smoke")?;
    let Some(arms) = arms else { return Ok(()) };
    let Some(Value::Array(list)) = tree.get_mut("arm") else {
        return Ok(());
    };
    let asked = |arm: &Value| match &arms {
        Value::Array(names) => names.iter().any(|name| Some(name) == arm.get("name")),
        _ => false,
    };
    list.retain(asked);
    if list.is_empty() {
        return Err(ExperimentError::key("smoke.arms", "names of arms", arms));
    }
    Ok(())
}

fn syntax(name: &str, text: &str, error: &toml::de::Error) -> ExperimentError {
    let before = |at: usize| text[..at.min(text.len())].matches('\n').count() + 1;
    let line = error.span().map_or(0, |span| before(span.start));
    ExperimentError::key(format!("{name}, line {line}"), "TOML", error.message())
}
