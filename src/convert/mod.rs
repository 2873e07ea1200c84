//! Models made into a model folder: from GGUF of the Llama family, from another folder, or with adapters merged.
//!
//! A conversion never guesses. What the file asks for and the model does not compute is an error that names it.

mod error;
pub mod folder;
pub mod gguf;
pub mod merge;

pub use error::ConvertError;
