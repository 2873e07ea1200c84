//! Evaluation: perplexity, and synthetic long-context tasks that need no download.
//!
//! The tasks are passkey retrieval and those of RULER (Hsieh et al. 2024, arXiv:2404.06654) that use no
//! question-answering corpus, with RULER's parameters, answer lengths and scoring; two in the manner of MRCR and bAbI;
//! and relay, for models that are trained on it. Wording, words and filler text are this crate's own, generated from a
//! seed, so scores compare between models run here; they are close to, but not the same as, published scores.
//! [`choice`] reads LongBench v2's questions from a file.

pub mod choice;
pub mod error;
pub mod execution;
pub mod heads;
pub mod kind;
pub mod lookups;
pub mod perplexity;
pub mod run;
pub mod score;
pub mod task;

mod aggregate;
mod fit;
mod greedy;
mod needle;
mod recall;
mod relay;
mod seeds;
mod stories;
mod text;

pub use error::EvalError;
pub use execution::{Execution, SegmentOverrides};
pub use greedy::Greedy;
pub use kind::TaskKind;
pub use perplexity::{Document, PerplexityConfig, PerplexityReport, WindowLoss, perplexity};
pub use recall::{HeadRecall, Oracle};
pub use run::{Answer, Progress, Report, Respond, RunConfig, run};
pub use task::{Sample, TaskOptions, generate};
