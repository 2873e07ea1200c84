//! A chat over one sequence of a session, turn by turn: nothing is read twice.
//!
//! A turn reads what the chat template writes between the last answer and the next one, and the model goes on from
//! there. So the session has read the template's text with the answers as the model wrote them. Templates that shorten
//! earlier answers, such as those that leave out what was thought, shorten nothing here. The end of what a turn reads
//! is the end of a prompt, so it is a break where the model's configuration says so (docs/contract.md, section 2).

use std::ops::ControlFlow;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::error::GenerateError;
use super::generator::{Finish, Generated, Generator, GeneratorConfig, Prompt};
use super::stop::StopError;
use super::text::TextStream;
use crate::device::{Device, Result as DeviceResult};
use crate::model::chat::{Chat, Conversation, Data};
use crate::model::decoder::Decoder;
use crate::model::error::{ChatError, TokenizerError};
use crate::model::files::OutputFile;
use crate::model::session::Session;
use crate::model::session_file::{Origin, StateFile, StateFileError, save};
use crate::model::tokenizer::Tokenizer;

/// A turn that cannot be taken, or a chat that cannot be restored.
#[derive(Debug, thiserror::Error)]
pub enum DialogueError {
    /// The template does not take the messages.
    #[error(transparent)]
    Chat(#[from] ChatError),
    /// Tokens without text.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// The model cannot go on.
    #[error(transparent)]
    Generate(#[from] GenerateError),
    /// A stop string that cannot be used.
    #[error(transparent)]
    Stop(#[from] StopError),
    /// The state cannot be saved or restored.
    #[error(transparent)]
    State(#[from] StateFileError),
    /// A turn failed within: what the model has read is not what has been said.
    #[error(
        "a turn has failed within: expected the chat to be begun anew, or a saved one to be loaded"
    )]
    Torn,
    /// A saved state that is not a chat's.
    #[error("{path}: expected the state of one chat, got {got}")]
    NotAChat {
        /// The file.
        path: String,
        /// What it holds.
        got: String,
    },
}

/// What a turn says as it goes on.
#[derive(Debug, Clone, Copy)]
pub enum Progress<'a> {
    /// Tokens of the prompt that are still to be read.
    Reading(usize),
    /// More of the answer's text.
    Text(&'a str),
}

/// An answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    /// Its text.
    pub text: String,
    /// Tokens that were read for it: what the template writes after the last answer.
    pub read: Vec<u32>,
    /// Its tokens, with their log-probabilities.
    pub generated: Generated,
}

/// What has been said, saved with the state.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct Log {
    conversation: Conversation,
    /// The last answer, which the conversation gets with the next message.
    answer: Option<String>,
    /// Tokens of it that the session has not read.
    unread: Vec<u32>,
    /// Turns taken.
    turns: u64,
}

/// A chat.
#[derive(Debug)]
pub struct Dialogue<'m, D: Device> {
    chat: &'m Chat,
    tokenizer: &'m Tokenizer,
    session: Session<'m, D>,
    system: Option<String>,
    stops: Vec<String>,
    /// Tokens that the session has read.
    read: Vec<u32>,
    log: Log,
    /// Whether a turn has begun and not ended.
    torn: bool,
}

impl<'m, D: Device> Dialogue<'m, D> {
    /// A chat of at most `longest` tokens, which a model in segments may exceed, with a system message where one is
    /// given. `segments_per_step` as in [`Session::new`].
    ///
    /// # Errors
    /// Those of the device.
    pub fn new(
        model: &'m Decoder<D>,
        chat: &'m Chat,
        tokenizer: &'m Tokenizer,
        system: Option<String>,
        (longest, segments_per_step): (usize, usize),
    ) -> DeviceResult<Self> {
        let mut dialogue = Self {
            chat,
            tokenizer,
            session: Session::new(model, 1, longest, segments_per_step)?,
            system,
            stops: Vec::new(),
            read: Vec::new(),
            log: Log::default(),
            torn: false,
        };
        dialogue.forget();
        Ok(dialogue)
    }

    /// Ends answers before any of these texts.
    pub fn stop_at(mut self, stops: Vec<String>) -> Self {
        self.stops = stops;
        self
    }

    /// Begins anew.
    ///
    /// # Errors
    /// Those of the device.
    pub fn reset(&mut self) -> DeviceResult<()> {
        self.session.restart(0)?;
        self.forget();
        Ok(())
    }

    fn forget(&mut self) {
        self.read.clear();
        self.torn = false;
        self.log = Log::default();
        if let Some(system) = &self.system {
            self.log.conversation.push("system", system);
        }
    }

    /// The tokens that have been read: all but the last of an answer that has not ended by itself, and but its end.
    pub fn tokens(&self) -> &[u32] {
        &self.read
    }

