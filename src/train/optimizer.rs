//! What the optimizer does to which parameter. The update itself is the device's: [`Device::adamw`].
//!
//! [`Device::adamw`]: crate::device::Device::adamw

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
