//! The model: configuration, weights, decoder, and what a sequence carries from segment to segment.

#[cfg(feature = "tokenizer")]
pub mod chat;
pub mod companions;
pub mod config;
pub mod decoder;
pub mod error;
pub mod families;
pub mod files;
pub mod flops;
pub mod lora;
pub mod memory;
pub mod parameters;
pub mod rope;
pub mod segmentation;
pub mod session;
pub mod session_file;
pub mod stage;
pub mod state;
pub mod switches;
pub mod tokenizer;
pub mod weights;
