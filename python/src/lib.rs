//! `segattn._native`: what the Python package `segattn` calls. Addresses are trusted here; the package checks types,
//! keeps memory alive and chooses the device.

mod arguments;
mod engine;
mod errors;
mod failure;
#[cfg(feature = "cuda")]
mod gpu;
mod host;
mod model;
mod plan;
mod tensor;

#[pyo3::pymodule]
mod _native {
    #[pymodule_export]
    use crate::host::{backward, forward};

    #[pymodule_export]
    use crate::model::Model;

    #[pymodule_export]
    use crate::plan::{
        SegmentPlan, beyond_length, prompt_marks, round_to_pool, segment_plan, segments, select,
    };

    #[cfg(feature = "cuda")]
    #[pymodule_export]
    use crate::gpu::{Plan, plan_backward, plan_forward};

    /// Whether this build has the kernels for GPUs.
    #[pymodule_export]
    const HAS_CUDA: bool = cfg!(feature = "cuda");
}
