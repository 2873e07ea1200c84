//! Text to tokens and back, by the `tokenizer.json` of a model folder. Tokens are bytes where the folder has no
//! tokenizer of any kind, or where its `config.json` says `"byte_tokens": true`.
//!
//! What stands around a text (BOS, EOS and any other added token) is decided in [`framing`], for training, scoring,
//! evaluation and generation alike. Whole characters as tokens arrive are the work of
//! [`crate::generate::text::TextStream`].

#[cfg(feature = "tokenizer")]
mod bounds;
pub mod framing;
mod generation;
#[cfg(feature = "tokenizer")]
mod place;
mod spelling;

use std::path::Path;

use super::config::{BYTE_TOKENS, CONFIG_FILE, MAX_CONFIG_BYTES, ModelConfig};
use super::error::TokenizerError;
use super::files;
use framing::Framing;
pub use generation::{GENERATION_FILE, GenerationSettings, end_ids};
#[cfg(feature = "tokenizer")]
pub(super) use place::{Placed, place_by};

/// The file's name in a model folder.
pub const TOKENIZER_FILE: &str = "tokenizer.json";
/// Ids of a model without a tokenizer: every byte is its own.
pub const BYTES: usize = 256;
/// Largest `tokenizer.json` accepted, in bytes; those of vocabularies of 256,000 take some 35 MB.
#[cfg(feature = "tokenizer")]
const MAX_TOKENIZER: u64 = 128 << 20;

/// Beginnings of the names of files that hold a tokenizer or belong to one.
const TOKENIZER_PREFIXES: [&str; 9] = [
    "tokenizer",
    "vocab.",
    "merges.",
    "spiece.",
    "sentencepiece.",
    "special_tokens_map",
    "added_tokens",
    "tekken",
    "bpe.",
];

/// Turns text into tokens and back.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    kind: Kind,
    framing: Framing,
    /// Ids from here on have no row in the model's embedding.
    limit: usize,
}

#[derive(Debug, Clone)]
enum Kind {
    #[cfg(feature = "tokenizer")]
    Json(Box<tokenizers::Tokenizer>),
    /// One token a byte; the ids of `hidden` have no text.
    Bytes { hidden: Vec<u32> },
}

/// Whether a file of this name holds a tokenizer, of any kind, or belongs to one.
pub fn is_tokenizer_file(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    let begins = TOKENIZER_PREFIXES.iter().any(|p| name.starts_with(p));
    begins || name.ends_with(".tiktoken") || name.ends_with(".spm") || name.ends_with(".model")
}

impl Tokenizer {
    /// The tokenizer in `folder`, for a model of this configuration; bytes where [`Tokenizer::read`] finds none.
    ///
    /// # Errors
    /// As [`Tokenizer::read`]; [`TokenizerError::TooFewIds`] without a tokenizer and with fewer than 256 ids.
    pub fn open(folder: &Path, config: &ModelConfig) -> Result<Self, TokenizerError> {
        if let Some(tokenizer) = Self::read(folder)? {
            return Ok(tokenizer.limited_to(config.vocab_size));
        }
        if config.vocab_size < BYTES {
            return Err(TokenizerError::TooFewIds {
                folder: folder.to_owned(),
                vocab_size: config.vocab_size,
            });
        }
        Ok(Self::bytes(config))
    }

    /// The tokenizer in `folder`; `None` where it has none of any kind, or where its `config.json` says
    /// `"byte_tokens": true`.
    ///
    /// # Errors
    /// As [`Tokenizer::from_file`]; [`TokenizerError::OtherKind`] for a tokenizer without a `tokenizer.json`.
    pub fn read(folder: &Path) -> Result<Option<Self>, TokenizerError> {
        if says_bytes(folder) {
            return Ok(None);
        }
        let path = folder.join(TOKENIZER_FILE);
        if !files::is_absent(&path) {
            return Self::from_file(&path).map(Some);
        }
        let Ok(entries) = std::fs::read_dir(folder) else {
            return Ok(None);
        };
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        match names.filter(|name| is_tokenizer_file(name)).min() {
            None => Ok(None),
            Some(file) => Err(TokenizerError::OtherKind {
                folder: folder.to_owned(),
                file,
            }),
        }
    }

