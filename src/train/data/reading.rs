//! What turns files into tokens.

use std::path::Path;

use super::pieces::Encode;
use crate::model::config::PromptBreak;
use crate::train::config::DataSection;

/// How files become tokens.
pub struct Reading<'a> {
    /// Section `data` of the configuration.
    pub section: &'a DataSection,
    /// Ids must be below it.
    pub vocab_size: usize,
    /// Ids put before each text.
    pub before: &'a [u32],
    /// Ids put after each text.
    pub after: &'a [u32],
    /// The tokenizer.
    pub encode: &'a dyn Encode,
    /// Where a segment ends before each answer of a conversation, as it does when the model generates.
    pub prompt_break: PromptBreak,
    /// Names the tokenizer and the chat template: equal only for those that give equal tokens.
    pub tokenizer: &'a str,
    /// Folder that keeps the tokens of large texts for the next run.
    pub cache: Option<&'a Path>,
    /// Folder for a file without a name, where the cache does not serve.
    pub scratch: &'a Path,
    /// Called with the bytes of text that have been read, and that there are.
    pub progress: &'a dyn Fn(u64, u64),
}
