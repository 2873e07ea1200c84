//! Evaluations, and what conversations look like.

#[cfg(feature = "tokenizer")]
mod chat_templates;
mod choice;
#[allow(dead_code, reason = "each test uses a part")]
#[path = "../common/mod.rs"]
mod common;
#[cfg(feature = "tokenizer")]
mod dialogue;
mod perplexity;
mod run;
mod tasks;
