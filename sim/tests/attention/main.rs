//! The attention kernels and the plans that launch them, on the simulated GPU under every check, against the
//! reference in f64, with NaN in everything that must not be read and poison in every output and workspace.

#[path = "../../../tests/attention_cases/mod.rs"]
mod attention_cases;
mod bits;
mod far_offsets;
mod hopper;
mod known_bugs;
mod simulated;
mod variants;
