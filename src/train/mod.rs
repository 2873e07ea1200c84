//! Training: exact TBPTT by gradient streams.

pub mod config;
pub mod error;
pub mod guard;
pub mod optimizer;
pub mod schedule;
pub mod streams;

pub use error::{Result, TrainError};
