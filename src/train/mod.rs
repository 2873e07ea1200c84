//! Training: exact TBPTT by gradient streams.

pub mod agreement;
pub mod checkpoint;
pub mod config;
pub mod data;
pub mod error;
pub mod folder;
pub mod guard;
mod hex;
pub mod lock;
pub mod optimizer;
pub mod progress;
pub mod schedule;
mod shards;
mod spread;
pub mod streams;
mod sums;
pub mod trainer;

pub use error::{Result, TrainError};
pub use sums::gradient_sets;
