//! GGUF files as model folders, against the package `gguf` and Transformers (tests/golden/gguf/make.py).

use std::path::{Path, PathBuf};

use crate::cli_model::{fails, json, printed};
use segattn::convert::ConvertError;
use segattn::convert::gguf::Gguf;
use segattn::convert::gguf::quants::BlockType;
use segattn::model::config::ModelConfig;
use segattn::model::tokenizer::Tokenizer;
use serde_json::Value;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden/gguf")
        .join(name)
}

#[test]
fn every_quantisation_widens_to_the_numbers_of_the_format() {
    let blocks = json(&golden("blocks.json"));
    let ids = [
        ("Q4_0", 2),
        ("Q4_1", 3),
        ("Q5_0", 6),
        ("Q5_1", 7),
        ("Q8_0", 8),
        ("Q4_K", 12),
        ("Q5_K", 13),
        ("Q6_K", 14),
    ];
    assert_eq!(blocks.as_object().unwrap().len(), ids.len());
    for (name, id) in ids {
        let kind = BlockType::from_id(id).unwrap();
        assert_eq!(kind.name(), name);
        let bytes: Vec<u8> = serde_json::from_value(blocks[name]["bytes"].clone()).unwrap();
        let expected: Vec<f32> = serde_json::from_value(blocks[name]["values"].clone()).unwrap();
        let mut values = Vec::new();
        kind.widen(&bytes, &mut values);
        assert_eq!(values, expected, "{name}");
    }
}

#[test]
fn a_converted_llama_scores_as_transformers_does_and_keeps_its_numbers() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let tiny = golden("tiny.gguf");
    printed(
        dir,
        &["convert", tiny.to_str().unwrap(), "--out", "model", "-q"],
    );
    let expected = json(&golden("tiny.json"));
    std::fs::write(dir.join("ids.json"), expected["ids"].to_string()).unwrap();
    printed(
        dir,
        &[
            "score", "-m", "model", "--tokens", "ids.json", "--out", "s.json", "-q",
        ],
    );
    let numbers = |value: &Value| -> Vec<f64> { serde_json::from_value(value.clone()).unwrap() };
    let got = numbers(&json(&dir.join("s.json"))["logprobs"]);
    for (got, expected) in got.iter().zip(numbers(&expected["logprobs"])) {
        assert!((got - expected).abs() < 2e-4, "{got} {expected}");
    }
    let config = json(&dir.join("model/config.json"));
    assert_eq!(config["torch_dtype"], "float16");
    assert_eq!(config["rope_theta"], 50000.0);
    assert_eq!(config["rms_norm_eps"], 1e-5);
    assert_eq!(
        json(&dir.join("model/generation_config.json"))["eos_token_id"],
        serde_json::json!([257])
    );
    let beside = json(&dir.join("model/tokenizer_config.json"));
    assert!(
        beside["chat_template"]
            .as_str()
            .unwrap()
            .contains("<|user|>")
    );
    // As f32 the numbers are the same, so the scores are.
    printed(
        dir,
        &[
            "convert",
            tiny.to_str().unwrap(),
            "--out",
            "wide",
            "--dtype",
            "f32",
            "-q",
        ],
    );
    printed(
        dir,
        &[
            "score", "-m", "wide", "--tokens", "ids.json", "--out", "w.json", "-q",
        ],
    );
    assert_eq!(json(&dir.join("w.json")), json(&dir.join("s.json")));
    // A folder of a folder, narrowed again: the same numbers, and what lay beside them.
    std::fs::write(dir.join("wide/LICENSE"), "free").unwrap();
    printed(
        dir,
        &["convert", "wide", "--out", "again", "--dtype", "f16", "-q"],
    );
    printed(
        dir,
        &[
            "score", "-m", "again", "--tokens", "ids.json", "--out", "a.json", "-q",
        ],
    );
    assert_eq!(json(&dir.join("a.json")), json(&dir.join("s.json")));
    let same = |name: &str| {
        std::fs::read(dir.join("again").join(name)).unwrap()
            == std::fs::read(dir.join("wide").join(name)).unwrap()
    };
    assert!(
        [
            "LICENSE",
            "tokenizer.json",
            "tokenizer_config.json",
            "generation_config.json"
        ]
        .into_iter()
        .all(same)
    );
    fails(dir, &["convert", "wide", "--out", "again"], "already");
}

