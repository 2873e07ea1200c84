//! How a run's texts become tokens, and the files that its checkpoints carry so that they are whole models.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use segattn::model::chat::{Chat, TEMPLATE_FILE};
use segattn::model::companions::companions;
use segattn::model::config::ModelConfig;
use segattn::model::error::TokenizerError;
use segattn::model::tokenizer::{BYTES, TOKENIZER_FILE, Tokenizer, end_ids, is_tokenizer_file};
use segattn::train::config::{Config, DataSection};
use segattn::train::data::{Bytes, Conversed, Encode, Located, converse, hash_file};

use super::files::read_text;

/// Largest chat template that is read, in bytes.
pub const MAX_TEMPLATE: u64 = 4 << 20;

/// How a run's texts become tokens.
pub struct Text {
    /// The model's folder.
    folder: Option<PathBuf>,
    /// The folder of the tokenizer and of the chat template.
    source: Option<PathBuf>,
    /// Whether they are those of a checkpoint.
    resumed: bool,
    kind: Kind,
    /// For conversations, where there is a template; an error only of a run that reads them.
    chat: Result<Option<(Chat, Tokenizer)>, String>,
}

enum Kind {
    /// By a `tokenizer.json`, which has this SHA-256.
    Tokenizer(Tokenizer, [u8; 32]),
    /// One token a byte.
    Bytes,
    /// By a tokenizer that cannot be read: an error, but only of a run that reads text.
    Unreadable(TokenizerError),
}

impl Text {
    /// That of `checkpoint`, of `model.tokenizer`, or of `model.folder`; bytes where there is none.
    pub fn open(config: &Config, checkpoint: Option<&Path>) -> Result<Self> {
        let named = config.model.tokenizer.as_deref();
        let folder = checkpoint.or(named).or(config.model.folder.as_deref());
        let must = checkpoint.is_none() && named.is_some();
        let read = folder.map_or(Ok(None), Tokenizer::read);
        let kind = match (read, folder) {
            (Ok(Some(tokenizer)), folder) => {
                let path = folder.unwrap_or(Path::new(".")).join(TOKENIZER_FILE);
                Kind::Tokenizer(tokenizer, hash_file(&path)?)
            }
            (Ok(None), Some(folder)) if must => bail!(
                "`model.tokenizer`: there is no tokenizer.json in {}",
                folder.display()
            ),
            (Ok(None), _) => Kind::Bytes,
            (Err(error), _) if must => return Err(error.into()),
            (Err(error), _) => Kind::Unreadable(error),
        };
        let model = checkpoint.or(config.model.folder.as_deref());
        Ok(Self {
            source: folder.map(Path::to_owned),
            folder: model.map(Path::to_owned),
            resumed: checkpoint.is_some(),
            kind,
            chat: Ok(None),
        })
    }

    /// The same with a chat template: that of the checkpoint, of `data.chat_template`, or of the tokenizer's folder.
    pub fn with_template(mut self, data: &DataSection, model: &ModelConfig) -> Result<Self> {
        let tokenizer = match &self.kind {
            Kind::Tokenizer(tokenizer, _) => tokenizer.clone(),
            Kind::Bytes => Tokenizer::bytes(model),
            Kind::Unreadable(_) => return Ok(self),
        };
        let tokenizer = tokenizer.limited_to(model.vocab_size);
        let given = data.chat_template.as_deref().filter(|_| !self.resumed);
        let chat = match (given, &self.source) {
            (Some(path), folder) => {
                let chat = Chat::of_template(&read_text(path, MAX_TEMPLATE)?, &tokenizer);
                let chat = chat.with_context(|| path.display().to_string())?;
                Some(match folder {
                    Some(folder) => chat.with_tokens_of(folder)?,
                    None => chat,
                })
            }
            (None, Some(folder)) => match Chat::open(folder, &tokenizer) {
                Ok(chat) => chat,
                Err(error) => {
                    self.chat = Err(error.to_string());
                    None
                }
            },
            (None, None) => None,
        };
        if let Some(chat) = chat {
            self.chat = Ok(Some((chat, tokenizer)));
        }
        Ok(self)
    }

    /// Names the tokenizer and the chat template: equal only for those that give equal tokens.
    pub fn identity(&self) -> String {
        let tokenizer = match &self.kind {
            Kind::Tokenizer(_, hash) => format!("{} {hash:x?}", env!("CARGO_PKG_VERSION")),
            Kind::Bytes | Kind::Unreadable(_) => "bytes".into(),
        };
        match &self.chat {
            Ok(Some((chat, _))) => format!("{tokenizer} {:x?}", chat.digest()),
            _ => tokenizer,
        }
    }