    /// One token a byte; the first `bos_token_id` of the configuration begins a text.
    pub fn bytes(config: &ModelConfig) -> Self {
        let special = config.bos_token_id.iter().chain(&config.eos_token_id);
        Self {
            kind: Kind::Bytes {
                hidden: special.copied().collect(),
            },
            framing: Framing::bytes(config),
            limit: config.vocab_size,
        }
    }

    /// Refuses to make ids that are not below `vocab_size`.
    pub fn limited_to(self, vocab_size: usize) -> Self {
        Self {
            limit: vocab_size,
            ..self
        }
    }

    /// What stands around a text.
    pub fn framing(&self) -> &Framing {
        &self.framing
    }

    /// Reads a `tokenizer.json`. Truncation and padding in it do not apply, as they do not by default in
    /// Hugging Face libraries: a long text stays whole.
    ///
    /// # Errors
    /// [`TokenizerError::File`], [`TokenizerError::Malformed`], [`TokenizerError::NotBuiltIn`].
    #[cfg(feature = "tokenizer")]
    pub fn from_file(path: &Path) -> Result<Self, TokenizerError> {
        let mut read = Self::parse(&files::read_bounded(path, MAX_TOKENIZER)?, path)?;
        if let (Kind::Json(tokenizer), Some(folder)) = (&read.kind, path.parent()) {
            read.framing.complete(tokenizer, folder)?;
        }
        Ok(read)
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

    /// A tokenizer from the bytes of a `tokenizer.json` alone; `path` is for messages.
    ///
    /// # Errors
    /// [`TokenizerError::Malformed`].
    #[cfg(feature = "tokenizer")]
    pub fn parse(bytes: &[u8], path: &Path) -> Result<Self, TokenizerError> {
        let malformed = |message: String| TokenizerError::Malformed {
            path: path.to_owned(),
            message,
        };
        bounds::check(bytes).map_err(malformed)?;
        let parsed = guarded(|| {
            let mut tokenizer = tokenizers::Tokenizer::from_bytes(bytes)?;
            tokenizer.with_truncation(None)?.with_padding(None);
            let framing = Framing::of_template(&tokenizer)?;
            Ok((tokenizer, framing))
        });
        let (tokenizer, framing) = parsed.map_err(malformed)?;
        Ok(Self {
            kind: Kind::Json(Box::new(tokenizer)),
            framing,
            limit: usize::MAX,
        })
    }

    /// One more than the largest id of the tokenizer and its framing.
    pub fn vocab_size(&self) -> usize {
        let own = match &self.kind {
            #[cfg(feature = "tokenizer")]
            Kind::Json(tokenizer) => {
                let ids = tokenizer.get_vocab(true).into_values();
                ids.max().map_or(0, |id| id as usize + 1)
            }
            Kind::Bytes { .. } => BYTES,
        };
        let around = self.framing.before.iter().chain(&self.framing.after);
        around.fold(own, |size, id| size.max(*id as usize + 1))
    }

    /// Whether every byte is a token.
    pub fn is_bytes(&self) -> bool {
        matches!(self.kind, Kind::Bytes { .. })
    }

    /// Tokens of a text; `framed` puts around it what the tokenizer puts around texts.
    ///
    /// # Errors
    /// [`TokenizerError::Failed`] where the tokenizer cannot spell the text, [`TokenizerError::Vocabulary`] where it
    /// becomes an id that the model has not.
    pub fn encode(&self, text: &str, framed: bool) -> Result<Vec<u32>, TokenizerError> {
        let mut ids = match framed {
            true => self.framing.before.clone(),
            false => Vec::new(),
        };
        match &self.kind {
            #[cfg(feature = "tokenizer")]
            Kind::Json(tokenizer) => {
                let encoded = guarded(|| tokenizer.encode_fast(text, false));
                let encoded = encoded.map_err(|message| TokenizerError::Failed { message })?;
                ids.extend_from_slice(encoded.get_ids());
            }
            Kind::Bytes { .. } => ids.extend(text.bytes().map(u32::from)),
        }
        if framed {
            ids.extend_from_slice(&self.framing.after);
        }
        self.check(ids.iter().copied())?;
        Ok(ids)
    }

    /// Refuses ids that the model has not.
    pub(super) fn check(&self, ids: impl Iterator<Item = u32>) -> Result<(), TokenizerError> {
        match ids.max() {
            Some(largest) if largest as usize >= self.limit => Err(TokenizerError::Vocabulary {
                largest,
                vocab_size: self.limit,
            }),
            _ => Ok(()),
        }
    }

    /// Tokens of a text, without any that stand around it. Each has the byte of the text at which it begins, and
    /// whether a word begins with it: a stretch of text that the tokenizer encodes by itself.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn locate(&self, text: &str) -> Result<Vec<(u32, usize, bool)>, TokenizerError> {
        match &self.kind {
            #[cfg(feature = "tokenizer")]
            Kind::Json(tokenizer) => {
                let encoded = guarded(|| tokenizer.encode(text, false));
                let encoded = encoded.map_err(|message| TokenizerError::Failed { message })?;
                let (ids, words) = (encoded.get_ids(), encoded.get_word_ids());
                let located = |(i, offsets): (usize, &(usize, usize))| {
                    (ids[i], offsets.0, i == 0 || words[i] != words[i - 1])
                };
                let offsets = encoded.get_offsets().iter().enumerate();
                Ok(offsets.map(located).collect())
            }
            Kind::Bytes { .. } => {
                let bytes = text.bytes().enumerate();
                Ok(bytes.map(|(i, byte)| (u32::from(byte), i, true)).collect())
            }
        }
    }

