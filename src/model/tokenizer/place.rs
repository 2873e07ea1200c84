//! Tokens with the bytes of the text that they stand for, and what chat templates need of a tokenizer.

use std::ops::Range;

use super::{Kind, Tokenizer, guarded};
use crate::model::error::TokenizerError;

/// A token, and where its text is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::model) struct Placed {
    /// Its id.
    pub(in crate::model) id: u32,
    /// Its bytes in the text. Tokens that share a character may share bytes.
    pub(in crate::model) bytes: Range<usize>,
}

impl Tokenizer {
    /// The library's tokenizer; `None` where tokens are bytes.
    pub(in crate::model) fn json(&self) -> Option<&tokenizers::Tokenizer> {
        match &self.kind {
            Kind::Json(tokenizer) => Some(tokenizer),
            Kind::Bytes { .. } => None,
        }
    }

    /// Tokens of a text, without any that stand around it, with their places.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub(in crate::model) fn place(&self, text: &str) -> Result<Vec<Placed>, TokenizerError> {
        let placed = match &self.kind {
            Kind::Json(tokenizer) => place_by(tokenizer, text)?,
            Kind::Bytes { .. } => {
                let byte = |(at, byte): (usize, u8)| Placed {
                    id: byte.into(),
                    bytes: at..at + 1,
                };
                text.bytes().enumerate().map(byte).collect()
            }
        };
        self.check(placed.iter().map(|token| token.id))?;
        Ok(placed)
    }
}

/// The same by another tokenizer, whose ids may be any.
///
/// # Errors
/// [`TokenizerError::Failed`].
pub(in crate::model) fn place_by(
    tokenizer: &tokenizers::Tokenizer,
    text: &str,
) -> Result<Vec<Placed>, TokenizerError> {
    let encoded = guarded(|| tokenizer.encode(text, false));
    let encoded = encoded.map_err(|message| TokenizerError::Failed { message })?;
    let ids = encoded.get_ids().iter().zip(encoded.get_offsets());
    let placed = |(id, (start, end)): (&u32, &(usize, usize))| Placed {
        id: *id,
        bytes: *start..*end,
    };
    Ok(ids.map(placed).collect())
}
