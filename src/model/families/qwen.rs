//! Qwen 2, 2.5 and 3, dense. Qwen 2 has biases on queries, keys and values that no key says; Qwen 3 has a norm of
//! each head of queries and keys.

use super::{Defaults, Family, Names, Sizes, Window, flag, no_window};
use crate::model::config::fields::Fields;
use crate::model::error::ConfigError;
use crate::model::switches::{QkNorm, Switches};

const DEFAULTS: Defaults = Defaults {
    positions: 32_768,
    ..Defaults::LLAMA
};

const WINDOW: Window = Window {
    flagged: true,
    by_layer: true,
    default: Some(4096),
};

pub(super) const QWEN2: Family = Family {
    model_type: "qwen2",
    architectures: ["Qwen2ForCausalLM", "Qwen2Model"],
    keys: &["sliding_window", "layer_types"],
    defaults: DEFAULTS,
    switches: qwen2,
    rope_kinds: &[],
    names: Names::LLAMA,
};

pub(super) const QWEN3: Family = Family {
    model_type: "qwen3",
    architectures: ["Qwen3ForCausalLM", "Qwen3Model"],
    keys: &["attention_bias", "sliding_window", "layer_types"],
    defaults: Defaults {
        head_dim: Some(128),
        ..DEFAULTS
    },
    switches: qwen3,
    rope_kinds: &[],
    names: Names::LLAMA,
};

fn qwen2(fields: &Fields<'_>, sizes: &Sizes) -> Result<Switches, ConfigError> {
    no_window(fields, sizes, WINDOW)?;
    Ok(Switches {
        qkv_bias: true,
        ..Switches::PLAIN
    })
}

fn qwen3(fields: &Fields<'_>, sizes: &Sizes) -> Result<Switches, ConfigError> {
    no_window(fields, sizes, WINDOW)?;
    let bias = flag(fields, "attention_bias")?;
    Ok(Switches {
        qkv_bias: bias,
        output_bias: bias,
        qk_norm: QkNorm::Head,
        ..Switches::PLAIN
    })
}
