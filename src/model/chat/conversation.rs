//! What is said to a template.

use minijinja::Value;
use minijinja::value::ValueKind;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::model::error::ChatError;

/// A value of JSON. Objects keep the order of their keys, which templates write.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Data(Value);

impl Data {
    /// A message of text.
    pub fn message(role: &str, content: &str) -> Self {
        let pairs = [("role", role), ("content", content)];
        Self(Value::from_pairs(pairs))
    }

    pub(super) fn value(&self) -> &Value {
        &self.0
    }

    /// Whether this is a message of the assistant.
    fn is_answer(&self) -> bool {
        let role = self.0.get_attr("role");
        role.is_ok_and(|role| role.as_str() == Some("assistant"))
    }
}

impl<'de> Deserialize<'de> for Data {
    fn deserialize<D: Deserializer<'de>>(input: D) -> Result<Self, D::Error> {
        Value::deserialize(input).map(Self)
    }
}

impl Serialize for Data {
    fn serialize<S: Serializer>(&self, output: S) -> Result<S::Ok, S::Error> {
        self.0.serialize(output)
    }
}

/// Messages, and what else a template is given. In JSON an object with these keys, of which only `messages` is needed;
/// others are passed over.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, Serialize)]
pub struct Conversation {
    /// The messages: objects with `role`, `content`, and what else the template reads. Keys whose value is null are
    /// left out of them, as Transformers does.
    pub messages: Vec<Data>,
    /// Descriptions of functions that the model may call.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tools: Option<Data>,
    /// Documents for the model to read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub documents: Option<Data>,
    /// Further names that the template reads, an object.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chat_template_kwargs: Option<Data>,
}

impl Conversation {
    /// Adds a message of text.
    pub fn push(&mut self, role: &str, content: &str) {
        self.messages.push(Data::message(role, content));
    }

    /// The same with the first `count` messages only.
    pub(super) fn first(&self, count: usize) -> Self {
        Self {
            messages: self.messages[..count].to_vec(),
            ..self.clone()
        }
    }

    /// Which messages are the assistant's.
    pub(super) fn answers(&self) -> impl Iterator<Item = usize> {
        let messages = self.messages.iter().enumerate();
        messages.filter(|(_, m)| m.is_answer()).map(|(i, _)| i)
    }

    /// The names that the template gets.
    pub(super) fn values(&self) -> Result<Vec<(String, Value)>, ChatError> {
        let mut messages: Vec<Value> = Vec::with_capacity(self.messages.len());
        for (i, message) in self.messages.iter().enumerate() {
            let message = object(&format!("message {i}"), message)?;
            messages.push(Value::from_pairs(
                message.filter(|(_, value)| !value.is_none()),
            ));
        }
        if messages.is_empty() {
            return Err(ChatError::Messages {
                what: "all".into(),
                expected: "at least one message".into(),
                got: "none".into(),
            });
        }
        let given =
            |data: &Option<Data>| data.as_ref().map_or(Value::from(()), |data| data.0.clone());
        let mut values = vec![
            ("messages".to_owned(), Value::from(messages)),
            ("tools".to_owned(), given(&self.tools)),
            ("documents".to_owned(), given(&self.documents)),
        ];
        if let Some(more) = &self.chat_template_kwargs {
            for (name, value) in object("chat_template_kwargs", more)? {
                let name = name.to_string();
                if values.iter().any(|(own, _)| *own == name) {
                    return Err(ChatError::Messages {
                        what: "chat_template_kwargs".into(),
                        expected: "names that the template does not have already".into(),
                        got: name,
                    });
                }
                values.push((name, value));
            }
        }
        Ok(values)
    }
}

/// Keys and values of an object.
fn object<'a>(
    what: &str,
    data: &'a Data,
) -> Result<impl Iterator<Item = (Value, Value)> + 'a, ChatError> {
    if data.0.kind() != ValueKind::Map {
        return Err(ChatError::Messages {
            what: what.to_owned(),
            expected: "an object".into(),
            got: data.0.kind().to_string(),
        });
    }
    let keys = data.0.try_iter().into_iter().flatten();
    Ok(keys.map(|key| {
        let value = data.0.get_item(&key).unwrap_or_default();
        (key, value)
    }))
}
