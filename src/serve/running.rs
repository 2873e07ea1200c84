//! A sequence that runs: what the engine knows of it beside the generator.

use std::sync::Arc;
use std::time::Instant;

use super::job::{Failure, Job, Ranked, Token};
use crate::generate::text::TextStream;
use crate::model::session_file::SavedSequence;
use crate::model::tokenizer::Tokenizer;

#[derive(Debug)]
pub(super) struct Running {
    pub job: Box<Job>,
    /// When it came.
    pub since: Instant,
    /// Its number among those that were given a place.
    pub arrival: u64,
    /// The prompt and the new tokens.
    pub tokens: Vec<u32>,
    /// Tokens of the prompt that had been read for another request.
    pub cached: usize,
    /// Its state as it was kept last, or as it began.
    pub saved: Option<Arc<SavedSequence>>,
    /// Of a prompt whose likeliest tokens are asked for, those known so far.
    pub prompt_top: Vec<Vec<Ranked>>,
    pub prompt_read: bool,
    /// When its last token came.
    pub last: Option<Instant>,
    /// Where reading pauses to keep the state, counted in tokens from the beginning, descending.
    pub pauses: Vec<usize>,
    text: TextStream,
}

/// Text that a token has made certain.
#[derive(Debug, Default)]
pub(super) struct NewText {
    pub certain: String,
    /// Of the sequence's last token: what had been held back.
    pub rest: String,
    /// Whether a stop string was met.
    pub stopped: bool,
}

impl Running {
    /// # Errors
    /// The job, with what is wrong with its stop strings.
    pub fn new(job: Box<Job>, since: Instant, arrival: u64) -> Result<Self, (Box<Job>, Failure)> {
        let text = match TextStream::new(job.stops.clone()) {
            Ok(text) => text.after(&job.prompt),
            Err(error) => return Err((job, Failure::Engine(error.to_string()))),
        };
        Ok(Self {
            tokens: job.prompt.clone(),
            job,
            since,
            arrival,
            cached: 0,
            saved: None,
            prompt_top: Vec::new(),
            prompt_read: false,
            last: None,
            pauses: Vec::new(),
            text,
        })
    }

    /// Whether its prompt is still being read.
    pub fn reads(&self) -> bool {
        !self.prompt_read
    }

    /// Tokens of the prompt that may be read at once.
    pub fn until_pause(&self, position: usize) -> usize {
        match self.job.prompt_top {
            // The likeliest tokens are known only after the last one read.
            Some(1..) => 1,
            _ => self.pauses.last().map_or(usize::MAX, |at| at - position),
        }
    }

    /// Whether reading has come to a pause.
    pub fn paused(&mut self, position: usize) -> bool {
        let before = self.pauses.len();
        self.pauses.retain(|at| *at > position);
        self.pauses.len() < before
    }

    /// Takes a new token, which `ends` the text or is the `last` one anyway.
    pub fn take(
        &mut self,
        token: &Token,
        ends: bool,
        last: bool,
        tokenizer: Option<&Tokenizer>,
    ) -> Result<NewText, Failure> {
        self.tokens.push(token.id);
        let Some(tokenizer) = tokenizer else {
            return Ok(NewText::default());
        };
        let decode = |tokens: &[u32]| tokenizer.decode(tokens, true);
        let failed =
            |error: crate::model::error::TokenizerError| Failure::Engine(error.to_string());
        let mut text = NewText::default();
        if !ends {
            text.certain = self.text.push(token.id, decode).map_err(failed)?.text;
        }
        text.stopped = self.text.stopped().is_some();
        if last && !text.stopped {
            text.rest = self.text.finish(decode).map_err(failed)?;
        }
        Ok(text)
    }
}

/// Where reading a prompt of `len` tokens pauses: at its end, at the last of its segments' `ends`, and at the last one
/// before it leaves a text that is known, `shared` tokens. What others will begin with is likely to end there.
pub(super) fn pauses(len: usize, ends: &[usize], shared: usize) -> Vec<usize> {
    let before = ends.iter().rfind(|end| **end <= shared);
    let mut pauses = vec![len];
    pauses.extend(ends.last().into_iter().chain(before));
    pauses.sort_unstable_by(|a, b| b.cmp(a));
    pauses.dedup();
    pauses
}
