//! The model: files, families, bits, gradients, retrieval, generation.

#[path = "../adapters/mod.rs"]
mod adapters;
mod bits;
mod breaks;
#[path = "../common/mod.rs"]
mod common;
mod convert_families;
mod cpu;
mod families;
mod files;
mod generation;
mod gradients;
mod heads;
mod lora;
#[path = "../meeting/mod.rs"]
mod meeting;
#[path = "../pieces/mod.rs"]
mod pieces;
mod random_models;
mod rereads;
mod retrieval;
#[allow(dead_code, reason = "the simulated GPU's tests use other parts")]
#[path = "../retrieval_cases/mod.rs"]
mod retrieval_cases;
mod sampler;
mod session_file;
mod sink_logits;
mod sinks;
#[path = "../spread/mod.rs"]
mod spread;
