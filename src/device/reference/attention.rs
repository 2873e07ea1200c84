//! The operation on the f64 device: the reference of [`crate::attention`].

use super::Reference;
use crate::attention::{Error, HostGradients, HostProblem, HostSaved, ViewMut, reference};
use crate::device::shared::spans::Operation;

impl Operation for Reference {
    type Number = f64;
    type Buffer = Vec<f64>;

    fn forward(
        problem: &HostProblem<'_, f64>,
        out: ViewMut<'_, f64>,
        lse: &mut [f64],
    ) -> Result<(), Error> {
        reference::forward(problem, out, lse)
    }

    fn backward(
        problem: &HostProblem<'_, f64>,
        saved: &HostSaved<'_, f64>,
        grads: HostGradients<'_, f64>,
    ) -> Result<(), Error> {
        reference::backward(problem, saved, grads)
    }
}
