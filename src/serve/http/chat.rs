//! `/v1/chat/completions`.

use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::State;
use axum::extract::rejection::BytesRejection;
use axum::response::Response;
use serde_json::{Map, Value};

use super::answer::Answer;
use super::error::ApiError;
use super::fields::Fields;
use super::wanted::{MOST_TOP, Wanted};
use super::{Server, body, new_id, now};
use crate::model::chat::{Chat, Conversation, Encoded, Rendered};
use crate::model::config::PromptBreak;
use crate::model::error::ChatError;

/// Answers messages, as the model's chat template puts them into one text.
pub async fn completions(
    State(server): State<Arc<Server>>,
    bytes: Result<Bytes, BytesRejection>,
) -> Result<Response, ApiError> {
    let mut fields = Fields::parse(&body(bytes)?)?;
    let wanted = Wanted::take(&mut fields, &server)?;
    let (prompt, read, marks) = prompt(&mut fields, &server)?;
    let top = fields.count("top_logprobs", 0..=MOST_TOP)?;
    let logprobs = match fields.flag("logprobs")? {
        true => Some(top.unwrap_or(0)),
        false if top.is_some() => {
            return Err(ApiError::argument(
                "top_logprobs",
                "`logprobs` to be true",
                "false",
            ));
        }
        false => None,
    };
    fields.end()?;
    let prompts = vec![prompt];
    let events = wanted.start(
        &server,
        &prompts,
        (read, &marks),
        [logprobs, wanted.prompt_logprobs],
        None,
    )?;
    let answer = Answer {
        id: new_id("chatcmpl"),
        created: now(),
        chat: true,
        prompts,
        n: wanted.n,
        seed: wanted.config.sampler.seed,
        logprobs,
        echo: false,
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

/// Breaks and rereads.
type Marks = [Vec<usize>; 2];

/// The tokens of the messages, up to where the model writes; how many of them lie before the last turn; and, where
/// prompts end segments, the breaks and rereads of the turns before it, behind each of which the model wrote an answer.
/// They lie where `segattn chat` and training on conversations have them.
fn prompt(fields: &mut Fields, server: &Server) -> Result<(Vec<u32>, usize, Marks), ApiError> {
    let none = || ApiError::wrong("the model has no chat template: use /v1/completions");
    let chat = server.chat.as_ref().ok_or_else(none)?;
    let (conversation, answers) = conversation(fields)?;
    let whole = tokens(server, chat, chat.render(&conversation, true))?.ids;
    let (mut read, [mut breaks, mut rereads]) = (0, Marks::default());
    let own = server.handle.shared.prompt_break;
    if own != PromptBreak::default() {
        for answer in answers.into_iter().filter(|answer| *answer > 0) {
            // A template may write earlier messages otherwise: then the model never read this prompt.
            let up_to = chat.up_to_answer(&conversation, answer);
            let Ok(up_to) = tokens(server, chat, up_to) else {
                continue;
            };
            let Some(answer) = up_to.generated.last() else {
                continue;
            };
            if whole.starts_with(&up_to.ids[..answer.start]) {
                own.mark(read..answer.start.max(read), &mut breaks, &mut rereads);
                let goes_on = whole.starts_with(&up_to.ids[..answer.end]);
                // The last token of an answer is read with the turn that follows.
                read = match goes_on && !answer.is_empty() {
                    true => answer.end - 1,
                    false => answer.start,
                };
            }
        }
    }
    Ok((whole, read, [breaks, rereads]))
}

fn tokens(
    server: &Server,
    chat: &Chat,
    rendered: Result<Rendered, ChatError>,
) -> Result<Encoded, ApiError> {
    let wrong = |error: ChatError| ApiError::wrong(format!("messages: {error}"));
    let encoded = chat.encode(server.tokenizer()?, &rendered.map_err(wrong)?);
    encoded.map_err(wrong)
}

/// The messages, with contents in parts put together, and what else the template is given; and which messages are the
/// model's answers.
fn conversation(fields: &mut Fields) -> Result<(Conversation, Vec<usize>), ApiError> {
    let expected = "a list of messages with `role` and `content`";
    let mut messages = match fields.take("messages") {
        Some(Value::Array(messages)) if !messages.is_empty() => messages,
        other => {
            let got = other.map_or("none".into(), |other| other.to_string());
            return Err(ApiError::argument("messages", expected, got));
        }
    };
    for message in &mut messages {
        let given = message.clone();
        let Some(message) = message.as_object_mut() else {
            return Err(ApiError::argument("messages", expected, given));
        };
        if let Some(Value::Array(parts)) = message.get("content") {
            let part = |part: &Value| match part["type"] == "text" {
                true => part["text"].as_str().map(str::to_owned),
                false => None,
            };
            let Some(text) = parts.iter().map(part).collect::<Option<String>>() else {
                return Err(ApiError::argument("messages", "content of text", given));
            };
            message.insert("content".into(), text.into());
        }
    }
    let roles = messages.iter().map(|message| &message["role"]).enumerate();
    let answers = roles.filter(|(_, role)| *role == "assistant");
    let answers = answers.map(|(i, _)| i).collect();
    let mut all = Map::new();
    all.insert("messages".into(), messages.into());
    for name in ["documents", "chat_template_kwargs"] {
        if let Some(value) = fields.take(name) {
            all.insert(name.into(), value);
        }
    }
    let conversation = serde_json::from_value(all.into());
    let conversation =
        conversation.map_err(|error| ApiError::wrong(format!("messages: {error}")))?;
    Ok((conversation, answers))
}
