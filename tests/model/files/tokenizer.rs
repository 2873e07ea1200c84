//! Text to tokens and back, through a small byte-level BPE of 272 ids and through plain bytes.

#![cfg(feature = "tokenizer")]

use std::path::{Path, PathBuf};

use proptest::prelude::*;
use segattn::generate::text::TextStream;
use segattn::model::config::ModelConfig;
use segattn::model::error::{FileError, TokenizerError};
use segattn::model::tokenizer::framing::Framing;
use segattn::model::tokenizer::{GenerationSettings, Tokenizer, end_ids};
use serde_json::{Value, json};

const IDS: usize = 272;

fn data() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/model/files/data")
}

fn config(vocab_size: usize) -> ModelConfig {
    ModelConfig::new(vocab_size, 8, 8, 1, 1, 1).unwrap()
}

fn open() -> Tokenizer {
    Tokenizer::open(&data(), &config(IDS)).unwrap()
}

/// The text released token by token.
fn streamed(tokenizer: &Tokenizer, tokens: &[u32]) -> String {
    let decode = |tokens: &[u32]| tokenizer.decode(tokens, true);
    let mut stream = TextStream::new(Vec::new()).unwrap();
    let mut text = String::new();
    for token in tokens {
        text.push_str(&stream.push(*token, decode).unwrap().text);
    }
    text.push_str(&stream.finish(decode).unwrap());
    text
}

#[test]
fn a_tokenizer_file_merges_and_adds_its_special_tokens_where_asked() {
    let tokenizer = open();
    assert_eq!(tokenizer.vocab_size(), IDS);
    assert!(!tokenizer.is_bytes());
    let plain = tokenizer.encode("segment the", false).unwrap();
    // The ids of "segment" and of " the", by the file's list of merges.
    assert_eq!(plain, [268, 262]);
    assert_eq!(
        tokenizer.encode("segment the", true).unwrap(),
        [0, 268, 262]
    );
    assert_eq!(
        tokenizer.decode(&[0, 268, 262, 1], true).unwrap(),
        "segment the"
    );
    assert_eq!(
        tokenizer.decode(&[0, 268, 1], false).unwrap(),
        "<begin>segment<end>"
    );
}

#[test]
fn a_long_text_stays_whole_although_the_file_truncates() {
    let text = "the segment ".repeat(50);
    let tokenizer = open();
    let tokens = tokenizer.encode(&text, false).unwrap();
    assert!(tokens.len() > 100);
    assert_eq!(tokenizer.decode(&tokens, true).unwrap(), text);
}

#[test]
fn ids_of_a_padded_vocabulary_have_no_text() {
    let tokenizer = Tokenizer::open(&data(), &config(1024)).unwrap();
    assert_eq!(
        tokenizer.decode(&[268, 1000, 262], true).unwrap(),
        "segment the"
    );
}

