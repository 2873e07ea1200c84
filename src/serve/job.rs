//! What the HTTP side asks of the engine, and what the engine answers.

use std::sync::mpsc::{SendError, Sender};

use tokio::sync::mpsc::UnboundedSender;
use tokio::sync::{OwnedSemaphorePermit, TryAcquireError};

use super::shared::Shared;
use crate::generate::GeneratorConfig;
use std::sync::Arc;

/// One sequence to be generated.
#[derive(Debug)]
pub struct Job {
    /// The tokens it begins with, at least one.
    pub prompt: Vec<u32>,
    /// Breaks in the prompt: a segment ends after so many of its tokens, strictly ascending.
    pub breaks: Vec<usize>,
    /// Where the prompt's segments are read again.
    pub rereads: Vec<usize>,
    /// How tokens are chosen, and what ends the sequence.
    pub config: GeneratorConfig,
    /// Number of its random stream.
    pub stream: u64,
    /// The text ends before any of these.
    pub stops: Vec<String>,
    /// For each new token, so many of the likeliest ones are reported.
    pub top: usize,
    /// Whether the tokens of the prompt are scored, and how many of the likeliest are reported for each.
    pub prompt_top: Option<usize>,
    /// Where its events go. Where nobody receives them any more, the sequence ends.
    pub events: Events,
    /// Its place among the requests that are running or waiting.
    pub permit: OwnedSemaphorePermit,
}

/// Where the events of a sequence go, with its number among those of its request.
#[derive(Debug, Clone)]
pub struct Events {
    /// The sequence's number.
    pub index: usize,
    /// The request's channel.
    pub to: UnboundedSender<(usize, Event)>,
}

impl Events {
    /// Whether somebody received it, or will.
    pub(super) fn send(&self, event: Event) -> bool {
        self.to.send((self.index, event)).is_ok()
    }

    pub(super) fn nobody_listens(&self) -> bool {
        self.to.is_closed()
    }
}

/// A token with its log-probability in nats.
pub type Ranked = (u32, f32);

/// What happens to a sequence, in this order: one `Prompt`, any number of `Token`, one `End`; or `Failed` at any time,
/// after which nothing comes.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// The prompt has been read.
    Prompt(PromptRead),
    /// A new token.
    Token(Token),
    /// The sequence has ended.
    End(End),
    /// It cannot go on.
    Failed(Failure),
}

/// A prompt that has been read.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct PromptRead {
    /// How many of its tokens had been read for another request.
    pub cached: usize,
    /// Where the prompt is scored, log-probabilities of its tokens from the second on.
    pub scores: Vec<f32>,
    /// Where they are asked for, the likeliest tokens at each of these places.
    pub top: Vec<Vec<Ranked>>,
}

/// A new token of a sequence.
#[derive(Debug, Clone, PartialEq)]
pub struct Token {
    /// Its id.
    pub id: u32,
    /// Its log-probability by the model's own distribution.
    pub log_probability: f32,
    /// The likeliest tokens at its place.
    pub top: Vec<Ranked>,
    /// Text that has become certain with it.
    pub text: String,
}

/// Why a sequence ended, and the last of its text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct End {
    /// Whether it came to an end token or a stop string; else it has all the tokens that it may have.
    pub stopped: bool,
    /// Text that was held back.
    pub text: String,
}

/// Why a sequence cannot go on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// The device or the model failed.
    #[error("{0}")]
    Engine(String),
    /// The server stops.
    #[error("the server is stopping")]
    Stopping,
}

/// Why the engine does not take a request.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// It has as many sequences as it may have.
    #[error("expected at most {limit} sequences running and waiting; try again later")]
    Full {
        /// Most sequences.
        limit: usize,
    },
    /// A request of more sequences than can ever be there at once.
    #[error("expected at most {limit} sequences in a request, got {got}")]
    TooMany {
        /// Most sequences.
        limit: usize,
        /// Those of the request.
        got: usize,
    },
    /// The engine has ended.
    #[error("the server is stopping")]
    Stopping,
}

/// What the engine is told.
#[derive(Debug)]
pub(super) enum Command {
    Run(Box<Job>),
    /// Ends everything that runs or waits.
    Cut,
}

/// The HTTP side's end of the channel to the engine.
#[derive(Debug, Clone)]
pub struct Handle {
    pub(super) to: Sender<Command>,
    /// What both sides know.
    pub shared: Arc<Shared>,
}

impl Handle {
    /// Places for `count` sequences.
    ///
    /// # Errors
    /// [`Refused::Full`] and [`Refused::TooMany`].
    pub fn places(&self, count: usize) -> Result<Vec<OwnedSemaphorePermit>, Refused> {
        let limit = self.shared.limits.places();
        if count > limit {
            return Err(Refused::TooMany { limit, got: count });
        }
        let places = self.shared.places.clone();
        let all = places.try_acquire_many_owned(u32::try_from(count).unwrap_or(u32::MAX));
        let mut all = all.map_err(|error| match error {
            TryAcquireError::NoPermits => Refused::Full { limit },
            TryAcquireError::Closed => Refused::Stopping,
        })?;
        let mut each: Vec<_> = (1..count).filter_map(|_| all.split(1)).collect();
        each.push(all);
        Ok(each)
    }

    /// Gives the engine a sequence to generate.
    ///
    /// # Errors
    /// [`Refused::Stopping`].
    pub fn run(&self, job: Job) -> Result<(), Refused> {
        let sent = self.to.send(Command::Run(Box::new(job)));
        sent.map_err(|SendError(_)| Refused::Stopping)
    }

    /// Whether the engine takes requests.
    pub fn alive(&self) -> bool {
        !self.shared.places.is_closed()
    }

    /// Ends everything that runs or waits.
    pub fn cut(&self) {
        // Where the engine has ended, so has all it did.
        let _ = self.to.send(Command::Cut);
    }
}
