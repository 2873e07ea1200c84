//! Text to tokens and back, through a small byte-level BPE of 272 ids and through plain bytes.

#![cfg(feature = "tokenizer")]

use std::path::{Path, PathBuf};

use proptest::prelude::*;
use segattn::generate::text::TextStream;
use segattn::model::config::ModelConfig;
use segattn::model::error::{FileError, TokenizerError};
use segattn::model::tokenizer::{Tokenizer, end_ids};

const IDS: usize = 272;

fn data() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/model_files/data")
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
fn a_tokenizer_with_more_ids_than_the_model_is_refused() {
    match Tokenizer::open(&data(), &config(IDS - 1)) {
        Err(TokenizerError::Vocabulary {
            largest,
            vocab_size,
        }) => {
            assert_eq!((largest as usize, vocab_size), (IDS - 1, IDS - 1));
        }
        other => panic!("{other:?}"),
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
    ] {
        std::fs::write(&path, text).unwrap();
        assert_eq!(end_ids(folder.path(), &config).unwrap(), ids, "{text}");
    }
    let many = format!("{{\"eos_token_id\": {:?}}}", vec![1; 65]);
    for text in [
        r#"{"eos_token_id": 100}"#,
        r#"{"eos_token_id": [-1]}"#,
        r#"{"eos_token_id": "a"}"#,
        &many,
    ] {
        std::fs::write(&path, text).unwrap();
        let error = end_ids(folder.path(), &config);
        assert!(
            matches!(error, Err(TokenizerError::EndIds { .. })),
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
