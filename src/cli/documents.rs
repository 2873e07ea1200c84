//! Documents for evaluation: text files and folders of them, JSONL, and lists of token ids.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use segattn::eval::Document;
use segattn::model::tokenizer::Tokenizer;
use segattn::train::data::{Format, compressed_text, is_compressed, list_files, table_texts};
use serde::Deserialize;

use super::files::{read_text, read_tokens};

/// Largest file that is read, in bytes.
const MAX_FILE: u64 = 1 << 32;

/// A line of a JSONL file; other fields are passed over.
#[derive(Deserialize)]
struct Line {
    text: String,
}

/// Reads every file that [`list_files`] finds: JSONL has one document a line in its field `text`, Parquet one a row in
/// its column `text`, `.json` is an array of token ids or an object with `tokens` and `breaks`, everything else is one
/// document of text. JSONL and text may be compressed (`.zst`).
pub fn read_documents(
    paths: &[PathBuf],
    text: Option<&Tokenizer>,
    vocab: usize,
) -> Result<Vec<Document>> {
    let files = list_files(paths, None).context("--data")?;
    let mut documents = Vec::new();
    for file in &files {
        read_file(file, text, vocab, &mut documents)?;
    }
    Ok(documents)
}

fn read_file(
    path: &Path,
    text: Option<&Tokenizer>,
    vocab: usize,
    documents: &mut Vec<Document>,
) -> Result<()> {
    let (format, compressed) = (Format::of(path), is_compressed(path));
    ensure!(
        !compressed || matches!(format, Format::Lines | Format::Text),
        "{}: expected a file that is not compressed, or JSONL or text, got {format:?}",
        path.display()
    );
    match format {
        Format::Ids => {
            let read = read_tokens(path, vocab)?;
            documents.push(Document {
                tokens: read.ids,
                breaks: read.breaks,
                rereads: read.rereads,
                bytes: None,
            });
            return Ok(());
        }
        Format::Binary => bail!(
            "{}: expected text, JSONL, Parquet or a list of token ids (.json), got a .bin file",
            path.display()
        ),
        Format::Lines | Format::Text | Format::Table => {}
    }
    let Some(text) = text else {
        bail!(
            "{}: the model has no tokenizer; give lists of token ids (.json)",
            path.display()
        );
    };
    let mut push = |content: &str| -> Result<()> {
        documents.push(Document {
            tokens: text.encode(content, true)?,
            breaks: Vec::new(),
            rereads: Vec::new(),
            bytes: Some(content.len() as u64),
        });
        Ok(())
    };
    if format == Format::Table {
        return table_texts(path)?.iter().try_for_each(|text| push(text));
    }
    let content = match compressed {
        true => compressed_text(path, MAX_FILE)?,
        false => read_text(path, MAX_FILE)?,
    };
    if format == Format::Text {
        return push(&content);
    }
    for (i, line) in content.lines().enumerate() {
        if line.trim().is_empty() {
            continue;
        }
        let line: Line = serde_json::from_str(line).with_context(|| {
            let at = i + 1;
            format!(
                "{}, line {at}: expected an object with a string `text`",
                path.display()
            )
        })?;
        push(&line.text)?;
    }
    Ok(())
}
