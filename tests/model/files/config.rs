//! `config.json`: real shapes load, and unknown keys survive.

use segattn::device::PoolBits;
use segattn::model::config::*;
use segattn::model::parameters::{Parameter, parameters};
use serde_json::{Value, json};

use super::hostile_config::refused;

pub fn llama3() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": false,
        "attention_dropout": 0.0, "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009],
        "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 8192,
        "max_position_embeddings": 131072, "mlp_bias": false, "num_attention_heads": 32,
        "num_hidden_layers": 16, "num_key_value_heads": 8, "head_dim": 64, "pretraining_tp": 1,
        "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "tie_word_embeddings": true,
        "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3"},
        "torch_dtype": "bfloat16", "use_cache": true, "vocab_size": 128256,
        "my_own": {"nested": [1, null, "x", 0.1], "big": 18446744073709551615u64}
    })
}

pub fn small() -> Value {
    json!({
        "model_type": "llama", "vocab_size": 258, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "segment": {
            "segment_len": 64, "prior_len": 16, "past_len": 32,
            "head_reads": [[["prior"], []], [["past"], ["past", "prior"]]],
            "retrieval": {"probe_len": 32}
        }
    })
}

pub fn with(mut base: Value, pointer: &str, value: Value) -> Value {
    let (parent, key) = pointer.rsplit_once('/').unwrap();
    let object = base.pointer_mut(parent).unwrap();
    match object {
        Value::Array(items) => items[key.parse::<usize>().unwrap()] = value,
        Value::Object(fields) => drop(fields.insert(key.into(), value)),
        _ => panic!("no parent for {pointer}"),
    }
    base
}

pub fn without(mut base: Value, key: &str) -> Value {
    base.as_object_mut().unwrap().remove(key).unwrap();
    base
}

#[test]
fn llama_3_config_loads_with_every_field() {
    let config = ModelConfig::from_json(llama3()).unwrap();
    assert_eq!(
        (config.q_dim(), config.kv_dim(), config.group_size()),
        (2048, 512, 4)
    );
    assert_eq!(config.eos_token_id, [128001, 128008, 128009]);
    assert_eq!(config.bos_token_id, [128000]);
    assert_eq!(config.dtype, Some(WeightType::Bf16));
    assert_eq!(config.rope_theta, 500000.0);
    assert!(config.tie_word_embeddings && config.segment.is_none());
    assert!(!config.reads_prior(0, 0) && !config.reads_past(0, 0));
    assert_eq!(
        config.rope_scaling,
        RopeScaling::Llama3 {
            factor: 32.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 8192
        }
    );
}

#[test]
fn saved_config_keeps_every_key_of_the_loaded_one() {
    for value in [llama3(), small()] {
        let folder = tempfile::tempdir().unwrap();
        let config = ModelConfig::from_json(value.clone()).unwrap();
        config.save(folder.path()).unwrap();
        let again = ModelConfig::load(folder.path()).unwrap();
        assert_eq!(again.to_json(), config.to_json());
        let written = again.to_json();
        for (key, before) in value.as_object().unwrap() {
            if key != "segment" {
                assert_eq!(&written[key], before, "{key}");
            }
        }
        assert_eq!(again.segment, config.segment);
        let names: Vec<_> = std::fs::read_dir(folder.path()).unwrap().collect();
        assert_eq!(names.len(), 1, "no temporary file stays behind");
    }
}

#[test]
fn left_out_keys_take_the_defaults_of_hugging_face() {
    let bare = without(without(small(), "segment"), "num_key_value_heads");
    let config = ModelConfig::from_json(bare).unwrap();
    assert_eq!((config.num_key_value_heads, config.head_dim), (4, 8));
    assert_eq!((config.rms_norm_eps, config.rope_theta), (1e-6, 10000.0));
    assert_eq!(config.rope_scaling, RopeScaling::Default);
    assert!(!config.tie_word_embeddings);
    let null = with(small(), "/num_key_value_heads", Value::Null);
    let null = without(null, "segment");
    assert_eq!(ModelConfig::from_json(null).unwrap().num_key_value_heads, 4);
}

