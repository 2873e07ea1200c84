//! A model folder with adapters added to its weights: `W + s B A`.

use std::path::Path;

use rayon::prelude::*;

use super::{ConvertError, begin};
use crate::model::companions::companions;
use crate::model::config::{ModelConfig, WeightType};
use crate::model::error::WeightsError;
use crate::model::lora::folder::AdapterFolder;
use crate::model::lora::{Adapter, Product};
use crate::model::parameters::{base_specs, specs};
use crate::model::weights::{Checkpoint, SaveOptions, save};

/// Writes the model in `input`, of configuration `config`, with `adapter` added to its weights to `folder`, in `dtype`.
/// Sums are f64 and rounded once. What lies beside the weights goes along.
///
/// # Errors
/// [`ConvertError`]: weights that are not those of `config` or do not fit `dtype`, a file that cannot be read or
/// written, weights in `folder` already.
pub fn merge(
    input: &Path,
    adapter: &AdapterFolder,
    folder: &Path,
    config: &ModelConfig,
    dtype: WeightType,
) -> Result<(), ConvertError> {
    let checkpoint = Checkpoint::open(input)?;
    checkpoint.check(config)?;
    begin(folder, companions(input)?)?;
    let (lora, specs, base) = (
        adapter.lora(),
        specs(&ModelConfig {
            lora: Some(adapter.lora().clone()),
            ..config.clone()
        }),
        base_specs(config),
    );
    let layers = 0..config.num_hidden_layers;
    let products: Vec<(usize, &[Adapter])> = layers
        .flat_map(|l| Product::ALL.map(|p| (p.weight(l), lora.of_product(l, p))))
        .collect();
    let values = |i: usize| -> Result<Vec<f32>, WeightsError> {
        let mut values = checkpoint.read(&base[i])?;
        let adapters = products.iter().find(|(weight, _)| *weight == i);
        for one in adapters.map_or(&[][..], |(_, adapters)| adapters) {
            let [down, up] = [one.down, one.up()].map(|i| adapter.read(&specs[i]));
            add(&mut values, one, (&down?, &up?), lora.config.factor());
        }
        Ok(values)
    };
    save(folder, config, values, SaveOptions::new(dtype)).map_err(ConvertError::Weights)
}

/// Adds `s B A` to the rows of one projection.
fn add(weight: &mut [f32], adapter: &Adapter, (down, up): (&[f32], &[f32]), factor: f64) {
    let (inner, rank) = (adapter.inner, down.len() / adapter.inner);
    let rows = &mut weight[adapter.column * inner..][..adapter.out * inner];
    let rows = rows.par_chunks_mut(inner).zip(up.par_chunks(rank));
    rows.for_each(|(row, up)| {
        let mut sums = vec![0.0; inner];
        for (b, down) in up.iter().zip(down.chunks(inner)) {
            let b = f64::from(*b);
            let pairs = sums.iter_mut().zip(down);
            pairs.for_each(|(sum, a)| *sum += b * f64::from(*a));
        }
        for (w, sum) in row.iter_mut().zip(sums) {
            *w = (f64::from(*w) + factor * sum) as f32;
        }
    });
}
