//! Training: configurations, data, steps, checkpoints, ranks.

#[path = "../adapters/mod.rs"]
mod adapters;
mod checkpoint;
#[path = "../common/mod.rs"]
mod common;
mod config;
mod data;
mod distillation;
mod files;
mod lookup;
mod lora;
#[path = "../meeting/mod.rs"]
mod meeting;
#[cfg(feature = "tokenizer")]
mod messages;
mod ranks;
#[path = "../reading/mod.rs"]
mod reading;
mod schedule;
#[path = "../spread/mod.rs"]
mod spread;
mod stages;
mod step;
#[cfg(feature = "datasets")]
mod tables;
mod tasks;
mod weights;
