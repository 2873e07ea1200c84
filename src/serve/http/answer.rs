//! Answers of completions and chats, as a whole or piece by piece.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;

use axum::Json;
use axum::body::{Body, Bytes};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use futures_util::stream::unfold;
use serde_json::{Value, json};
use tokio::sync::mpsc::UnboundedReceiver;

use super::Server;
use super::error::ApiError;
use super::scores;
use crate::serve::job::{Event, Failure, PromptRead, Ranked, Token};

/// What an answer says beside its choices, and how its choices are written.
#[derive(Debug)]
pub struct Answer {
    pub server: Arc<Server>,
    pub id: String,
    pub created: u64,
    pub chat: bool,
    pub prompts: Vec<Vec<u32>>,
    /// Sequences of each prompt.
    pub n: usize,
    pub seed: u64,
    /// Whether log-probabilities are reported, with so many of the likeliest tokens.
    pub logprobs: Option<usize>,
    /// Whether a completion begins with its prompt.
    pub echo: bool,
    pub token_ids: bool,
    pub prompt_logprobs: bool,
    /// Whether a stream ends with the usage.
    pub stream_usage: bool,
}

/// What a choice says at a time.
#[derive(Debug, Default)]
struct Piece {
    prompt: Option<PromptRead>,
    tokens: Vec<Token>,
    text: String,
    finish: Option<&'static str>,
}

/// Where a choice stands.
#[derive(Debug, Clone, Default)]
struct Progress {
    new: usize,
    cached: usize,
    /// Characters of the text so far.
    offset: usize,
    ended: bool,
}

type Events = UnboundedReceiver<(usize, Event)>;

impl Piece {
    /// Takes an event.
    fn take(&mut self, event: Event, progress: &mut Progress) -> Result<(), Failure> {
        match event {
            Event::Prompt(prompt) => {
                progress.cached = prompt.cached;
                self.prompt = Some(prompt);
            }
            Event::Token(mut token) => {
                progress.new += 1;
                self.text.push_str(&std::mem::take(&mut token.text));
                self.tokens.push(token);
            }
            Event::End(end) => {
                progress.ended = true;
                self.text.push_str(&end.text);
                self.finish = Some(if end.stopped { "stop" } else { "length" });
            }
            Event::Failed(failure) => return Err(failure),
        }
        Ok(())
    }
}

impl Answer {
    fn choices(&self) -> usize {
        self.prompts.len() * self.n
    }

    /// The whole answer, once all its sequences have ended.
    ///
    /// # Errors
    /// The first failure of a sequence.
    pub async fn whole(self, mut events: Events) -> Result<Response, ApiError> {
        let mut progress = vec![Progress::default(); self.choices()];
        let mut pieces: Vec<Piece> = progress.iter().map(|_| Piece::default()).collect();
        while progress.iter().any(|p| !p.ended) {
            let (index, event) = events.recv().await.ok_or(Failure::Stopping)?;
            pieces[index].take(event, &mut progress[index])?;
        }
        let each = pieces.iter().zip(&mut progress).enumerate();
        let choices =
            each.map(|(index, (piece, progress))| self.choice(index, piece, progress, false));
        let choices: Vec<Value> = choices.collect();
        let mut answer = self.frame(choices, false);
        answer["usage"] = self.usage(&progress);
        if self.chat {
            self.about_prompt(0, pieces[0].prompt.as_ref(), &mut answer);
        }
        Ok(Json(answer).into_response())
    }

    /// The answer piece by piece, as server-sent events.
    pub fn streamed(self, events: Events) -> Response {
        let progress = vec![Progress::default(); self.choices()];
        let state = Stream {
            answer: self,
            events,
            progress,
            ready: VecDeque::new(),
            done: false,
        };
        let body = Body::from_stream(unfold(state, |mut state| async {
            let bytes = state.next().await?;
            Some((Ok::<_, Infallible>(bytes), state))
        }));
        let kind = (header::CONTENT_TYPE, "text/event-stream");
        let fresh = (header::CACHE_CONTROL, "no-cache");
        ([kind, fresh], body).into_response()
    }

    fn frame(&self, choices: Vec<Value>, chunk: bool) -> Value {
        let object = match (self.chat, chunk) {
            (true, true) => "chat.completion.chunk",
            (true, false) => "chat.completion",
            (false, _) => "text_completion",
        };
        json!({
            "id": self.id,
            "object": object,
            "created": self.created,
            "model": self.server.name,
            "seed": self.seed,
            "choices": choices,
        })
    }

    fn usage(&self, progress: &[Progress]) -> Value {
        let prompt: usize = self.prompts.iter().map(Vec::len).sum();
        let new: usize = progress.iter().map(|p| p.new).sum();
        // Of each prompt's copies the first reads it.
        let cached: usize = progress.iter().step_by(self.n).map(|p| p.cached).sum();
        json!({
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
            "prompt_tokens_details": {"cached_tokens": cached},
        })
    }

