//! Memory of the simulated GPU: buffers with exact bounds over sparse mappings, each with its shadow.

pub mod global;
pub mod image;
mod mapping;
pub mod region;

pub(crate) use mapping::Mapping;
