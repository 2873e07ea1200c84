//! Calls on the memory of NVIDIA GPUs, on another library's stream.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use pyo3::prelude::*;
use segattn::attention::cuda::{BackwardPlan, DeviceSlice, Dtype, Error, ForwardPlan};
use segattn::attention::{Gradients, Saved};
use segattn::cuda::kernels::DriverKernels;

use crate::arguments::Arguments;
use crate::errors;
use crate::host::{Targets, Upstream};
use crate::tensor::{Numbers, Tensor};

/// A call that was checked and planned.
#[pyclass(frozen)]
pub struct Plan {
    kernels: Arc<DriverKernels>,
    call: Call,
}

enum Call {
    Forward(Box<ForwardPlan>),
    Backward(Box<BackwardPlan>),
}

/// The kernels of a GPU, loaded once for the process.
fn kernels(ordinal: usize) -> Result<Arc<DriverKernels>, Error> {
    static LOADED: Mutex<Option<HashMap<usize, Arc<DriverKernels>>>> = Mutex::new(None);
    let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
    let loaded = loaded.get_or_insert_default();
    if let Some(kernels) = loaded.get(&ordinal) {
        return Ok(kernels.clone());
    }
    let context = segattn::cuda::open(ordinal)?;
    let kernels = Arc::new(DriverKernels::new(&context)?);
    loaded.insert(ordinal, kernels.clone());
    Ok(kernels)
}

fn dtype(is_bf16: bool) -> Dtype {
    match is_bf16 {
        true => Dtype::Bf16,
        false => Dtype::F16,
    }
}

fn slice(Numbers(data, len): Numbers) -> DeviceSlice {
    DeviceSlice::new(data, len)
}

/// Plans a forward call on GPU `ordinal`.
#[pyfunction]
pub fn plan_forward(
    py: Python<'_>,
    ordinal: usize,
    is_bf16: bool,
    arguments: Arguments,
    out: Tensor,
    lse: Numbers,
) -> PyResult<Plan> {
    let dtype = dtype(is_bf16);
    let planned = py.detach(|| -> Result<Plan, Error> {
        let kernels = kernels(ordinal)?;
        let problem = arguments.problem(|name, tensor| tensor.on_device(name, dtype))?;
        let out = out.on_device("out", dtype)?;
        let plan = ForwardPlan::new(&problem, &out, slice(lse), None, &*kernels)?;
        Ok(Plan {
            kernels,
            call: Call::Forward(Box::new(plan)),
        })
    });
    planned.map_err(|error| errors::gpu(py, error))
}

/// Plans a backward call on GPU `ordinal`.
#[pyfunction]
pub fn plan_backward(
    py: Python<'_>,
    ordinal: usize,
    is_bf16: bool,
    arguments: Arguments,
    upstream: Upstream,
    targets: Targets,
) -> PyResult<Plan> {
    let dtype = dtype(is_bf16);
    let planned = py.detach(|| -> Result<Plan, Error> {
        let kernels = kernels(ordinal)?;
        let problem = arguments.problem(|name, tensor| tensor.on_device(name, dtype))?;
        let saved = Saved {
            out: upstream.out.on_device("out", dtype)?,
            lse: slice(upstream.lse),
            d_out: upstream.d_out.on_device("d_out", dtype)?,
            d_lse: upstream.d_lse.map(slice),
        };
        let mut gradients = Gradients::new(
            targets.d_q.on_device("d_q", dtype)?,
            targets.d_k.on_device("d_k", dtype)?,
            targets.d_v.on_device("d_v", dtype)?,
            slice(targets.d_past_gate),
        );
        if let Some((d_k, d_v)) = targets.d_prior {
            let d_k = d_k.on_device("d_prior_k", dtype)?;
            gradients = gradients.prior(d_k, d_v.on_device("d_prior_v", dtype)?);
        }
        let plan = BackwardPlan::new(&problem, &saved, &gradients, &*kernels)?;
        Ok(Plan {
            kernels,
            call: Call::Backward(Box::new(plan)),
        })
    });
    planned.map_err(|error| errors::gpu(py, error))
}

#[pymethods]
impl Plan {
    /// Bytes of device memory that `run` needs, at a multiple of 256.
    #[getter]
    fn workspace_bytes(&self) -> usize {
        match &self.call {
            Call::Forward(plan) => plan.workspace_bytes(),
            Call::Backward(plan) => plan.workspace_bytes(),
        }
    }

    /// Enqueues the call on a stream of the plan's GPU. The tensors of the plan, stream and workspace are the caller's,
    /// who keeps them until the stream has passed.
    fn run(&self, py: Python<'_>, stream: usize, workspace: Numbers) -> PyResult<()> {
        let done = py.detach(|| -> Result<(), Error> {
            // SAFETY: the caller's promise; the primary context is the process's.
            unsafe {
                let mut stream = self.kernels.on_raw(stream as *mut _)?;
                match &self.call {
                    Call::Forward(plan) => plan.run(&mut stream, slice(workspace)),
                    Call::Backward(plan) => plan.run(&mut stream, slice(workspace)),
                }
            }
        });
        done.map_err(|error| errors::gpu(py, error))
    }
}
