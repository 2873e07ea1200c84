//! Text to tokens and back: `tokenizer.json` of a model folder, or bytes where there is none.
//!
//! Whole characters as tokens arrive are the work of [`crate::generate::text::TextStream`].

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::config::ModelConfig;
use super::error::TokenizerError;
use super::files;

/// The file's name in a model folder.
pub const TOKENIZER_FILE: &str = "tokenizer.json";
/// Defaults of generation, beside `config.json`.
const GENERATION_FILE: &str = "generation_config.json";
/// Ids of a model without a tokenizer: every byte is its own.
pub const BYTES: usize = 256;
/// Largest `tokenizer.json` accepted, in bytes; those of vocabularies of 256,000 take some 35 MB.
#[cfg(feature = "tokenizer")]
const MAX_TOKENIZER: u64 = 128 << 20;
/// Largest `generation_config.json` accepted, in bytes.
const MAX_GENERATION: u64 = 1 << 20;
/// Most ids that may end a text.
const MAX_TOKEN_IDS: usize = 64;

/// Turns text into tokens and back.
#[derive(Debug, Clone)]
pub struct Tokenizer(Kind);

#[derive(Debug, Clone)]
enum Kind {
    #[cfg(feature = "tokenizer")]
    Json(Box<tokenizers::Tokenizer>),
    /// One token a byte; `bos` begins a text, and neither it nor the ids of `hidden` have text.
    Bytes { bos: Option<u32>, hidden: Vec<u32> },
}

impl Tokenizer {
    /// The tokenizer in `folder`, for a model of this configuration; bytes where there is no
    /// `tokenizer.json`.
    ///
    /// # Errors
    /// [`TokenizerError`]: as [`Tokenizer::from_file`], ids for which the model has no embedding, or no
    /// file and fewer than 256 ids.
    pub fn open(folder: &Path, config: &ModelConfig) -> Result<Self, TokenizerError> {
        let path = folder.join(TOKENIZER_FILE);
        if std::fs::symlink_metadata(&path).is_err() {
            return Self::bytes(folder, config);
        }
        let tokenizer = Self::from_file(&path)?;
        if tokenizer.vocab_size() > config.vocab_size {
            return Err(TokenizerError::Vocabulary {
                largest: u32::try_from(tokenizer.vocab_size() - 1).unwrap_or(u32::MAX),
                vocab_size: config.vocab_size,
            });
        }
        Ok(tokenizer)
    }

    fn bytes(folder: &Path, config: &ModelConfig) -> Result<Self, TokenizerError> {
        if config.vocab_size < BYTES {
            return Err(TokenizerError::TooFewIds {
                folder: folder.to_owned(),
                vocab_size: config.vocab_size,
            });
        }
        let special = config.bos_token_id.iter().chain(&config.eos_token_id);
        Ok(Self(Kind::Bytes {
            bos: config.bos_token_id.first().copied(),
            hidden: special.copied().collect(),
        }))
    }

    /// Reads a `tokenizer.json`. Truncation and padding in it do not apply, as they do not by default in
    /// Hugging Face libraries: a long text stays whole.
    ///
    /// # Errors
    /// [`TokenizerError::File`], [`TokenizerError::Malformed`], [`TokenizerError::NotBuiltIn`].
    #[cfg(feature = "tokenizer")]
    pub fn from_file(path: &Path) -> Result<Self, TokenizerError> {
        Self::parse(&files::read_bounded(path, MAX_TOKENIZER)?, path)
    }

    /// This build reads no `tokenizer.json`.
    ///
    /// # Errors
    /// [`TokenizerError::NotBuiltIn`].
    #[cfg(not(feature = "tokenizer"))]
    pub fn from_file(path: &Path) -> Result<Self, TokenizerError> {
        Err(TokenizerError::NotBuiltIn {
            path: path.to_owned(),
        })
    }

    /// A tokenizer from the bytes of a `tokenizer.json`; `path` is for messages.
    ///
    /// # Errors
    /// [`TokenizerError::Malformed`].
    #[cfg(feature = "tokenizer")]
    pub fn parse(bytes: &[u8], path: &Path) -> Result<Self, TokenizerError> {
        let malformed = |message: String| TokenizerError::Malformed {
            path: path.to_owned(),
            message,
        };
        let parsed = guarded(|| {
            let mut tokenizer = tokenizers::Tokenizer::from_bytes(bytes)?;
            tokenizer.with_truncation(None)?.with_padding(None);
            Ok(tokenizer)
        });
        Ok(Self(Kind::Json(Box::new(parsed.map_err(malformed)?))))
    }

