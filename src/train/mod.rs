//! Training: exact TBPTT by gradient streams.

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
pub mod streams;
pub mod trainer;

pub use error::{Result, TrainError};
