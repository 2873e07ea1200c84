//! How a run's texts become tokens, and the files that say so.

use std::path::Path;

use anyhow::{Result, bail};
use segattn::model::tokenizer::{TOKENIZER_FILE, Tokenizer};
use segattn::train::config::Config;

/// How a run's texts become tokens.
pub enum Text {
    /// By a `tokenizer.json`.
    Tokenizer(Tokenizer),
    /// One token a byte.
    Bytes,
}

impl Text {
    /// That of `checkpoint`, of `model.tokenizer`, or of `model.folder`; bytes where there is none.
    pub fn open(config: &Config, checkpoint: Option<&Path>) -> Result<Self> {
        let named = config.model.tokenizer.as_deref();
        let folder = checkpoint.or(named).or(config.model.folder.as_deref());
        match folder.map(|folder| folder.join(TOKENIZER_FILE)) {
            Some(path) if path.is_file() => Ok(Self::Tokenizer(Tokenizer::from_file(&path)?)),
            Some(path) if checkpoint.is_none() && named.is_some() => {
                bail!("`model.tokenizer`: there is no {}", path.display())
            }
            _ => Ok(Self::Bytes),
        }
    }

    pub fn encode(&self, text: &str) -> Result<Vec<u32>, String> {
        match self {
            Self::Tokenizer(tokenizer) => tokenizer.encode(text, false).map_err(|e| e.to_string()),
            Self::Bytes => Ok(text.bytes().map(u32::from).collect()),
        }
    }

    pub fn vocab_size(&self) -> usize {
        match self {
            Self::Tokenizer(tokenizer) => tokenizer.vocab_size(),
            Self::Bytes => 256,
        }
    }
}

/// The tokenizer's files, which each checkpoint carries so that it can generate.
pub fn tokenizer_files(config: &Config) -> Result<Vec<(String, Vec<u8>)>> {
    let model = &config.model;
    let Some(folder) = model.tokenizer.as_ref().or(model.folder.as_ref()) else {
        return Ok(Vec::new());
    };
    let mut files = Vec::new();
    for name in [
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
    ] {
        let path = folder.join(name);
        if path.is_file() {
            files.push((name.to_owned(), std::fs::read(path)?));
        }
    }
    Ok(files)
}
