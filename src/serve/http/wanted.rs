//! What requests for completions and for chats have in common: how tokens are chosen, and what is reported.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;

use super::Server;
use super::error::ApiError;
use super::fields::Fields;
use crate::generate::GeneratorConfig;
use crate::serve::job::{Event, Events, Job};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

/// Most stop strings, and most bytes of one.
const MOST_STOPS: usize = 16;
const LONGEST_STOP: usize = 1024;
/// Most of the likeliest tokens that are reported at a place.
pub const MOST_TOP: usize = 20;
/// New tokens of a completion where nothing says how many.
const DEFAULT_NEW: usize = 256;
/// Seeds that clients read exactly, whatever their numbers are.
const SEED_BITS: u64 = (1 << 53) - 1;

/// The common part of a request.
#[derive(Debug)]
pub struct Wanted {
    /// How tokens are chosen; `max_new` is what was asked for or the largest number.
    pub config: GeneratorConfig,
    /// Whether `max_new` was asked for.
    pub max_new_given: bool,
    /// Sequences of each prompt.
    pub n: usize,
    /// Stop strings.
    pub stops: Vec<String>,
    /// Whether the answer is streamed.
    pub stream: bool,
    /// Whether a stream ends with the usage.
    pub stream_usage: bool,
    /// Whether token ids are reported.
    pub token_ids: bool,
    /// Whether the prompt's log-probabilities are reported, with so many of the likeliest tokens.
    pub prompt_logprobs: Option<usize>,
}

impl Wanted {
    /// Takes the common fields.
    ///
    /// # Errors
    /// The first field with a wrong value.
    pub fn take(fields: &mut Fields, server: &Server) -> Result<Self, ApiError> {
        if let Some(model) = fields.string("model")?
            && model != server.name
        {
            return Err(ApiError::unknown_model(&server.name, &model));
        }
        let config = server.sampling(fields)?;
        let stops = fields.strings("stop", MOST_STOPS)?;
        if let Some(stop) = stops
            .iter()
            .find(|s| s.is_empty() || s.len() > LONGEST_STOP)
        {
            let expected = format!("strings of 1 to {LONGEST_STOP} bytes");
            return Err(ApiError::argument("stop", expected, format!("{stop:?}")));
        }
        if !stops.is_empty() && server.text.is_none() {
            return Err(ApiError::argument(
                "stop",
                "nothing: the model has no tokenizer",
                "strings",
            ));
        }
        let options = match fields.take("stream_options") {
            Some(serde_json::Value::Object(options)) => options,
            _ => Default::default(),
        };
        Ok(Self {
            max_new_given: config.max_new != usize::MAX,
            config,
            n: fields
                .count("n", 1..=server.handle.shared.limits.places())?
                .unwrap_or(1),
            stops,
            stream: fields.flag("stream")?,
            stream_usage: options.get("include_usage") == Some(&true.into()),
            token_ids: fields.flag("return_token_ids")?,
            prompt_logprobs: fields.count("prompt_logprobs", 0..=MOST_TOP)?,
        })
    }

