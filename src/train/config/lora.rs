//! Section `lora`: low-rank adapters in place of the model's own weights.

use serde::{Deserialize, Serialize};

use super::{ModelSection, TrainingSection};
use crate::model::config::ModelConfig;
use crate::model::lora::{ALL, AdapterError, Lora, LoraConfig};
use crate::train::error::{Result, TrainError};

/// Section `lora`. Without a rank all weights are trained.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LoraSection {
    /// Rank of the adapters. `None`: there are none.
    pub r: Option<usize>,
    /// The factor of an adapter is `alpha / r`; by default 1.
    pub alpha: Option<f64>,
    /// Whether it is `alpha / sqrt(r)` instead.
    pub rslora: bool,
    /// Projections that get adapters, by the ends of their names.
    pub targets: Vec<String>,
    /// Dropout before adapters, which is not computed: 0.
    pub dropout: f64,
    /// Other weights that are trained whole, which is not computed: none.
    pub modules_to_save: Vec<String>,
}

impl Default for LoraSection {
    fn default() -> Self {
        Self {
            r: None,
            alpha: None,
            rslora: false,
            targets: vec![ALL.to_owned()],
            dropout: 0.0,
            modules_to_save: Vec::new(),
        }
    }
}

impl LoraSection {
    /// Whether adapters are trained.
    pub fn is_on(&self) -> bool {
        self.r.is_some()
    }

    /// The adapters of `model`; `None` where there are none.
    ///
    /// # Errors
    /// [`TrainError::Config`] for numbers out of their range and for targets that the model does not have.
    pub fn adapters(&self, model: &ModelConfig) -> Result<Option<Lora>> {
        let Some(rank) = self.r else {
            return Ok(None);
        };
        let config = LoraConfig {
            rank,
            alpha: self.alpha.unwrap_or(rank as f64),
            rslora: self.rslora,
            targets: self.targets.clone(),
        };
        let named = |error| match error {
            AdapterError::Key { key, expected, got } => {
                let key = match key.as_str() {
                    "lora_alpha" => "lora.alpha",
                    "target_modules" => "lora.targets",
                    _ => "lora.r",
                };
                TrainError::config(key, expected, got)
            }
            other => TrainError::config("lora", "adapters of the model", other),
        };
        Lora::new(model, config).map(Some).map_err(named)
    }

    pub(super) fn validate(&self, model: &ModelSection, training: &TrainingSection) -> Result<()> {
        if self.dropout != 0.0 {
            let expected = "0: dropout is not computed, since training and generation would then differ in bits";
            return Err(TrainError::config("lora.dropout", expected, self.dropout));
        }
        if let Some(module) = self.modules_to_save.first() {
            let expected = "none: beside adapters no weights are trained";
            return Err(TrainError::config("lora.modules_to_save", expected, module));
        }
        if !self.is_on() {
            let off = LoraSection::default();
            let (expected, got) = ("a rank, since other keys of the section are given", "none");
            return match *self == off {
                true => Ok(()),
                false => Err(TrainError::config("lora.r", expected, got)),
            };
        }
        if model.folder.is_none() {
            let expected = "a model folder, whose weights the adapters are added to";
            return Err(TrainError::config("model.folder", expected, "none"));
        }
        let fixed = "where `lora.r` is given: the model's own weights stay as they are";
        if training.learn_gates {
            let expected = format!("false {fixed}");
            return Err(TrainError::config("training.learn_gates", expected, true));
        }
        match training.train_only.first() {
            Some(name) => {
                let expected = format!("none {fixed}");
                Err(TrainError::config("training.train_only", expected, name))
            }
            None => Ok(()),
        }
    }
}
