//! Llama 1 to 3, and the many models that are stored as one; and Llama with sink logits, which are trained here.

use super::{Defaults, Family, Names, Sizes, flag};
use crate::model::config::fields::Fields;
use crate::model::error::ConfigError;
use crate::model::switches::Switches;

pub(super) const LLAMA: Family = Family {
    model_type: "llama",
    architectures: ["LlamaForCausalLM", "LlamaModel"],
    keys: &["attention_bias", "mlp_bias"],
    defaults: Defaults::LLAMA,
    switches,
    rope_kinds: &[],
    names: Names::LLAMA,
};

/// A `model_type` of its own: no other library reads such a folder as a Llama, without the logits.
pub(super) const LLAMA_SINK_LOGITS: Family = Family {
    model_type: "llama_sink_logits",
    architectures: ["LlamaSinkLogitsForCausalLM", "LlamaSinkLogitsModel"],
    switches: with_sink_logits,
    ..LLAMA
};

fn with_sink_logits(fields: &Fields<'_>, sizes: &Sizes) -> Result<Switches, ConfigError> {
    Ok(Switches {
        sink_logits: true,
        ..switches(fields, sizes)?
    })
}

/// `attention_bias` is of all four projections.
pub(super) fn switches(fields: &Fields<'_>, _: &Sizes) -> Result<Switches, ConfigError> {
    let attention = flag(fields, "attention_bias")?;
    Ok(Switches {
        qkv_bias: attention,
        output_bias: attention,
        mlp_bias: flag(fields, "mlp_bias")?,
        ..Switches::PLAIN
    })
}
