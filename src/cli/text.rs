//! The tokenizer of a model folder: `tokenizer.json`, or bytes where there is none.

use std::path::Path;

use anyhow::{Result, anyhow, ensure};
use tokenizers::Tokenizer;

/// Ids of a byte-level model: every byte is its own id, ids from here on have no text.
const BYTES: usize = 256;

/// Turns text into tokens and back.
pub enum Text {
    /// From a `tokenizer.json`.
    Tokenizer(Box<Tokenizer>),
    /// One token a byte.
    Bytes,
}

impl Text {
    /// The tokenizer in `folder`, for a model of `vocab_size` ids.
    pub fn open(folder: &Path, vocab_size: usize) -> Result<Self> {
        let path = folder.join("tokenizer.json");
        if !path.is_file() {
            ensure!(
                vocab_size >= BYTES,
                "{} has no tokenizer.json, and its {vocab_size} ids are too few for bytes; give --tokens",
                folder.display()
            );
            return Ok(Self::Bytes);
        }
        let tokenizer =
            Tokenizer::from_file(&path).map_err(|e| anyhow!("{}: {e}", path.display()))?;
        let largest = tokenizer.get_vocab(true).into_values().max().unwrap_or(0);
        ensure!(
            (largest as usize) < vocab_size,
            "{} has ids up to {largest}, the model only {vocab_size} of them",
            path.display()
        );
        Ok(Self::Tokenizer(Box::new(tokenizer)))
    }

    /// Tokens of a whole prompt, with the special ones the tokenizer puts around it.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        self.tokens(text, true)
    }

    /// Tokens of a text that goes on from another: without special ones.
    pub fn encode_more(&self, text: &str) -> Result<Vec<u32>> {
        self.tokens(text, false)
    }

    fn tokens(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        match self {
            Self::Bytes => Ok(text.bytes().map(u32::from).collect()),
            Self::Tokenizer(tokenizer) => tokenizer
                .encode_fast(text, special)
                .map(|e| e.get_ids().to_vec())
                .map_err(|e| anyhow!("tokenizer: {e}")),
        }
    }

    /// Text of tokens, without special ones.
    pub fn decode(&self, tokens: &[u32]) -> Result<String> {
        match self {
            Self::Bytes => {
                let bytes: Vec<u8> = tokens
                    .iter()
                    .filter_map(|t| u8::try_from(*t).ok())
                    .collect();
                Ok(String::from_utf8_lossy(&bytes).into_owned())
            }
            Self::Tokenizer(tokenizer) => tokenizer
                .decode(tokens, true)
                .map_err(|e| anyhow!("tokenizer: {e}")),
        }
    }
}
