//! A model folder as another: segments, another number format, everything else as it was.

use std::path::Path;

use super::{ConvertError, begin};
use crate::model::companions::companions;
use crate::model::config::{ModelConfig, WeightType};
use crate::model::parameters::specs;
use crate::model::weights::{Checkpoint, SaveOptions, save};

/// Writes the model in `input` to `folder` with this configuration, which is that of `input` but for its segments, and
/// weights in `dtype`. What lies beside the weights goes along.
///
/// # Errors
/// [`ConvertError`]: weights that are not those of `config` or do not fit `dtype`, a file that cannot be read or
/// written, weights in `folder` already.
pub fn convert(
    input: &Path,
    folder: &Path,
    config: &ModelConfig,
    dtype: WeightType,
) -> Result<(), ConvertError> {
    let checkpoint = Checkpoint::open(input)?;
    checkpoint.check(config)?;
    begin(folder, companions(input)?)?;
    let specs = specs(config);
    save(
        folder,
        config,
        |i| checkpoint.read(&specs[i]),
        SaveOptions::new(dtype),
    )
    .map_err(ConvertError::Weights)
}
