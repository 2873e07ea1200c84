//! SmolLM3: some layers do not rotate.

use serde_json::Value;

use super::{Defaults, Family, Names, Sizes, Window, llama, no_window};
use crate::model::config::fields::Fields;
use crate::model::error::ConfigError;
use crate::model::switches::Switches;

pub(super) const SMOLLM3: Family = Family {
    model_type: "smollm3",
    architectures: ["SmolLM3ForCausalLM", "SmolLM3Model"],
    keys: &[
        "attention_bias",
        "mlp_bias",
        "sliding_window",
        "layer_types",
        "no_rope_layers",
        "no_rope_layer_interval",
        // Kept from its training; nothing reads it.
        "pretraining_tp",
    ],
    defaults: Defaults {
        rope_theta: 2_000_000.0,
        tied: true,
        positions: 32_768,
        ..Defaults::LLAMA
    },
    switches,
    rope_kinds: &[],
    names: Names::LLAMA,
};

/// In `no_rope_layers`, 1 is a layer that rotates. Without it, every `no_rope_layer_interval`-th does not.
fn switches(fields: &Fields<'_>, sizes: &Sizes) -> Result<Switches, ConfigError> {
    let window = Window {
        flagged: true,
        by_layer: true,
        default: None,
    };
    no_window(fields, sizes, window)?;
    let key = "no_rope_layers";
    let rotates = |value: &Value| value.as_u64().filter(|n| *n <= 1);
    let unrotated = match fields.list(key)? {
        Some(list) => {
            let flags: Option<Vec<u64>> = list.iter().map(rotates).collect();
            let Some(flags) = flags.filter(|flags| flags.len() == sizes.layers) else {
                let expected = format!("a list of {} numbers that are 0 or 1", sizes.layers);
                return Err(fields.invalid(key, expected, &Value::Array(list.to_vec())));
            };
            (0..sizes.layers).filter(|l| flags[*l] == 0).collect()
        }
        None => {
            let interval = fields
                .size("no_rope_layer_interval", 1..=usize::MAX)?
                .unwrap_or(4);
            (0..sizes.layers)
                .filter(|l| (l + 1).is_multiple_of(interval))
                .collect()
        }
    };
    Ok(Switches {
        unrotated,
        ..llama::switches(fields, sizes)?
    })
}
