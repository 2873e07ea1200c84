//! `segattn`, run as a command.

#![cfg(feature = "cli")]

mod chat;
#[path = "../cli_model/mod.rs"]
mod cli_model;
mod convert_gguf;
#[cfg(unix)]
mod distillation;
mod eval;
mod generate;
mod inspect;
mod lora;
#[cfg(unix)]
#[path = "../meeting/mod.rs"]
mod meeting;
#[cfg(unix)]
mod output;
#[cfg(unix)]
mod ranks;
mod resume;
mod score;
#[cfg(feature = "serve")]
mod serve;
#[cfg(feature = "serve")]
#[path = "../serving/mod.rs"]
mod serving;
#[cfg(unix)]
mod stages;
mod tensorboard;
mod train;
mod train_folder;
#[path = "../training/mod.rs"]
mod training;