#[test]
fn rope_parameters_mean_the_same_as_the_older_keys() {
    let old = ModelConfig::from_json(llama3()).unwrap();
    let mut newer = without(without(llama3(), "rope_scaling"), "rope_theta");
    newer = with(newer, "/rope_parameters", llama3()["rope_scaling"].clone());
    newer = with(newer, "/rope_parameters/rope_theta", json!(500000.0));
    let config = ModelConfig::from_json(newer.clone()).unwrap();
    assert_eq!(
        (config.rope_theta, &config.rope_scaling),
        (old.rope_theta, &old.rope_scaling)
    );
    let written = config.to_json();
    assert_eq!(written["rope_parameters"], newer["rope_parameters"]);
    assert_eq!(written["rope_scaling"], llama3()["rope_scaling"]);
    let again = ModelConfig::from_json(written).unwrap();
    assert_eq!(again.rope_scaling, old.rope_scaling);
    let contradiction = with(newer, "/rope_theta", json!(10000.0));
    refused(contradiction, "rope_parameters.rope_theta");
}

#[test]
fn linear_scaling_is_read_under_both_of_its_names() {
    for name in ["type", "rope_type"] {
        let value = with(
            small(),
            "/rope_scaling",
            json!({name: "linear", "factor": 4}),
        );
        let config = ModelConfig::from_json(value).unwrap();
        assert_eq!(config.rope_scaling, RopeScaling::Linear { factor: 4.0 });
    }
}

#[test]
fn segment_object_says_what_each_head_reads() {
    let config = ModelConfig::from_json(small()).unwrap();
    let reads = |layer, head| {
        (
            config.reads_prior(layer, head),
            config.reads_past(layer, head),
        )
    };
    assert_eq!(reads(0, 0), (true, false));
    assert_eq!(reads(0, 1), (false, false));
    assert_eq!(reads(1, 0), (false, true));
    assert_eq!(reads(1, 1), (true, true));
    let retrieval = config.segment.as_ref().unwrap().retrieval;
    assert_eq!(
        retrieval,
        RetrievalConfig::Blocks {
            block_len: 8,
            probe_len: 32,
            probe_window: 8,
            probe_stride: 4,
        }
    );
    let left_out = with(
        small(),
        "/segment",
        json!({"segment_len": 64, "prior_len": 64, "past_len": 0}),
    );
    let config = ModelConfig::from_json(left_out).unwrap();
    assert!((0..2).all(|layer| {
        (0..2).all(|head| config.reads_prior(layer, head) && !config.reads_past(layer, head))
    }));
    assert_eq!(
        config.segment.unwrap().retrieval,
        RetrievalConfig::default()
    );
}

#[test]
fn keys_of_retrieval_choose_its_rule() {
    let read = |retrieval: Value| {
        let object = with(small(), "/segment/retrieval", retrieval);
        // Lengths that are multiples of nothing, which the second rule allows.
        let object = with(object, "/segment/past_len", json!(13));
        ModelConfig::from_json(object).map(|config| config.segment.unwrap())
    };
    for (retrieval, [queries, window_len, window_before]) in [
        (json!({"queries": 16, "window_len": 32}), [16, 32, 16]),
        (json!({"queries": 3}), [3, 32, 16]),
        (json!({"window_len": 5}), [16, 5, 2]),
        (json!({"window_len": 5, "block_len": null}), [16, 5, 2]),
        (json!({"window_len": 5, "window_before": 0}), [16, 5, 0]),
        (json!({"window_before": 31}), [16, 32, 31]),
    ] {
        let segment = read(retrieval).unwrap();
        let expected = RetrievalConfig::Windows {
            queries,
            window_len,
            window_before,
        };
        assert_eq!((segment.retrieval, segment.past_len), (expected, 13));
        let written =
            json!({"queries": queries, "window_len": window_len, "window_before": window_before});
        assert_eq!(segment.retrieval.to_json(), written);
    }
    for (retrieval, key) in [
        (json!({"queries": 16, "block_len": 8}), "segment.retrieval"),
        (
            json!({"window_len": 8, "probe_len": 8}),
            "segment.retrieval",
        ),
        (json!({"queries": 0}), "segment.retrieval.queries"),
        (json!({"window_len": 1.5}), "segment.retrieval.window_len"),
        (
            json!({"window_before": 32}),
            "segment.retrieval.window_before",
        ),
        (
            json!({"window_len": 4, "window_before": 4}),
            "segment.retrieval.window_before",
        ),
        (json!({"windows": 3}), "segment.retrieval.windows"),
        (json!({}), "segment.past_len"),
    ] {
        let error = read(retrieval).unwrap_err().to_string();
        assert!(error.contains(&format!("`{key}`")), "{error}");
    }
}

