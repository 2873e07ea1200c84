//! The teacher of a run, where it has one.

use super::Trainer;
use crate::device::Device;
use crate::model::decoder::Decoder;
use crate::train::config::DistillationSection;
use crate::train::error::{Result, TrainError};
use crate::train::streams::Teacher;

impl DistillationSection {
    /// The teacher as gradients are computed with it.
    pub(super) fn teaching<'a, D: Device>(&self, model: &'a Decoder<D>) -> Teacher<'a, D> {
        Teacher {
            model,
            weight: self.weight,
            temperature: self.temperature,
        }
    }
}

impl<D: Device> Trainer<D> {
    /// The trainer of a run with a section `distillation`, and the model that the section names, as it is executed. It
    /// only reads, so it needs no more than [`Decoder`]s for generation have.
    ///
    /// # Errors
    /// [`TrainError::Config`] where the section names no model, and for a teacher with another vocabulary or execution.
    pub fn with_teacher(mut self, teacher: Decoder<D>) -> Result<Self> {
        let section = &self.config.distillation;
        if !section.is_on() {
            let (key, expected) = ("distillation.model", "the teacher's folder");
            return Err(TrainError::config(key, expected, "none"));
        }
        section.apply(&mut teacher.config.clone(), self.model.config.vocab_size)?;
        self.teacher = Some(teacher);
        Ok(self)
    }

    /// The configuration says whether there is a teacher.
    pub(super) fn check_teacher(&self) -> Result<()> {
        let expected = "one where `distillation.model` is given, and none where it is not";
        let shown = |there: bool| if there { "one" } else { "none" };
        match (self.config.distillation.is_on(), self.teacher.is_some()) {
            (said, there) if said != there => {
                Err(TrainError::argument("teacher", expected, shown(there)))
            }
            _ => Ok(()),
        }
    }

    /// What a step minimises, but for the price of gates: the loss, or its share and that of the divergence.
    pub(super) fn objective(&self, loss: f64, divergence: Option<f64>) -> f64 {
        let section = &self.config.distillation;
        let (weight, temperature) = (section.weight, section.temperature);
        match divergence {
            Some(divergence) => {
                (1.0 - weight) * loss + weight * temperature * temperature * divergence
            }
            None => loss,
        }
    }
}