#[test]
fn the_vocabulary_becomes_a_tokenizer() {
    let dir = tempfile::tempdir().unwrap();
    let gguf = Gguf::open(&golden("tiny.gguf")).unwrap();
    gguf.save(
        dir.path(),
        gguf.config(),
        gguf.config().dtype.unwrap(),
        None,
    )
    .unwrap();
    let config = ModelConfig::load(dir.path()).unwrap();
    let tokenizer = Tokenizer::open(dir.path(), &config).unwrap();
    let text = "the the<think>12 other\u{e9}";
    let ids = tokenizer.encode(text, false).unwrap();
    // Merged words, a token of the user whole, digits one by one.
    assert_eq!(ids[..5], [259, 260, 262, u32::from(b'1'), u32::from(b'2')]);
    assert_eq!(tokenizer.decode(&ids, false).unwrap(), text);
    assert_eq!(tokenizer.encode("the", true).unwrap(), [256, 259]);
}

#[test]
fn segments_are_written_beside_the_model() {
    let dir = tempfile::tempdir().unwrap();
    let tiny = golden("tiny.gguf");
    let segments = [
        "--segment-len",
        "64",
        "--prior-len",
        "16",
        "--past-len",
        "16",
        "--past-heads",
        "0.1,1.0",
        "--break-ids",
        "3,7",
        "--break-after-prompt",
    ];
    let fixed = ["convert", tiny.to_str().unwrap(), "--out", "model", "-q"];
    printed(dir.path(), &[&fixed[..], &segments].concat());
    let segment = json(&dir.path().join("model/config.json"))["segment"].clone();
    assert_eq!(segment["segment_len"], 64);
    assert_eq!(segment["break_ids"], serde_json::json!([3, 7]));
    assert_eq!(segment["break_after_prompt"], true);
    assert_eq!(segment["prompt_suffix_len"], 1);
    let reads = serde_json::json!([
        [["prior"], ["prior", "past"]],
        [["prior", "past"], ["prior"]]
    ]);
    assert_eq!(segment["head_reads"], reads);
    let wrong = [
        "--segment-len",
        "64",
        "--past-len",
        "16",
        "--past-heads",
        "2.0",
    ];
    let fixed = ["convert", tiny.to_str().unwrap(), "--out", "other", "-q"];
    fails(
        dir.path(),
        &[&fixed[..], &wrong].concat(),
        "LAYER.HEAD below 2.2",
    );
    assert!(!dir.path().join("other").exists());
}

#[test]
fn the_heads_that_read_the_past_are_measured() {
    let dir = tempfile::tempdir().unwrap();
    let tiny = golden("tiny.gguf");
    let convert = |name: &str, heads: &str| {
        let fixed = ["convert", tiny.to_str().unwrap(), "--out", name];
        let segments = [
            "--segment-len",
            "64",
            "--past-len",
            "16",
            "--past-heads",
            heads,
        ];
        printed(dir.path(), &[&fixed[..], &segments].concat());
        json(&dir.path().join(name).join("config.json"))["segment"]["head_reads"].clone()
    };
    let of = |heads: &str| convert(&heads.replace(':', "-"), heads);
    let both = serde_json::json!(["prior", "past"]);
    let count = |reads: &Value| {
        let layers = reads.as_array().unwrap().iter();
        layers
            .flat_map(|l| l.as_array().unwrap())
            .filter(|h| **h == both)
            .count()
    };
    assert_eq!(count(&of("mass:3")), 3);
    assert_eq!(count(&of("copy:2")), 2);
    // A file without gates has equal gates: the first heads.
    assert_eq!(
        of("gate:2"),
        serde_json::json!([[both, both], [["prior"], ["prior"]]])
    );
    assert_eq!(count(&of("all")), 4);
    for (heads, expected) in [
        ("mass:5", "at most 4 heads"),
        ("mass:0", "mass:N"),
        ("weight:2", "mass:N"),
        ("0.0,0.0", "each head once"),
    ] {
        let fixed = ["convert", tiny.to_str().unwrap(), "--out", "none", "-q"];
        let segments = [
            "--segment-len",
            "64",
            "--past-len",
            "16",
            "--past-heads",
            heads,
        ];
        fails(dir.path(), &[&fixed[..], &segments].concat(), expected);
        assert!(!dir.path().join("none").exists());
    }
}

