//! Text of a sequence as its tokens come: whole characters only, up to a stop string.
//!
//! A token's text depends on the tokens before it (a character's bytes may be spread over several
//! tokens, and many tokenizers drop a space at the start of a text), so the last tokens are decoded
//! again with each new one and what is new at the end is released. The tokens before the stream's first are context
//! too: without them the space of the first new word would be lost.

use super::stop::{StopError, StopMatcher, StopOutput};

/// Longest run of tokens held back for an unfinished character; a broken one ends here. Literal
/// replacement characters look unfinished too, so it leaves room for several.
const MAX_HELD: usize = 32;

/// Most tokens without text at a stream's start that are decoded again with a new one.
const MAX_CONTEXT: usize = 64;

/// The text of one sequence, token by token.
#[derive(Debug, Clone)]
pub struct TextStream {
    tokens: Vec<u32>,
    /// Tokens from here on give the next ones their context.
    context: usize,
    /// Tokens before this have been released.
    released: usize,
    stop: StopMatcher,
}

impl TextStream {
    /// A stream that ends at any of the stop strings.
    ///
    /// # Errors
    /// [`StopError`] for an empty stop string.
    pub fn new(stops: Vec<String>) -> Result<Self, StopError> {
        Ok(Self {
            tokens: Vec::new(),
            context: 0,
            released: 0,
            stop: StopMatcher::new(stops)?,
        })
    }

    /// The stream of text that follows these tokens, whose own text is not part of it.
    pub fn after(mut self, tokens: &[u32]) -> Self {
        let context = &tokens[tokens.len().saturating_sub(MAX_HELD)..];
        self.tokens = context.to_vec();
        self.released = context.len();
        self
    }

    /// Takes the next token and releases the text that is certain. `decode` gives the text of some
    /// tokens in a row.
    ///
    /// # Errors
    /// What `decode` returns.
    pub fn push<E>(
        &mut self,
        token: u32,
        decode: impl Fn(&[u32]) -> Result<String, E>,
    ) -> Result<StopOutput, E> {
        self.tokens.push(token);
        let text = decode(&self.tokens[self.context..])?;
        let held = self.tokens.len() - self.released;
        if text.ends_with(char::REPLACEMENT_CHARACTER) && held < MAX_HELD {
            return Ok(self.stop.push(b""));
        }
        self.release(&text, decode)
    }

    /// Ends the stream: releases everything held back.
    ///
    /// # Errors
    /// What `decode` returns.
    pub fn finish<E>(&mut self, decode: impl Fn(&[u32]) -> Result<String, E>) -> Result<String, E> {
        let mut rest = String::new();
        if self.released < self.tokens.len() {
            let text = decode(&self.tokens[self.context..])?;
            rest = self.release(&text, decode)?.text;
        }
        rest.push_str(&self.stop.finish());
        Ok(rest)
    }

    /// Index of the stop string met so far.
    pub fn stopped(&self) -> Option<usize> {
        self.stop.stopped()
    }

    fn release<E>(
        &mut self,
        text: &str,
        decode: impl Fn(&[u32]) -> Result<String, E>,
    ) -> Result<StopOutput, E> {
        let before = decode(&self.tokens[self.context..self.released])?;
        // Decoders change no text already given; one that does has its new text cut where the old ends.
        let mut at = before.len().min(text.len());
        while !text.is_char_boundary(at) {
            at += 1;
        }
        let new = &text.as_bytes()[at..];
        let output = self.stop.push(new);
        if !new.is_empty() || self.tokens.len() - self.context > MAX_CONTEXT {
            self.context = self.released;
        } else if !before.is_empty() {
            // A hidden token gives the next no context: what has text stays that.
            self.tokens.truncate(self.released);
        }
        self.released = self.tokens.len();
        Ok(output)
    }
}
