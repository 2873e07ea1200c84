//! Conversations as a model's chat template writes them.

use super::pieces::Conversed;
use crate::model::chat::{Chat, Conversation};
use crate::model::tokenizer::Tokenizer;

/// The tokens of a conversation, an object of JSON with `messages` and what else [`Conversation`] has.
///
/// # Errors
/// What is wrong with it, in words.
pub fn converse(
    chat: &Chat,
    tokenizer: &Tokenizer,
    conversation: &str,
) -> Result<Conversed, String> {
    let conversation: Conversation =
        serde_json::from_str(conversation).map_err(|error| error.to_string())?;
    let rendered = chat
        .answers(&conversation)
        .map_err(|error| error.to_string())?;
    let encoded = chat
        .encode(tokenizer, &rendered)
        .map_err(|error| error.to_string())?;
    if encoded.generated.iter().all(|answer| answer.is_empty()) {
        return Err("no message of the assistant".into());
    }
    Ok(Conversed {
        ids: encoded.ids,
        answers: encoded.generated,
    })
}
