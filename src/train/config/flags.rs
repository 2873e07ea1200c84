//! The flags: one for each leaf of the default configuration's own tree, explained by the example file.

use std::collections::HashMap;

use serde_json::Value as Json;

use super::Config;

/// The commented example, `configs/train.toml`.
pub const EXAMPLE: &str = include_str!("../../../configs/train.toml");

/// A key of the configuration as a flag.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flag {
    /// Dotted key: `training.steps`.
    pub key: String,
    /// Its default, as it would be written; `none` where it has none.
    pub default: String,
    /// What it does.
    pub help: String,
}

/// Every key of the configuration, sections in their order.
pub fn flags() -> Vec<Flag> {
    let help = comments(EXAMPLE);
    let mut list = Vec::new();
    leaves("", &default_tree(), &mut |key, default| {
        list.push(Flag {
            help: help.get(key).cloned().unwrap_or_default(),
            default: match default {
                Json::Null => "none".to_owned(),
                Json::String(text) => text.clone(),
                other => other.to_string(),
            },
            key: key.to_owned(),
        });
    });
    list
}

/// The default configuration, keys without a value as null.
pub(super) fn default_tree() -> Json {
    serde_json::to_value(Config::default()).expect("numbers, strings, lists and tables are JSON")
}

fn leaves(prefix: &str, tree: &Json, visit: &mut impl FnMut(&str, &Json)) {
    let Json::Object(keys) = tree else {
        return visit(prefix, tree);
    };
    for (key, value) in keys {
        let dot = if prefix.is_empty() { "" } else { "." };
        leaves(&format!("{prefix}{dot}{key}"), value, visit);
    }
}

/// The comment behind each key of the example, keys that are commented out included.
fn comments(example: &str) -> HashMap<String, String> {
    let (mut section, mut found) = (String::new(), HashMap::new());
    for line in example.lines() {
        if let Some(name) = line.strip_prefix('[').and_then(|l| l.strip_suffix(']')) {
            section = name.to_owned();
            continue;
        }
        let line = line.strip_prefix("# ").unwrap_or(line);
        let Some((key, rest)) = line.split_once(" = ") else {
            continue;
        };
        if let (false, Some((_, comment))) = (key.contains(' '), rest.rsplit_once("  # ")) {
            found.insert(format!("{section}.{key}"), comment.trim().to_owned());
        }
    }
    found
}
