//! The teacher of a training run: the folder that `distillation.model` names.

use std::path::Path;

use anyhow::{Context, Result};
use segattn::device::Device;
use segattn::model::config::ModelConfig;
use segattn::model::decoder::Decoder;
use segattn::model::memory::{Use, memory};
use segattn::model::weights::Checkpoint;
use segattn::train::config::{Config, DistillationSection, TeacherExecution};

use super::model::load_config;
use super::text::Text;

/// A teacher before its weights are read.
pub struct Teacher {
    /// As it is executed.
    config: ModelConfig,
    weights: Checkpoint,
    /// Names its weights.
    pub fingerprint: String,
}

impl Teacher {
    /// That of a run, where it has one, for a student of this configuration.
    pub fn open(run: &Config, student: &ModelConfig, text: &Text) -> Result<Option<Self>> {
        let section = &run.distillation;
        let Some(folder) = &section.model else {
            return Ok(None);
        };
        let teacher = Self::read(section, folder, student.vocab_size);
        let context = || format!("the teacher in {} (`distillation.model`)", folder.display());
        let teacher = teacher.with_context(context)?;
        if !text.is_of(folder)? {
            tracing::warn!(
                "{}: the teacher has another tokenizer.json than the run; it reads the run's ids as they are",
                folder.display()
            );
        }
        Ok(Some(teacher))
    }

    fn read(section: &DistillationSection, folder: &Path, vocab_size: usize) -> Result<Self> {
        let mut config = load_config(folder)?;
        section.apply(&mut config, vocab_size)?;
        let weights = Checkpoint::open(folder)?;
        weights.check(&config)?;
        Ok(Self {
            fingerprint: weights.fingerprint()?,
            config,
            weights,
        })
    }

    /// Warns where sequences of so many tokens are longer than what the teacher says it was trained on. A folder that
    /// was trained further on longer ones may still say so.
    pub fn warn_of_length(&self, run: &Config, longest: usize) {
        let most = self.config.max_position_embeddings;
        if run.distillation.execution == TeacherExecution::Full && longest > most {
            tracing::warn!(
                "the teacher reads sequences of {longest} tokens with full attention, and its config.json says \
                 max_position_embeddings = {most}: what it says of later tokens may be no lesson"
            );
        }
    }

    /// The model on a device.
    pub fn load<D: Device>(&self, device: D) -> Result<Decoder<D>> {
        Ok(self.weights.load(device, self.config.clone(), false)?)
    }

    /// A model that takes as much memory.
    pub fn for_dry_run<D: Device>(&self, device: D) -> Result<Decoder<D>> {
        Ok(Decoder::for_dry_run(device, self.config.clone(), false)?)
    }

    /// Bytes that it takes where all numbers are f32: weights, and all else for each sequence of `longest` tokens of
    /// which it reads `rows` at a time.
    pub fn estimate(&self, longest: usize, rows: usize) -> [u64; 2] {
        let all = memory(&self.config, longest, Use::Teach { rows }, size_of::<f32>());
        [all.weights, all.total() - all.weights]
    }
}