    /// Says something, and takes the answer. Turn `n`, from 0, draws with the seed of `config` plus `n`. `each` sees
    /// the answer as it comes; `Break` ends it, but not what is read before it.
    ///
    /// # Errors
    /// [`DialogueError`]. Before anything is read ([`DialogueError::Chat`], [`GenerateError::TooLong`]) the chat is as
    /// it was; otherwise it can only be reset, or another one loaded: all else is [`DialogueError::Torn`].
    pub fn turn(
        &mut self,
        message: &str,
        mut config: GeneratorConfig,
        mut each: impl FnMut(Progress<'_>) -> ControlFlow<()>,
    ) -> Result<Answer, DialogueError> {
        if self.torn {
            return Err(DialogueError::Torn);
        }
        let (conversation, tokens) = self.next(message)?;
        config.sampler.seed = config.sampler.seed.wrapping_add(self.log.turns);
        let mut stream =
            TextStream::new(self.stops.clone())?.after(&[&self.read[..], &tokens].concat());
        let prompt = Prompt {
            before: &self.read,
            tokens: &tokens,
            breaks: &[],
            rereads: &[],
            stream: 0,
        };
        let mut generator = Generator::new(&mut self.session, &[prompt], config)?;
        self.torn = true;
        loop {
            let left = generator.read_prompts()?;
            // A prompt that is read in part could not be gone on with.
            let _ = each(Progress::Reading(left));
            if left == 0 {
                break;
            }
        }
        let decode = |tokens: &[u32]| self.tokenizer.decode(tokens, true);
        let mut text = String::new();
        while let Some(token) = generator.step()?.first().copied() {
            let mut part = String::new();
            if token.finish != Some(Finish::EndToken) {
                part = stream.push(token.token, decode)?.text;
            }
            text.push_str(&part);
            if each(Progress::Text(&part)).is_break() || stream.stopped().is_some() {
                generator.stop(0);
            }
        }
        if stream.stopped().is_none() {
            let rest = stream.finish(decode)?;
            text.push_str(&rest);
            let _ = each(Progress::Text(&rest));
        }
        let generated = generator.generated().remove(0);
        self.read.extend(tokens.iter().chain(&generated.tokens));
        let mut unread = self.read.split_off(self.session.position(0));
        if generated.finish == Some(Finish::EndToken) {
            // The template writes it, or what it has in its place.
            unread.pop();
        }
        self.log = Log {
            conversation,
            answer: Some(text.clone()),
            unread,
            turns: self.log.turns + 1,
        };
        self.torn = false;
        Ok(Answer {
            text,
            read: tokens,
            generated,
        })
    }

    /// The conversation with a message more, and the tokens to be read for it.
    fn next(&self, message: &str) -> Result<(Conversation, Vec<u32>), DialogueError> {
        let mut conversation = self.log.conversation.clone();
        let message = Data::message("user", message);
        let rendered = match &self.log.answer {
            None => {
                conversation.messages.push(message);
                self.chat.render(&conversation, true)?
            }
            Some(answer) => {
                let more = std::slice::from_ref(&message);
                let rendered = self.chat.after_answer(&conversation, more)?;
                conversation.push("assistant", answer);
                conversation.messages.push(message);
                rendered
            }
        };
        let mut tokens = self.log.unread.clone();
        tokens.extend(self.chat.encode(self.tokenizer, &rendered)?.ids);
        Ok((conversation, tokens))
    }

    /// Saves the state with what has been said. `weights` is the digest of the model's weights, see [`Origin`].
    ///
    /// # Errors
    /// [`DialogueError::State`], [`DialogueError::Torn`].
    pub fn save(&self, weights: &str, place: &OutputFile) -> Result<(), DialogueError> {
        if self.torn {
            return Err(DialogueError::Torn);
        }
        let note = serde_json::to_string(&self.log).map_err(|error| DialogueError::NotAChat {
            path: place.path().display().to_string(),
            got: error.to_string(),
        })?;
        let tokens = [self.read.clone()];
        let origin = Origin {
            tokens: &tokens,
            weights,
            note: &note,
        };
        Ok(save(&self.session, origin, place)?)
    }

    /// Goes on with a saved chat.
    ///
    /// # Errors
    /// [`DialogueError::NotAChat`], and the chat is as it was; [`DialogueError::State`], and it has been reset.
    pub fn load(&mut self, path: &Path, weights: &str) -> Result<(), DialogueError> {
        let mut file = StateFile::open(path)?;
        let other = |got: String| DialogueError::NotAChat {
            path: path.display().to_string(),
            got,
        };
        if file.note().is_empty() || file.positions().len() != 1 {
            return Err(other("that of `generate`".into()));
        }
        let log = serde_json::from_str(file.note()).map_err(|error| other(error.to_string()))?;
        let read = file.tokens(0)?;
        if let Err(error) = file.restore(&mut self.session, weights) {
            self.reset().map_err(GenerateError::from)?;
            return Err(error.into());
        }
        (self.read, self.log, self.torn) = (read, log, false);
        Ok(())
    }
}
