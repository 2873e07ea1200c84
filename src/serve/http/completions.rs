//! `/v1/completions`.

use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::State;
use axum::extract::rejection::BytesRejection;
use axum::response::Response;
use serde_json::Value;

use super::answer::Answer;
use super::error::ApiError;
use super::fields::{Fields, ids};
use super::wanted::{MOST_TOP, Wanted};
use super::{Server, body, new_id, now};

/// Most prompts of a request.
const MOST_PROMPTS: usize = 1024;

/// Continues one prompt or several, each as text or token ids.
pub async fn completions(
    State(server): State<Arc<Server>>,
    bytes: Result<Bytes, BytesRejection>,
) -> Result<Response, ApiError> {
    let mut fields = Fields::parse(&body(bytes)?)?;
    let wanted = Wanted::take(&mut fields, &server)?;
    let prompts = prompts(&mut fields, &server)?;
    let logprobs = fields.count("logprobs", 0..=MOST_TOP)?;
    let echo = fields.flag("echo")?;
    fields.end()?;
    if echo {
        server.tokenizer()?;
    }
    // The prompt is scored where it is shown with log-probabilities.
    let echoed = logprobs.filter(|_| echo);
    let prompt_top = wanted.prompt_logprobs.max(echoed);
    let events = wanted.start(
        &server,
        &prompts,
        (0, &Default::default()),
        [logprobs, prompt_top],
        Wanted::default_new(),
    )?;
    let answer = Answer {
        id: new_id("cmpl"),
        created: now(),
        chat: false,
        prompts,
        n: wanted.n,
        seed: wanted.config.sampler.seed,
        logprobs,
        echo,
        token_ids: wanted.token_ids,
        prompt_logprobs: wanted.prompt_logprobs.is_some(),
        stream_usage: wanted.stream_usage,
        server,
    };
    match wanted.stream {
        true => Ok(answer.streamed(events)),
        false => answer.whole(events).await,
    }
}

/// A text, token ids, or a list of either.
fn prompts(fields: &mut Fields, server: &Server) -> Result<Vec<Vec<u32>>, ApiError> {
    let expected =
        format!("a text, a list of token ids, or a list of at most {MOST_PROMPTS} of either");
    let Some(prompt) = fields.take("prompt") else {
        return Err(ApiError::argument("prompt", expected, "nothing"));
    };
    if let Some(text) = prompt.as_str() {
        return Ok(vec![server.encode(text)?]);
    }
    let one = |value: &Value| match value.as_str() {
        Some(text) => Ok(Some(server.encode(text)?)),
        None => Ok(ids(value)),
    };
    let all = match (ids(&prompt), prompt.as_array()) {
        (Some(ids), _) if !ids.is_empty() => Some(vec![ids]),
        (_, Some(all)) if (1..=MOST_PROMPTS).contains(&all.len()) => all
            .iter()
            .map(one)
            .collect::<Result<Option<Vec<_>>, ApiError>>()?,
        _ => None,
    };
    all.ok_or_else(|| ApiError::argument("prompt", expected, prompt))
}