#[test]
fn parameter_list_has_hugging_face_names_and_shapes() {
    let config = ModelConfig::from_json(small()).unwrap();
    let list = parameters(&config);
    let shape = |name: &str| {
        let found: Vec<_> = list.iter().filter(|spec| spec.name == name).collect();
        assert_eq!(found.len(), 1, "{name}");
        found[0].shape.clone()
    };
    assert_eq!(list.len(), 3 + 2 * 9 + 1);
    assert_eq!(shape("model.embed_tokens.weight"), [258, 32]);
    assert_eq!(shape("model.layers.0.input_layernorm.weight"), [32]);
    assert_eq!(shape("model.layers.0.self_attn.q_proj.weight"), [32, 32]);
    assert_eq!(shape("model.layers.1.self_attn.k_proj.weight"), [16, 32]);
    assert_eq!(shape("model.layers.1.self_attn.v_proj.weight"), [16, 32]);
    assert_eq!(shape("model.layers.1.self_attn.o_proj.weight"), [32, 32]);
    assert_eq!(shape("model.layers.1.self_attn.past_gate"), [4]);
    assert_eq!(
        shape("model.layers.0.post_attention_layernorm.weight"),
        [32]
    );
    assert_eq!(shape("model.layers.0.mlp.gate_proj.weight"), [48, 32]);
    assert_eq!(shape("model.layers.0.mlp.up_proj.weight"), [48, 32]);
    assert_eq!(shape("model.layers.0.mlp.down_proj.weight"), [32, 48]);
    assert_eq!(shape("model.norm.weight"), [32]);
    assert_eq!(shape("lm_head.weight"), [258, 32]);
    let tied = parameters(&ModelConfig::from_json(llama3()).unwrap());
    assert_eq!(tied.len(), 2 + 16 * 9);
    let total: usize = tied.iter().map(Parameter::numel).sum();
    assert_eq!(total, 1_235_814_400, "the published size of Llama 3.2 1B");
}

#[test]
fn keys_of_other_architectures_may_stand_there_with_values_that_change_nothing() {
    for (key, value) in [
        ("hidden_act", json!("swish")),
        ("is_causal", json!(true)),
        ("sliding_window", json!(null)),
        ("no_rope_layers", json!([1, 1])),
        ("layer_types", json!(["full_attention", "full_attention"])),
        ("embedding_multiplier", json!(1)),
        ("logits_scaling", json!(1.0)),
        ("dtype", json!("float64")),
        ("architectures", json!(["LlamaModel"])),
    ] {
        let value = with(small(), &format!("/{key}"), value);
        assert!(ModelConfig::from_json(value).is_ok(), "{key}");
    }
    let unused = with(
        with(small(), "/sliding_window", json!(4096)),
        "/use_sliding_window",
        json!(false),
    );
    assert!(ModelConfig::from_json(unused).is_ok());
}