    /// One more than the largest id that a text can become.
    pub fn vocab_size(&self) -> usize {
        match &self.0 {
            #[cfg(feature = "tokenizer")]
            Kind::Json(tokenizer) => {
                let ids = tokenizer.get_vocab(true).into_values();
                ids.max().map_or(0, |id| id as usize + 1)
            }
            Kind::Bytes { bos, .. } => BYTES.max(bos.map_or(0, |id| id as usize + 1)),
        }
    }

    /// Whether every byte is a token.
    pub fn is_bytes(&self) -> bool {
        matches!(self.0, Kind::Bytes { .. })
    }

    /// Tokens of a text; `add_special_tokens` puts around it what the tokenizer puts around texts
    /// (most: the token that begins one).
    ///
    /// # Errors
    /// [`TokenizerError::Failed`] where the tokenizer cannot spell the text.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, TokenizerError> {
        match &self.0 {
            #[cfg(feature = "tokenizer")]
            Kind::Json(tokenizer) => {
                let encoded = guarded(|| tokenizer.encode_fast(text, add_special_tokens));
                encoded
                    .map(|encoded| encoded.get_ids().to_vec())
                    .map_err(|message| TokenizerError::Failed { message })
            }
            Kind::Bytes { bos, .. } => {
                let first = bos.filter(|_| add_special_tokens);
                Ok(first
                    .into_iter()
                    .chain(text.bytes().map(u32::from))
                    .collect())
            }
        }
    }

    /// Text of tokens. Ids that stand for nothing (a model's vocabulary is often padded) have none,
    /// with `skip_special_tokens` neither have special ones; bytes that are no UTF-8 become U+FFFD.
    ///
    /// # Errors
    /// [`TokenizerError::Failed`].
    pub fn decode(
        &self,
        tokens: &[u32],
        skip_special_tokens: bool,
    ) -> Result<String, TokenizerError> {
        match &self.0 {
            #[cfg(feature = "tokenizer")]
            Kind::Json(tokenizer) => guarded(|| tokenizer.decode(tokens, skip_special_tokens))
                .map_err(|message| TokenizerError::Failed { message }),
            Kind::Bytes { hidden, .. } => {
                let kept = tokens
                    .iter()
                    .filter(|t| !(skip_special_tokens && hidden.contains(t)));
                let bytes: Vec<u8> = kept.filter_map(|t| u8::try_from(*t).ok()).collect();
                Ok(String::from_utf8_lossy(&bytes).into_owned())
            }
        }
    }
}

/// The ids that end a text: those of `generation_config.json`, else those of `config.json`, as
/// Hugging Face libraries choose them.
///
/// # Errors
/// [`TokenizerError::File`], [`TokenizerError::EndIds`].
pub fn end_ids(folder: &Path, config: &ModelConfig) -> Result<Vec<u32>, TokenizerError> {
    let path = folder.join(GENERATION_FILE);
    if std::fs::symlink_metadata(&path).is_err() {
        return Ok(config.eos_token_id.clone());
    }
    let bytes = files::read_bounded(&path, MAX_GENERATION)?;
    let file: Value =
        serde_json::from_slice(&bytes).map_err(|error| files::json_error(&path, &error))?;
    match file.get("eos_token_id") {
        None | Some(Value::Null) => Ok(config.eos_token_id.clone()),
        Some(ids) => {
            parse_ids(ids, config.vocab_size).ok_or_else(|| end_ids_error(path, config, ids))
        }
    }
}

fn parse_ids(ids: &Value, vocab_size: usize) -> Option<Vec<u32>> {
    let id = |value: &Value| {
        let id = u32::try_from(value.as_u64()?).ok()?;
        ((id as usize) < vocab_size).then_some(id)
    };
    match ids {
        Value::Array(ids) if ids.len() <= MAX_TOKEN_IDS => ids.iter().map(id).collect(),
        Value::Array(_) => None,
        one => Some(vec![id(one)?]),
    }
}

fn end_ids_error(path: PathBuf, config: &ModelConfig, got: &Value) -> TokenizerError {
    TokenizerError::EndIds {
        path,
        expected: format!(
            "an id below vocab_size = {} or a list of at most {MAX_TOKEN_IDS}",
            config.vocab_size
        ),
        got: got.to_string().chars().take(80).collect(),
    }
}

/// Calls the tokenizer library. Files that it accepts can still make it panic (ids that its own tables
/// lack), which here is an error like any other.
#[cfg(feature = "tokenizer")]
fn guarded<T>(call: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, String> {
    match std::panic::catch_unwind(std::panic::AssertUnwindSafe(call)) {
        Ok(result) => result.map_err(|error| error.to_string()),
        Err(panic) => {
            let message = panic.downcast_ref::<String>().cloned();
            let message = message.or_else(|| panic.downcast_ref::<&str>().map(|m| m.to_string()));
            Err(message.unwrap_or_else(|| "the library failed".into()))
        }
    }
}
