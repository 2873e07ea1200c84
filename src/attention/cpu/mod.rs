//! Segment attention on the CPU in f32: tiled, with an online softmax, on all cores, with the widest vectors of the
//! machine.
//!
//! The bits of a query row depend only on that row and the keys it sees (docs/contract.md, section 4); see the module
//! `tile`. They do not depend on the number of threads or on the instruction set. Sums of gradients have a fixed order;
//! see the module `schedule`.

mod backward;
mod forward;
mod kernels;
mod schedule;
mod shared;
mod simd;
mod softmax;
mod tile;

use std::ops::Range;

use kernels::Kernels;
use shared::{SharedRows, SharedSlice};
use tile::Rows;

use super::error::Error;
use super::layout::{View, ViewMut};
use super::problem::{HostGradients, HostProblem, HostSaved};
use super::source::Part;
use crate::isa::Isa;

/// Memory space of lengths and gates.
const HOST: &str = "host values on the CPU";

/// Computes `out` (like `q`) and `lse` `[batch, q_heads, rows]`; padding rows are 0 and -inf.
///
/// # Errors
/// See [`Problem::validate`](super::Problem::validate); likewise for `out` and `lse`. `head_dim` must be a multiple of
/// 8 up to 256.
pub fn forward(
    problem: &HostProblem<'_, f32>,
    out: ViewMut<'_, f32>,
    lse: &mut [f32],
) -> Result<(), Error> {
    forward_on(Isa::best(), problem, out, lse)
}

/// [`forward`] with a given instruction set. The bits are the same for all. If the machine lacks it,
/// [`Isa::Portable`] is used.
///
/// # Errors
/// Those of [`forward`].
pub fn forward_on(
    isa: Isa,
    problem: &HostProblem<'_, f32>,
    out: ViewMut<'_, f32>,
    lse: &mut [f32],
) -> Result<(), Error> {
    problem.check_on_host(HOST)?;
    problem.validate_forward(&out, &lse)?;
    check_head_dim(problem)?;
    let out = SharedRows::new(out);
    forward::run(problem, &out, &SharedSlice::new(lse), Kernels::of(isa));
    Ok(())
}

/// Computes the gradients of a loss from those with respect to `out` and `lse`.
///
/// The bits of the gradients of a batch element depend only on that batch element.
///
/// # Errors
/// See [`Problem::validate`](super::Problem::validate); likewise for every other argument. `query_start` must be 0,
/// `head_dim` a multiple of 8 up to 256.
pub fn backward(
    problem: &HostProblem<'_, f32>,
    saved: &HostSaved<'_, f32>,
    grads: HostGradients<'_, f32>,
) -> Result<(), Error> {
    backward_on(Isa::best(), problem, saved, grads)
}

/// [`backward`] with a given instruction set, as [`forward_on`].
///
/// # Errors
/// Those of [`backward`].
pub fn backward_on(
    isa: Isa,
    problem: &HostProblem<'_, f32>,
    saved: &HostSaved<'_, f32>,
    grads: HostGradients<'_, f32>,
) -> Result<(), Error> {
    problem.check_on_host(HOST)?;
    problem.validate_backward(saved, &grads)?;
    check_head_dim(problem)?;
    backward::run(problem, saved, grads, Kernels::of(isa));
    Ok(())
}

fn check_head_dim(problem: &HostProblem<'_, f32>) -> Result<(), Error> {
    let head_dim = problem.head_dim();
    if head_dim.is_multiple_of(8) && head_dim <= 256 {
        return Ok(());
    }
    Err(Error::Unsupported {
        argument: "head_dim",
        expected: "multiples of 8 up to 256",
        got: head_dim.to_string(),
    })
}

fn scale(problem: &HostProblem<'_, f32>) -> f32 {
    problem
        .scale
        .unwrap_or_else(|| 1.0 / (problem.head_dim() as f32).sqrt())
}

/// Bias of a head on the scores of a part of the keys that it reads.
fn past_bias(problem: &HostProblem<'_, f32>, part: Part, q_head: usize) -> f32 {
    match part {
        Part::Gated => problem.gate(q_head).ln(),
        Part::Sinks | Part::Prior | Part::Current => 0.0,
    }
}

/// The heads of a group that read a part of the keys, as ranges of indices within the group.
fn head_runs(problem: &HostProblem<'_, f32>, part: Part, kv_head: usize) -> Vec<Range<usize>> {
    let group = problem.group();
    let mut runs: Vec<Range<usize>> = Vec::new();
    for head in (0..group).filter(|head| problem.reads_part(part, kv_head * group + head)) {
        match runs.last_mut() {
            Some(run) if run.end == head => run.end = head + 1,
            _ => runs.push(head..head + 1),
        }
    }
    runs
}

/// The rows from one row of a head on.
fn source_rows<'a>(view: &View<'a, f32>, [batch_index, row, head]: [usize; 3]) -> Rows<'a> {
    Rows {
        data: &view.data[view.layout.offset(batch_index, row, head)..],
        stride: view.layout.row_stride,
    }
}
