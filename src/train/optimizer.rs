//! What the optimizer does to which parameter. The update itself is the device's: [`Device::adamw`].
//!
//! [`Device::adamw`]: crate::device::Device::adamw

use super::config::TrainingSection;
use super::error::{Result, TrainError};
use crate::model::parameters::{Role, TensorSpec};

/// Largest usable global norm of the gradients: a gradient above it has a square that overflows f32, and a
/// second moment of infinity would freeze its weight for good.
pub const MAX_GRADIENT: f64 = 1e18;

/// Smallest value that a learned past gate above zero may take, since the operation adds `ln gate` to the
/// scores. A gate of zero stays zero: its head does not read the past, and no gradient could bring it back.
pub const MIN_GATE: f32 = 1e-4;

/// Whether weight decay applies to the parameter `name` of this shape: to matrices, not to norms and gates
/// (one dimension), and to the token embedding only if asked.
pub fn decays(name: &str, shape: &[usize], decay_embeddings: bool) -> bool {
    shape.len() >= 2 && (decay_embeddings || !name.contains("embed_tokens"))
}

/// For each tensor whether a run updates it: those that `train_only` names, or all, and gates as `learn_gates` says; of
/// a model with adapters theirs alone.
///
/// # Errors
/// [`TrainError::Config`] for a pattern that no tensor has in its name, and for one that only some of several matrices
/// have which are kept as one; also for a price of gates that are not updated.
pub fn updated(specs: &[TensorSpec], training: &TrainingSection) -> Result<Vec<bool>> {
    let is_gate = |spec: &TensorSpec| matches!(spec.role, Role::Gate { .. });
    let patterns = &training.train_only;
    let names = || {
        specs
            .iter()
            .flat_map(|spec| spec.parts.iter().map(|p| &p.0))
    };
    if let Some(pattern) = patterns
        .iter()
        .find(|p| !names().any(|name| name.contains(*p)))
    {
        let expected = "parts of names of the model's tensors, such as \"past_gate\"";
        return Err(TrainError::config("training.train_only", expected, pattern));
    }
    let updated = |spec: &TensorSpec| {
        if spec.frozen {
            return Ok(false);
        }
        if patterns.is_empty() {
            return Ok(training.learn_gates || !is_gate(spec));
        }
        let named = |(name, _): &&(String, Vec<usize>)| patterns.iter().any(|p| name.contains(p));
        match spec.parts.iter().filter(named).count() {
            0 => Ok(false),
            n if n == spec.parts.len() => Ok(true),
            _ => {
                let names: Vec<&str> = spec.parts.iter().map(|p| p.0.as_str()).collect();
                let expected = format!(
                    "all or none of {}, which are one tensor here",
                    names.join(", ")
                );
                let got = patterns.join(", ");
                Err(TrainError::config("training.train_only", expected, got))
            }
        }
    };
    let updated = specs.iter().map(updated).collect::<Result<Vec<bool>>>()?;
    let gates = specs
        .iter()
        .zip(&updated)
        .any(|(spec, u)| *u && is_gate(spec));
    if training.gate_l1 > 0.0 && !gates {
        let expected = "0 where no gate is updated; set training.learn_gates, or name \"past_gate\" in \
                        training.train_only";
        return Err(TrainError::config(
            "training.gate_l1",
            expected,
            training.gate_l1,
        ));
    }
    Ok(updated)
}

#[cfg(test)]
mod tests {
    use super::decays;

    #[test]
    fn matrices_decay_and_norms_gates_and_by_default_embeddings_do_not() {
        assert!(decays("model.layers.0.mlp.up_proj.weight", &[8, 4], false));
        assert!(!decays("model.layers.0.input_layernorm.weight", &[4], true));
        assert!(!decays("model.layers.0.self_attn.past_gate", &[4], true));
        assert!(!decays("model.embed_tokens.weight", &[8, 4], false));
        assert!(decays("model.embed_tokens.weight", &[8, 4], true));
    }
}
