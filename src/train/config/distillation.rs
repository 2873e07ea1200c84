//! Section `distillation`: a teacher, whose probabilities are learned.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::positive;
use crate::model::config::ModelConfig;
use crate::train::error::{Result, TrainError};

/// Section `distillation`. Without a model nothing is distilled.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DistillationSection {
    /// Model folder of the teacher. `None`: there is none.
    pub model: Option<PathBuf>,
    /// How the teacher is executed.
    pub execution: TeacherExecution,
    /// Share of the divergence in what is minimised, from 0 to 1; the loss on the next token has the rest.
    pub weight: f64,
    /// What both models' logits are divided by for the divergence.
    pub temperature: f64,
}

/// How a teacher is executed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TeacherExecution {
    /// With full attention, whatever its folder says.
    Full,
    /// In segments, as its folder says.
    Segments,
}

impl Default for DistillationSection {
    fn default() -> Self {
        Self {
            model: None,
            execution: TeacherExecution::Full,
            weight: 1.0,
            temperature: 1.0,
        }
    }
}

impl DistillationSection {
    /// Whether there is a teacher.
    pub fn is_on(&self) -> bool {
        self.model.is_some()
    }

    /// Makes the configuration in the teacher's folder that of its execution, for a student with `vocab_size` ids.
    ///
    /// # Errors
    /// [`TrainError::Config`] for another vocabulary, and for execution in segments where the folder has none.
    pub fn apply(&self, teacher: &mut ModelConfig, vocab_size: usize) -> Result<()> {
        if teacher.vocab_size != vocab_size {
            let expected = format!("a model with the student's vocabulary of {vocab_size} ids");
            let (key, got) = ("distillation.model", teacher.vocab_size);
            return Err(TrainError::config(key, expected, got));
        }
        match (self.execution, &teacher.segment) {
            (TeacherExecution::Full, _) => teacher.segment = None,
            (TeacherExecution::Segments, Some(_)) => {}
            (TeacherExecution::Segments, None) => {
                let expected = "`full`, since the teacher's `config.json` has no `segment` object";
                let key = "distillation.execution";
                return Err(TrainError::config(key, expected, "segments"));
            }
        }
        Ok(())
    }

    pub(super) fn validate(&self) -> Result<()> {
        if !self.is_on() && *self != Self::default() {
            let expected = "a model folder, since other keys of the section are given";
            return Err(TrainError::config("distillation.model", expected, "none"));
        }
        if !(0.0..=1.0).contains(&self.weight) {
            let (key, expected) = ("distillation.weight", "a number from 0 to 1");
            return Err(TrainError::config(key, expected, self.weight));
        }
        positive("distillation.temperature", self.temperature)
    }
}