    /// Gives the engine `n` sequences of each prompt, with the breaks and rereads of the turns that end in its first
    /// `read` tokens, and of the turn behind them. It reports `top` of the likeliest tokens and, with `prompt_top`,
    /// scores the prompt. Where nothing says how many new tokens there may be, there are as many as the model's
    /// settings say, else `default_new`, else as many as there is room for.
    ///
    /// # Errors
    /// A prompt that is too long or has tokens that the model has not; no place.
    pub fn start(
        &self,
        server: &Server,
        prompts: &[Vec<u32>],
        (read, [breaks, rereads]): (usize, &[Vec<usize>; 2]),
        [top, prompt_top]: [Option<usize>; 2],
        default_new: Option<usize>,
    ) -> Result<UnboundedReceiver<(usize, Event)>, ApiError> {
        let shared = &server.handle.shared;
        let longest = shared.limits.longest;
        let mut max_new = Vec::new();
        for prompt in prompts {
            server.check(prompt)?;
            let room = longest.saturating_sub(prompt.len());
            let default = server.max_new.or(default_new).unwrap_or(usize::MAX);
            let wanted = match self.max_new_given {
                true => self.config.max_new,
                false => default.min(room.max(1)),
            };
            if wanted > room {
                return Err(ApiError::too_long(format!(
                    "expected at most {longest} tokens, got {} of the prompt and {wanted} new ones",
                    prompt.len()
                )));
            }
            max_new.push(wanted);
        }
        let mut places = server
            .handle
            .places(prompts.len().saturating_mul(self.n))?
            .into_iter();
        let (to, from) = unbounded_channel();
        for (number, prompt) in prompts.iter().enumerate() {
            for copy in 0..self.n {
                let Some(permit) = places.next() else { break };
                let (mut breaks, mut rereads) = (breaks.clone(), rereads.clone());
                let turn = read..prompt.len();
                (shared.prompt_break).mark(turn, &mut breaks, &mut rereads);
                server.handle.run(Job {
                    prompt: prompt.clone(),
                    breaks,
                    rereads,
                    config: GeneratorConfig {
                        max_new: max_new[number],
                        ..self.config.clone()
                    },
                    // Copies of a prompt draw from streams of their own, as in a batch of `generate`.
                    stream: copy as u64,
                    stops: self.stops.clone(),
                    top: top.unwrap_or(0),
                    prompt_top,
                    events: Events {
                        index: number * self.n + copy,
                        to: to.clone(),
                    },
                    permit,
                })?;
            }
        }
        Ok(from)
    }

    /// New tokens of a completion where neither the request nor the model says how many.
    pub fn default_new() -> Option<usize> {
        Some(DEFAULT_NEW)
    }
}

impl Server {
    /// How tokens are chosen: the request's settings over the model's own.
    fn sampling(&self, fields: &mut Fields) -> Result<GeneratorConfig, ApiError> {
        let mut sampler = self.sampler;
        for (name, setting) in [
            ("temperature", &mut sampler.temperature),
            ("top_p", &mut sampler.top_p),
            ("min_p", &mut sampler.min_p),
            ("repetition_penalty", &mut sampler.repetition_penalty),
        ] {
            if let Some(value) = fields.number(name)? {
                *setting = value;
            }
        }
        if let Some(top_k) = fields.count("top_k", 0..=usize::MAX)? {
            sampler.top_k = top_k;
        }
        sampler.seed = match fields.seed()? {
            Some(seed) => seed,
            None => RandomState::new().hash_one(0) & SEED_BITS,
        };
        if let Err(error) = sampler.validate() {
            return Err(ApiError::wrong(error.to_string()));
        }
        let most = 0..=self.handle.shared.limits.longest;
        let max_new = fields.count("max_tokens", most.clone())?;
        let max_new = fields.count("max_completion_tokens", most)?.or(max_new);
        let mut end_tokens = match fields.flag("ignore_eos")? {
            true => Vec::new(),
            false => self.end_tokens.clone(),
        };
        end_tokens.extend(fields.ids("stop_token_ids")?.unwrap_or_default());
        Ok(GeneratorConfig {
            sampler,
            max_new: max_new.unwrap_or(usize::MAX),
            end_tokens,
        })
    }

    /// Checks the tokens of a prompt.
    fn check(&self, prompt: &[u32]) -> Result<(), ApiError> {
        let (vocab_size, longest) = (
            self.handle.shared.vocab_size,
            self.handle.shared.limits.longest,
        );
        if prompt.is_empty() {
            return Err(ApiError::argument("prompt", "at least one token", "none"));
        }
        if prompt.len() > longest {
            let got = prompt.len();
            return Err(ApiError::too_long(format!(
                "prompt: expected at most {longest} tokens, got {got}"
            )));
        }
        match prompt.iter().find(|id| **id as usize >= vocab_size) {
            None => Ok(()),
            Some(id) => Err(ApiError::argument(
                "prompt",
                format!("ids below {vocab_size}"),
                id,
            )),
        }
    }
}
