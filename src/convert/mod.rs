//! Models made into a model folder: from GGUF of the Llama family, or from another folder.
//!
//! A conversion never guesses. What the file asks for and the model does not compute is an error that names it.

mod error;
pub mod folder;
pub mod gguf;

pub use error::ConvertError;
