//! What a run keeps of each tensor: which, and whether the tensors that it begins from are those.

use crate::device::{Device, Kind, Purpose};
use crate::model::config::ModelConfig;
use crate::model::parameters::TensorSpec;
use crate::train::config::Config;
use crate::train::error::{Result, TrainError};
use crate::train::progress::Tensors;

/// What is kept of each tensor, in the order of [`Tensors`]' fields.
#[derive(Clone, Copy)]
pub(super) enum Kept {
    Values,
    M,
    V,
}

pub(super) fn room<D: Device>(device: &D, len: usize) -> crate::device::Result<D::Buffer> {
    let buffer = device.empty(Kind::Exact, len);
    buffer.map_err(|error| error.wanted_for(Purpose::Optimizer))
}

/// Elements of a tensor that a run keeps in f32.
pub(super) fn kept(spec: &TensorSpec) -> usize {
    if spec.frozen { 0 } else { spec.role.len() }
}

/// Adapters need the weights that they are added to, and the configuration says whether there are any.
pub(super) fn check_adapters(model: &ModelConfig, config: &Config, base: bool) -> Result<()> {
    let adapters = model.lora.is_some();
    if adapters == base && adapters == config.lora.is_on() {
        return Ok(());
    }
    let expected = "a model with adapters and the weights that they are added to where `lora.r` is given, and \
                    neither where it is not";
    let got = format!("adapters: {adapters}, weights: {base}");
    Err(TrainError::argument("model", expected, got))
}

pub(super) fn check_sizes(specs: &[TensorSpec], tensors: &Tensors) -> Result<()> {
    for (kind, list) in [
        ("values", &tensors.values),
        ("m", &tensors.m),
        ("v", &tensors.v),
    ] {
        if list.len() != specs.len() {
            let expected = format!("{} tensors", specs.len());
            return Err(TrainError::argument(kind, expected, list.len()));
        }
        for (spec, tensor) in specs.iter().zip(list) {
            if tensor.len() != kept(spec) {
                let name = format!("{kind} of `{}`", spec.parts[0].0);
                let expected = format!("{} elements", kept(spec));
                return Err(TrainError::argument(name, expected, tensor.len()));
            }
        }
    }
    Ok(())
}