    /// Whether a folder has the same tokenizer, as far as one can be read here.
    pub fn is_of(&self, folder: &Path) -> Result<bool> {
        let path = folder.join(TOKENIZER_FILE);
        Ok(match &self.kind {
            Kind::Tokenizer(_, hash) => path.is_file() && hash_file(&path)? == *hash,
            Kind::Bytes => !path.is_file(),
            Kind::Unreadable(_) => true,
        })
    }

    /// One more than the largest id of the tokenizer.
    pub fn vocab_size(&self) -> usize {
        match &self.kind {
            Kind::Tokenizer(tokenizer, _) => tokenizer.vocab_size(),
            Kind::Bytes | Kind::Unreadable(_) => BYTES,
        }
    }

    /// Notes in a new model's configuration which tokens begin and end a text.
    pub fn note(&self, model: &mut ModelConfig) {
        if let Kind::Tokenizer(tokenizer, _) = &self.kind {
            tokenizer.framing().note(model);
        }
    }

    /// The tokens before and after each text.
    pub fn around(&self, model: &ModelConfig, data: &DataSection) -> Result<(Vec<u32>, Vec<u32>)> {
        // Training ends a text with an id at which generation stops.
        let mut ends = match &self.folder {
            Some(folder) => end_ids(folder, model)?,
            None => model.eos_token_id.clone(),
        };
        ends.sort_by_key(|id| !model.eos_token_id.contains(id));
        let bytes = Tokenizer::bytes(model);
        let framing = match &self.kind {
            Kind::Tokenizer(tokenizer, _) => tokenizer.framing(),
            Kind::Bytes => bytes.framing(),
            Kind::Unreadable(_) => return Ok((Vec::new(), Vec::new())),
        };
        if !data.add_bos && !framing.before.is_empty() {
            tracing::warn!(
                "data.add_bos is false: texts are trained without the tokens {:?} (BOS), which score, eval and \
                 generate put before them",
                framing.before
            );
        }
        Ok(framing.document(data.add_bos, data.add_eos, &ends))
    }
}

impl Encode for Text {
    fn encode(&self, text: &str) -> Result<Vec<u32>, String> {
        match &self.kind {
            Kind::Tokenizer(tokenizer, _) => {
                tokenizer.encode(text, false).map_err(|e| e.to_string())
            }
            Kind::Bytes => Bytes.encode(text),
            Kind::Unreadable(error) => Err(error.to_string()),
        }
    }

    fn locate(&self, text: &str) -> Result<Vec<Located>, String> {
        match &self.kind {
            Kind::Tokenizer(tokenizer, _) => {
                let words = tokenizer.locate(text).map_err(|e| e.to_string())?;
                let located = |(token, start, begins_word)| Located {
                    token,
                    start,
                    begins_word,
                };
                Ok(words.into_iter().map(located).collect())
            }
            Kind::Bytes => Bytes.locate(text),
            Kind::Unreadable(error) => Err(error.to_string()),
        }
    }

    fn converse(&self, conversation: &str) -> Result<Vec<Conversed>, String> {
        match &self.chat {
            Ok(Some((chat, tokenizer))) => converse(chat, tokenizer, conversation),
            Ok(None) => Err(
                "no chat template: give one by `data.chat_template`, or one in the folder of the \
                             tokenizer"
                    .into(),
            ),
            Err(error) => Err(error.clone()),
        }
    }

    fn ends_line(&self, id: u32) -> bool {
        match &self.kind {
            Kind::Tokenizer(tokenizer, _) => {
                let text = tokenizer.decode(&[id], false);
                text.is_ok_and(|text| text.ends_with('\n'))
            }
            Kind::Bytes => Bytes.ends_line(id),
            Kind::Unreadable(_) => false,
        }
    }

    fn needs_whole_words(&self) -> bool {
        match &self.kind {
            Kind::Tokenizer(tokenizer, _) => tokenizer.needs_whole_words(),
            Kind::Bytes | Kind::Unreadable(_) => false,
        }
    }
}

/// What lies beside the weights in the model's folder goes into each checkpoint; the files of the tokenizer come from
/// `model.tokenizer`, and the chat template from `data.chat_template`, where these are given.
pub fn companion_files(config: &Config) -> Result<Vec<(String, Vec<u8>)>> {
    let model = &config.model;
    let mut files = match &model.folder {
        Some(folder) => companions(folder)?,
        None => Vec::new(),
    };
    if let Some(folder) = &model.tokenizer {
        let of_tokenizer = |name: &str| is_tokenizer_file(name) || name.contains("chat_template");
        files.retain(|(name, _)| !of_tokenizer(name));
        let own = companions(folder)?.into_iter();
        files.extend(own.filter(|(name, _)| of_tokenizer(name)));
    }
    if let Some(path) = &config.data.chat_template {
        files.retain(|(name, _)| name != TEMPLATE_FILE);
        files.push((
            TEMPLATE_FILE.to_owned(),
            read_text(path, MAX_TEMPLATE)?.into_bytes(),
        ));
    }
    Ok(files)
}
