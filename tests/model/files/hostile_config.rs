//! `config.json`: what is not supported, missing, absurd or unreadable is refused by name.

use proptest::prelude::*;
use segattn::model::config::*;
use segattn::model::error::ConfigError;
use segattn::model::parameters::parameters;
use serde_json::{Value, json};

use super::config::{llama3, small, with, without};

fn key_of(error: &ConfigError) -> &str {
    match error {
        ConfigError::Missing { key }
        | ConfigError::Invalid { key, .. }
        | ConfigError::Unsupported { key, .. } => key,
        ConfigError::File(_) => "(file)",
    }
}

#[track_caller]
pub fn refused(value: Value, key: &str) {
    let error = ModelConfig::from_json(value).unwrap_err();
    assert_eq!(key_of(&error), key, "{error}");
}

#[test]
fn unsupported_features_say_what_is_supported() {
    for (key, value) in [
        ("model_type", json!("mixtral")),
        ("hidden_act", json!("gelu")),
        ("use_bias", json!(true)),
        ("qk_norm", json!(true)),
        ("pretraining_tp", json!(2)),
        ("partial_rotary_factor", json!(0.5)),
        ("architectures", json!(["MistralForCausalLM"])),
        ("quantization_config", json!({"bits": 4})),
        ("torch_dtype", json!("int8")),
        (
            "rope_scaling",
            json!({"rope_type": "proportional", "factor": 2.0}),
        ),
        ("is_causal", json!(false)),
        ("sliding_window", json!(4096)),
        ("no_rope_layers", json!([1, 0])),
        (
            "layer_types",
            json!(["full_attention", "sliding_attention"]),
        ),
        ("embedding_multiplier", json!(12.0)),
        ("residual_multiplier", json!(0.22)),
        ("logits_scaling", json!(8)),
        ("num_local_experts", json!(8)),
        ("position_embedding_type", json!("alibi")),
        // Not in any list: their names say that they change what is computed.
        ("router_expert_count", json!(8)),
        ("mlp_multiplier", json!(0.5)),
        ("key_norm", json!(true)),
        ("attn_sinks", json!([1, 2])),
        ("rope_fraction", json!(0.5)),
    ] {
        let error = ModelConfig::from_json(with(small(), &format!("/{key}"), value)).unwrap_err();
        let ConfigError::Unsupported { supported, .. } = &error else {
            panic!("{key}: {error}");
        };
        assert!(
            !supported.is_empty() && key_of(&error).starts_with(key),
            "{error}"
        );
    }
}

#[test]
fn families_that_are_not_computed_are_refused_with_what_is_missing() {
    for (name, missing) in [
        ("gemma3_text", "soft caps"),
        ("gpt_oss", "sliding windows and experts"),
        ("mixtral", "experts"),
        ("qwen3_moe", "experts"),
        ("olmo3", "sliding windows"),
        ("phi", "layer norms"),
        ("ministral3", "queries scaled"),
        ("nobody_knows", "llama, llama_sink_logits, qwen2"),
    ] {
        let error = ModelConfig::from_json(with(small(), "/model_type", json!(name))).unwrap_err();
        assert_eq!(key_of(&error), "model_type");
        assert!(error.to_string().contains(missing), "{error}");
    }
}

#[test]
fn families_refuse_what_they_do_not_compute_by_key() {
    let base = |model_type: &str, class: &str| {
        let named = with(small(), "/model_type", json!(model_type));
        with(named, "/architectures", json!([class]))
    };
    let mistral = base("mistral", "MistralForCausalLM");
    // Left out, the window is 4096.
    refused(mistral.clone(), "sliding_window");
    refused(
        with(mistral.clone(), "/sliding_window", json!(4096)),
        "sliding_window",
    );
    for window in [Value::Null, json!(131_072)] {
        ModelConfig::from_json(with(mistral.clone(), "/sliding_window", window)).unwrap();
    }
    let plain = with(mistral, "/sliding_window", Value::Null);
    refused(
        with(plain, "/attention_bias", json!(true)),
        "attention_bias",
    );
    let qwen = base("qwen2", "Qwen2ForCausalLM");
    ModelConfig::from_json(with(qwen.clone(), "/sliding_window", json!(4096))).unwrap();
    let windowed = with(qwen.clone(), "/use_sliding_window", json!(true));
    refused(
        with(windowed, "/sliding_window", json!(4096)),
        "sliding_window",
    );
    let layers = json!(["full_attention", "sliding_attention"]);
    refused(with(qwen.clone(), "/layer_types", layers), "layer_types");
    refused(
        with(qwen, "/architectures", json!(["LlamaForCausalLM"])),
        "architectures",
    );
    let smollm = base("smollm3", "SmolLM3ForCausalLM");
    for list in [json!([1]), json!([1, 2]), json!([1, "0"])] {
        refused(
            with(smollm.clone(), "/no_rope_layers", list),
            "no_rope_layers",
        );
    }
    let granite = base("granite", "GraniteForCausalLM");
    refused(with(granite, "/logits_scaling", json!(0)), "logits_scaling");
    let phi = base("phi3", "Phi3ForCausalLM");
    refused(
        with(phi.clone(), "/partial_rotary_factor", json!(0)),
        "partial_rotary_factor",
    );
    let short = json!({"rope_type": "longrope", "short_factor": [1], "long_factor": [1, 1, 1, 1]});
    refused(
        with(phi.clone(), "/rope_scaling", short.clone()),
        "rope_scaling.original_max_position_embeddings",
    );
    let original = with(phi, "/original_max_position_embeddings", json!(64));
    refused(
        with(original, "/rope_scaling", short),
        "rope_scaling.short_factor",
    );
}

