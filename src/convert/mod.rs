//! Models made into a model folder: from GGUF, from another folder, or with adapters merged.
//!
//! A conversion never guesses. What the file asks for and the model does not compute is an error that names it.

mod error;
pub mod folder;
pub mod gguf;
pub mod merge;

use std::path::Path;

pub use error::ConvertError;

use crate::model::companions::STATE;
use crate::model::error::WeightsError;
use crate::model::files;
use crate::model::weights::{check_free, other_weights};

/// Makes `folder` and writes the files that lie beside the weights, unless it holds weights already, of whatever kind,
/// or a run's checkpoint: their `config.json` would be another's then.
fn begin(
    folder: &Path,
    beside: impl IntoIterator<Item = (String, Vec<u8>)>,
) -> Result<(), ConvertError> {
    check_free(folder)?;
    let state = STATE.map(str::to_owned).into_iter();
    let state = state.filter(|name| !files::is_absent(&folder.join(name)));
    let weights = other_weights(folder).0.into_iter();
    // The file that is converted may lie there.
    let weights = weights.filter(|name| !name.ends_with(".gguf"));
    if let Some(name) = weights.chain(state).next() {
        let path = folder.join(name);
        return Err(WeightsError::AlreadyThere { path }.into());
    }
    std::fs::create_dir_all(folder).map_err(|error| files::io_error(folder, error))?;
    for (name, content) in beside {
        let path = folder.join(name);
        if let Some(inside) = path.parent().filter(|inside| *inside != folder) {
            std::fs::create_dir_all(inside).map_err(|error| files::io_error(inside, error))?;
        }
        files::write_renamed(&path, &content)?;
    }
    Ok(())
}