    fn choice(&self, index: usize, piece: &Piece, progress: &mut Progress, chunk: bool) -> Value {
        let prompt = &self.prompts[index / self.n];
        let mut choice = match (self.chat, chunk) {
            (true, true) => {
                let role = piece.prompt.as_ref().map(|_| "assistant");
                let delta = match role {
                    Some(role) => json!({"role": role, "content": piece.text}),
                    None => json!({"content": piece.text}),
                };
                json!({"index": index, "delta": delta})
            }
            (true, false) => {
                let message = json!({"role": "assistant", "content": piece.text, "refusal": null});
                json!({"index": index, "message": message})
            }
            (false, _) => {
                let mut text = String::new();
                if self.echo && piece.prompt.is_some() {
                    text = self.server.decode(prompt);
                }
                text.push_str(&piece.text);
                json!({"index": index, "text": text})
            }
        };
        choice["logprobs"] = self.logprobs_of(prompt, piece, progress);
        choice["finish_reason"] = piece.finish.into();
        if self.token_ids {
            let ids: Vec<u32> = piece.tokens.iter().map(|token| token.id).collect();
            choice["token_ids"] = ids.into();
        }
        if !self.chat {
            self.about_prompt(index, piece.prompt.as_ref(), &mut choice);
        }
        choice
    }

    /// Ids and log-probabilities of the prompt, where they are asked for.
    fn about_prompt(&self, index: usize, read: Option<&PromptRead>, to: &mut Value) {
        let Some(read) = read else { return };
        let prompt = &self.prompts[index / self.n];
        if self.token_ids {
            to["prompt_token_ids"] = prompt.clone().into();
        }
        if self.prompt_logprobs {
            let places = self.prompt_places(prompt, read).map(|(token, top)| {
                token.map_or(Value::Null, |token| scores::by_id(&self.server, token, top))
            });
            to["prompt_logprobs"] = places.collect();
        }
    }

    /// Each token of a scored prompt with the likeliest ones at its place; nothing is known of the first.
    fn prompt_places<'a>(
        &self,
        prompt: &'a [u32],
        read: &'a PromptRead,
    ) -> impl Iterator<Item = (Option<Ranked>, &'a [Ranked])> {
        let later = prompt.iter().skip(1).zip(&read.scores).enumerate();
        let later = later.map(|(i, (id, score))| {
            let top = read.top.get(i).map_or(&[][..], Vec::as_slice);
            (Some((*id, *score)), top)
        });
        std::iter::once((None, &[][..])).chain(later)
    }

    fn logprobs_of(&self, prompt: &[u32], piece: &Piece, progress: &mut Progress) -> Value {
        let Some(top) = self.logprobs else {
            return Value::Null;
        };
        let new = piece.tokens.iter();
        let new = new.map(|token| ((token.id, token.log_probability), token.top.as_slice()));
        if self.chat {
            let content = new.map(|(token, top)| scores::content(&self.server, token, top));
            return json!({"content": content.collect::<Vec<_>>(), "refusal": null});
        }
        let mut places = scores::Places::new(&self.server, progress.offset, top);
        if let Some(read) = piece.prompt.as_ref().filter(|_| self.echo) {
            for (i, (token, likeliest)) in self.prompt_places(prompt, read).enumerate() {
                places.push(prompt[i], token.map(|t| t.1), likeliest);
            }
        }
        for ((id, score), likeliest) in new {
            places.push(id, Some(score), likeliest);
        }
        progress.offset = places.offset;
        places.into_json()
    }
}

/// A stream's state.
struct Stream {
    answer: Answer,
    events: Events,
    progress: Vec<Progress>,
    ready: VecDeque<Value>,
    done: bool,
}

impl Stream {
    /// The next bytes.
    async fn next(&mut self) -> Option<Bytes> {
        loop {
            if let Some(ready) = self.ready.pop_front() {
                return Some(Bytes::from(format!("data: {ready}\n\n")));
            }
            if self.done {
                return None;
            }
            if self.progress.iter().all(|p| p.ended) {
                self.done = true;
                return Some(self.last());
            }
            let event = self.events.recv().await;
            let (index, event) = event.unwrap_or((0, Event::Failed(Failure::Stopping)));
            let mut piece = Piece::default();
            match piece.take(event, &mut self.progress[index]) {
                Ok(()) => self.tell(index, &piece),
                Err(failure) => {
                    self.done = true;
                    self.ready.push_back(ApiError::from(failure).to_json());
                }
            }
        }
    }

    fn tell(&mut self, index: usize, piece: &Piece) {
        let answer = &self.answer;
        let says_ids = answer.logprobs.is_some() || answer.token_ids;
        let says_prompt = answer.chat || answer.echo || answer.token_ids || answer.prompt_logprobs;
        let says = match (&piece.prompt, piece.finish) {
            (_, Some(_)) => true,
            (Some(_), None) => says_prompt,
            (None, None) => says_ids || !piece.text.is_empty(),
        };
        if !says {
            return;
        }
        let choice = answer.choice(index, piece, &mut self.progress[index], true);
        let mut chunk = answer.frame(vec![choice], true);
        if answer.chat {
            answer.about_prompt(index, piece.prompt.as_ref(), &mut chunk);
        }
        if answer.stream_usage {
            chunk["usage"] = Value::Null;
        }
        self.ready.push_back(chunk);
    }

    /// The end of the stream, after the usage where it is asked for.
    fn last(&self) -> Bytes {
        let mut text = String::new();
        if self.answer.stream_usage {
            let mut chunk = self.answer.frame(Vec::new(), true);
            chunk["usage"] = self.answer.usage(&self.progress);
            text = format!("data: {chunk}\n\n");
        }
        Bytes::from(text + "data: [DONE]\n\n")
    }
}
