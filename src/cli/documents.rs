//! Documents for evaluation: text files and folders of them, JSONL, and lists of token ids.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use segattn::eval::Document;
use segattn::model::segmentation::Tokens;
use segattn::model::tokenizer::Tokenizer;
use segattn::train::data::{Format, is_compressed, list_files};
use serde::Deserialize;

use super::files::{read_text, read_tokens};

/// Largest file that is read, in bytes.
const MAX_FILE: u64 = 1 << 32;

/// A line of a JSONL file; other fields are passed over.
#[derive(Deserialize)]
struct Line {
    text: String,
}

/// Reads every file that [`list_files`] finds: JSONL has one document a line in its field `text`, `.json` is an array
/// of token ids or an object with `tokens` and `breaks`, everything else is one document of text.
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
    let format = Format::of(path);
    ensure!(
        !is_compressed(path),
        "{}: expected a file that is not compressed, got a .zst file",
        path.display()
    );
    match format {
        Format::Ids => {
            let Tokens { ids, breaks } = read_tokens(path, vocab)?;
            documents.push(Document {
                tokens: ids,
                breaks,
                bytes: None,
            });
            return Ok(());
        }
        Format::Binary | Format::Table => bail!(
            "{}: expected text, JSONL or a list of token ids (.json), got a .bin or .parquet file",
            path.display()
        ),
        Format::Lines | Format::Text => {}
    }
    let Some(text) = text else {
        bail!(
            "{}: the model has no tokenizer; give lists of token ids (.json)",
            path.display()
        );
    };
    let content = read_text(path, MAX_FILE)?;
    let mut push = |content: &str| -> Result<()> {
        documents.push(Document {
            tokens: text.encode(content, true)?,
            breaks: Vec::new(),
            bytes: Some(content.len() as u64),
        });
        Ok(())
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