#[test]
fn of_a_tokenizer_with_more_ids_than_the_model_only_texts_that_hold_such_an_id_are_refused() {
    let tokenizer = Tokenizer::open(&data(), &config(268)).unwrap();
    assert_eq!(tokenizer.encode(" the", false).unwrap(), [262]);
    match tokenizer.encode("segment the", false) {
        Err(TokenizerError::Vocabulary {
            largest: 268,
            vocab_size: 268,
        }) => {}
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_tokenizer_of_another_kind_is_named_and_not_read_as_bytes() {
    for file in [
        "tokenizer.model",
        "vocab.json",
        "tokenizer_config.json",
        "merges.txt",
        "spiece.model",
        "x.tiktoken",
    ] {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(file), "{}").unwrap();
        match Tokenizer::open(folder.path(), &config(IDS)) {
            Err(error @ TokenizerError::OtherKind { .. }) => {
                let message = error.to_string();
                assert!(
                    message.contains(file) && message.contains("tokenizer.json"),
                    "{message}"
                );
            }
            other => panic!("{file}: {other:?}"),
        }
    }
}

/// A folder with the tokenizer, its template replaced, and these files beside it.
fn folder(template: Value, files: &[(&str, Value)]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let bytes = std::fs::read(data().join("tokenizer.json")).unwrap();
    let mut file: Value = serde_json::from_slice(&bytes).unwrap();
    file["post_processor"] = template;
    std::fs::write(folder.path().join("tokenizer.json"), file.to_string()).unwrap();
    for (name, content) in files {
        std::fs::write(folder.path().join(name), content.to_string()).unwrap();
    }
    folder
}

#[test]
fn the_template_then_tokenizer_config_says_what_stands_around_a_text() {
    let special = |name: &str| json!({"SpecialToken": {"id": name, "type_id": 0}});
    let text = json!({"Sequence": {"id": "A", "type_id": 0}});
    let template = |single: Vec<Value>| {
        json!({
            "type": "TemplateProcessing", "single": single, "pair": [text],
            "special_tokens": {
                "<begin>": {"id": "<begin>", "ids": [0], "tokens": ["<begin>"]},
                "<end>": {"id": "<end>", "ids": [1], "tokens": ["<end>"]},
            },
        })
    };
    let asked = json!({"bos_token": "<begin>", "eos_token": {"content": "<end>"}, "add_bos_token": true,
        "add_eos_token": true});
    let unasked = json!({"bos_token": "<begin>", "add_bos_token": false});
    let map = json!({"bos_token": "<begin>", "eos_token": "<end>"});
    let both = template(vec![
        special("<begin>"),
        special("<begin>"),
        text.clone(),
        special("<end>"),
    ]);
    type Files<'a> = &'a [(&'a str, Value)];
    type Case<'a> = (Value, Files<'a>, [&'a [u32]; 2], Option<u32>);
    let cases: [Case<'_>; 6] = [
        (both.clone(), &[], [&[0, 0], &[1]], Some(1)),
        // The template goes before the other files.
        (
            both,
            &[("tokenizer_config.json", unasked.clone())],
            [&[0, 0], &[1]],
            Some(1),
        ),
        (Value::Null, &[], [&[], &[]], None),
        (
            Value::Null,
            &[("tokenizer_config.json", asked)],
            [&[0], &[1]],
            Some(1),
        ),
        (
            Value::Null,
            &[("tokenizer_config.json", unasked)],
            [&[], &[]],
            None,
        ),
        (
            Value::Null,
            &[
                ("tokenizer_config.json", json!({"add_bos_token": true})),
                ("special_tokens_map.json", map),
            ],
            [&[0], &[]],
            Some(1),
        ),
    ];
    for (template, files, [before, after], eos) in cases {
        let folder = folder(template, files);
        // A BOS of the model's own configuration adds nothing beside a tokenizer.
        let mut config = config(IDS);
        config.bos_token_id = vec![5];
        let tokenizer = Tokenizer::open(folder.path(), &config).unwrap();
        let framed = tokenizer.encode("segment", true).unwrap();
        assert_eq!(framed, [before, &[268], after].concat(), "{files:?}");
        assert_eq!(tokenizer.framing().eos, eos, "{files:?}");
    }
    let twice = folder(template(vec![text.clone(), text.clone()]), &[]);
    let error = Tokenizer::open(twice.path(), &config(IDS));
    assert!(
        matches!(error, Err(TokenizerError::Malformed { .. })),
        "{error:?}"
    );
}

#[test]
fn training_frames_a_document_like_a_text_and_ends_it_where_generation_ends() {
    let framing = Framing {
        before: vec![7],
        after: vec![8],
        bos: Some(7),
        eos: Some(8),
    };
    let document = |begin, end, ends: &[u32]| framing.document(begin, end, ends);
    assert_eq!(document(true, true, &[8, 9]), (vec![7], vec![8]));
    assert_eq!(document(true, true, &[9, 3]), (vec![7], vec![8, 9]));
    assert_eq!(document(true, true, &[]), (vec![7], vec![8]));
    assert_eq!(document(false, false, &[9]), (vec![], vec![]));
    let none = Framing {
        eos: Some(8),
        ..Framing::default()
    };
    assert_eq!(none.document(true, true, &[]), (vec![], vec![8]));
}

#[test]
fn files_that_ask_for_absurd_sizes_are_refused() {
    let bytes = std::fs::read(data().join("tokenizer.json")).unwrap();
    let base: Value = serde_json::from_slice(&bytes).unwrap();
    let replace = json!({"type": "Replace", "pattern": {"String": "a"}, "content": "aaaaaaaaaa"});
    let sequence = json!({"Sequence": {"id": "A", "type_id": 0}});
    let parts = vec![sequence.clone(); 100_000];
    for (key, part) in [
        (
            "normalizer",
            json!({"type": "Precompiled", "precompiled_charsmap": "/////w=="}),
        ),
        (
            "normalizer",
            json!({"type": "Sequence", "normalizers": vec![&replace; 12]}),
        ),
        (
            "normalizer",
            json!({"type": "Prepend", "prepend": "a".repeat(1 << 20)}),
        ),
        (
            "decoder",
            json!({"type": "Sequence", "decoders": vec![replace; 12]}),
        ),
        (
            "pre_tokenizer",
            json!({"type": "Metaspace", "replacement": "a".repeat(1 << 20)}),
        ),
        (
            "post_processor",
            json!({"type": "TemplateProcessing", "single": parts, "pair": [sequence], "special_tokens": {}}),
        ),
    ] {
        let mut file = base.clone();
        file[key] = part;
        let read = Tokenizer::parse(file.to_string().as_bytes(), Path::new("tokenizer.json"));
        assert!(
            matches!(read, Err(TokenizerError::Malformed { .. })),
            "{key}"
        );
    }
}

#[test]
fn settings_of_generation_are_read_and_those_that_are_not_applied_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("generation_config.json");
    let write = |value: Value| std::fs::write(&path, value.to_string()).unwrap();
    assert_eq!(
        GenerationSettings::load(folder.path()).unwrap(),
        GenerationSettings::default()
    );
    write(
        json!({"do_sample": true, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.1,
        "max_new_tokens": 12, "num_beams": 4, "no_repeat_ngram_size": 0, "pad_token_id": 0, "penalty_alpha": null}),
    );
    let settings = GenerationSettings::load(folder.path()).unwrap();
    let wanted = GenerationSettings {
        do_sample: Some(true),
        temperature: Some(0.6),
        top_k: Some(20),
        top_p: Some(0.9),
        min_p: None,
        repetition_penalty: Some(1.1),
        max_new_tokens: Some(12),
        ignored: vec!["num_beams".into()],
    };
    assert_eq!(settings, wanted);
    for bad in [
        json!({"temperature": "hot"}),
        json!({"top_p": 0}),
        json!({"top_k": -1}),
        json!([1]),
    ] {
        write(bad.clone());
        let error = GenerationSettings::load(folder.path());
        assert!(
            matches!(error, Err(TokenizerError::Generation { .. })),
            "{bad}: {error:?}"
        );
    }
}

#[test]
fn without_a_file_every_byte_is_a_token() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = config(258);
    let tokenizer = Tokenizer::open(folder.path(), &config).unwrap();
    assert!(tokenizer.is_bytes());
    assert_eq!(tokenizer.encode("é", true).unwrap(), [0xc3, 0xa9]);
    config.bos_token_id = vec![256];
    config.eos_token_id = vec![10];
    let tokenizer = Tokenizer::open(folder.path(), &config).unwrap();
    assert_eq!(tokenizer.vocab_size(), 257);
    assert_eq!(tokenizer.encode("a", true).unwrap(), [256, 97]);
    assert_eq!(tokenizer.encode("a", false).unwrap(), [97]);
    assert_eq!(tokenizer.decode(&[256, 97, 10, 257], true).unwrap(), "a");
    assert_eq!(tokenizer.decode(&[256, 97, 10, 257], false).unwrap(), "a\n");
    let few = Tokenizer::open(folder.path(), &self::config(255));
    assert!(
        matches!(
            few,
            Err(TokenizerError::TooFewIds {
                vocab_size: 255,
                ..
            })
        ),
        "{few:?}"
    );
}

#[test]
fn ids_that_end_a_text_come_from_the_generation_file_first() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = config(100);
    config.eos_token_id = vec![3];
    assert_eq!(end_ids(folder.path(), &config).unwrap(), [3]);
    let path = folder.path().join("generation_config.json");
    for (text, ids) in [
        (r#"{"eos_token_id": 7}"#, vec![7]),
        (r#"{"eos_token_id": [7, 9]}"#, vec![7, 9]),
        (r#"{"eos_token_id": null}"#, vec![3]),
        (r#"{"bos_token_id": 1}"#, vec![3]),
        (r#"{"eos_token_id": [7, -1]}"#, vec![7]),
        (r#"{"eos_token_id": -1}"#, vec![]),
    ] {
        std::fs::write(&path, text).unwrap();
        assert_eq!(end_ids(folder.path(), &config).unwrap(), ids, "{text}");
    }
    let many = format!("{{\"eos_token_id\": {:?}}}", vec![1; 65]);
    for text in [
        r#"{"eos_token_id": [1.5]}"#,
        r#"{"eos_token_id": "a"}"#,
        &many,
    ] {
        std::fs::write(&path, text).unwrap();
        let error = end_ids(folder.path(), &config);
        assert!(
            matches!(error, Err(TokenizerError::Generation { .. })),
            "{text}: {error:?}"
        );
    }
    std::fs::write(&path, "{").unwrap();
    let error = end_ids(folder.path(), &config);
    assert!(
        matches!(error, Err(TokenizerError::File(FileError::Json { .. }))),
        "{error:?}"
    );
}

#[test]
fn unreadable_tokenizer_files_are_typed_errors() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokenizer.json");
    let deep = "[".repeat(1 << 20);
    for bytes in [b"".as_slice(), b"{}", b"\xff\xfe", b"[1]", deep.as_bytes()] {
        std::fs::write(&path, bytes).unwrap();
        let error = Tokenizer::open(folder.path(), &config(300));
        assert!(
            matches!(error, Err(TokenizerError::Malformed { .. })),
            "{error:?}"
        );
    }
    std::fs::File::create(&path)
        .unwrap()
        .set_len(1 << 40)
        .unwrap();
    let error = Tokenizer::open(folder.path(), &config(300));
    let too_large = matches!(error, Err(TokenizerError::File(FileError::TooLarge { .. })));
    assert!(too_large, "{error:?}");
}

/// A Unigram tokenizer over a few letters, with or without a split at spaces.
fn unigram(split: bool) -> Tokenizer {
    let mut vocab = vec![json!(["<unk>", 0.0]), json!(["\u{2581}", -1.0])];
    vocab.extend(
        ["a", "b", "aa", "ab", "ba", "aab", "\u{2581}a"].map(|piece| {
            let score = -1.1 * piece.chars().count() as f64;
            json!([piece, score])
        }),
    );
    let file = json!({
        "version": "1.0",
        "normalizer": {"type": "NFKC"},
        "pre_tokenizer":
            {"type": "Metaspace", "replacement": "\u{2581}", "prepend_scheme": "always", "split": split},
        "model": {"type": "Unigram", "unk_id": 0, "vocab": vocab, "byte_fallback": false},
    });
    Tokenizer::parse(file.to_string().as_bytes(), Path::new("tokenizer.json")).unwrap()
}

#[test]
fn located_tokens_are_those_of_the_text_and_say_where_words_begin() {
    let text = "aab \u{ff41}\u{ff42}a ba";
    for split in [true, false] {
        let tokenizer = unigram(split);
        assert!(tokenizer.needs_whole_words());
        let located = tokenizer.locate(text).unwrap();
        let ids: Vec<u32> = located.iter().map(|t| t.0).collect();
        assert_eq!(ids, tokenizer.encode(text, false).unwrap());
        let words: Vec<usize> = located.iter().filter(|t| t.2).map(|t| t.1).collect();
        let begins: &[usize] = if split { &[0, 3, 11] } else { &[0] };
        assert_eq!(words, begins, "{located:?}");
    }
    assert!(!open().needs_whole_words());
}

#[test]
fn a_configuration_can_say_that_tokens_are_bytes_beside_any_tokenizer_file() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["tokenizer.model", "tokenizer.json", "vocab.json"] {
        std::fs::write(folder.path().join(name), "what is no tokenizer").unwrap();
    }
    let mut config = config(300);
    config.save(folder.path()).unwrap();
    Tokenizer::open(folder.path(), &config).unwrap_err();
    config.source.insert("byte_tokens".into(), json!(true));
    config.save(folder.path()).unwrap();
    let read = ModelConfig::load(folder.path()).unwrap();
    let tokenizer = Tokenizer::open(folder.path(), &read).unwrap();
    assert!(tokenizer.is_bytes());
    assert_eq!(tokenizer.encode("ab", false).unwrap(), [97, 98]);
    config.source.insert("byte_tokens".into(), json!("yes"));
    let error = ModelConfig::from_json(config.to_json()).unwrap_err();
    assert!(error.to_string().contains("byte_tokens"), "{error}");
}

proptest! {
    #[test]
    fn any_text_survives_encoding_and_arrives_whole_token_by_token(
        // A stream cannot tell a U+FFFD that was written from one that stands for half a character.
        text in "[^\u{fffd}\\p{C}]{0,40}|[é🎉 the]{0,30}",
    ) {
        let folder = tempfile::tempdir().unwrap();
        for tokenizer in [open(), Tokenizer::open(folder.path(), &config(256)).unwrap()] {
            let tokens = tokenizer.encode(&text, false).unwrap();
            prop_assert_eq!(&tokenizer.decode(&tokens, true).unwrap(), &text);
            prop_assert_eq!(&streamed(&tokenizer, &tokens), &text);
        }
    }

    #[test]
    fn mutated_tokenizer_files_work_or_fail_without_panic(
        edits in prop::collection::vec((0usize..8000, any::<u8>()), 1..5),
        text in "[a-zé <>]{0,20}",
    ) {
        let mut bytes = std::fs::read(data().join("tokenizer.json")).unwrap();
        for (at, byte) in edits {
            let at = at % bytes.len();
            match byte % 3 {
                0 => bytes[at] = byte,
                1 => drop(bytes.drain(at..(at + 5).min(bytes.len()))),
                _ => bytes[at] ^= 1 << (byte % 8),
            }
        }
        if let Ok(tokenizer) = Tokenizer::parse(&bytes, Path::new("tokenizer.json"))
            && let Ok(tokens) = tokenizer.encode(&text, true)
        {
            let decoded = tokenizer.decode(&tokens, true);
            prop_assert!(tokens.iter().all(|t| (*t as usize) < tokenizer.vocab_size()) || decoded.is_ok());
        }
    }
}
