//! Experiments: definitions in TOML, the runs that they ask for, rows of results, and reports of them.
//!
//! An experiment has *arms*. An arm is a set of keys laid over the experiment's own: those of the training
//! configuration (`[arm.train]`, the segments of the model among them) and those of the evaluation (`[arm.eval]`, flags
//! of `segattn eval`). What a key means is known where it is read, so a new key needs no change here. This module has
//! the definitions and the statistics; the command line runs them (`segattn reproduce`, `segattn report`).

pub mod definition;
pub mod error;
pub mod report;
pub mod rows;
pub mod stats;

mod merge;

pub use definition::{Arm, Definition, Evaluation, Minutes, Model};
pub use error::ExperimentError;
pub use rows::{Row, Rows};
