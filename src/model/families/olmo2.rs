//! OLMo 2: norms behind attention and MLP, and a norm of all queries and of all keys of a token.

use super::{Defaults, Family, Names, Sizes, flag};
use crate::model::config::fields::Fields;
use crate::model::error::ConfigError;
use crate::model::switches::{QkNorm, Switches};

pub(super) const OLMO2: Family = Family {
    model_type: "olmo2",
    architectures: ["Olmo2ForCausalLM", "Olmo2Model"],
    keys: &["attention_bias"],
    defaults: Defaults {
        rms_norm_eps: 1e-5,
        ..Defaults::LLAMA
    },
    switches,
    rope_kinds: &[],
    names: Names {
        norms: ["post_attention_layernorm", "post_feedforward_layernorm"],
        ..Names::LLAMA
    },
};

fn switches(fields: &Fields<'_>, _: &Sizes) -> Result<Switches, ConfigError> {
    let bias = flag(fields, "attention_bias")?;
    Ok(Switches {
        qkv_bias: bias,
        output_bias: bias,
        qk_norm: QkNorm::Full,
        norm_after: true,
        ..Switches::PLAIN
    })
}
