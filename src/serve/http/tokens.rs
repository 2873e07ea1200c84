//! `/tokenize` and `/detokenize`.

use std::sync::Arc;

use axum::Json;
use axum::body::Bytes;
use axum::extract::State;
use axum::extract::rejection::BytesRejection;
use serde_json::{Value, json};

use super::error::ApiError;
use super::fields::Fields;
use super::{Server, body};

/// The tokens of a text.
pub async fn tokenize(
    State(server): State<Arc<Server>>,
    bytes: Result<Bytes, BytesRejection>,
) -> Result<Json<Value>, ApiError> {
    let mut fields = Fields::parse(&body(bytes)?)?;
    let Some(text) = fields.string("prompt")? else {
        return Err(ApiError::argument("prompt", "a text", "nothing"));
    };
    let framed = fields.take("add_special_tokens") != Some(false.into());
    let tokens = server.tokenizer()?.encode(&text, framed);
    let tokens = tokens.map_err(|error| ApiError::wrong(error.to_string()))?;
    Ok(Json(json!({
        "count": tokens.len(),
        "max_model_len": server.handle.shared.limits.longest,
        "tokens": tokens,
    })))
}

/// The text of tokens.
pub async fn detokenize(
    State(server): State<Arc<Server>>,
    bytes: Result<Bytes, BytesRejection>,
) -> Result<Json<Value>, ApiError> {
    let mut fields = Fields::parse(&body(bytes)?)?;
    let Some(tokens) = fields.ids("tokens")? else {
        return Err(ApiError::argument(
            "tokens",
            "a list of token ids",
            "nothing",
        ));
    };
    let vocab_size = server.handle.shared.vocab_size;
    if let Some(id) = tokens.iter().find(|id| **id as usize >= vocab_size) {
        let expected = format!("ids below {vocab_size}");
        return Err(ApiError::argument("tokens", expected, id));
    }
    let text = server.tokenizer()?.decode(&tokens, false);
    let text = text.map_err(|error| ApiError::wrong(error.to_string()))?;
    Ok(Json(json!({ "prompt": text })))
}
