//! The model's stacked tensors as the named tensors of a safetensors file, and back.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashSet};
use std::path::Path;

use super::names::damaged;
use crate::model::config::ModelConfig;
use crate::model::lora::Adapter;
use crate::model::parameters::{parameters, specs};
use crate::train::error::Result;

/// A named tensor: name, shape, values.
pub(super) type Part<'a> = (String, Vec<usize>, Cow<'a, [f32]>);

/// Named tensors of a file: shape and values.
pub(super) struct Named(pub(super) BTreeMap<String, (Vec<usize>, Vec<f32>)>);

/// Names that have a place in a file: all but those of gates that no head uses.
fn known(model: &ModelConfig) -> HashSet<String> {
    let adapters = model.lora.iter().flat_map(|lora| lora.adapters());
    let own = parameters(model).into_iter().map(|p| p.name);
    own.chain(adapters.flat_map(Adapter::names)).collect()
}

/// The parts of all tensors that are not frozen, each name behind `prefix`.
pub(super) fn parts<'a>(
    model: &ModelConfig,
    prefix: &str,
    tensors: &'a [Vec<f32>],
) -> Vec<Part<'a>> {
    let known = known(model);
    let mut parts = Vec::new();
    for (spec, values) in specs(model).into_iter().zip(tensors) {
        if spec.frozen {
            continue;
        }
        let mut values = Cow::Borrowed(values.as_slice());
        if spec.heads.is_some() {
            spec.for_file(values.to_mut());
        }
        let mut at = 0;
        for (name, shape) in spec.parts {
            let part = at..at + shape.iter().product::<usize>();
            at = part.end;
            if known.contains(&name) {
                let part = match &values {
                    Cow::Borrowed(values) => Cow::Borrowed(&values[part]),
                    Cow::Owned(values) => Cow::Owned(values[part].to_vec()),
                };
                parts.push((format!("{prefix}{name}"), shape, part));
            }
        }
    }
    parts
}

impl Named {
    /// The model's stacked tensors; gates that the file does not have are `absent`.
    pub(super) fn take(
        &self,
        folder: &Path,
        model: &ModelConfig,
        prefix: &str,
        absent: f32,
    ) -> Result<Vec<Vec<f32>>> {
        let known = known(model);
        let mut tensors = Vec::new();
        for spec in specs(model) {
            if spec.frozen {
                tensors.push(Vec::new());
                continue;
            }
            let mut values = Vec::with_capacity(spec.role.len());
            for (name, shape) in &spec.parts {
                if !known.contains(name) {
                    values.resize(spec.role.len(), absent);
                    continue;
                }
                let name = format!("{prefix}{name}");
                let found = self.0.get(&name);
                let Some((_, part)) = found.filter(|(got, _)| got == shape) else {
                    let got = found.map_or("none".into(), |(got, _)| format!("{got:?}"));
                    let what = format!("tensor `{name}`");
                    return Err(damaged(folder, &what, format!("shape {shape:?}"), got));
                };
                values.extend_from_slice(part);
            }
            spec.keep(&mut values);
            tensors.push(values);
        }
        Ok(tensors)
    }
}