#[test]
fn the_rotary_base_is_found_in_every_place_and_must_be_the_same_in_all() {
    let theta = |value| ModelConfig::from_json(value).map(|config| config.rope_theta);
    let inside = json!({"rope_type": "linear", "factor": 2.0, "rope_theta": 500000.0});
    let alone = with(small(), "/rope_scaling", inside.clone());
    assert_eq!(theta(alone).unwrap(), 500000.0);
    let same = with(
        with(small(), "/rope_scaling", inside.clone()),
        "/rope_theta",
        json!(500000.0),
    );
    assert_eq!(theta(same).unwrap(), 500000.0);
    refused(
        with(
            with(small(), "/rope_scaling", inside),
            "/rope_theta",
            json!(10000.0),
        ),
        "rope_scaling.rope_theta",
    );
}

#[test]
fn the_original_context_may_stand_beside_the_scaling() {
    let key = "original_max_position_embeddings";
    let mut beside = llama3();
    let inner = beside["rope_scaling"]
        .as_object_mut()
        .unwrap()
        .remove(key)
        .unwrap();
    beside[key] = inner.clone();
    let (beside, inside) = (
        ModelConfig::from_json(beside).unwrap(),
        ModelConfig::from_json(llama3()).unwrap(),
    );
    assert_eq!(beside.rope_scaling, inside.rope_scaling);
    refused(with(llama3(), &format!("/{key}"), json!(7)), key);
    assert_ne!(inner, json!(7));
}

#[test]
fn breaks_and_bits_of_the_pool_are_read_and_written_back_and_left_out_where_there_are_none() {
    let plain = ModelConfig::from_json(small()).unwrap();
    let written = plain.to_json();
    for key in [
        "break_ids",
        "break_after_prompt",
        "prompt_suffix_len",
        "pool_bits",
        "pool_len",
    ] {
        assert!(written["segment"].get(key).is_none(), "{key}");
    }
    let value = with(small(), "/segment/break_ids", json!([9, 3]));
    let value = with(value, "/segment/break_after_prompt", json!(true));
    let value = with(value, "/segment/prompt_suffix_len", json!(2));
    let value = with(value, "/segment/pool_bits", json!(4));
    let value = with(value, "/segment/pool_len", json!(4096));
    let config = ModelConfig::from_json(value).unwrap();
    let segment = config.segment.as_ref().unwrap();
    assert_eq!(
        (segment.pool_bits, segment.pool_len),
        (PoolBits::Four, 4096)
    );
    assert_eq!(segment.break_ids, [9, 3]);
    assert!(segment.break_after_prompt);
    assert_eq!(segment.prompt_suffix_len, 2);
    let again = ModelConfig::from_json(config.to_json()).unwrap();
    assert_eq!(again.segment, config.segment);
}

#[test]
fn negative_ids_stand_for_none() {
    let ids = |value| {
        ModelConfig::from_json(with(small(), "/eos_token_id", value))
            .unwrap()
            .eos_token_id
    };
    assert!(ids(json!(-1)).is_empty());
    assert_eq!(ids(json!([1, -1])), [1]);
    // One without a row in the embedding is never chosen.
    assert_eq!(ids(json!(258)), [258]);
}

#[test]
fn marks_and_numbers_that_json_lacks_and_pointers_are_passed_over_or_named() {
    let folder = tempfile::tempdir().unwrap();
    let write = |text: &str| std::fs::write(folder.path().join("config.json"), text).unwrap();
    write(&format!("\u{feff}{}", small()));
    assert!(ModelConfig::load(folder.path()).is_ok());
    let error = |text: &str| {
        write(text);
        ModelConfig::load(folder.path()).unwrap_err().to_string()
    };
    assert!(error("{\n \"rope_theta\": NaN}").contains("no NaN"));
    assert!(error("{\"rope_theta\": -Infinity}").contains("no Infinity"));
    assert!(
        error("version https://git-lfs.github.com/spec/v1\noid sha256:0\n").contains("Git LFS")
    );
}
