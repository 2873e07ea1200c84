//! What stands around a text: the one place that decides it, for training, scoring, evaluation and generation.
//!
//! In this order, the first that says something holds:
//!
//! 1. the template of `tokenizer.json` (its post-processor), where it adds any token;
//! 2. `add_bos_token` and `add_eos_token` of `tokenizer_config.json`, with the tokens that `bos_token` and `eos_token`
//!    name there or in `special_tokens_map.json`;
//! 3. of a folder without a tokenizer (bytes), the first `bos_token_id` of `config.json`.
//!
//! A `bos_token_id` of `config.json` beside a tokenizer that does not add it adds nothing, as in Transformers.
//! Training also ends each document, see [`Framing::document`].

#[cfg(feature = "tokenizer")]
use std::path::Path;

#[cfg(feature = "tokenizer")]
use serde_json::Value;

use crate::model::config::ModelConfig;
#[cfg(feature = "tokenizer")]
use crate::model::error::FileError;
#[cfg(feature = "tokenizer")]
use crate::model::files;

/// Largest `tokenizer_config.json` accepted, in bytes; those of vocabularies of 256,000 list their added tokens.
#[cfg(feature = "tokenizer")]
pub(in crate::model) const MAX_FILE: u64 = 16 << 20;

/// Tokens around a text.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Framing {
    /// Before it.
    pub before: Vec<u32>,
    /// After it.
    pub after: Vec<u32>,
    /// The token that begins a text, whether or not one is put there.
    pub bos: Option<u32>,
    /// The token that ends a text, whether or not one is put there.
    pub eos: Option<u32>,
}

impl Framing {
    pub(super) fn bytes(config: &ModelConfig) -> Self {
        let bos = config.bos_token_id.first().copied();
        Self {
            before: bos.into_iter().collect(),
            after: Vec::new(),
            bos,
            eos: config.eos_token_id.first().copied(),
        }
    }

    /// What training puts before and after each document: `before` where `begin`; and where `end`, `after`, then the
    /// first of `end_ids` (those that end generation), or else the tokenizer's own EOS, unless `after` ends with it.
    pub fn document(&self, begin: bool, end: bool, end_ids: &[u32]) -> (Vec<u32>, Vec<u32>) {
        let before = match begin {
            true => self.before.clone(),
            false => Vec::new(),
        };
        if !end {
            return (before, Vec::new());
        }
        let mut after = self.after.clone();
        let ended = after.last().is_some_and(|last| {
            end_ids.contains(last) || end_ids.is_empty() && Some(*last) == self.eos
        });
        if !ended {
            after.extend(end_ids.first().copied().or(self.eos));
        }
        (before, after)
    }

    /// Notes in a new model's configuration which tokens begin and end a text.
    pub fn note(&self, config: &mut ModelConfig) {
        let below = |id: Option<u32>| id.filter(|id| (*id as usize) < config.vocab_size);
        let (bos, eos) = (below(self.bos), below(self.eos));
        config.bos_token_id = bos.into_iter().collect();
        config.eos_token_id = eos.into_iter().collect();
    }
}

#[cfg(feature = "tokenizer")]
impl Framing {
    /// By the template: a text of one token goes through it.
    pub(super) fn of_template(tokenizer: &tokenizers::Tokenizer) -> tokenizers::Result<Self> {
        use tokenizers::{Encoding, PostProcessor, Token};
        let Some(processor) = tokenizer.get_post_processor() else {
            return Ok(Self::default());
        };
        let text = Encoding::from_tokens(vec![Token::new(0, "a".to_owned(), (0, 1))], 0);
        let framed = processor.process(text, None, true)?;
        let (ids, added) = (framed.get_ids(), framed.get_special_tokens_mask());
        let mut texts = added.iter().enumerate().filter(|(_, added)| **added == 0);
        let (Some((at, _)), None) = (texts.next(), texts.next()) else {
            return Err("expected a template (post_processor) that holds the text once".into());
        };
        let (before, after) = (ids[..at].to_vec(), ids[at + 1..].to_vec());
        Ok(Self {
            bos: before.first().copied(),
            eos: after.last().copied(),
            before,
            after,
        })
    }

    /// By the files beside `tokenizer.json`, where the template does not say it.
    pub(super) fn complete(
        &mut self,
        tokenizer: &tokenizers::Tokenizer,
        folder: &Path,
    ) -> Result<(), FileError> {
        let (config, map) = (
            files::read_object(&folder.join("tokenizer_config.json"), MAX_FILE)?,
            files::read_object(&folder.join("special_tokens_map.json"), MAX_FILE)?,
        );
        let named = |key: &str| {
            let name = config.get(key).or_else(|| map.get(key))?;
            let name = name.get("content").unwrap_or(name).as_str()?;
            tokenizer.token_to_id(name)
        };
        let (bos, eos) = (named("bos_token"), named("eos_token"));
        let wants = |key: &str| config.get(key).and_then(Value::as_bool);
        let template = !self.before.is_empty() || !self.after.is_empty();
        for (key, id, ids) in [
            ("add_bos_token", bos, &mut self.before),
            ("add_eos_token", eos, &mut self.after),
        ] {
            match (wants(key), id) {
                (Some(wanted), _) if template && wanted == ids.is_empty() => tracing::warn!(
                    "{}: tokenizer_config.json has `{key}` = {wanted}, the template of tokenizer.json says \
                     otherwise and holds",
                    folder.display()
                ),
                (Some(_), _) if template => {}
                (Some(true), Some(id)) => ids.push(id),
                (Some(true), None) => tracing::warn!(
                    "{}: tokenizer_config.json has `{key}` but names no token of the tokenizer; none is added",
                    folder.display()
                ),
                _ => {}
            }
        }
        self.bos = self.before.first().copied().or(bos);
        self.eos = eos.or(self.eos);
        Ok(())
    }
}
