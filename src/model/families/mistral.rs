//! Mistral and Ministral, without a window.

use super::{Defaults, Family, Names, Sizes, Window, no_window};
use crate::model::config::fields::Fields;
use crate::model::error::ConfigError;
use crate::model::switches::Switches;

const DEFAULTS: Defaults = Defaults {
    positions: 131_072,
    ..Defaults::LLAMA
};
const WINDOW: Window = Window {
    flagged: false,
    by_layer: false,
    default: Some(4096),
};

pub(super) const MISTRAL: Family = Family {
    model_type: "mistral",
    architectures: ["MistralForCausalLM", "MistralModel"],
    keys: &["sliding_window"],
    defaults: DEFAULTS,
    switches: mistral,
    rope_kinds: &[],
    names: Names::LLAMA,
};

pub(super) const MINISTRAL: Family = Family {
    model_type: "ministral",
    architectures: ["MinistralForCausalLM", "MinistralModel"],
    keys: &["sliding_window", "layer_types"],
    defaults: DEFAULTS,
    switches: ministral,
    rope_kinds: &[],
    names: Names::LLAMA,
};

fn mistral(fields: &Fields<'_>, sizes: &Sizes) -> Result<Switches, ConfigError> {
    no_window(fields, sizes, WINDOW)?;
    Ok(Switches::PLAIN)
}

fn ministral(fields: &Fields<'_>, sizes: &Sizes) -> Result<Switches, ConfigError> {
    let window = Window {
        by_layer: true,
        ..WINDOW
    };
    no_window(fields, sizes, window)?;
    Ok(Switches::PLAIN)
}