    /// Whether the tokens of a word depend on all of it. A Unigram model compares sums of scores from the beginning of
    /// the word, and rounding decides between sums that are equal.
    pub fn needs_whole_words(&self) -> bool {
        match &self.kind {
            #[cfg(feature = "tokenizer")]
            Kind::Json(tokenizer) => {
                matches!(tokenizer.get_model(), tokenizers::ModelWrapper::Unigram(_))
            }
            Kind::Bytes { .. } => false,
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
        match &self.kind {
            #[cfg(feature = "tokenizer")]
            Kind::Json(tokenizer) => guarded(|| tokenizer.decode(tokens, skip_special_tokens))
                .map_err(|message| TokenizerError::Failed { message }),
            Kind::Bytes { hidden } => {
                let kept = tokens
                    .iter()
                    .filter(|t| !(skip_special_tokens && hidden.contains(t)));
                let bytes: Vec<u8> = kept.filter_map(|t| u8::try_from(*t).ok()).collect();
                Ok(String::from_utf8_lossy(&bytes).into_owned())
            }
        }
    }
}

/// Whether the folder's configuration says that tokens are bytes. One that cannot be read says nothing here: it is an
/// error of whoever loads the model.
fn says_bytes(folder: &Path) -> bool {
    let path = folder.join(CONFIG_FILE);
    let config = files::read_json(&path, MAX_CONFIG_BYTES);
    config.is_ok_and(|config| config.get(BYTE_TOKENS) == Some(&true.into()))
}

/// Calls the tokenizer library. Files that it accepts can still make it panic (ids that its own tables
/// lack), which here is an error like any other.
#[cfg(feature = "tokenizer")]
fn guarded<T>(call: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, String> {
    crate::guarded::guarded(call)?.map_err(|error| error.to_string())
}
