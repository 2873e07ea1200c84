//! Calls on device memory, in bf16 and f16.

use std::ffi::c_void;
use std::sync::Arc;

use segattn::attention::cuda::{BackwardPlan, DeviceSlice, Dtype, ForwardPlan, Tensor};
use segattn::attention::{Gradients, Saved};
use segattn::cuda::kernels::DriverKernels;

use crate::failure::Failure;
use crate::given::{self, Roles};
use crate::types;

/// The kernels in the primary context of a GPU.
pub(crate) struct Gpu {
    kernels: Arc<DriverKernels>,
}

/// A validated call.
pub(crate) struct GpuPlan {
    kernels: Arc<DriverKernels>,
    call: Call,
}

#[expect(clippy::large_enum_variant)] // There is one a plan, in a box.
enum Call {
    Forward(ForwardPlan),
    Backward(BackwardPlan),
}

impl Gpu {
    pub fn open(ordinal: i32) -> Result<Self, Failure> {
        let ordinal = usize::try_from(ordinal).map_err(|_| Failure::Argument {
            argument: "ordinal",
            expected: "a number that is at least 0".into(),
            got: ordinal.to_string(),
        })?;
        let context = segattn::cuda::open(ordinal)?;
        let kernels = Arc::new(DriverKernels::new(&context)?);
        Ok(Gpu { kernels })
    }

    /// # Safety
    /// Every array in host memory is as `types` says.
    pub unsafe fn forward(
        &self,
        problem: &types::Problem,
        forward: &types::Forward,
    ) -> Result<GpuPlan, Failure> {
        let dtype = dtype(problem)?;
        // SAFETY: the caller's promise, in each of the calls.
        let plan = unsafe {
            let roles = Roles::new(problem)?;
            let call = given::problem(problem, &roles, |name, x| tensor(name, x, dtype))?;
            let out = tensor("out", &forward.out, dtype)?;
            let lse = numbers("lse", forward.lse, given::query_rows(problem))?;
            ForwardPlan::new(&call, &out, lse, None, &*self.kernels)?
        };
        Ok(self.plan(Call::Forward(plan)))
    }

    /// # Safety
    /// As [`forward`](Self::forward).
    pub unsafe fn backward(
        &self,
        problem: &types::Problem,
        backward: &types::Backward,
    ) -> Result<GpuPlan, Failure> {
        let dtype = dtype(problem)?;
        let rows = given::query_rows(problem);
        // SAFETY: the caller's promise, in each of the calls.
        let plan = unsafe {
            let roles = Roles::new(problem)?;
            let call = given::problem(problem, &roles, |name, x| tensor(name, x, dtype))?;
            let saved = Saved {
                out: tensor("out", &backward.out, dtype)?,
                lse: numbers("lse", backward.lse, rows)?,
                d_out: tensor("d_out", &backward.d_out, dtype)?,
                d_lse: match backward.d_lse.is_null() {
                    true => None,
                    false => Some(numbers("d_lse", backward.d_lse, rows)?),
                },
            };
            let gradients = Gradients {
                d_q: tensor("d_q", &backward.d_q, dtype)?,
                d_k: tensor("d_k", &backward.d_k, dtype)?,
                d_v: tensor("d_v", &backward.d_v, dtype)?,
                d_prior: match given::is_there(
                    ["d_prior_k", "d_prior_v"],
                    [&backward.d_prior_k, &backward.d_prior_v],
                )? {
                    true => Some((
                        tensor("d_prior_k", &backward.d_prior_k, dtype)?,
                        tensor("d_prior_v", &backward.d_prior_v, dtype)?,
                    )),
                    false => None,
                },
                d_past_gate: numbers("d_past_gate", backward.d_past_gate, given::gates(problem))?,
            };
            BackwardPlan::new(&call, &saved, &gradients, &*self.kernels)?
        };
        Ok(self.plan(Call::Backward(plan)))
    }

    fn plan(&self, call: Call) -> GpuPlan {
        let kernels = self.kernels.clone();
        GpuPlan { kernels, call }
    }
}

impl GpuPlan {
    pub fn workspace_bytes(&self) -> usize {
        match &self.call {
            Call::Forward(plan) => plan.workspace_bytes(),
            Call::Backward(plan) => plan.workspace_bytes(),
        }
    }

    /// Enqueues the call; `with_values` copies lengths and gates in host memory first.
    ///
    /// # Safety
    /// `stream` is a `CUstream` of the device's primary context. Every address is as [`ForwardPlan::run`] says.
    pub unsafe fn run(
        &self,
        stream: *mut c_void,
        workspace: *mut c_void,
        bytes: usize,
        with_values: bool,
    ) -> Result<(), Failure> {
        let workspace = DeviceSlice::new(workspace.addr() as u64, bytes);
        // SAFETY: the caller's promise, in each of the calls.
        unsafe {
            let mut stream = self.kernels.on_raw(stream.cast())?;
            match (&self.call, with_values) {
                (Call::Forward(plan), true) => plan.run(&mut stream, workspace)?,
                (Call::Forward(plan), false) => plan.launch(&mut stream, workspace)?,
                (Call::Backward(plan), true) => plan.run(&mut stream, workspace)?,
                (Call::Backward(plan), false) => plan.launch(&mut stream, workspace)?,
            }
        }
        Ok(())
    }
}

fn dtype(problem: &types::Problem) -> Result<Dtype, Failure> {
    match problem.dtype {
        x if x == types::Dtype::Bf16 as i32 => Ok(Dtype::Bf16),
        x if x == types::Dtype::F16 as i32 => Ok(Dtype::F16),
        got => Err(Failure::Dtype {
            expected: "SEGATTN_DTYPE_BF16 and SEGATTN_DTYPE_F16 on a GPU",
            got,
        }),
    }
}

/// A tensor in device memory.
///
/// # Safety
/// As [`given::layout`].
unsafe fn tensor<'a>(
    argument: &'static str,
    tensor: &types::Tensor,
    dtype: Dtype,
) -> Result<Tensor<'a>, Failure> {
    // SAFETY: the caller's promise.
    let layout = unsafe { given::layout(argument, tensor) }?;
    let len = given::check_array(argument, tensor.data.cast::<u16>(), layout.extent())?;
    Ok(Tensor {
        data: tensor.data.addr() as u64,
        len,
        dtype,
        layout,
    })
}

/// f32 in device memory.
fn numbers(
    argument: &'static str,
    pointer: *const f32,
    len: Option<usize>,
) -> Result<DeviceSlice, Failure> {
    let len = given::check_array(argument, pointer, len)?;
    Ok(DeviceSlice::new(pointer.addr() as u64, len))
}
