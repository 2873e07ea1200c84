//! Granite, dense: four factors. `attention_multiplier` is the scale of attention itself, 1 where it is left out.

use super::{Defaults, Family, Names, Sizes, factor, llama};
use crate::model::config::fields::Fields;
use crate::model::error::ConfigError;
use crate::model::switches::Switches;

pub(super) const GRANITE: Family = Family {
    model_type: "granite",
    architectures: ["GraniteForCausalLM", "GraniteModel"],
    keys: &[
        "attention_bias",
        "mlp_bias",
        "embedding_multiplier",
        "residual_multiplier",
        "attention_multiplier",
        "logits_scaling",
    ],
    defaults: Defaults::LLAMA,
    switches,
    rope_kinds: &[],
    names: Names::LLAMA,
};

fn switches(fields: &Fields<'_>, sizes: &Sizes) -> Result<Switches, ConfigError> {
    Ok(Switches {
        embedding_multiplier: factor(fields, "embedding_multiplier")?,
        residual_multiplier: factor(fields, "residual_multiplier")?,
        attention_scale: Some(factor(fields, "attention_multiplier")?),
        logits_divisor: factor(fields, "logits_scaling")?,
        ..llama::switches(fields, sizes)?
    })
}
