//! Keys of other architectures: each changes what a model computes, so a value that does is refused by name.

use serde_json::Value;

use super::fields::Fields;
use crate::model::error::ConfigError;

/// Values of a key that change nothing here. `null` never does.
#[derive(Clone, Copy)]
enum Neutral {
    /// Only `null`, or an absent key.
    Null,
    False,
    True,
    Number(f64),
    /// One of these texts.
    Text(&'static [&'static str]),
    /// An empty list, or one of only this text.
    ListOf(&'static str),
    /// An empty list, or one of only this number.
    Numbers(f64),
}

impl Neutral {
    fn holds(self, value: &Value) -> bool {
        let all =
            |one: &dyn Fn(&Value) -> bool| value.as_array().is_some_and(|all| all.iter().all(one));
        match self {
            Self::Null => false,
            Self::False => *value == Value::Bool(false),
            Self::True => *value == Value::Bool(true),
            Self::Number(number) => value.as_f64() == Some(number),
            Self::Text(texts) => value.as_str().is_some_and(|text| texts.contains(&text)),
            Self::ListOf(text) => all(&|item| item.as_str() == Some(text)),
            Self::Numbers(number) => all(&|item| item.as_f64() == Some(number)),
        }
    }
}

/// Key, its neutral values, and these in words.
#[rustfmt::skip]
const KEYS: &[(&str, Neutral, &str)] = &[
    ("model_type", Neutral::Text(&["llama"]), "\"llama\""),
    ("hidden_act", Neutral::Text(&["silu", "swish"]), "\"silu\""),
    ("hidden_activation", Neutral::Text(&["silu", "swish"]), "\"silu\""),
    ("attention_bias", Neutral::False, "false (projections without bias)"),
    ("qkv_bias", Neutral::False, "false (projections without bias)"),
    ("mlp_bias", Neutral::False, "false (projections without bias)"),
    ("use_bias", Neutral::False, "false (projections without bias)"),
    ("lm_head_bias", Neutral::False, "false (a head without bias)"),
    ("pretraining_tp", Neutral::Number(1.0), "1 (whole matrices)"),
    ("partial_rotary_factor", Neutral::Number(1.0), "1.0 (all of a head rotates)"),
    ("rotary_pct", Neutral::Number(1.0), "1.0 (all of a head rotates)"),
    ("is_causal", Neutral::True, "true (a token sees those before it)"),
    ("is_encoder_decoder", Neutral::False, "false (a decoder)"),
    ("add_cross_attention", Neutral::False, "false (a decoder)"),
    ("sliding_window", Neutral::Null, "null (every token before, or `segment`)"),
    ("attention_chunk_size", Neutral::Null, "null (every token before, or `segment`)"),
    ("layer_types", Neutral::ListOf("full_attention"), "\"full_attention\" in every layer"),
    ("no_rope_layers", Neutral::Numbers(1.0), "1 (rotary positions) in every layer"),
    ("no_rope_layer_interval", Neutral::Null, "null (rotary positions in every layer)"),
    ("alibi", Neutral::False, "false (rotary positions)"),
    ("rope_interleave", Neutral::False, "false (a head's halves are rotated)"),
    ("rope_interleaved", Neutral::False, "false (a head's halves are rotated)"),
    ("rope_local_base_freq", Neutral::Null, "null (one base for all layers)"),
    ("embedding_multiplier", Neutral::Number(1.0), "1 (Llama's)"),
    ("scale_emb", Neutral::Number(1.0), "1 (Llama's)"),
    ("scale_depth", Neutral::Null, "null (Llama's)"),
    ("residual_multiplier", Neutral::Number(1.0), "1 (Llama's)"),
    ("attention_multiplier", Neutral::Null, "null (1 / sqrt(head_dim))"),
    ("query_pre_attn_scalar", Neutral::Null, "null (1 / sqrt(head_dim))"),
    ("scale_attn_by_inverse_layer_idx", Neutral::False, "false (1 / sqrt(head_dim))"),
    ("logits_scaling", Neutral::Number(1.0), "1 (Llama's)"),
    ("logit_scale", Neutral::Number(1.0), "1 (Llama's)"),
    ("attn_logit_softcapping", Neutral::Null, "null (no cap)"),
    ("final_logit_softcapping", Neutral::Null, "null (no cap)"),
    ("attn_temperature_tuning", Neutral::False, "false (Llama's)"),
    ("clip_qkv", Neutral::Null, "null (not clipped)"),
    ("qk_norm", Neutral::False, "false (no norm of queries and keys)"),
    ("use_qk_norm", Neutral::False, "false (no norm of queries and keys)"),
    ("qk_layernorm", Neutral::False, "false (no norm of queries and keys)"),
    ("use_parallel_residual", Neutral::False, "false (attention, then MLP)"),
    ("parallel_attn", Neutral::False, "false (attention, then MLP)"),
    ("num_experts", Neutral::Null, "null (one MLP a layer)"),
    ("num_local_experts", Neutral::Null, "null (one MLP a layer)"),
    ("n_routed_experts", Neutral::Null, "null (one MLP a layer)"),
    ("kv_lora_rank", Neutral::Null, "null (whole keys and values)"),
    ("q_lora_rank", Neutral::Null, "null (whole queries)"),
    ("num_kv_shared_layers", Neutral::Number(0.0), "0 (keys and values of its own in every layer)"),
    ("cross_attention_layers", Neutral::ListOf(""), "none"),
    ("quantization_config", Neutral::Null, "weights in float64, float32, float16 or bfloat16, without this key"),
];

/// Randomness that training would need and this crate has not, under the names of configurations.
const DROPOUT: [&str; 7] = [
    "attention_dropout",
    "hidden_dropout",
    "attn_pdrop",
    "resid_pdrop",
    "embd_pdrop",
    "dropout",
    "layerdrop",
];

/// Keys whose values say that the model computes in a way this crate does not.
pub(super) fn refuse_unsupported(fields: &Fields<'_>) -> Result<(), ConfigError> {
    for (key, neutral, supported) in KEYS {
        if let Some(got) = fields.get(key)
            && !neutral.holds(got)
            && !switched_off(fields, key)
        {
            return Err(fields.unsupported(key, supported, got));
        }
    }
    if fields.get("model_type").is_none() {
        return Err(fields.missing("model_type"));
    }
    if let Some(names) = fields.list("architectures")?
        && !names
            .iter()
            .any(|name| matches!(name.as_str(), Some("LlamaForCausalLM" | "LlamaModel")))
    {
        let got = fields.get("architectures").unwrap_or(&Value::Null);
        return Err(fields.unsupported("architectures", "[\"LlamaForCausalLM\"]", got));
    }
    Ok(())
}

/// A window that another key says is not used.
fn switched_off(fields: &Fields<'_>, key: &str) -> bool {
    key == "sliding_window" && fields.get("use_sliding_window") == Some(&Value::Bool(false))
}

/// Dropout, which a model's training has in other libraries and not here, is refused by name.
pub(super) fn refuse_dropout(fields: &Fields<'_>) -> Result<(), ConfigError> {
    for key in DROPOUT {
        if let Some(got) = fields.get(key)
            && got.as_f64() != Some(0.0)
        {
            return Err(fields.unsupported(key, "0 in training (there is no dropout)", got));
        }
    }
    Ok(())
}
