//! Generation: the loop over a session, the choice of tokens and the end of a text.

#[cfg(feature = "tokenizer")]
pub mod dialogue;
pub mod dry_run;
mod error;
pub mod generator;
pub mod stop;
pub mod text;

pub use crate::device::sampler;
pub use error::GenerateError;
pub use generator::{Finish, Generated, Generator, GeneratorConfig, NewToken, Prompt};
