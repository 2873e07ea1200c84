//! Segment attention: long sequences in memory that does not grow with them.
//!
//! A sequence runs segment by segment. The queries of a segment read, in one fused softmax, the segment
//! itself (causal), the KV tail of the segment before (*prior*, the only place where gradients leave the
//! segment) and, per head and gated, KV retrieved from the far past (*past*, read only).
//!
//! | module | what it is |
//! |---|---|
//! | [`attention`] | the operation, forward and backward: arguments and their checks, `cpu` in f32, `reference` in f64 |
//! | [`device`] | what the model needs from a device, as one trait; [`device::cpu::Cpu`] and the f64 [`device::reference::Reference`] |
//! | [`model`] | Llama-family decoder in the Hugging Face layout, state, pool and retrieval, sessions |
//! | [`train`] | exact TBPTT by gradient streams, optimizer, data, checkpoints |
//! | [`generate`] | sampling, stop strings, streaming text |
//! | [`eval`] | perplexity and synthetic long-context tasks |
//! | [`isa`] | which vector instructions the CPU's kernels use |
//!
//! On one device the log-probability of each token has the same bits in training, scoring, prefill and
//! decoding, whatever the batch and however many segments run side by side.
//!
//! Without default features the library needs neither command-line nor GPU crates.
#![deny(missing_docs)]

pub mod attention;
pub mod cuda;
pub mod device;
pub mod eval;
pub mod generate;
pub mod isa;
pub mod model;
pub mod train;
