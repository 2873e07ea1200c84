//! A server of one model over HTTP, by OpenAI's interface.
//!
//! One thread, the [engine], owns the device and all sequences: they join and leave between its steps. The HTTP side
//! talks to it by channels. The bits of a sequence's log-probabilities are those of
//! [`Generator`](crate::generate::Generator) alone, whatever runs beside it (docs/contract.md, section 4).

pub mod engine;
pub mod http;
pub mod job;
mod prefixes;
mod running;
mod shared;

pub use shared::{Histogram, Limits, Metrics, Shared};
