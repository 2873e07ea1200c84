//! Mutation tests: bugs are planted one at a time into kernels, and at least 95% of them must be caught.
//!
//! `cargo test -p segattn-sim --test mutations` plants a fixed one in 42 into the attention kernels (one in 120 into
//! those for Hopper) and all of those of a small product; `sim/planted` plants every one and prints a table.

mod attention;
#[path = "../../../tests/attention_cases/mod.rs"]
mod attention_cases;
mod attention_rules;
mod gradient_rules;
mod hopper_rules;
mod product;
mod shared_rules;
#[path = "../attention/simulated.rs"]
#[allow(dead_code)]
mod simulated;
