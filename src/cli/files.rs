//! Files that commands exchange: token lists in, results out.

use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use segattn::model::files::OutputFile;

/// Largest token list that is read, in bytes of JSON.
const MAX_TOKENS_FILE: u64 = 1 << 30;

/// Reads a JSON array of token ids, each below `vocab`.
pub fn read_tokens(path: &Path, vocab: usize) -> Result<Vec<u32>> {
    let file =
        std::fs::File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    let mut text = String::new();
    file.take(MAX_TOKENS_FILE + 1)
        .read_to_string(&mut text)
        .with_context(|| format!("cannot read {}", path.display()))?;
    ensure!(
        text.len() as u64 <= MAX_TOKENS_FILE,
        "{}: expected at most {MAX_TOKENS_FILE} bytes",
        path.display()
    );
    // A byte order mark is passed over.
    let json = text.strip_prefix('\u{feff}').unwrap_or(&text);
    let tokens: Vec<u32> = serde_json::from_str(json)
        .with_context(|| format!("{}: expected a JSON array of token ids", path.display()))?;
    for (i, token) in tokens.iter().enumerate() {
        ensure!(
            (*token as usize) < vocab,
            "{}: token {i} is {token}, expected below vocab_size = {vocab}",
            path.display()
        );
    }
    Ok(tokens)
}

/// Where results go, found to be writable before the work that makes them.
pub struct Results(OutputFile);

impl Results {
    /// The place of that name, unless nothing can be written there.
    pub fn at(path: &Path) -> Result<Self> {
        let file = OutputFile::open(path);
        Ok(Self(file.with_context(|| {
            format!("cannot write {}", path.display())
        })?))
    }

    /// The place, where one is asked for.
    pub fn maybe(path: Option<&Path>) -> Result<Option<Self>> {
        path.map(Self::at).transpose()
    }

    /// Writes the results: whole or not at all where that place is a file.
    pub fn write(&self, contents: &[u8]) -> Result<()> {
        let written = self.0.write_all(contents);
        written.with_context(|| format!("cannot write {}", self.0.path().display()))
    }
}

/// Writes a file beside its place and renames it, so that a reader never sees half of it.
pub fn write_atomically(path: &Path, contents: &[u8]) -> Result<()> {
    Results::at(path)?.write(contents)
}
