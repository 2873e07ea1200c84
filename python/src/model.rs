//! `segattn._native.Model`: a model for generation or in training.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, TryLockError};

use pyo3::prelude::*;
use segattn::generate::sampler::SamplerConfig;
use segattn::generate::{Finish, GeneratorConfig, NewToken};
use segattn::model::segmentation::Tokens;
use segattn::train::data::{Example, Policy};
use segattn::train::trainer::StepReport;

use crate::engine::{self, Engine, Request, Start};
use crate::failure::Failure;

/// A model on a device. One call at a time.
#[pyclass(frozen)]
pub struct Model(Mutex<Box<dyn Engine>>);

/// Token ids, breaks and rereads.
type Ids = (Vec<u32>, Vec<usize>, Vec<usize>);
/// New tokens, their log-probabilities, and why the sequence ended.
type Generated = (Vec<u32>, Vec<f32>, &'static str);
/// Step, loss, gradient norm, learning rate, tokens, why it was skipped, whether the guard ends the run, and the
/// log-probabilities of each sequence's targets.
type Report = (
    u64,
    f64,
    f64,
    f64,
    usize,
    Option<String>,
    bool,
    Vec<Vec<f64>>,
);

/// How prompts go on, a dict.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
pub struct Settings {
    max_new: usize,
    temperature: f32,
    top_k: usize,
    top_p: f32,
    min_p: f32,
    repetition_penalty: f32,
    seed: u64,
    end_tokens: Option<Vec<u32>>,
    segments_per_step: usize,
}

/// A sequence to train on, a dict.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
pub struct Sequence {
    tokens: Vec<u32>,
    breaks: Vec<usize>,
    rereads: Vec<usize>,
    weights: Option<Vec<f32>>,
    /// Log-probabilities and advantages of all tokens, and the clip's bounds.
    policy: Option<(Vec<f32>, Vec<f32>, [f64; 2])>,
}

fn tokens((ids, breaks, rereads): Ids) -> Tokens {
    Tokens {
        ids,
        breaks,
        rereads,
    }
}

impl From<Sequence> for Example {
    fn from(sequence: Sequence) -> Self {
        Example {
            tokens: sequence.tokens,
            weights: sequence.weights,
            breaks: sequence.breaks,
            rereads: sequence.rereads,
            policy: sequence.policy.map(|(old, advantages, clip)| Policy {
                old,
                advantages,
                clip,
            }),
        }
    }
}

fn report(report: StepReport) -> Report {
    (
        report.step,
        report.loss,
        report.grad_norm,
        report.lr,
        report.tokens,
        report.skipped.map(|reason| format!("{reason:?}")),
        report.stop,
        report.log_probabilities,
    )
}

impl Model {
    /// Runs `work` on the model without the interpreter's lock.
    fn with<T: Send>(
        &self,
        py: Python<'_>,
        work: impl FnOnce(&mut dyn Engine) -> Result<T, Failure> + Send,
    ) -> PyResult<T> {
        let done = py.detach(|| work(&mut **self.lock()?));
        done.map_err(|failure| failure.raise(py))
    }

    fn lock(&self) -> Result<MutexGuard<'_, Box<dyn Engine>>, Failure> {
        match self.0.try_lock() {
            Ok(engine) => Ok(engine),
            // A panic inside a call leaves weights between two steps.
            Err(TryLockError::Poisoned(_)) => Err(Failure::other(
                "the model is not usable since a call panicked",
            )),
            Err(TryLockError::WouldBlock) => Err(Failure::other(
                "the model is in use by another call; one at a time",
            )),
        }
    }
}

#[pymethods]
impl Model {
    /// The model in a folder, for generation, with the adapters in another.
    #[staticmethod]
    fn open(
        py: Python<'_>,
        folder: PathBuf,
        adapter: Option<PathBuf>,
        device: String,
    ) -> PyResult<Self> {
        let opened = py.detach(|| engine::open(&folder, adapter.as_deref(), &device));
        Ok(Model(Mutex::new(
            opened.map_err(|failure| failure.raise(py))?,
        )))
    }

