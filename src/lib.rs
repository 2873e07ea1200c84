//! Segment attention: long sequences in memory that does not grow with them.
//!
//! A sequence runs segment by segment. The queries of a segment read, in one fused softmax, the segment itself
//! (causal), the KV tail of the segment before (*prior*, the only place where gradients leave a segment) and, for each
//! head and gated, KV rows retrieved from all earlier segments (*past*, read-only). The method is that of
//! "Training-Inference Consistent Segmented Execution for Long-Context LLMs" (arXiv 2605.11744); what is computed is
//! specified in `docs/contract.md`.
//!
//! # The operation
//!
//! | module | what it has |
//! |---|---|
//! | [`attention`] | [`Problem`](attention::Problem) and its validation, `cpu` in f32, `reference` in f64 |
//! | [`attention::cuda`] | a GPU in bf16 and f16: plans on device addresses, calls on cudarc slices |
//!
//! # The model
//!
//! | module | what it has |
//! |---|---|
//! | [`model`] | a decoder of Hugging Face folders, its state, pool and retrieval, sessions |
//! | [`train`] | exact TBPTT by gradient streams, optimizer, data, checkpoints |
//! | [`generate`] | sampling, stop strings, streaming text |
//! | `serve` | a server by OpenAI's interface; with the feature `serve`, on by default |
//! | [`convert`] | GGUF files of the Llama family made into model folders |
//! | [`eval`] | perplexity and synthetic long-context tasks |
//! | [`experiment`] | definitions of experiments, rows of results, tables and plots of them |
//!
//! # What they run on
//!
//! | module | what it has |
//! |---|---|
//! | [`device`] | the trait [`Device`](device::Device), which the model is generic over |
//! | [`device::cpu`], [`mod@device::reference`] | the CPU in f32; a reference in f64 |
//! | [`device::gpu`] | a GPU in bf16, over CUDA's driver, a dry run for memory plans, or a simulated GPU |
//! | [`cuda`] | CUDA's driver, loaded at run time, and [`cuda::kernels`], the registry of the compiled kernels |
//! | [`ranks`] | several processes that compute one run: how they meet and exchange buffers |
//! | [`isa`] | which vector instructions the CPU's kernels use |
//!
//! # Equal bits
//!
//! On one device the log-probability of each token has the same bits in training, scoring, prefill and decoding,
//! whatever the batch and however many segments run side by side. The backward pass is deterministic.
//!
//! # Features
//!
//! `cli` (default): the command `segattn`. `tokenizer` (in `cli`): `tokenizer.json` files and chat templates.
//! `datasets` (in `cli`): `.parquet` and `.zst` files as training data. `serve`: the server, and its command. `cuda`:
//! the GPU; the kernels come compiled, and the build needs no GPU. `linked-driver`: `cuda` in a program that links the
//! driver. Without features the library needs neither command-line nor GPU crates.
#![deny(missing_docs)]

pub mod attention;
pub mod convert;
pub mod cuda;
pub mod device;
pub mod eval;
pub mod experiment;
pub mod generate;
#[cfg(any(feature = "tokenizer", feature = "datasets"))]
mod guarded;
pub mod isa;
pub mod model;
mod random;
pub mod ranks;
#[cfg(feature = "serve")]
pub mod serve;
pub mod train;

/// The code of the README is compiled as documentation tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
