//! The operation on the f64 device: the reference of [`crate::attention`].

use super::Reference;
use crate::attention::{Error, Grads, Problem, View, ViewMut, reference};
use crate::device::shared::spans::Operation;

impl Operation for Reference {
    type Number = f64;
    type Buffer = Vec<f64>;

    fn forward(
        problem: &Problem<'_, f64>,
        out: ViewMut<'_, f64>,
        lse: &mut [f64],
    ) -> Result<(), Error> {
        reference::forward(problem, out, lse)
    }

    fn backward(
        problem: &Problem<'_, f64>,
        [out, d_out]: [View<'_, f64>; 2],
        lse: &[f64],
        grads: Grads<'_, f64>,
    ) -> Result<(), Error> {
        reference::backward(problem, out, lse, d_out, None, grads)
    }
}