    /// A model in training, by keys of configs/train.toml: the one they name, a new one, or the newest of `saved`.
    #[staticmethod]
    fn train(
        py: Python<'_>,
        keys: Vec<(String, String)>,
        vocab_size: usize,
        saved: Option<PathBuf>,
        device: String,
    ) -> PyResult<Self> {
        let start = match saved {
            Some(root) => Start::Saved(root),
            None => Start::Config { vocab_size },
        };
        let made = py.detach(|| engine::train(start, &keys, &device));
        Ok(Model(Mutex::new(
            made.map_err(|failure| failure.raise(py))?,
        )))
    }

    /// The model's config.json.
    fn config(&self, py: Python<'_>) -> PyResult<String> {
        self.with(py, |engine| Ok(engine.config().to_json().to_string()))
    }

    /// Continues prompts. `on_token(sequence, token, log_probability)` returns whether its sequence goes on.
    fn generate(
        &self,
        py: Python<'_>,
        prompts: Vec<Ids>,
        streams: Vec<u64>,
        settings: Settings,
        on_token: Option<Py<PyAny>>,
    ) -> PyResult<Vec<Generated>> {
        let mut hear = |token: &NewToken| {
            Python::attach(|py| -> PyResult<ControlFlow<()>> {
                // Ctrl-C ends the call between two tokens.
                py.check_signals()?;
                let Some(on_token) = &on_token else {
                    return Ok(ControlFlow::Continue(()));
                };
                let heard = (token.sequence, token.token, token.log_probability);
                match on_token.bind(py).call1(heard)?.is_truthy()? {
                    true => Ok(ControlFlow::Continue(())),
                    false => Ok(ControlFlow::Break(())),
                }
            })
            .map_err(Failure::Raised)
        };
        let generated = self.with(py, |engine| {
            let end_tokens = settings.end_tokens;
            let request = Request {
                prompts: prompts.into_iter().map(tokens).collect(),
                streams,
                settings: GeneratorConfig {
                    sampler: SamplerConfig {
                        temperature: settings.temperature,
                        top_k: settings.top_k,
                        top_p: settings.top_p,
                        min_p: settings.min_p,
                        repetition_penalty: settings.repetition_penalty,
                        seed: settings.seed,
                    },
                    max_new: settings.max_new,
                    end_tokens: end_tokens.unwrap_or_else(|| engine.config().eos_token_id.clone()),
                },
                segments_per_step: settings.segments_per_step,
            };
            engine.generate(&request, &mut hear)
        })?;
        let one = |one: segattn::generate::Generated| {
            let finish = match one.finish {
                Some(Finish::EndToken) => "end token",
                Some(Finish::Length) => "length",
                Some(Finish::Stopped) | None => "stopped",
            };
            (one.tokens, one.log_probabilities, finish)
        };
        Ok(generated.into_iter().map(one).collect())
    }

    /// Log-probability of each token but the first of each sequence.
    fn score(
        &self,
        py: Python<'_>,
        sequences: Vec<Ids>,
        segments_per_step: usize,
    ) -> PyResult<Vec<Vec<f32>>> {
        let sequences: Vec<Tokens> = sequences.into_iter().map(tokens).collect();
        self.with(py, |engine| engine.score(&sequences, segments_per_step))
    }

    /// A training step.
    fn step(&self, py: Python<'_>, sequences: Vec<Sequence>) -> PyResult<Report> {
        let sequences: Vec<Example> = sequences.into_iter().map(Example::from).collect();
        Ok(report(self.with(py, |engine| engine.step(sequences))?))
    }

    /// Saves weights, moments and configuration; returns the folder, which is a model folder.
    fn save(&self, py: Python<'_>, root: PathBuf, keep: usize) -> PyResult<PathBuf> {
        self.with(py, |engine| engine.save(&root, keep))
    }
}
