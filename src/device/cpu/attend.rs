//! The operation on the CPU device: the f32 path of [`crate::attention`].

use super::{Buffer, Cpu};
use crate::attention::{Error, Grads, Problem, View, ViewMut, cpu};
use crate::device::shared::spans::Operation;

impl Operation for Cpu {
    type Number = f32;
    type Buffer = Buffer;

    fn forward(
        problem: &Problem<'_, f32>,
        out: ViewMut<'_, f32>,
        lse: &mut [f32],
    ) -> Result<(), Error> {
        cpu::forward(problem, out, lse)
    }

    fn backward(
        problem: &Problem<'_, f32>,
        [out, d_out]: [View<'_, f32>; 2],
        lse: &[f32],
        grads: Grads<'_, f32>,
    ) -> Result<(), Error> {
        cpu::backward(problem, out, lse, d_out, None, grads)
    }
}
