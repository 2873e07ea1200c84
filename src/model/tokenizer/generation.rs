//! `generation_config.json`: which ids end a text, and how a model's authors mean it to be sampled.

use std::path::Path;

use serde_json::{Map, Value};

use crate::device::sampler::SamplerConfig;
use crate::model::config::{ModelConfig, token_id_list};
use crate::model::error::TokenizerError;
use crate::model::files;

/// Defaults of generation, beside `config.json`.
pub const GENERATION_FILE: &str = "generation_config.json";
/// Largest `generation_config.json` accepted, in bytes.
const MAX_GENERATION: u64 = 1 << 20;
/// Most ids that may end a text.
const MAX_TOKEN_IDS: usize = 64;
/// Keys that say nothing about which tokens are chosen, or are read elsewhere.
const WITHOUT_EFFECT: [&str; 9] = [
    "_from_model_config",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "transformers_version",
    "use_cache",
    "return_dict_in_generate",
    "output_scores",
    "cache_implementation",
];
/// Values that switch a setting off, by key; those of every other key are `null` and `false`.
const OFF: [(&str, f64); 10] = [
    ("num_beams", 1.0),
    ("num_beam_groups", 1.0),
    ("num_return_sequences", 1.0),
    ("length_penalty", 1.0),
    ("typical_p", 1.0),
    ("encoder_repetition_penalty", 1.0),
    ("no_repeat_ngram_size", 0.0),
    ("min_length", 0.0),
    ("epsilon_cutoff", 0.0),
    ("eta_cutoff", 0.0),
];

/// The sampling that `generation_config.json` asks for, under its names; `None` where it says nothing.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GenerationSettings {
    /// Whether tokens are drawn at all; else the likeliest is taken.
    pub do_sample: Option<bool>,
    /// Divides the logits.
    pub temperature: Option<f32>,
    /// Number of likeliest tokens that are drawn from; 0 for all.
    pub top_k: Option<usize>,
    /// Probability that the tokens drawn from have together.
    pub top_p: Option<f32>,
    /// Share of the likeliest token's probability that a token needs.
    pub min_p: Option<f32>,
    /// Penalty on tokens of the text so far.
    pub repetition_penalty: Option<f32>,
    /// Most new tokens.
    pub max_new_tokens: Option<usize>,
    /// Settings that this crate has not, in the file's order: they are not applied.
    pub ignored: Vec<String>,
}

impl GenerationSettings {
    /// Those of a model folder; all `None` where it has no such file.
    ///
    /// # Errors
    /// [`TokenizerError::File`], [`TokenizerError::Generation`] for a value out of its range.
    pub fn load(folder: &Path) -> Result<Self, TokenizerError> {
        let path = folder.join(GENERATION_FILE);
        match read(&path)? {
            Some(file) => Self::parse(&file, &path),
            None => Ok(Self::default()),
        }
    }

    /// Those of a file's object; `path` is for messages.
    ///
    /// # Errors
    /// [`TokenizerError::Generation`] for a value out of its range.
    pub fn parse(file: &Map<String, Value>, path: &Path) -> Result<Self, TokenizerError> {
        let number = |key: &'static str, expected: &str, good: fn(f64) -> bool| {
            setting(file, path, key, expected, |value| {
                value.as_f64().filter(|x| good(*x)).map(|x| x as f32)
            })
        };
        let count = |key: &'static str| {
            setting(file, path, key, "a number from 0 on", |value| {
                usize::try_from(value.as_u64()?).ok()
            })
        };
        let share = |x: f64| (0.0..=1.0).contains(&x);
        let settings = Self {
            do_sample: setting(file, path, "do_sample", "true or false", Value::as_bool)?,
            temperature: number("temperature", "a finite number from 0 on", |x| {
                x.is_finite() && x >= 0.0
            })?,
            top_k: count("top_k")?,
            top_p: number("top_p", "a number above 0, at most 1", |x| {
                x > 0.0 && x <= 1.0
            })?,
            min_p: number("min_p", "a number from 0 to 1", share)?,
            repetition_penalty: number("repetition_penalty", "a finite number above 0", |x| {
                x.is_finite() && x > 0.0
            })?,
            max_new_tokens: count("max_new_tokens")?,
            ignored: Vec::new(),
        };
        let known = [
            "do_sample",
            "temperature",
            "top_k",
            "top_p",
            "min_p",
            "repetition_penalty",
            "max_new_tokens",
        ];
        let in_effect = |(key, value): &(&String, &Value)| {
            let off = OFF
                .iter()
                .find(|(name, _)| name == key)
                .map(|(_, off)| *off);
            !known.contains(&key.as_str())
                && !WITHOUT_EFFECT.contains(&key.as_str())
                && !matches!(value, Value::Null | Value::Bool(false))
                && (off.is_none() || value.as_f64() != off)
        };
        let ignored = file.iter().filter(in_effect).map(|(key, _)| key.clone());
        Ok(Self {
            ignored: ignored.collect(),
            ..settings
        })
    }

    /// How tokens are chosen by these settings, where nothing else is asked for.
    pub fn sampler(&self) -> SamplerConfig {
        let default = SamplerConfig::default();
        let temperature = match self.greedy() {
            true => Some(0.0),
            false => self.temperature,
        };
        SamplerConfig {
            temperature: temperature.unwrap_or(default.temperature),
            top_k: self.top_k.unwrap_or(default.top_k),
            top_p: self.top_p.unwrap_or(default.top_p),
            min_p: self.min_p.unwrap_or(default.min_p),
            repetition_penalty: self
                .repetition_penalty
                .unwrap_or(default.repetition_penalty),
            seed: default.seed,
        }
    }

    /// Whether the file asks for the likeliest token every time.
    pub fn greedy(&self) -> bool {
        self.do_sample == Some(false)
    }
}

fn read(path: &Path) -> Result<Option<Map<String, Value>>, TokenizerError> {
    if files::is_absent(path) {
        return Ok(None);
    }
    match files::read_json(path, MAX_GENERATION)? {
        Value::Object(object) => Ok(Some(object)),
        other => Err(wrong(path, "(the file)", "an object".into(), &other)),
    }
}

fn setting<T>(
    file: &Map<String, Value>,
    path: &Path,
    key: &'static str,
    expected: &str,
    parse: impl Fn(&Value) -> Option<T>,
) -> Result<Option<T>, TokenizerError> {
    match file.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => match parse(value) {
            Some(parsed) => Ok(Some(parsed)),
            None => Err(wrong(path, key, expected.to_owned(), value)),
        },
    }
}

fn wrong(path: &Path, key: &'static str, expected: String, got: &Value) -> TokenizerError {
    TokenizerError::Generation {
        path: path.to_owned(),
        key,
        expected,
        got: got.to_string().chars().take(80).collect(),
    }
}

/// The ids that end a text: those of `generation_config.json`, else those of `config.json`, as
/// Hugging Face libraries choose them. Negative ids stand for none there, and here.
///
/// # Errors
/// [`TokenizerError::File`], [`TokenizerError::Generation`].
pub fn end_ids(folder: &Path, config: &ModelConfig) -> Result<Vec<u32>, TokenizerError> {
    let path = folder.join(GENERATION_FILE);
    let Some(file) = read(&path)? else {
        return Ok(config.eos_token_id.clone());
    };
    let expected = format!("a token id or a list of at most {MAX_TOKEN_IDS}");
    let ids = setting(&file, &path, "eos_token_id", &expected, |ids| {
        token_id_list(ids, MAX_TOKEN_IDS)
    })?;
    Ok(ids.unwrap_or_else(|| config.eos_token_id.clone()))
}
