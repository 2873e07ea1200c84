//! The fields of a request's object, taken out one by one. `null` is as good as nothing.

use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use super::error::ApiError;

/// Fields that change the result, by the value that switches each off; this server has not what they ask for.
const NOT_HERE: [&str; 13] = [
    "audio",
    "best_of",
    "frequency_penalty",
    "function_call",
    "functions",
    "guided_json",
    "guided_regex",
    "logit_bias",
    "presence_penalty",
    "response_format",
    "suffix",
    "tool_choice",
    "tools",
];

/// What is left of a request's fields.
#[derive(Debug)]
pub struct Fields(Map<String, Value>);

type Result<T> = std::result::Result<T, ApiError>;

impl Fields {
    /// Those of a body.
    ///
    /// # Errors
    /// The body is no JSON, or no object.
    pub fn parse(body: &[u8]) -> Result<Self> {
        match serde_json::from_slice(body) {
            Ok(Value::Object(fields)) => Ok(Self(fields)),
            Ok(other) => {
                let got = kind(&other);
                Err(ApiError::wrong(format!(
                    "the body: expected a JSON object, got {got}"
                )))
            }
            Err(error) => Err(ApiError::wrong(format!("the body is no JSON: {error}"))),
        }
    }

    /// A field that is there.
    pub fn take(&mut self, name: &str) -> Option<Value> {
        self.0.remove(name).filter(|value| !value.is_null())
    }

    fn read<T>(
        &mut self,
        name: &str,
        expected: &str,
        read: impl Fn(&Value) -> Option<T>,
    ) -> Result<Option<T>> {
        match self.take(name) {
            None => Ok(None),
            Some(value) => match read(&value) {
                Some(read) => Ok(Some(read)),
                None => Err(ApiError::argument(name, expected, value)),
            },
        }
    }

    /// True or false; false where it is not there.
    pub fn flag(&mut self, name: &str) -> Result<bool> {
        Ok(self
            .read(name, "true or false", Value::as_bool)?
            .unwrap_or(false))
    }

    /// A number.
    pub fn number(&mut self, name: &str) -> Result<Option<f32>> {
        self.read(name, "a number", |value| value.as_f64().map(|x| x as f32))
    }

    /// A whole number in a range.
    pub fn count(&mut self, name: &str, range: RangeInclusive<usize>) -> Result<Option<usize>> {
        let expected = match *range.end() {
            usize::MAX => format!("a whole number of at least {}", range.start()),
            end => format!("a whole number from {} to {end}", range.start()),
        };
        self.read(name, &expected, |value| {
            let count = usize::try_from(value.as_u64()?).ok()?;
            range.contains(&count).then_some(count)
        })
    }

    /// A seed. Negative numbers are taken for what they are in 64 bits.
    pub fn seed(&mut self) -> Result<Option<u64>> {
        self.read("seed", "a whole number", |value| {
            value.as_u64().or(value.as_i64().map(i64::cast_unsigned))
        })
    }

    /// A string.
    pub fn string(&mut self, name: &str) -> Result<Option<String>> {
        self.read(name, "a string", |value| value.as_str().map(str::to_owned))
    }

    /// A string or a list of them, at most `most`.
    pub fn strings(&mut self, name: &str, most: usize) -> Result<Vec<String>> {
        let expected = format!("a string or a list of at most {most}");
        let read = self.read(name, &expected, |value| {
            let one = |value: &Value| value.as_str().map(str::to_owned);
            match value {
                Value::Array(all) if all.len() <= most => all.iter().map(one).collect(),
                value => Some(vec![one(value)?]),
            }
        })?;
        Ok(read.unwrap_or_default())
    }

    /// A list of token ids.
    pub fn ids(&mut self, name: &str) -> Result<Option<Vec<u32>>> {
        self.read(name, "a list of token ids", ids)
    }

    /// Refuses what is left if it asks for something that this server has not; the rest says nothing about the result.
    pub fn end(mut self) -> Result<()> {
        for name in NOT_HERE {
            let Some(value) = self.take(name) else {
                continue;
            };
            let off = match &value {
                Value::Number(number) => {
                    number.as_f64() == Some(if name == "best_of" { 1.0 } else { 0.0 })
                }
                Value::String(text) => text.is_empty() || text == "none" || text == "auto",
                Value::Array(all) => all.is_empty(),
                Value::Object(all) => all.is_empty() || all.get("type") == Some(&"text".into()),
                _ => false,
            };
            if !off {
                return Err(ApiError::argument(
                    name,
                    "nothing: this server does not support it",
                    value,
                ));
            }
        }
        Ok(())
    }
}

/// Token ids of a list of numbers.
pub fn ids(value: &Value) -> Option<Vec<u32>> {
    let id = |value: &Value| u32::try_from(value.as_u64()?).ok();
    value.as_array()?.iter().map(id).collect()
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}
