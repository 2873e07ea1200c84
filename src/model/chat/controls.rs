//! Control tokens: the special tokens of a tokenizer. Those that a template writes are control tokens; the same
//! spelling in a message is text.
//!
//! A tokenizer finds special tokens by their spelling alone. So text in which both occur is encoded by a twin of the
//! tokenizer: special tokens are no longer found there, and the template's are spelled with a private character before
//! them, under which the twin knows them.

use std::ops::Range;
use std::sync::OnceLock;

use aho_corasick::{AhoCorasick, MatchKind};
use tokenizers::AddedToken;

use super::marks::Taken;
use crate::model::error::TokenizerError;
use crate::model::tokenizer::{Placed, Tokenizer, place_by};

/// The special tokens of a tokenizer.
#[derive(Debug, Default)]
pub(super) struct Controls {
    tokens: Vec<(u32, AddedToken)>,
    /// Finds them; `None` where there are none.
    automaton: Option<AhoCorasick>,
    /// Made where it is first needed, which is rare.
    twin: OnceLock<Result<Twin, String>>,
}

/// A tokenizer that takes special tokens for text, and knows them by other spellings.
#[derive(Debug)]
struct Twin {
    tokenizer: tokenizers::Tokenizer,
    /// What stands before the spelling of a control token.
    sign: char,
    /// For each id of such a spelling that of the control token.
    ids: Vec<(u32, u32)>,
}

impl Controls {
    pub(super) fn of(tokenizer: &Tokenizer) -> Self {
        let Some(json) = tokenizer.json() else {
            return Self::default();
        };
        let added = json.get_added_tokens_decoder().into_iter();
        // The library looks at what stands around a `single_word` token; chat models have none.
        let control = |t: &AddedToken| t.special && !t.single_word && !t.content.is_empty();
        let mut tokens: Vec<_> = added.filter(|(_, token)| control(token)).collect();
        tokens.sort_by_key(|(id, _)| *id);
        let mut automaton = AhoCorasick::builder();
        // As the tokenizer itself looks for them.
        automaton.match_kind(MatchKind::LeftmostLongest);
        let automaton = automaton.build(tokens.iter().map(|(_, token)| &token.content));
        Self {
            automaton: automaton.ok().filter(|_| !tokens.is_empty()),
            tokens,
            twin: OnceLock::new(),
        }
    }

    /// Where a text spells control tokens.
    pub(super) fn find(&self, text: &str) -> impl Iterator<Item = Range<usize>> {
        let found = self.automaton.iter().flat_map(move |a| a.find_iter(text));
        found.map(|found| found.range())
    }

    /// Bytes of the longest spelling of a control token with which a text begins.
    pub(super) fn longest_at(&self, text: &str) -> Option<usize> {
        let spelled = self.tokens.iter().map(|(_, token)| &token.content);
        spelled
            .filter(|t| text.starts_with(*t))
            .map(String::len)
            .max()
    }

    /// Tokens of a text in which the control tokens at `plain` are text.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub(super) fn encode(
        &self,
        tokenizer: &Tokenizer,
        text: &str,
        plain: &[Range<usize>],
    ) -> Result<Vec<Placed>, TokenizerError> {
        let Some(json) = tokenizer.json().filter(|_| !plain.is_empty()) else {
            return tokenizer.place(text);
        };
        let mut taken = Taken::default();
        taken.by(text);
        let [sign] = taken.free();
        let own;
        let twin = match self.twin.get_or_init(|| Twin::of(json, &self.tokens, sign)) {
            Ok(twin) if twin.sign != sign => {
                own = Twin::of(json, &self.tokens, sign);
                own.as_ref()
            }
            shared => shared.as_ref(),
        };
        let failed = |message: &String| TokenizerError::Failed {
            message: message.clone(),
        };
        let twin = twin.map_err(failed)?;
        let mut spelled = String::with_capacity(text.len() + 64);
        let (mut signs, mut done) = (Vec::new(), 0);
        for found in self.find(text) {
            if plain
                .iter()
                .any(|p| p.start < found.end && found.start < p.end)
            {
                continue;
            }
            spelled.push_str(&text[done..found.start]);
            signs.push(spelled.len());
            spelled.push(sign);
            done = found.start;
        }
        spelled.push_str(&text[done..]);
        // Where a byte of `spelled` is in `text`.
        let back = |at: usize| at - signs.partition_point(|s| *s < at) * sign.len_utf8();
        let mut placed = place_by(&twin.tokenizer, &spelled)?;
        if let Some(found) = placed
            .iter()
            .find(|t| self.tokens.iter().any(|(id, _)| *id == t.id))
        {
            let message = format!(
                "a message spells the control token {}, and the tokenizer has no text for it",
                found.id
            );
            return Err(TokenizerError::Failed { message });
        }
        for token in &mut placed {
            let twin = twin.ids.iter().find(|(twin, _)| *twin == token.id);
            token.id = twin.map_or(token.id, |(_, id)| *id);
            token.bytes = back(token.bytes.start)..back(token.bytes.end);
        }
        tokenizer.check(placed.iter().map(|token| token.id))?;
        Ok(placed)
    }
}

impl Twin {
    fn of(
        of: &tokenizers::Tokenizer,
        tokens: &[(u32, AddedToken)],
        sign: char,
    ) -> Result<Self, String> {
        let mut tokenizer = of.clone();
        tokenizer.set_encode_special_tokens(true);
        let spelled = tokens.iter().map(|(_, token)| AddedToken {
            content: format!("{sign}{}", token.content),
            special: false,
            normalized: false,
            ..token.clone()
        });
        let spelled: Vec<AddedToken> = spelled.collect();
        let names: Vec<String> = spelled.iter().map(|token| token.content.clone()).collect();
        let added = tokenizer.add_tokens(spelled);
        added.map_err(|error| error.to_string())?;
        let pairs = names.iter().zip(tokens);
        let pair = |(name, (id, _)): (&String, &(u32, AddedToken))| {
            Some((tokenizer.token_to_id(name)?, *id))
        };
        let ids = pairs.filter_map(pair).collect();
        Ok(Self {
            tokenizer,
            sign,
            ids,
        })
    }
}
