//! Calls on host memory: f32 on all cores, f64 by the reference.

use pyo3::prelude::*;
use segattn::attention::{
    Error, Gradients, HostGradients, HostProblem, HostSaved, Saved, ViewMut, cpu, reference,
};

use crate::arguments::Arguments;
use crate::errors;
use crate::tensor::{Numbers, Tensor};

/// What a backward pass reads besides the arguments.
#[derive(Debug, FromPyObject)]
#[pyo3(from_item_all)]
pub struct Upstream {
    pub out: Tensor,
    pub lse: Numbers,
    pub d_out: Tensor,
    pub d_lse: Option<Numbers>,
}

/// What it writes.
#[derive(Debug, FromPyObject)]
#[pyo3(from_item_all)]
pub struct Targets {
    pub d_q: Tensor,
    pub d_k: Tensor,
    pub d_v: Tensor,
    pub d_prior: Option<(Tensor, Tensor)>,
    pub d_past_gate: Numbers,
}

/// Writes `out` and `lse`. Addresses are trusted: `segattn.attention` keeps the arrays alive and writes to new ones.
#[pyfunction]
pub fn forward(
    py: Python<'_>,
    is_f64: bool,
    arguments: Arguments,
    out: Tensor,
    lse: Numbers,
) -> PyResult<()> {
    // SAFETY: the caller's promise.
    let done = py.detach(|| unsafe {
        match is_f64 {
            true => run_forward(&arguments, out, lse, reference::forward),
            false => run_forward(&arguments, out, lse, cpu::forward),
        }
    });
    done.map_err(|error| errors::attention(py, &error))
}

/// Writes all gradients; otherwise as [`forward`].
#[pyfunction]
pub fn backward(
    py: Python<'_>,
    is_f64: bool,
    arguments: Arguments,
    upstream: Upstream,
    targets: Targets,
) -> PyResult<()> {
    // SAFETY: the caller's promise.
    let done = py.detach(|| unsafe {
        match is_f64 {
            true => run_backward(&arguments, &upstream, &targets, reference::backward),
            false => run_backward(&arguments, &upstream, &targets, cpu::backward),
        }
    });
    done.map_err(|error| errors::attention(py, &error))
}

/// # Safety
/// All addresses are those of host memory as [`Tensor::view`] and [`Tensor::view_mut`] need it.
unsafe fn run_forward<T>(
    arguments: &Arguments,
    out: Tensor,
    lse: Numbers,
    run: impl FnOnce(&HostProblem<'_, T>, ViewMut<'_, T>, &mut [T]) -> Result<(), Error>,
) -> Result<(), Error> {
    // SAFETY: the caller's promise.
    unsafe {
        let problem = arguments.problem(|name, tensor| tensor.view(name))?;
        run(&problem, out.view_mut("out")?, lse.slice_mut("lse")?)
    }
}

/// # Safety
/// As [`run_forward`].
unsafe fn run_backward<T>(
    arguments: &Arguments,
    upstream: &Upstream,
    targets: &Targets,
    run: impl FnOnce(&HostProblem<'_, T>, &HostSaved<'_, T>, HostGradients<'_, T>) -> Result<(), Error>,
) -> Result<(), Error> {
    // SAFETY: the caller's promise.
    unsafe {
        let problem = arguments.problem(|name, tensor| tensor.view(name))?;
        let saved = Saved {
            out: upstream.out.view("out")?,
            lse: upstream.lse.slice("lse")?,
            d_out: upstream.d_out.view("d_out")?,
            d_lse: match upstream.d_lse {
                Some(d_lse) => Some(d_lse.slice("d_lse")?),
                None => None,
            },
        };
        let mut gradients = Gradients::new(
            targets.d_q.view_mut("d_q")?,
            targets.d_k.view_mut("d_k")?,
            targets.d_v.view_mut("d_v")?,
            targets.d_past_gate.slice_mut("d_past_gate")?,
        );
        if let Some((d_k, d_v)) = targets.d_prior {
            gradients = gradients.prior(d_k.view_mut("d_prior_k")?, d_v.view_mut("d_prior_v")?);
        }
        run(&problem, &saved, gradients)
    }
}
