//! The bytes of single tokens.

use super::{Kind, Tokenizer};

impl Tokenizer {
    /// The bytes that a token stands for, also where they are only a part of a character. A special token is its name;
    /// an id that stands for nothing has none.
    pub fn spelling(&self, id: u32) -> Vec<u8> {
        match &self.kind {
            #[cfg(feature = "tokenizer")]
            Kind::Json(tokenizer) => json(tokenizer, id),
            Kind::Bytes { .. } => u8::try_from(id).into_iter().collect(),
        }
    }
}

#[cfg(feature = "tokenizer")]
fn json(tokenizer: &tokenizers::Tokenizer, id: u32) -> Vec<u8> {
    let Some(token) = tokenizer.id_to_token(id) else {
        return Vec::new();
    };
    let added = tokenizer.get_added_tokens_decoder().contains_key(&id);
    let decoder = serde_json::to_string(&tokenizer.get_decoder()).unwrap_or_default();
    if added {
        return token.into_bytes();
    }
    // A byte-level model writes every byte as one character.
    if decoder.contains("\"ByteLevel\"") {
        let bytes: Option<Vec<u8>> = token.chars().map(byte_of).collect();
        return bytes.unwrap_or_else(|| token.into_bytes());
    }
    let byte = token.strip_prefix("<0x").and_then(|t| t.strip_suffix('>'));
    match byte.and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
        Some(byte) => vec![byte],
        None => token.replace('\u{2581}', " ").into_bytes(),
    }
}

/// The byte that a character of a byte-level model stands for: printable bytes of Latin-1 for themselves, the others,
/// in their order, as the characters from U+0100 on.
#[cfg(feature = "tokenizer")]
fn byte_of(c: char) -> Option<u8> {
    let itself = |byte: &u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    match u32::from(c).checked_sub(0x100) {
        Some(number) => (0..=u8::MAX)
            .filter(|byte| !itself(byte))
            .nth(number as usize),
        None => u8::try_from(u32::from(c)).ok().filter(itself),
    }
}
