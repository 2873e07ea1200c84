//! Chat templates: messages to the text that a model was trained on, and to its tokens.
//!
//! A template is the text of `chat_template.jinja`, or of `chat_template` in `tokenizer_config.json`, in the language
//! Jinja as Transformers runs it. Three things are added to its text:
//!
//! - **What is a control token.** The special tokens that the template writes are control tokens. Where a message
//!   spells one, it stays text ([`Rendered::plain`]): nobody can end their turn and begin another's by writing so.
//! - **What the assistant writes.** `{% generation %}` around it in the template, or else the difference between the
//!   text before and after a message of the assistant ([`Chat::answers`]).
//! - **What follows an answer**, for chats that keep a model's state instead of reading everything again
//!   ([`Chat::after_answer`]).
//!
//! ```
//! use segattn::model::chat::{Chat, Conversation};
//! use segattn::model::config::ModelConfig;
//! use segattn::model::tokenizer::Tokenizer;
//!
//! # let json = serde_json::json!({"model_type": "llama", "vocab_size": 256, "hidden_size": 8, "intermediate_size": 8,
//! #     "num_hidden_layers": 1, "num_attention_heads": 1, "rms_norm_eps": 1e-5, "max_position_embeddings": 64});
//! # let config = ModelConfig::from_json(json).unwrap();
//! let tokenizer = Tokenizer::bytes(&config);
//! let template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}";
//! let chat = Chat::of_template(template, &tokenizer)?;
//! let messages = r#"{"messages": [{"role": "user", "content": "Hello"}]}"#;
//! let conversation: Conversation = serde_json::from_str(messages)?;
//! let rendered = chat.render(&conversation, true)?;
//! assert_eq!(rendered.text, "user: Hello\n");
//! assert_eq!(chat.encode(&tokenizer, &rendered)?.ids.len(), 12);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod controls;
mod conversation;
mod engine;
mod json;
mod marks;
mod source;

use std::ops::Range;
use std::path::Path;

use minijinja::Value;
use sha2::{Digest, Sha256};

use super::error::ChatError;
use super::tokenizer::Tokenizer;
use controls::Controls;
pub use conversation::{Conversation, Data};
use engine::{Engine, strings, with_strings};
use marks::{Marks, Taken};
use source::Source;
pub use source::TEMPLATE_FILE;

type Result<T> = std::result::Result<T, ChatError>;

/// The chat template of a model.
#[derive(Debug)]
pub struct Chat {
    engine: Engine,
    /// Private characters of the template.
    taken: Taken,
    /// `bos_token` and its like.
    tokens: Vec<(String, Value)>,
    controls: Controls,
    digest: [u8; 32],
}

/// What a template has written.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rendered {
    /// The text.
    pub text: String,
    /// Bytes of the text, in order, that spell control tokens and come from messages: they are encoded as text.
    pub plain: Vec<Range<usize>>,
    /// Bytes of the text, in order, that the assistant writes, as far as the template says it.
    pub generated: Vec<Range<usize>>,
}

/// The tokens of a [`Rendered`] text.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Encoded {
    /// The ids, control tokens among them.
    pub ids: Vec<u32>,
    /// Those of them, in order, that have any byte of [`Rendered::generated`]: what the assistant writes.
    pub generated: Vec<Range<usize>>,
}

impl Chat {
    /// The template of a model folder; `None` where it has none.
    ///
    /// # Errors
    /// [`ChatError::File`], [`ChatError::Template`]; [`ChatError::Name`] where there are named templates and none is
    /// `default`.
    pub fn open(folder: &Path, tokenizer: &Tokenizer) -> Result<Option<Self>> {
        Self::open_named(folder, None, tokenizer)
    }

    /// The template `name` of a model folder, or the default one.
    ///
    /// # Errors
    /// As [`Chat::open`].
    pub fn open_named(
        folder: &Path,
        name: Option<&str>,
        tokenizer: &Tokenizer,
    ) -> Result<Option<Self>> {
        let source = Source::read(folder)?;
        let Some(template) = source.template(name, folder)? else {
            return Ok(None);
        };
        let chat = Self::of_template(template, tokenizer)?;
        Ok(Some(chat.with_tokens(source.tokens)))
    }

    /// The same with `bos_token` and the like as a model folder names them.
    ///
    /// # Errors
    /// [`ChatError::File`].
    pub fn with_tokens_of(self, folder: &Path) -> Result<Self> {
        Ok(self.with_tokens(Source::read(folder)?.tokens))
    }

    fn with_tokens(mut self, tokens: Vec<(String, Value)>) -> Self {
        let mut digest = Sha256::new_with_prefix(self.digest);
        for (name, value) in &tokens {
            digest.update(format!("{name}={value:?};"));
        }
        self.digest = digest.finalize().into();
        self.tokens = tokens;
        self
    }

    /// A template by its text. It knows no `bos_token` and the like, see [`Chat::with_tokens_of`].
    ///
    /// # Errors
    /// [`ChatError::Template`].
    pub fn of_template(template: &str, tokenizer: &Tokenizer) -> Result<Self> {
        let mut taken = Taken::default();
        taken.by(template);
        Ok(Self {
            engine: Engine::new(template)?,
            taken,
            tokens: Vec::new(),
            controls: Controls::of(tokenizer),
            digest: Sha256::digest(template).into(),
        })
    }

    /// A digest of the template and of the tokens that it may name.
    pub fn digest(&self) -> [u8; 32] {
        self.digest
    }

