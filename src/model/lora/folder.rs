//! Adapters in PEFT's layout: `adapter_config.json` and `adapter_model.safetensors`.
//!
//! Which projections have adapters is said by the tensors of the file, as PEFT names them. A key of
//! `adapter_config.json` that would change what is computed is refused by name, unless its value says that it is off.

use std::collections::BTreeSet;
use std::path::Path;

use serde_json::{Map, Value, json};

use super::{AdapterError, DOWN, Lora, LoraConfig, PREFIX, UP, modules};
use crate::device::{Device, Kind};
use crate::model::config::fields::shown;
use crate::model::config::{CONFIG_FILE, ModelConfig};
use crate::model::decoder::Decoder;
use crate::model::error::{ModelError, NameList, WeightsError};
use crate::model::files;
use crate::model::parameters::{TensorSpec, base_specs};
use crate::model::weights::{Checkpoint, other_weights};

/// The settings of an adapter.
pub const ADAPTER_CONFIG_FILE: &str = "adapter_config.json";
/// Its tensors.
pub const ADAPTER_FILE: &str = "adapter_model.safetensors";
/// The key of `config.json` that says how a model reads segments.
const SEGMENT: &str = "segment";
/// Largest `adapter_config.json` accepted, in bytes.
const MAX_BYTES: u64 = 16 << 20;

/// Keys that are read, and keys that change nothing here whatever they say: tensors tell which projections have
/// adapters, dropout is for training, and where the base model lies is the caller's to say.
const ACCEPTED: [&str; 16] = [
    "auto_mapping",
    "base_model_name_or_path",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "r",
    "revision",
    "runtime_config",
    "target_modules",
    "use_rslora",
];
/// Keys of texts or flags, with the values that are computed.
const ONLY: [(&str, &[&str]); 4] = [
    ("peft_type", &["\"LORA\""]),
    ("task_type", &["\"CAUSAL_LM\""]),
    ("bias", &["\"none\""]),
    // The others change the base model's weights when the adapter is made.
    (
        "init_lora_weights",
        &["true", "false", "\"gaussian\"", "\"orthogonal\""],
    ),
];

/// The adapter of a folder; values stay in the file until they are read.
#[derive(Debug)]
pub struct AdapterFolder {
    lora: Lora,
    tensors: Checkpoint,
}

impl AdapterFolder {
    /// Reads the settings and the names of the tensors, and checks that they are those of adapters of `model`.
    ///
    /// # Errors
    /// [`AdapterError`]: a file that cannot be read, a key that is not computed, tensors of no projection of the model.
    pub fn open(folder: &Path, model: &ModelConfig) -> Result<Self, AdapterError> {
        let path = folder.join(ADAPTER_CONFIG_FILE);
        let Value::Object(keys) = files::read_json(&path, MAX_BYTES)? else {
            return Err(AdapterError::key(
                "(the file)",
                "an object",
                "another value",
            ));
        };
        let mut config = settings(&keys)?;
        let weights = folder.join(ADAPTER_FILE);
        if files::is_absent(&weights) {
            let folder = folder.to_owned();
            let found = other_weights(&folder);
            return Err(AdapterError::NoWeights { folder, found });
        }
        let tensors = Checkpoint::of_file(&weights)?;
        config.targets = targets(folder, model, &tensors)?;
        let lora = Lora::new(model, config)?;
        let opened = Self { lora, tensors };
        for spec in opened.lora.specs() {
            opened.tensors.check_spec(&spec)?;
        }
        Ok(opened)
    }

    /// The adapters.
    pub fn lora(&self) -> &Lora {
        &self.lora
    }

    /// The values of a tensor of the model with these adapters.
    ///
    /// # Errors
    /// As [`Checkpoint::read`].
    pub fn read(&self, spec: &TensorSpec) -> Result<Vec<f32>, WeightsError> {
        self.tensors.read(spec)
    }

    /// `base` with these adapters, sharing its weights.
    ///
    /// # Errors
    /// [`ModelError::Weights`] as [`Checkpoint::read`], [`ModelError::Device`].
    pub fn over<D: Device + Clone>(&self, base: &Decoder<D>) -> Result<Decoder<D>, ModelError> {
        let (specs, first) = (self.lora.specs(), base_specs(&base.config).len());
        let values = |i: usize| -> Result<D::Buffer, ModelError> {
            let values = self.read(&specs[i - first])?;
            let mut buffer = base.device.empty(Kind::Exact, values.len())?;
            base.device.write(&mut buffer, 0, &values)?;
            Ok(buffer)
        };
        base.with_adapters(Some(self.lora.clone()), values)
    }

    /// SHA-256 over settings and tensors.
    ///
    /// # Errors
    /// As [`Checkpoint::fingerprint`].
    pub fn fingerprint(&self) -> Result<String, WeightsError> {
        let LoraConfig { rank, .. } = self.lora.config;
        let factor = self.lora.config.factor();
        Ok(format!("{rank} {factor} {}", self.tensors.fingerprint()?))
    }

    /// Gives `model` the segments that the adapter was trained with, where a `config.json` beside the adapter has the
    /// key `segment`, be it `null`.
    ///
    /// # Errors
    /// [`AdapterError::Config`].
    pub fn set_segments(folder: &Path, model: &mut ModelConfig) -> Result<(), AdapterError> {
        if files::is_absent(&folder.join(CONFIG_FILE)) {
            return Ok(());
        }
        let trained = ModelConfig::load(folder)?;
        if trained.source.contains_key(SEGMENT) {
            model.segment = trained.segment;
            model.validate()?;
        }
        Ok(())
    }
}

