//! Documents for evaluation: text files and folders of them, JSONL, and lists of token ids.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use segattn::eval::Document;
use segattn::model::tokenizer::Tokenizer;
use serde::Deserialize;

use super::files::read_tokens;

/// Largest file that is read, in bytes.
const MAX_FILE: u64 = 1 << 32;
/// Deepest folder that is looked into.
const MAX_DEPTH: usize = 32;

/// A line of a JSONL file; other fields are passed over.
#[derive(Deserialize)]
struct Line {
    text: String,
}

/// Reads every file, folders in order of their names: `.jsonl` has one document a line in its field
/// `text`, `.json` is an array of token ids, everything else is one document of text.
pub fn read_documents(
    paths: &[PathBuf],
    text: Option<&Tokenizer>,
    vocab: usize,
) -> Result<Vec<Document>> {
    let mut files = Vec::new();
    for path in paths {
        collect(path, 0, &mut files)?;
    }
    ensure!(!files.is_empty(), "--data: no files there");
    let mut documents = Vec::new();
    for file in &files {
        read_file(file, text, vocab, &mut documents)?;
    }
    Ok(documents)
}

fn collect(path: &Path, depth: usize, files: &mut Vec<PathBuf>) -> Result<()> {
    let found = fs::metadata(path).with_context(|| format!("cannot read {}", path.display()))?;
    if !found.is_dir() {
        files.push(path.to_owned());
        return Ok(());
    }
    ensure!(
        depth < MAX_DEPTH,
        "{}: folders deeper than {MAX_DEPTH}",
        path.display()
    );
    let mut entries = fs::read_dir(path)
        .and_then(|entries| {
            entries
                .map(|e| Ok(e?.path()))
                .collect::<std::io::Result<Vec<_>>>()
        })
        .with_context(|| format!("cannot read {}", path.display()))?;
    entries.sort();
    for entry in &entries {
        // A link to a folder may lead back here.
        if !(entry.is_symlink() && entry.is_dir()) {
            collect(entry, depth + 1, files)?;
        }
    }
    Ok(())
}

fn read_file(
    path: &Path,
    text: Option<&Tokenizer>,
    vocab: usize,
    documents: &mut Vec<Document>,
) -> Result<()> {
    let extension = path.extension().and_then(|e| e.to_str());
    if extension == Some("json") {
        documents.push(Document {
            tokens: read_tokens(path, vocab)?,
            bytes: None,
        });
        return Ok(());
    }
    let Some(text) = text else {
        bail!(
            "{}: the model has no tokenizer; give lists of token ids (.json)",
            path.display()
        );
    };
    let content = read_text(path)?;
    let mut push = |content: &str| -> Result<()> {
        documents.push(Document {
            tokens: text.encode(content, true)?,
            bytes: Some(content.len() as u64),
        });
        Ok(())
    };
    if extension != Some("jsonl") {
        return push(&content);
    }
    for (i, line) in content.lines().enumerate() {
        if line.trim().is_empty() {
            continue;
        }
        let line: Line = serde_json::from_str(line).with_context(|| {
            let at = i + 1;
            format!(
                "{}, line {at}: expected an object with `text`",
                path.display()
            )
        })?;
        push(&line.text)?;
    }
    Ok(())
}

fn read_text(path: &Path) -> Result<String> {
    let file = fs::File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    let mut content = String::new();
    file.take(MAX_FILE + 1)
        .read_to_string(&mut content)
        .with_context(|| format!("cannot read {} as UTF-8 text", path.display()))?;
    ensure!(
        content.len() as u64 <= MAX_FILE,
        "{}: expected at most {MAX_FILE} bytes",
        path.display()
    );
    Ok(content)
}
