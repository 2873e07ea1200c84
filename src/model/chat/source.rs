//! Where a model folder keeps its chat templates, and the tokens that they may name.

use std::path::Path;

use minijinja::Value;
use serde_json::{Map, Value as Json};

use crate::model::companions::TEMPLATE_FOLDER;
use crate::model::error::{ChatError, FileError, NameList};
use crate::model::files;
use crate::model::tokenizer::framing::MAX_FILE;

/// The file in a model folder with the default template.
pub const TEMPLATE_FILE: &str = "chat_template.jinja";
/// The name of the template that is used where no other is asked for.
const DEFAULT: &str = "default";
/// Largest template accepted, in bytes; those known have up to 30 kB.
const MAX_TEMPLATE: u64 = 4 << 20;

/// What a folder says about chats.
pub(super) struct Source {
    /// Templates with their names.
    templates: Vec<(String, String)>,
    /// `bos_token` and its like, with the text of the token.
    pub(super) tokens: Vec<(String, Value)>,
}

impl Source {
    /// Reads `chat_template.jinja` and the files of `additional_chat_templates/`, or else `chat_template` of
    /// `tokenizer_config.json`: a text, or a list of objects with `name` and `template`.
    pub(super) fn read(folder: &Path) -> Result<Self, ChatError> {
        let path = folder.join("tokenizer_config.json");
        let config = files::read_object(&path, MAX_FILE)?;
        let map = files::read_object(&folder.join("special_tokens_map.json"), MAX_FILE)?;
        let mut templates = named_files(&folder.join(TEMPLATE_FOLDER))?;
        let own = folder.join(TEMPLATE_FILE);
        if !files::is_absent(&own) {
            templates.push((DEFAULT.to_owned(), text(&own)?));
        }
        if templates.is_empty() {
            templates = of_config(&config).map_err(|message| FileError::Json { path, message })?;
        }
        let named = map.iter().chain(&config);
        let token = |(name, value): (&String, &Json)| {
            let text = value.get("content").unwrap_or(value).as_str()?;
            name.ends_with("_token")
                .then(|| (name.clone(), Value::from(text)))
        };
        Ok(Self {
            templates,
            tokens: named.filter_map(token).collect(),
        })
    }

    /// The template `name`, or the default one; `None` where the folder has none at all.
    pub(super) fn template(
        &self,
        name: Option<&str>,
        folder: &Path,
    ) -> Result<Option<&str>, ChatError> {
        let wanted = name.unwrap_or(DEFAULT);
        let mut each = self.templates.iter();
        match each.find(|(name, _)| name == wanted) {
            Some((_, template)) => Ok(Some(template)),
            None if self.templates.is_empty() && name.is_none() => Ok(None),
            None => Err(ChatError::Name {
                folder: folder.to_owned(),
                expected: wanted.to_owned(),
                found: NameList(
                    self.templates
                        .iter()
                        .map(|(name, _)| name.clone())
                        .collect(),
                ),
            }),
        }
    }
}

/// The templates of `tokenizer_config.json`, or what is wrong with them.
fn of_config(config: &Map<String, Json>) -> Result<Vec<(String, String)>, String> {
    match config.get("chat_template") {
        None | Some(Json::Null) => Ok(Vec::new()),
        Some(Json::String(template)) => Ok(vec![(DEFAULT.to_owned(), template.clone())]),
        Some(Json::Array(list)) => {
            let part = |item: &Json, key| item.get(key).and_then(Json::as_str).map(str::to_owned);
            let pairs = list
                .iter()
                .map(|item| part(item, "name").zip(part(item, "template")));
            let pairs: Option<Vec<_>> = pairs.collect();
            pairs.ok_or_else(|| {
                "`chat_template`: expected objects with `name` and `template`".to_owned()
            })
        }
        Some(_) => Err("`chat_template`: expected a text or a list of named templates".to_owned()),
    }
}

/// Templates in files `NAME.jinja`, in the order of their names.
fn named_files(folder: &Path) -> Result<Vec<(String, String)>, ChatError> {
    let Ok(entries) = std::fs::read_dir(folder) else {
        return Ok(Vec::new());
    };
    let mut found = Vec::new();
    for path in entries.filter_map(|entry| Some(entry.ok()?.path())) {
        if let (Some(name), Some("jinja")) = (
            path.file_stem().and_then(|name| name.to_str()),
            path.extension().and_then(|end| end.to_str()),
        ) {
            found.push((name.to_owned(), text(&path)?));
        }
    }
    found.sort();
    Ok(found)
}

fn text(path: &Path) -> Result<String, FileError> {
    let bytes = files::read_bounded(path, MAX_TEMPLATE)?;
    String::from_utf8(bytes).map_err(|error| FileError::Json {
        path: path.to_owned(),
        message: format!("expected UTF-8 text: {error}"),
    })
}
