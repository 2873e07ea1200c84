//! Files of a model folder: what loads, what is written back, and what is refused by a typed error.

mod companions;
mod config;
mod hostile_config;
mod hostile_weights;
#[cfg(unix)]
mod links;
mod rope;
mod tokenizer;
mod weights;