#[test]
fn unknown_keys_that_are_off_are_accepted() {
    for (key, value) in [
        ("router_expert_count", json!(0)),
        ("mlp_multiplier", json!(1.0)),
        ("key_norm", json!(false)),
        ("attn_sinks", json!([])),
        ("rope_fraction", Value::Null),
        ("_attn_implementation", json!("sdpa")),
        ("output_attentions", json!(true)),
        ("attention_probs_dropout_prob", json!(0.1)),
    ] {
        let config = ModelConfig::from_json(with(small(), &format!("/{key}"), value)).unwrap();
        assert_eq!(config.ignored_keys(), [] as [&str; 0], "{key}");
    }
}

#[test]
fn unknown_keys_without_a_meaning_for_computing_are_named_as_ignored() {
    let mut value = small();
    for (key, set) in [
        ("trainer_notes", json!("lr 1e-4")),
        ("dataset", json!({"name": "x"})),
        ("stage", json!(2)),
        ("use_compile", json!(false)),
        ("transformers_version", json!("5.0")),
        ("use_cache", json!(true)),
        ("pad_token_id", json!(0)),
    ] {
        value[key] = set;
    }
    let config = ModelConfig::from_json(value).unwrap();
    let mut ignored = config.ignored_keys();
    ignored.sort_unstable();
    assert_eq!(ignored, ["dataset", "stage", "trainer_notes"]);
    assert_eq!(config.to_json()["dataset"], json!({"name": "x"}));
}

#[test]
fn dropout_is_refused_by_name_in_training_only() {
    for key in ["attention_dropout", "mlp_dropout_rate", "resid_pdrop"] {
        let value = with(small(), &format!("/{key}"), json!(0.1));
        let config = ModelConfig::from_json(value).unwrap();
        assert_eq!(key_of(&config.check_training().unwrap_err()), key);
    }
    assert!(
        ModelConfig::from_json(small())
            .unwrap()
            .check_training()
            .is_ok()
    );
}

#[test]
fn missing_keys_are_named() {
    for key in [
        "model_type",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
    ] {
        refused(without(small(), key), key);
    }
    for key in ["segment_len", "prior_len", "past_len"] {
        let mut value = small();
        value["segment"].as_object_mut().unwrap().remove(key);
        refused(value, &format!("segment.{key}"));
    }
}

