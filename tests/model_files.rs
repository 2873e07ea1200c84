//! Files of a model folder: what loads, what is written back, and what is refused by a typed error.

#[path = "model_files/companions.rs"]
mod companions;
#[path = "model_files/config.rs"]
mod config;
#[path = "model_files/hostile_config.rs"]
mod hostile_config;
#[path = "model_files/hostile_weights.rs"]
mod hostile_weights;
#[cfg(unix)]
#[path = "model_files/links.rs"]
mod links;
#[path = "model_files/rope.rs"]
mod rope;
#[path = "model_files/tokenizer.rs"]
mod tokenizer;
#[path = "model_files/weights.rs"]
mod weights;