#[test]
fn training_refuses_heads_by_gates_of_a_wrong_number_or_beside_others() {
    let dir = tempfile::tempdir().unwrap();
    let tiny = golden("tiny.gguf");
    let convert = ["convert", tiny.to_str().unwrap(), "--out", "model"];
    printed(
        dir.path(),
        &[&convert[..], &["--segment-len", "64", "--past-len", "16"]].concat(),
    );
    std::fs::write(dir.path().join("text"), "a line\n".repeat(100)).unwrap();
    for heads in ["gate:0", "gate:5", "gate:x", "gate:", "gate:2,0.0"] {
        let heads = format!("{:?}", heads.split(',').collect::<Vec<_>>());
        let train = [
            "train",
            "--model.folder",
            "model",
            "--data.train",
            "text",
            "--training.output",
            "run",
            "--model.segment.past-heads",
            &heads,
        ];
        fails(
            dir.path(),
            &train,
            "expected gate:N alone, with 1 to 4 heads",
        );
    }
}

#[test]
fn segments_for_long_texts_are_one_flag_which_others_change() {
    let dir = tempfile::tempdir().unwrap();
    let tiny = golden("tiny.gguf");
    let segment = |name: &str, flags: &[&str]| {
        let convert = ["convert", tiny.to_str().unwrap(), "--out", name, "-q"];
        printed(dir.path(), &[&convert[..], flags].concat());
        ModelConfig::load(&dir.path().join(name))
            .unwrap()
            .segment
            .unwrap()
    };
    let whole = segment("long", &["--long"]);
    let got = [
        whole.segment_len,
        whole.prior_len,
        whole.past_len,
        whole.sink_len,
        whole.prompt_suffix_len,
        whole.reread_suffix,
    ];
    assert_eq!(got, [1024, 1024, 2048, 4, 64, 1]);
    assert!(whole.break_after_prompt);
    assert!(
        whole
            .head_reads
            .iter()
            .flatten()
            .all(|head| head.prior && head.past)
    );
    let other = segment(
        "other",
        &["--long", "--segment-len", "512", "--past-heads", "0.0"],
    );
    assert_eq!((other.segment_len, other.prior_len), (512, 512));
    let past = other.head_reads.iter().flatten().filter(|head| head.past);
    assert_eq!(past.count(), 1);
    let convert = ["convert", tiny.to_str().unwrap(), "--out", "none"];
    let alone = [&convert[..], &["--reread-suffix", "1"]].concat();
    fails(dir.path(), &alone, "--long");
}

/// The tiny file with some bytes changed.
fn changed(change: impl FnOnce(&mut Vec<u8>)) -> Result<Gguf, ConvertError> {
    let mut bytes = std::fs::read(golden("tiny.gguf")).unwrap();
    change(&mut bytes);
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), bytes).unwrap();
    Gguf::open(file.path())
}

fn place(bytes: &[u8], text: &str) -> usize {
    bytes
        .windows(text.len())
        .position(|w| w == text.as_bytes())
        .unwrap()
}

#[test]
fn broken_and_foreign_files_are_refused_by_name() {
    let refused = |change: fn(&mut Vec<u8>), word: &str| {
        let error = changed(change).unwrap_err().to_string();
        assert!(error.contains(word), "{error} has no {word:?}");
    };
    refused(|b| b[0] = b'X', "magic");
    refused(|b| b[4] = 9, "version");
    refused(|b| b[8..16].fill(0xff), "number of tensors");
    refused(|b| b[16..24].fill(0xff), "number of keys");
    refused(|b| b.truncate(b.len() - 4096), "inside the file");
    refused(|b| b.truncate(100), "number of tensors");
    refused(|b| b.truncate(3000), "expected");
    refused(
        |b| {
            let at = place(b, "general.architecture") + 20 + 4 + 8;
            b[at..at + 5].copy_from_slice(b"gemma");
        },
        "gemma",
    );
    refused(
        |b| {
            let at = place(b, "blk.1.ffn_up.weight");
            b[at + 7] = b'x';
        },
        "blk.1.ffn_up.weight",
    );
    refused(
        |b| {
            let at = place(b, "llama.rope.freq_base");
            b[at + 6..at + 10].copy_from_slice(b"rune");
        },
        "llama.rune.freq_base",
    );
}

#[test]
fn random_damage_never_panics() {
    let bytes = std::fs::read(golden("tiny.gguf")).unwrap();
    let mut s = 1u64;
    for _ in 0..400 {
        let mut damaged = bytes.clone();
        for _ in 0..3 {
            s = s
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            let at = (s >> 33) as usize % 8000;
            damaged[at] = (s >> 20) as u8;
        }
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), damaged).unwrap();
        if let Ok(gguf) = Gguf::open(file.path()) {
            let out = tempfile::tempdir().unwrap();
            let _ = gguf.save(
                out.path(),
                gguf.config(),
                gguf.config().dtype.unwrap(),
                None,
            );
        }
    }
}
