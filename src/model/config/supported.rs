//! Keys that this crate does not read. A key that changes what a model computes is refused by name.
//!
//! The rule, in this order:
//!
//! 1. keys of known architectures ([`KEYS`]) may have only a value that changes nothing, unless the model's family
//!    reads them;
//! 2. keys that this crate reads ([`READ`], and those of the family) and notes of libraries ([`HARMLESS`]) are
//!    accepted;
//! 3. an unknown key whose name says that it sets what a model computes ([`COMPUTING`]) is refused, unless its value
//!    says that it is off;
//! 4. any other unknown key is ignored, and [`ignored`] names it.

use serde_json::{Map, Value};

use super::BYTE_TOKENS;
use super::fields::Fields;
use crate::model::error::ConfigError;
use crate::model::families::Family;

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
    ("position_embedding_type", Neutral::Text(&["rope", "rotary"]), "\"rope\""),
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
    ("full_attn_mod", Neutral::Number(1.0), "1 (every layer alike)"),
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

/// Keys that are read elsewhere in this crate.
const READ: &[&str] = &[
    "architectures",
    "bos_token_id",
    BYTE_TOKENS,
    "dtype",
    "eos_token_id",
    "head_dim",
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "model_type",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "original_max_position_embeddings",
    "rms_norm_eps",
    "rope_length",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "segment",
    "tie_word_embeddings",
    "torch_dtype",
    "use_sliding_window",
    "vocab_size",
];

/// Keys of libraries that do not change what a Llama model computes. Settings of generation have a file of their own.
const HARMLESS: &[&str] = &[
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_attn_implementation_internal",
    "_flash_attn_2_enabled",
    "_name_or_path",
    "attn_implementation",
    "auto_map",
    "early_stopping",
    "id2label",
    "initializer_range",
    "is_decoder",
    "is_llama_config",
    "keys_to_ignore_at_inference",
    "label2id",
    "length_penalty",
    "max_length",
    "max_window_layers",
    "min_length",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "problem_type",
    "repetition_penalty",
    "return_dict",
    "return_dict_in_generate",
    "task_specific_params",
    "temperature",
    "tokenizer_class",
    "top_k",
    "top_p",
    "torchscript",
    "transformers.js_config",
    "transformers_version",
    "typical_p",
    "unk_token_id",
    "use_bfloat16",
    "use_cache",
];

/// Parts of names of keys that set what a model computes.
const COMPUTING: &[&str] = &[
    "activation",
    "alibi",
    "attention",
    "attn",
    "bias",
    "clip",
    "conv",
    "embedding",
    "expert",
    "ffn",
    "kv_",
    "lora",
    "mamba",
    "mlp",
    "moe",
    "multiplier",
    "mup",
    "norm",
    "position",
    "qk_",
    "quant",
    "residual",
    "rope",
    "rotary",
    "scal",
    "sink",
    "skip",
    "softcap",
    "ssm",
    "window",
];

/// Keys whose values say that the model computes in a way this crate does not.
pub(super) fn refuse_unsupported(fields: &Fields<'_>, family: &Family) -> Result<(), ConfigError> {
    for (key, neutral, supported) in KEYS {
        if !family.keys.contains(key)
            && let Some(got) = fields.get(key)
            && !neutral.holds(got)
            && !switched_off(fields, key)
        {
            return Err(fields.unsupported(key, supported, got));
        }
    }
    Ok(())
}

/// A window that another key says is not used.
fn switched_off(fields: &Fields<'_>, key: &str) -> bool {
    key == "sliding_window" && fields.get("use_sliding_window") == Some(&Value::Bool(false))
}

/// Refuses unknown keys that set what a model computes.
pub(super) fn refuse_unknown(fields: &Fields<'_>, family: &Family) -> Result<(), ConfigError> {
    for (key, value) in fields.iter() {
        let computing = COMPUTING.iter().any(|part| key.contains(part));
        if computing && !is_known(key, family) && !is_dropout(key) && !is_off(key, value) {
            let supported = "only without this key, which is not known here and by its name changes what a model \
                             computes; remove it if the model does not need it";
            return Err(fields.unsupported(key, supported, value));
        }
    }
    Ok(())
}

/// Unknown keys that have a value in effect and are ignored.
pub(super) fn ignored<'a>(object: &'a Map<String, Value>, family: &Family) -> Vec<&'a str> {
    let in_effect = |(key, value): &(&String, &Value)| {
        !is_known(key, family) && !is_dropout(key) && !is_off(key, value)
    };
    let keys = object.iter().filter(in_effect);
    keys.map(|(key, _)| key.as_str()).collect()
}

fn is_known(key: &str, family: &Family) -> bool {
    family.keys.contains(&key)
        || READ.contains(&key)
        || HARMLESS.contains(&key)
        || KEYS.iter().any(|(known, ..)| *known == key)
}

/// Whether a key sets a probability of dropout, which [`refuse_dropout`] checks before training.
fn is_dropout(key: &str) -> bool {
    key.contains("dropout") || key.contains("pdrop") || key.contains("layerdrop")
}

/// Whether the value of a key says that it is not used. A factor is off at 1, any other number at 0.
fn is_off(key: &str, value: &Value) -> bool {
    let factor = key.contains("multiplier") || key.contains("scal");
    let off = if factor { 1.0 } else { 0.0 };
    match value {
        Value::Null => true,
        Value::Bool(on) => !on,
        Value::Number(number) => number.as_f64() == Some(off),
        Value::String(text) => text.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::Object(object) => object.is_empty(),
    }
}

/// Refuses dropout by name: other libraries apply it in training, and this crate does not.
pub(super) fn refuse_dropout(fields: &Fields<'_>) -> Result<(), ConfigError> {
    for (key, value) in fields.iter() {
        if is_dropout(key) && !is_off(key, value) {
            return Err(fields.unsupported(key, "0 in training (there is no dropout)", value));
        }
    }
    Ok(())
}
