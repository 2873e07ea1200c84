//! The tensors of a model on a device, in the form that the forward pass reads.

use std::sync::Arc;

use super::{Role, TensorSpec};
use crate::device::{Accumulate, Device, DeviceError, Kind, Purpose, Result, Rows, RowsMut};

/// A weight as the forward uses it.
#[derive(Debug)]
pub enum Weight<D: Device> {
    /// Packed for GEMMs.
    Matrix(D::Matrix),
    /// A norm's weight, a bias, or sink logits.
    Vector(D::Buffer),
    /// Past gates, on the host too since they decide which work is done.
    Gate(Vec<f32>),
    /// Of another part of the model.
    Absent,
}

/// All weights of a model on a device, in the order of its specs. Models that differ in their adapters share the
/// others.
#[derive(Debug)]
pub struct Weights<D: Device> {
    weights: Vec<Arc<Weight<D>>>,
}

impl<D: Device> Weights<D> {
    /// Prepares every tensor's values; `training` also prepares gradients of inputs.
    pub fn prepare<E: From<DeviceError>>(
        device: &D,
        specs: &[TensorSpec],
        mut values: impl FnMut(usize) -> std::result::Result<D::Buffer, E>,
        training: bool,
    ) -> std::result::Result<Self, E> {
        let prepare = |(i, spec): (usize, &TensorSpec)| -> std::result::Result<_, E> {
            if spec.is_absent() {
                return Ok(Arc::new(Weight::Absent));
            }
            let buffer = values(i)?;
            Ok(Arc::new(match spec.role {
                Role::Matrix { out, inner } => {
                    let scaled = scaled(device, spec, &buffer)?;
                    let values = scaled.as_ref().unwrap_or(&buffer);
                    let matrix = device.matrix(values, out, inner, training && !spec.frozen);
                    Weight::Matrix(matrix.map_err(|e| e.wanted_for(Purpose::Weights))?)
                }
                Role::Norm { .. } | Role::Bias { .. } | Role::Sink { .. } => Weight::Vector(buffer),
                Role::Gate { len } => Weight::Gate(device.read(&buffer, 0..len)?),
            }))
        };
        Ok(Self {
            weights: specs
                .iter()
                .enumerate()
                .map(prepare)
                .collect::<std::result::Result<_, E>>()?,
        })
    }

    /// The first `count` of these weights, shared, and `more` behind them.
    pub(crate) fn with(&self, count: usize, more: Self) -> Self {
        let shared = self.weights[..count].iter().cloned();
        Self {
            weights: shared.chain(more.weights).collect(),
        }
    }

    /// Takes over the values of tensor `i`, which `spec` describes.
    ///
    /// # Errors
    /// [`DeviceError::Argument`] for a weight that models share, or what the device says.
    pub fn refresh(
        &mut self,
        device: &D,
        i: usize,
        spec: &TensorSpec,
        values: &D::Buffer,
    ) -> Result<()> {
        let Some(weight) = Arc::get_mut(&mut self.weights[i]) else {
            let (expected, got) = ("a weight of one model alone", &spec.parts[0].0);
            return Err(DeviceError::argument("weight", expected, got));
        };
        match weight {
            Weight::Matrix(matrix) => {
                let scaled = scaled(device, spec, values)?;
                device.refresh(matrix, scaled.as_ref().unwrap_or(values))
            }
            Weight::Vector(vector) => {
                let len = device.len(vector);
                let rows = Rows::packed(values, 0, len);
                let target = RowsMut::packed(vector, 0, len);
                device.copy(rows, target, 1, len, Accumulate::No)
            }
            Weight::Gate(gate) => {
                *gate = device.read(values, 0..gate.len())?;
                Ok(())
            }
            Weight::Absent => Ok(()),
        }
    }

    /// The matrix at `i`; the index functions name only matrices here.
    pub(crate) fn matrix(&self, i: usize) -> &D::Matrix {
        match &*self.weights[i] {
            Weight::Matrix(matrix) => matrix,
            _ => unreachable!("tensor {i} is a matrix by its spec"),
        }
    }

    /// The norm weight, bias or sink logits at `i`.
    pub(crate) fn vector(&self, i: usize) -> &D::Buffer {
        match &*self.weights[i] {
            Weight::Vector(vector) => vector,
            _ => unreachable!("tensor {i} is a vector by its spec"),
        }
    }

    /// The past gates at `i`.
    pub(crate) fn gate(&self, i: usize) -> &[f32] {
        match &*self.weights[i] {
            Weight::Gate(gate) => gate,
            _ => unreachable!("tensor {i} is a gate by its spec"),
        }
    }
}

/// The values times the factor of the tensor; `None` where it is 1.
fn scaled<D: Device>(
    device: &D,
    spec: &TensorSpec,
    values: &D::Buffer,
) -> Result<Option<D::Buffer>> {
    if spec.factor == 1.0 {
        return Ok(None);
    }
    let len = spec.role.len();
    let mut scaled = device.empty(Kind::Exact, len)?;
    let (src, dst) = (
        Rows::packed(values, 0, len),
        RowsMut::packed(&mut scaled, 0, len),
    );
    device.scale(spec.factor, src, dst, [1, len], Accumulate::No)?;
    Ok(Some(scaled))
}
