//! The crate's GPU device on a simulated GPU.

mod breaks;
mod buffers;
mod common;
mod decode;
mod faults;
mod lora;
mod memory;
mod model;
mod norms;
mod pool;
mod rereads;
mod retrieval;
#[allow(dead_code, reason = "tests/model/retrieval.rs uses other parts")]
#[path = "../../../tests/retrieval_cases/mod.rs"]
mod retrieval_cases;
mod safe_calls;
mod sinks;
mod switches;
