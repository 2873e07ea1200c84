//! Laying flags over the file's value tree, and errors that name the key.

use serde_json::Value as Json;
use toml::{Table, Value};

use super::Config;
use super::flags::default_tree;
use crate::train::error::{Result, TrainError};

/// What a flag says to unset a key that has no value by default.
const NONE: &str = "none";

/// The configuration in `text`, with `overrides` over it, not yet checked for ranges.
pub(super) fn parse(text: &str, overrides: &[(String, String)]) -> Result<Config> {
    let mut tree: Table = text.parse().map_err(|error| syntax(text, &error))?;
    for (key, value) in overrides {
        lay_over(&mut tree, &key.replace('-', "_"), value)?;
    }
    serde_path_to_error::deserialize(Value::Table(tree)).map_err(|error| {
        let path = error.path().to_string();
        let message = error.into_inner().message().to_owned();
        typed(path, &message)
    })
}

/// Sets one dotted key.
fn lay_over(tree: &mut Table, key: &str, text: &str) -> Result<()> {
    let parts: Vec<&str> = key.split('.').collect();
    let mut shape = default_tree();
    for part in &parts {
        shape = match shape {
            Json::Object(mut keys) if keys.contains_key(*part) => keys.remove(*part),
            Json::Object(keys) => {
                let names: Vec<_> = keys.keys().map(String::as_str).collect();
                let expected = format!("one of {}", names.join(", "));
                let got = format!("`{part}`{}", did_you_mean(part, &names));
                return Err(TrainError::config(key, expected, got));
            }
            _ => None,
        }
        .ok_or_else(|| TrainError::config(key, "a key", "something below a value"))?;
    }
    let (last, folders) = parts
        .split_last()
        .expect("splitting gives one part or more");
    let mut table = tree;
    for folder in folders {
        let entry = table.entry(*folder).or_insert(Value::Table(Table::new()));
        let got = entry.type_str();
        table = entry
            .as_table_mut()
            .ok_or_else(|| TrainError::config(*folder, "a table", got))?;
    }
    match value(key, &shape, text)? {
        Some(value) => drop(table.insert((*last).into(), value)),
        None => drop(table.remove(*last)),
    }
    Ok(())
}

/// A flag's text as the kind of value its key has by default; `None` unsets the key.
fn value(key: &str, default: &Json, text: &str) -> Result<Option<Value>> {
    let parsed = || format!("x = {text}").parse::<Table>().ok()?.remove("x");
    let string = || Value::String(text.to_owned());
    Ok(Some(match default {
        Json::Object(_) => return Err(TrainError::config(key, "one of its keys", text)),
        Json::String(_) => string(),
        // A list of one string may be written without brackets, one of several with commas.
        Json::Array(_) => parsed().filter(Value::is_array).unwrap_or_else(|| {
            let items = text.split(',').map(str::trim).filter(|s| !s.is_empty());
            Value::Array(items.map(|s| Value::String(s.to_owned())).collect())
        }),
        _ if text == NONE => return Ok(None),
        _ => parsed().unwrap_or_else(string),
    }))
}

/// Where the text is not TOML.
fn syntax(text: &str, error: &toml::de::Error) -> TrainError {
    let line = |at: usize| text[..at.min(text.len())].matches('\n').count() + 1;
    TrainError::Data {
        path: "the configuration".into(),
        line: error.span().map(|span| line(span.start)),
        expected: "TOML".into(),
        got: error.message().to_owned(),
    }
}

/// Serde's message about the key with this path, taken apart.
pub(crate) fn typed(path: String, message: &str) -> TrainError {
    let (got, expected) = message
        .split_once(", expected ")
        .unwrap_or((message, "another value"));
    let got = ["invalid type: ", "invalid value: ", "invalid length "]
        .iter()
        .find_map(|prefix| got.strip_prefix(prefix))
        .unwrap_or(got);
    // Unknown keys and variants stand between backquotes, as do those that are known.
    let quoted = |text: &'_ str| -> Vec<String> {
        let parts = text.split('`').skip(1).step_by(2);
        parts.map(str::to_owned).collect()
    };
    let hint = match (got.strip_prefix("unknown "), quoted(got).first()) {
        (Some(_), Some(name)) => did_you_mean(name, &quoted(expected)),
        _ => String::new(),
    };
    TrainError::config(path, expected.trim(), format!("{}{hint}", got.trim()))
}

/// `; did you mean ...` if one of the names is close to this one.
fn did_you_mean(name: &str, names: &[impl AsRef<str>]) -> String {
    let distance = |n: &str| strsim::damerau_levenshtein(name, n);
    let closest = names.iter().map(AsRef::as_ref).min_by_key(|n| distance(n));
    match closest {
        Some(closest) if distance(closest) <= 1 + name.len() / 4 => {
            format!("; did you mean `{closest}`?")
        }
        _ => String::new(),
    }
}
