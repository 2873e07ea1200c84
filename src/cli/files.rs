//! Files that commands exchange: token lists in, results out.

use std::io::{Read, Write};
use std::path::Path;

use anyhow::{Context, Result, ensure};

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
    let tokens: Vec<u32> = serde_json::from_str(&text)
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

/// Writes a file beside its place and renames it, so that a reader never sees half of it.
pub fn write_atomically(path: &Path, contents: &[u8]) -> Result<()> {
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let write = || -> std::io::Result<()> {
        let mut options = tempfile::Builder::new();
        // Results are for others too; the default of a temporary file is its owner alone.
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            options.permissions(std::fs::Permissions::from_mode(0o644));
        }
        let mut file = options.tempfile_in(folder)?;
        file.write_all(contents)?;
        file.persist(path)?;
        Ok(())
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}
