//! Training data in Parquet files, as pyarrow writes them (`tests/golden/parquet/make.py`), and in compressed files.

use std::path::{Path, PathBuf};

use crate::reading::{documents, ids, read_with, reading};
use segattn::train::config::DataSection;
use segattn::train::data::{
    Bytes, Conversed, Corpus, Encode, Format, Located, Reading, compressed_text, is_compressed,
    table_texts,
};

fn golden(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    folder.join("tests/golden/parquet").join(name)
}

/// Takes the JSON of a conversation for its text; the assistant writes its last byte.
struct Json;

impl Encode for Json {
    fn encode(&self, text: &str) -> Result<Vec<u32>, String> {
        Bytes.encode(text)
    }

    fn locate(&self, text: &str) -> Result<Vec<Located>, String> {
        Bytes.locate(text)
    }

    fn converse(&self, conversation: &str) -> Result<Vec<Conversed>, String> {
        let ids = Bytes.encode(conversation)?;
        let last = ids.len() - 1..ids.len();
        Ok(vec![Conversed {
            ids,
            answers: vec![last],
        }])
    }

    fn ends_line(&self, id: u32) -> bool {
        Bytes.ends_line(id)
    }
}

#[test]
fn rows_of_texts_are_documents() {
    let section = DataSection::default();
    let corpus = read_with(&[golden("text.parquet")], &section).unwrap();
    let expected = ["one", "zwei ü\n", "", "four"].map(ids);
    assert_eq!(documents(&corpus), expected);
    let other = DataSection {
        jsonl_field: "label".into(),
        ..section
    };
    let failed = read_with(&[golden("text.parquet")], &other)
        .unwrap_err()
        .to_string();
    assert!(failed.contains("something else in `label`"), "{failed}");
    let other = DataSection {
        jsonl_field: "content".into(),
        ..DataSection::default()
    };
    let failed = read_with(&[golden("text.parquet")], &other)
        .unwrap_err()
        .to_string();
    assert!(
        failed.contains("a column content or tokens or messages, got text, label"),
        "{failed}"
    );
}

#[test]
fn rows_of_messages_are_conversations() {
    let (section, scratch) = (DataSection::default(), tempfile::tempdir().unwrap());
    let reading = Reading {
        encode: &Json,
        ..reading(&section, scratch.path())
    };
    let corpus = Corpus::read(&[&[golden("messages.parquet")]], &reading).unwrap();
    assert_eq!(corpus.documents().len(), 5);
    for (i, document) in corpus.documents().iter().enumerate() {
        let example = corpus.example(document, 0..document.len).unwrap();
        let json: Vec<u8> = example.tokens.iter().map(|id| *id as u8).collect();
        let row: serde_json::Value = serde_json::from_slice(&json).unwrap();
        let expected = serde_json::json!({"messages": [
            {"role": "user", "content": format!("What is {i}?"), "name": null},
            {"role": "assistant", "content": format!("{i} is Größe {i}."), "name": null},
        ]});
        assert_eq!(row, expected);
        assert_eq!(example.weights.unwrap().iter().sum::<f32>(), 1.0);
    }
}

#[test]
fn compressed_files_are_read_as_what_is_in_them() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &[u8]| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    let packed = |text: &str| zstd::encode_all(text.as_bytes(), 3).unwrap();
    let section = DataSection::default();
    let read = |path: PathBuf| read_with(&[path], &section);
    let text = "Some text, again and again. ".repeat(30_000);
    let path = write("a.txt.zst", &packed(&text));
    assert!(is_compressed(&path) && Format::of(&path) == Format::Text);
    assert_eq!(documents(&read(path).unwrap()), [ids(&text)]);
    // Two frames one after the other, the second of them cut inside a line.
    let lines = ["{\"text\": \"one\"}\n{\"te", "xt\": \"two\"}\n"]
        .map(packed)
        .concat();
    let path = write("b.JSONL.ZST", &lines);
    assert_eq!(documents(&read(path).unwrap()), [ids("one"), ids("two")]);
    let path = write("c.json.zst", &packed("[[1, 2], [3]]"));
    assert_eq!(documents(&read(path).unwrap()), [vec![1, 2], vec![3]]);
    // Folders are searched for what is in compressed files.
    let found = read_with(&[folder.path().to_owned()], &section).unwrap();
    assert_eq!(found.documents().len(), 3);
    let refused = |path: PathBuf, expected: &str| {
        let failed = read(path).unwrap_err().to_string();
        assert!(failed.contains(expected), "{failed}");
    };
    refused(
        write("d.bin.zst", &packed("xx")),
        "text, JSONL or JSON in a .zst file",
    );
    refused(write("e.txt.zst", b"not compressed"), "e.txt.zst");
    refused(write("f.txt.zst", &packed(&text)[..40]), "f.txt.zst");
    refused(write("g.parquet", b"PAR1 nothing PAR1"), "a Parquet file");
    // A changed `text.parquet`, which makes the library panic.
    refused(golden("damaged.parquet"), "a Parquet file");
}

#[test]
fn texts_are_read_without_being_encoded() {
    let texts = table_texts(&golden("text.parquet")).unwrap();
    assert_eq!(texts, ["one", "zwei ü\n", "", "four"]);
    let refused = table_texts(&golden("messages.parquet")).unwrap_err();
    assert!(refused.to_string().contains("a column text"), "{refused}");
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.txt.zst");
    std::fs::write(&path, zstd::encode_all("four".as_bytes(), 3).unwrap()).unwrap();
    assert_eq!(compressed_text(&path, 4).unwrap(), "four");
    let refused = compressed_text(&path, 3).unwrap_err().to_string();
    assert!(refused.contains("at most 3 bytes"), "{refused}");
}
