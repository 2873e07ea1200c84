//! The attention operation on the CPU device, in f32.

use super::{Buffer, Cpu};
use crate::attention::{Error, HostGradients, HostProblem, HostSaved, ViewMut, cpu};
use crate::device::shared::spans::Operation;

impl Operation for Cpu {
    type Number = f32;
    type Buffer = Buffer;

    fn forward(
        problem: &HostProblem<'_, f32>,
        out: ViewMut<'_, f32>,
        lse: &mut [f32],
    ) -> Result<(), Error> {
        cpu::forward(problem, out, lse)
    }

    fn backward(
        problem: &HostProblem<'_, f32>,
        saved: &HostSaved<'_, f32>,
        grads: HostGradients<'_, f32>,
    ) -> Result<(), Error> {
        cpu::backward(problem, saved, grads)
    }
}
