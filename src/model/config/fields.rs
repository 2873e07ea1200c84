//! Typed, bounded access to the keys of a JSON object, with errors that name the key.

use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use crate::model::error::ConfigError;

/// Longest piece of a wrong value that an error repeats.
const SHOWN_CHARS: usize = 80;

/// One JSON object and where it stands in `config.json`.
#[derive(Clone, Copy)]
pub(in crate::model) struct Fields<'a> {
    object: &'a Map<String, Value>,
    /// Prefix of its keys in errors: "" or "segment.".
    prefix: &'a str,
}

impl<'a> Fields<'a> {
    pub(in crate::model) fn new(object: &'a Map<String, Value>, prefix: &'a str) -> Self {
        Self { object, prefix }
    }

    pub(in crate::model) fn path(&self, key: &str) -> String {
        format!("{}{key}", self.prefix)
    }

    /// All keys with their values.
    pub(in crate::model) fn iter(&self) -> impl Iterator<Item = (&'a String, &'a Value)> {
        self.object.iter()
    }

    /// The value of `key`; `null` counts as absent, as it does in the Hugging Face library.
    pub(in crate::model) fn get(&self, key: &str) -> Option<&'a Value> {
        self.object.get(key).filter(|value| !value.is_null())
    }

    /// Whether the key is there, be it `null`.
    pub(in crate::model) fn has(&self, key: &str) -> bool {
        self.object.contains_key(key)
    }

    pub(in crate::model) fn missing(&self, key: &str) -> ConfigError {
        ConfigError::Missing {
            key: self.path(key),
        }
    }

    pub(in crate::model) fn invalid(
        &self,
        key: &str,
        expected: impl Into<String>,
        got: &Value,
    ) -> ConfigError {
        ConfigError::Invalid {
            key: self.path(key),
            expected: expected.into(),
            got: shown(got),
        }
    }

    pub(in crate::model) fn unsupported(
        &self,
        key: &str,
        supported: &str,
        got: &Value,
    ) -> ConfigError {
        ConfigError::Unsupported {
            key: self.path(key),
            supported: supported.into(),
            got: shown(got),
        }
    }

    pub(in crate::model) fn size(
        &self,
        key: &str,
        bounds: RangeInclusive<usize>,
    ) -> Result<Option<usize>, ConfigError> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        value
            .as_u64()
            .and_then(|number| usize::try_from(number).ok())
            .filter(|number| bounds.contains(number))
            .map(Some)
            .ok_or_else(|| {
                let (low, high) = (bounds.start(), bounds.end());
                self.invalid(key, format!("an integer from {low} to {high}"), value)
            })
    }

    pub(in crate::model) fn required_size(
        &self,
        key: &str,
        bounds: RangeInclusive<usize>,
    ) -> Result<usize, ConfigError> {
        self.size(key, bounds)?.ok_or_else(|| self.missing(key))
    }

    pub(in crate::model) fn number(&self, key: &str) -> Result<Option<f64>, ConfigError> {
        self.get(key)
            .map(|value| {
                value
                    .as_f64()
                    .filter(|number| number.is_finite())
                    .ok_or_else(|| self.invalid(key, "a finite number", value))
            })
            .transpose()
    }

    pub(in crate::model) fn required_number(&self, key: &str) -> Result<f64, ConfigError> {
        self.number(key)?.ok_or_else(|| self.missing(key))
    }

    pub(in crate::model) fn flag(&self, key: &str) -> Result<Option<bool>, ConfigError> {
        self.get(key)
            .map(|value| {
                value
                    .as_bool()
                    .ok_or_else(|| self.invalid(key, "true or false", value))
            })
            .transpose()
    }

    pub(in crate::model) fn text(&self, key: &str) -> Result<Option<&'a str>, ConfigError> {
        self.get(key)
            .map(|value| {
                value
                    .as_str()
                    .ok_or_else(|| self.invalid(key, "a string", value))
            })
            .transpose()
    }

    pub(in crate::model) fn object(
        &self,
        key: &str,
    ) -> Result<Option<&'a Map<String, Value>>, ConfigError> {
        self.get(key)
            .map(|value| {
                value
                    .as_object()
                    .ok_or_else(|| self.invalid(key, "an object", value))
            })
            .transpose()
    }

    pub(in crate::model) fn list(&self, key: &str) -> Result<Option<&'a [Value]>, ConfigError> {
        self.get(key)
            .map(|value| {
                value
                    .as_array()
                    .map(Vec::as_slice)
                    .ok_or_else(|| self.invalid(key, "a list", value))
            })
            .transpose()
    }

    /// Refuses every key that is not in `known`: a misspelt key must not silently mean its default.
    pub(in crate::model) fn only(&self, known: &[&str]) -> Result<(), ConfigError> {
        match self
            .object
            .iter()
            .find(|(key, _)| !known.contains(&key.as_str()))
        {
            None => Ok(()),
            Some((key, _)) => Err(ConfigError::Invalid {
                key: self.path(&shortened(key)),
                expected: format!("one of the keys {}", known.join(", ")),
                got: "an unknown key".into(),
            }),
        }
    }
}

/// A value as an error shows it: its JSON text, cut where it gets long.
pub(in crate::model) fn shown(value: &Value) -> String {
    match value {
        Value::Array(items) if items.len() > 8 => format!("a list of {}", items.len()),
        Value::Object(fields) => format!("an object of {} keys", fields.len()),
        other => shortened(&other.to_string()),
    }
}

fn shortened(text: &str) -> String {
    let mut cut: String = text.chars().take(SHOWN_CHARS).collect();
    if cut.len() < text.len() {
        cut.push_str("...");
    }
    cut
}

/// One id or a list of at most `most`; negative ones are left out.
pub(in crate::model) fn token_id_list(value: &Value, most: usize) -> Option<Vec<u32>> {
    let id = |value: &Value| match value.as_i64()? {
        negative if negative < 0 => Some(None),
        id => u32::try_from(id).ok().map(Some),
    };
    let ids: Option<Vec<Option<u32>>> = match value {
        Value::Array(ids) if ids.len() <= most => ids.iter().map(id).collect(),
        Value::Array(_) => None,
        one => Some(vec![id(one)?]),
    };
    Some(ids?.into_iter().flatten().collect())
}