#[test]
fn absurd_and_contradictory_values_are_refused_by_key() {
    for key in [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
    ] {
        for value in [
            json!(0),
            json!(-1),
            json!(u64::MAX),
            json!(1u64 << 40),
            json!(1.5),
            json!("8"),
            json!([8]),
        ] {
            refused(with(small(), &format!("/{key}"), value), key);
        }
    }
    for (pointer, value, key) in [
        ("/num_key_value_heads", json!(3), "num_key_value_heads"),
        ("/head_dim", json!(7), "head_dim"),
        ("/hidden_size", json!(33), "hidden_size"),
        ("/rms_norm_eps", json!(-1e-5), "rms_norm_eps"),
        ("/rope_theta", json!(0), "rope_theta"),
        ("/eos_token_id", json!(1.5), "eos_token_id"),
        (
            "/rope_scaling",
            json!({"type": "linear"}),
            "rope_scaling.factor",
        ),
        (
            "/rope_scaling",
            json!({"type": "linear", "factor": 0.5}),
            "rope_scaling.factor",
        ),
        ("/segment/segment_len", json!(63), "segment.segment_len"),
        ("/segment/segment_len", json!(0), "segment.segment_len"),
        ("/segment/prior_len", json!(72), "segment.prior_len"),
        ("/segment/prior_len", json!(12), "segment.prior_len"),
        ("/segment/past_len", json!(31), "segment.past_len"),
        ("/segment/past_length", json!(32), "segment.past_length"),
        ("/segment/pool_bits", json!(5), "segment.pool_bits"),
        ("/segment/pool_bits", json!("8"), "segment.pool_bits"),
        (
            "/segment/prompt_suffix_len",
            json!(1),
            "segment.prompt_suffix_len",
        ),
        ("/segment/pool_len", json!("64"), "segment.pool_len"),
        ("/segment/pool_len", json!(-8), "segment.pool_len"),
        ("/segment/pool_len", json!(8), "segment.pool_len"),
        ("/segment/pool_len", json!(1001), "segment.pool_len"),
        ("/segment/pool_len", json!(1u64 << 31), "segment.pool_len"),
        ("/segment/break_ids", json!([3, 258]), "segment.break_ids"),
        ("/segment/break_ids", json!([-1]), "segment.break_ids"),
        ("/segment/break_ids", json!(3), "segment.break_ids"),
        (
            "/segment/break_after_prompt",
            json!(1),
            "segment.break_after_prompt",
        ),
        (
            "/segment/retrieval/block_len",
            json!(0),
            "segment.retrieval.block_len",
        ),
        (
            "/segment/retrieval/block",
            json!(8),
            "segment.retrieval.block",
        ),
        (
            "/segment/head_reads",
            json!([[["prior"], []]]),
            "segment.head_reads",
        ),
        (
            "/segment/head_reads/1",
            json!([[]]),
            "segment.head_reads[1]",
        ),
        (
            "/segment/head_reads/1/0",
            json!(["future"]),
            "segment.head_reads[1][0]",
        ),
        (
            "/segment/head_reads/1/0",
            json!(["past", "past"]),
            "segment.head_reads[1][0]",
        ),
    ] {
        refused(with(small(), pointer, value), key);
    }
}

#[test]
fn llama3_scaling_needs_an_ordered_ramp() {
    let base = with(small(), "/rope_scaling", llama3()["rope_scaling"].clone());
    let value = with(base, "/rope_scaling/high_freq_factor", json!(1.0));
    refused(value, "rope_scaling.high_freq_factor");
}

#[test]
fn unreadable_config_files_are_typed_errors() {
    let folder = tempfile::tempdir().unwrap();
    let load = || ModelConfig::load(folder.path()).unwrap_err();
    assert!(matches!(load(), ConfigError::File(_)), "absent");
    let path = folder.path().join(CONFIG_FILE);
    for text in ["", "[", "{\"model_type\":", "\u{0}", &"[".repeat(100_000)] {
        std::fs::write(&path, text).unwrap();
        assert!(matches!(load(), ConfigError::File(_)), "{:.20}", text);
    }
    std::fs::write(&path, "[]").unwrap();
    assert!(matches!(load(), ConfigError::Invalid { .. }));
    let huge = std::fs::File::create(&path).unwrap();
    huge.set_len(1 << 40).unwrap();
    assert!(load().to_string().contains("at most"));
}

fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        (0u64..70).prop_map(Value::from),
        any::<f64>().prop_map(|x| json!(x)),
        "[a-z_]{0,12}".prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 12, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::hash_map("[a-z_]{1,8}", inner, 0..4).prop_map(|map| json!(map)),
        ]
    })
}

const POINTERS: &[&str] = &[
    "/model_type",
    "/vocab_size",
    "/hidden_size",
    "/intermediate_size",
    "/num_hidden_layers",
    "/num_attention_heads",
    "/num_key_value_heads",
    "/head_dim",
    "/rms_norm_eps",
    "/rope_theta",
    "/rope_scaling",
    "/rope_parameters",
    "/tie_word_embeddings",
    "/max_position_embeddings",
    "/bos_token_id",
    "/eos_token_id",
    "/torch_dtype",
    "/dtype",
    "/segment",
    "/segment/segment_len",
    "/segment/head_reads",
    "/segment/head_reads/0",
    "/segment/head_reads/0/1",
    "/segment/retrieval",
    "/segment/retrieval/block_len",
    "/segment/anything",
    "/anything",
];

proptest! {
    #[test]
    fn any_value_under_any_key_loads_soundly_or_is_a_typed_error(
        pointer in prop::sample::select(POINTERS),
        value in any_json(),
    ) {
        if let Ok(config) = ModelConfig::from_json(with(small(), pointer, value)) {
            prop_assert!(config.validate().is_ok());
            prop_assert!(parameters(&config).iter().all(|spec| spec.numel() > 0));
            let again = ModelConfig::from_json(config.to_json()).unwrap();
            prop_assert_eq!(again.to_json(), config.to_json());
        }
    }
}
