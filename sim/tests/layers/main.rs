//! The kernels of the layers around attention on the simulated GPU, and with bugs planted into them.
//!
//! `cargo test -p segattn-sim --test layers` plants one bug in so many ([`planted::QUICK`]); `sim/planted` every one.

mod adamw;
mod common;
mod divergence;
mod head_norms;
mod head_norms_rules;
mod length;
mod loss;
mod norm;
mod planted;
mod planted_rules;
mod retrieval;
mod retrieval_rules;
mod rotation;
#[path = "../../../tests/retrieval_cases/rounding.rs"]
mod rounding;
mod rows;
mod rows_rules;
mod sampling;
mod sampling_rules;
mod sinks;
mod sinks_rules;
mod windows;
