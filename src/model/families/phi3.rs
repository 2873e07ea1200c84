//! Phi 3, 3.5 and 4: fused projections, and part of a head rotates.

use super::{Defaults, Family, Names, Sizes, Window, no_window};
use crate::model::config::fields::Fields;
use crate::model::config::rotary_dim;
use crate::model::error::ConfigError;
use crate::model::switches::Switches;

pub(super) const PHI3: Family = Family {
    model_type: "phi3",
    architectures: ["Phi3ForCausalLM", "Phi3Model"],
    keys: &["sliding_window", "partial_rotary_factor"],
    defaults: Defaults {
        rms_norm_eps: 1e-5,
        positions: 4096,
        ..Defaults::LLAMA
    },
    switches,
    rope_kinds: &[("su", "longrope"), ("yarn", "longrope")],
    names: Names {
        qkv: &["self_attn.qkv_proj"],
        gate_up: &["mlp.gate_up_proj"],
        ..Names::LLAMA
    },
};

fn switches(fields: &Fields<'_>, sizes: &Sizes) -> Result<Switches, ConfigError> {
    let window = Window {
        flagged: false,
        by_layer: false,
        default: None,
    };
    no_window(fields, sizes, window)?;
    Ok(Switches {
        rotary_dim: Some(rotary_dim(fields, sizes.head_dim)?),
        ..Switches::PLAIN
    })
}