    /// The text of a conversation; with `prompt` up to where the assistant writes its next message.
    ///
    /// # Errors
    /// [`ChatError::Messages`] for messages that no template takes, [`ChatError::Template`] where the template fails.
    pub fn render(&self, conversation: &Conversation, prompt: bool) -> Result<Rendered> {
        let data = conversation.values()?;
        let (mut taken, mut bytes) = (self.taken.clone(), 0);
        for (_, value) in &data {
            strings(value, &mut |text| {
                taken.by(text);
                bytes += text.len();
            });
        }
        let marks = Marks::free_of(&taken);
        let mark = |text: &str| marks.mark(text, &self.controls);
        let mut context = self.tokens.clone();
        let marked = |(name, value): (String, Value)| (name, with_strings(&value, &mark));
        context.extend(data.into_iter().map(marked));
        context.push(("add_generation_prompt".into(), prompt.into()));
        let text = self.engine.render(context, &marks, bytes)?;
        Ok(marks.take(&text, &self.controls))
    }

    /// A conversation as texts in which every answer stands as the assistant writes it: what stands in
    /// `{% generation %}`, or where the template has none, what the message adds to the text before it, without white
    /// space after its last control token.
    ///
    /// That is one text. But a template without `{% generation %}` may write an answer otherwise when messages follow,
    /// such as without what was thought. Then each answer has a text of its own, which ends with it.
    ///
    /// # Errors
    /// As [`Chat::render`]; [`ChatError::Answer`] where the text of an answer does not begin with the prompt for it.
    pub fn answers(&self, conversation: &Conversation) -> Result<Vec<Rendered>> {
        let mut whole = self.render(conversation, false)?;
        if !whole.generated.is_empty() {
            return Ok(vec![whole]);
        }
        let mut each = Vec::new();
        for message in conversation.answers() {
            each.push(self.answer(conversation, message)?);
        }
        if each
            .iter()
            .all(|answer| whole.text.starts_with(&answer.text))
        {
            whole.generated = each
                .into_iter()
                .flat_map(|answer| answer.generated)
                .collect();
            each = vec![whole];
        }
        Ok(each)
    }

    /// The text up to the end of the answer that is message `message` of a conversation. The last of what is generated
    /// in it is this answer, as [`Chat::answers`] has it.
    ///
    /// # Errors
    /// As [`Chat::answers`].
    pub fn up_to_answer(&self, conversation: &Conversation, message: usize) -> Result<Rendered> {
        let text = self.render(&conversation.first(message + 1), false)?;
        match text.generated.is_empty() {
            true => self.answer(conversation, message),
            false => Ok(text),
        }
    }

    /// The text up to the end of one answer.
    fn answer(&self, conversation: &Conversation, message: usize) -> Result<Rendered> {
        let failed = |what| ChatError::Answer { message, what };
        if message == 0 {
            return Err(failed("nothing is said before it"));
        }
        let start = self.render(&conversation.first(message), true)?.text;
        let mut text = self.render(&conversation.first(message + 1), false)?;
        let Some(written) = text.text.strip_prefix(&start) else {
            return Err(failed("its text does not go on from the prompt for it"));
        };
        let control = self.controls.find(written).last().map_or(0, |c| c.end);
        let end = match control > 0 && written[control..].trim().is_empty() {
            true => start.len() + control,
            false => text.text.len(),
        };
        text.generated.push(start.len()..end);
        Ok(text)
    }

    /// What the template writes between the text of the last answer, which the model has written itself, and its next
    /// one, when `more` are the messages that follow `conversation` and its answer.
    ///
    /// # Errors
    /// As [`Chat::render`]; [`ChatError::Answer`] where the template does not write the text of an answer once.
    pub fn after_answer(&self, conversation: &Conversation, more: &[Data]) -> Result<Rendered> {
        let mut taken = self.taken.clone();
        for (_, value) in conversation.values()? {
            strings(&value, &mut |text| taken.by(text));
        }
        for message in more {
            strings(message.value(), &mut |text| taken.by(text));
        }
        let [answer] = taken.free();
        let mut whole = conversation.clone();
        whole.push("assistant", &answer.to_string());
        whole.messages.extend_from_slice(more);
        let rendered = self.render(&whole, true)?;
        let mut parts = rendered.text.split(answer);
        let (Some(before), Some(after), None) = (parts.next(), parts.next(), parts.next()) else {
            return Err(ChatError::Answer {
                message: conversation.messages.len(),
                what: "its text does not stand once in that of the conversation",
            });
        };
        let start = before.len() + answer.len_utf8();
        let kept = rendered.plain.iter().filter(|range| range.start >= start);
        Ok(Rendered {
            text: after.to_owned(),
            plain: kept.map(|r| r.start - start..r.end - start).collect(),
            generated: Vec::new(),
        })
    }

    /// The tokens of a text of this template. Nothing is put around them: what a text begins with, the template says.
    ///
    /// # Errors
    /// [`ChatError::Tokenizer`].
    pub fn encode(&self, tokenizer: &Tokenizer, rendered: &Rendered) -> Result<Encoded> {
        let placed = self
            .controls
            .encode(tokenizer, &rendered.text, &rendered.plain)?;
        let within = |bytes: &Range<usize>| {
            let start = placed.partition_point(|token| token.bytes.end <= bytes.start);
            let end = placed.partition_point(|token| token.bytes.start < bytes.end);
            start..end.max(start)
        };
        Ok(Encoded {
            generated: rendered.generated.iter().map(within).collect(),
            ids: placed.into_iter().map(|token| token.id).collect(),
        })
    }
}