/// The settings, but for the targets.
fn settings(keys: &Map<String, Value>) -> Result<LoraConfig, AdapterError> {
    let off = |value: &Value| match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        Value::String(text) => text.is_empty(),
        _ => false,
    };
    for (key, value) in keys {
        if let Some((_, values)) = ONLY.iter().find(|(known, _)| key == known) {
            if !value.is_null() && !values.contains(&value.to_string().as_str()) {
                let expected = format!("null or {}", values.join(", "));
                return Err(AdapterError::key(key, expected, shown(value)));
            }
        } else if !ACCEPTED.contains(&key.as_str()) && !off(value) {
            let expected = "to be off (null, false or empty): it is not computed";
            return Err(AdapterError::key(key, expected, shown(value)));
        }
    }
    let wrong = |key: &str, expected: &str| {
        let got = keys.get(key).map_or("none".to_owned(), shown);
        AdapterError::key(key, expected, got)
    };
    let rank = keys.get("r").and_then(Value::as_u64);
    let alpha = keys.get("lora_alpha").and_then(Value::as_f64);
    let rslora = match keys.get("use_rslora") {
        None | Some(Value::Null) => Some(false),
        Some(value) => value.as_bool(),
    };
    Ok(LoraConfig {
        rank: rank.ok_or_else(|| wrong("r", "an integer"))? as usize,
        alpha: alpha.ok_or_else(|| wrong("lora_alpha", "a number"))?,
        rslora: rslora.ok_or_else(|| wrong("use_rslora", "true or false"))?,
        targets: Vec::new(),
    })
}

/// The projections that have adapters in the file, by the ends of their names where every layer has them.
fn targets(
    folder: &Path,
    model: &ModelConfig,
    tensors: &Checkpoint,
) -> Result<Vec<String>, AdapterError> {
    let known = modules(model);
    let (mut found, mut unexpected) = (BTreeSet::new(), Vec::new());
    for (name, _) in tensors.tensors() {
        let inside = name.strip_prefix(PREFIX);
        let module = inside.and_then(|n| n.strip_suffix(DOWN).or_else(|| n.strip_suffix(UP)));
        match module.filter(|module| known.iter().any(|known| known == module)) {
            Some(module) => drop(found.insert(module.to_owned())),
            None => unexpected.push(name.to_owned()),
        }
    }
    let names = found
        .iter()
        .flat_map(|module| [DOWN, UP].map(|end| format!("{PREFIX}{module}{end}")));
    let held: BTreeSet<&str> = tensors.tensors().map(|(name, _)| name).collect();
    let missing: Vec<String> = names.filter(|name| !held.contains(name.as_str())).collect();
    if !missing.is_empty() || !unexpected.is_empty() {
        return Err(AdapterError::Names {
            folder: folder.to_owned(),
            missing: NameList(missing),
            unexpected: NameList(unexpected),
        });
    }
    // `q_proj` says it for all layers.
    let last = |module: &str| module.rsplit('.').next().unwrap_or_default().to_owned();
    let whole = |name: &String| {
        let mut of_name = known.iter().filter(|module| last(module) == *name);
        of_name.all(|module| found.contains(module))
    };
    let short: BTreeSet<String> = found.iter().map(|module| last(module)).collect();
    let (whole, partly): (Vec<String>, Vec<String>) = short.into_iter().partition(whole);
    let partly = found.iter().filter(|module| partly.contains(&last(module)));
    Ok(whole.iter().chain(partly).cloned().collect())
}

/// The object of an `adapter_config.json` for PEFT. `base`: where the base model lies.
pub fn to_json(lora: &LoraConfig, base: Option<&Path>) -> Value {
    let targets = match &lora.targets[..] {
        [all] if all == super::ALL => json!(all),
        targets => json!(targets),
    };
    // PEFT takes integers for `lora_alpha`; other numbers work too.
    let alpha = match lora.alpha {
        whole if whole.fract() == 0.0 && whole < 1e15 => json!(whole as u64),
        other => json!(other),
    };
    json!({
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.map(|path| path.display().to_string()),
        "inference_mode": true,
        "r": lora.rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "use_rslora": lora.rslora,
        "target_modules": targets,
        "bias": "none",
        "fan_in_fan_out": false,
        "init_lora_weights": true,
        "modules_to_save": null,
    })
}

/// The object of the `config.json` beside an adapter, which says that there are no segments too.
pub fn model_json(model: &ModelConfig) -> Value {
    let mut json = model.to_json();
    if model.segment.is_none() {
        json[SEGMENT] = Value::Null;
    }
    json
}

/// The settings that [`to_json`] has written.
///
/// # Errors
/// [`AdapterError::Key`].
pub fn from_json(value: &Value) -> Result<LoraConfig, AdapterError> {
    let Value::Object(keys) = value else {
        return Err(AdapterError::key("(the file)", "an object", shown(value)));
    };
    let targets = match keys.get("target_modules") {
        Some(Value::String(one)) => vec![one.clone()],
        Some(Value::Array(all)) => {
            let names = all.iter().filter_map(Value::as_str);
            names.map(str::to_owned).collect()
        }
        _ => Vec::new(),
    };
    Ok(LoraConfig {
        targets,
        ..settings(keys)?
    })
}
