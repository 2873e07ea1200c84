//! Files that commands exchange: token lists in, results out.

use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result, anyhow, ensure};
use segattn::eval::Document;
use segattn::model::files::OutputFile;
use segattn::model::segmentation::Tokens;
use segattn::train::data::parse_ids;

/// Largest token list that is read, in bytes of JSON.
const MAX_TOKENS_FILE: u64 = 1 << 30;

/// Breaks and rereads given as flags.
#[derive(Debug, clap::Args)]
pub struct BreakArgs {
    /// Ends segments early, each after so many tokens; besides the breaks that the tokens have
    #[arg(long, value_name = "P,...", value_delimiter = ',')]
    breaks: Vec<usize>,
    /// Reads a segment's tokens once more after so many tokens, with what they have retrieved; besides the rereads that
    /// the tokens have
    #[arg(long, value_name = "P,...", value_delimiter = ',')]
    rereads: Vec<usize>,
}

impl BreakArgs {
    /// The tokens with these breaks and rereads too.
    pub fn over(&self, mut tokens: Tokens) -> Result<Tokens> {
        let count = tokens.ids.len();
        self.add([&mut tokens.breaks, &mut tokens.rereads], count)?;
        Ok(tokens)
    }

    /// The only document with these breaks and rereads too.
    pub fn over_only(&self, documents: &mut [Document]) -> Result<()> {
        let flag = match (self.breaks.is_empty(), self.rereads.is_empty()) {
            (true, true) => return Ok(()),
            (false, _) => "--breaks",
            (true, false) => "--rereads",
        };
        match documents {
            [document] => {
                let count = document.tokens.len();
                self.add([&mut document.breaks, &mut document.rereads], count)
            }
            _ => Err(anyhow!(
                "{flag}: expected one document, got {}; give several theirs in .json files, {}",
                documents.len(),
                r#"{"tokens": [...], "breaks": [...], "rereads": [...]}"#
            )),
        }
    }

    fn add(&self, [breaks, rereads]: [&mut Vec<usize>; 2], tokens: usize) -> Result<()> {
        let given = [("--breaks", &self.breaks), ("--rereads", &self.rereads)];
        for ((flag, given), to) in given.into_iter().zip([&mut *breaks, rereads]) {
            if let Some(behind) = given.iter().find(|position| **position > tokens) {
                return Err(anyhow!(
                    "{flag}: expected positions up to the {tokens} tokens, got {behind}"
                ));
            }
            to.extend(given);
            to.sort_unstable();
        }
        breaks.dedup();
        Ok(())
    }
}

/// Reads a UTF-8 file of at most `limit` bytes. A byte order mark at its start is dropped.
pub fn read_text(path: &Path, limit: u64) -> Result<String> {
    let file =
        std::fs::File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    let mut text = String::new();
    file.take(limit + 1)
        .read_to_string(&mut text)
        .with_context(|| format!("cannot read {} as UTF-8 text", path.display()))?;
    ensure!(
        text.len() as u64 <= limit,
        "{}: expected at most {limit} bytes",
        path.display()
    );
    if text.starts_with('\u{feff}') {
        text.drain(..'\u{feff}'.len_utf8());
    }
    Ok(text)
}

/// Reads token ids, each below `vocab`: a JSON array of them, or an object with `tokens` and `breaks`.
pub fn read_tokens(path: &Path, vocab: usize) -> Result<Tokens> {
    let json = read_text(path, MAX_TOKENS_FILE)?;
    let tokens = parse_ids(&json).map_err(|error| anyhow!("{}: {error}", path.display()))?;
    for (i, token) in tokens.ids.iter().enumerate() {
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
