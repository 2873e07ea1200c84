//! Families of models that the decoder computes. A family is a table: the keys of its `config.json`, the
//! [`Switches`] that they set, and the names of its tensors. One file each; the names are those of Transformers.

mod granite;
mod llama;
mod mistral;
mod olmo2;
mod phi3;
mod qwen;
mod refused;
mod seed_oss;
mod smollm3;

use serde_json::{Value, json};

use super::config::fields::Fields;
use super::config::invalid;
use super::error::ConfigError;
use super::switches::Switches;

/// A family of models.
pub struct Family {
    /// `model_type` in `config.json`.
    pub model_type: &'static str,
    /// Names of its classes: with the head, which is the one that is written, and without.
    pub architectures: [&'static str; 2],
    /// Keys that the family reads beside those of every family.
    pub(super) keys: &'static [&'static str],
    /// What stands for keys that are left out.
    pub(super) defaults: Defaults,
    /// Reads the switches.
    pub(super) switches: fn(&Fields<'_>, &Sizes) -> Result<Switches, ConfigError>,
    /// Older names of kinds of rotary scaling, with the name of today.
    pub(super) rope_kinds: &'static [(&'static str, &'static str)],
    /// Names of a layer's tensors.
    pub(super) names: Names,
}

/// Values of keys that a `config.json` leaves out.
pub(super) struct Defaults {
    pub(super) head_dim: Option<usize>,
    pub(super) rms_norm_eps: f64,
    pub(super) rope_theta: f64,
    pub(super) tied: bool,
    pub(super) positions: usize,
}

impl Defaults {
    const LLAMA: Self = Self {
        head_dim: None,
        rms_norm_eps: 1e-6,
        rope_theta: 10_000.0,
        tied: false,
        positions: 2048,
    };
}

/// Names of tensors that families call differently.
pub(super) struct Names {
    /// The two norms of a layer: of attention, and of the MLP.
    pub(super) norms: [&'static str; 2],
    /// Queries, keys and values: one after the other in one tensor, or three tensors.
    pub(super) qkv: &'static [&'static str],
    /// Gate and up: likewise.
    pub(super) gate_up: &'static [&'static str],
}

impl Names {
    const LLAMA: Self = Self {
        norms: ["input_layernorm", "post_attention_layernorm"],
        qkv: &["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        gate_up: &["mlp.gate_proj", "mlp.up_proj"],
    };
}

/// Sizes that switches depend on.
pub(super) struct Sizes {
    pub(super) layers: usize,
    pub(super) head_dim: usize,
    pub(super) positions: usize,
}

/// All families.
pub(super) const FAMILIES: &[&Family] = &[
    &llama::LLAMA,
    &llama::LLAMA_SINK_LOGITS,
    &qwen::QWEN2,
    &qwen::QWEN3,
    &mistral::MISTRAL,
    &mistral::MINISTRAL,
    &smollm3::SMOLLM3,
    &granite::GRANITE,
    &phi3::PHI3,
    &olmo2::OLMO2,
    &seed_oss::SEED_OSS,
];

/// The family of plain models.
pub(super) const LLAMA: &Family = &llama::LLAMA;

/// The family of models that are made here.
pub(crate) fn made_here(sink_logits: bool) -> &'static Family {
    match sink_logits {
        true => &llama::LLAMA_SINK_LOGITS,
        false => LLAMA,
    }
}

impl Family {
    /// The family that a `config.json` names.
    pub(super) fn of(fields: &Fields<'_>) -> Result<&'static Self, ConfigError> {
        let Some(name) = fields.text("model_type")? else {
            return Err(fields.missing("model_type"));
        };
        let Some(family) = FAMILIES.iter().find(|family| family.model_type == name) else {
            return Err(fields.unsupported("model_type", &refused::supported(name), &json!(name)));
        };
        let named = |name: &Value| {
            name.as_str()
                .is_some_and(|n| family.architectures.contains(&n))
        };
        match fields.list("architectures")? {
            Some(names) if !names.iter().any(named) => {
                let supported = format!("[\"{}\"] of {name}", family.architectures[0]);
                let got = fields.get("architectures").unwrap_or(&Value::Null);
                Err(fields.unsupported("architectures", &supported, got))
            }
            _ => Ok(family),
        }
    }
}

impl Family {
    /// The name of today of a kind of rotary scaling.
    pub(super) fn rope_kind<'a>(&self, name: &'a str) -> &'a str {
        let renamed = self.rope_kinds.iter().find(|(old, _)| *old == name);
        renamed.map_or(name, |(_, new)| new)
    }
}

impl std::fmt::Debug for Family {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.model_type)
    }
}

impl PartialEq for Family {
    fn eq(&self, other: &Self) -> bool {
        self.model_type == other.model_type
    }
}

/// A flag that is false where it is left out.
fn flag(fields: &Fields<'_>, key: &str) -> Result<bool, ConfigError> {
    Ok(fields.flag(key)?.unwrap_or(false))
}

/// How the keys of a family say that attention has a sliding window.
struct Window {
    /// Only where `use_sliding_window` is true.
    flagged: bool,
    /// Only in layers of another type than `full_attention`, where `layer_types` is given.
    by_layer: bool,
    /// The window where the key is left out, which `null` is not.
    default: Option<usize>,
}

/// Refuses a window that hides a token of the context the model was made for.
fn no_window(fields: &Fields<'_>, sizes: &Sizes, window: Window) -> Result<(), ConfigError> {
    let full = |value: &Value| value.as_str() == Some("full_attention");
    if window.by_layer
        && let Some(types) = fields.list("layer_types")?
    {
        let got = fields.get("layer_types").unwrap_or(&Value::Null);
        let supported = "\"full_attention\" in every layer";
        return match types.iter().all(full) {
            true => Ok(()),
            false => Err(fields.unsupported("layer_types", supported, got)),
        };
    }
    if window.flagged && !flag(fields, "use_sliding_window")? {
        return Ok(());
    }
    let len = match fields.has("sliding_window") {
        true => fields.size("sliding_window", 1..=usize::MAX)?,
        false => window.default,
    };
    match len.filter(|len| *len < sizes.positions) {
        Some(len) => {
            let supported = "null, or at least max_position_embeddings (a token sees all before it; `segment` bounds \
                             what it sees in another way)";
            Err(fields.unsupported("sliding_window", supported, &json!(len)))
        }
        None => Ok(()),
    }
}

/// A factor of the family's; 1 where it is left out.
fn factor(fields: &Fields<'_>, key: &str) -> Result<f64, ConfigError> {
    let factor = fields.number(key)?.unwrap_or(1.0);
    match (1e-30..1e30).contains(&factor) {
        true => Ok(factor),
        false => invalid(key, "a number from 1e-30 to 1e30", factor),
    }
}
