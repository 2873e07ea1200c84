//! Conversations as a model's chat template writes them.

use super::pieces::Conversed;
use crate::model::chat::{Chat, Conversation};
use crate::model::error::ChatError;
use crate::model::tokenizer::Tokenizer;

/// The tokens of a conversation, an object of JSON with `messages` and what else [`Conversation`] has; of each of its
/// texts where it takes several ([`Chat::answers`]).
///
/// # Errors
/// What is wrong with it, in words.
pub fn converse(
    chat: &Chat,
    tokenizer: &Tokenizer,
    conversation: &str,
) -> Result<Vec<Conversed>, String> {
    let said = |error: ChatError| error.to_string();
    let conversation: Conversation =
        serde_json::from_str(conversation).map_err(|error| error.to_string())?;
    let mut texts = Vec::new();
    for rendered in chat.answers(&conversation).map_err(said)? {
        let encoded = chat.encode(tokenizer, &rendered).map_err(said)?;
        if encoded.generated.iter().any(|answer| !answer.is_empty()) {
            texts.push(Conversed {
                ids: encoded.ids,
                answers: encoded.generated,
            });
        }
    }
    match texts.is_empty() {
        true => Err("no message of the assistant".into()),
        false => Ok(texts),
    }
}
