//! Models made into a model folder: from GGUF, from another folder, or with adapters merged.
//!
//! A conversion never guesses. What the file asks for and the model does not compute is an error that names it.

mod error;
pub mod folder;
pub mod gguf;
pub mod merge;

use std::path::Path;

pub use error::ConvertError;

use crate::model::files;
use crate::model::weights::check_free;

/// Makes `folder` and writes the files that lie beside the weights, unless it holds weights already.
fn begin(
    folder: &Path,
    beside: impl IntoIterator<Item = (String, Vec<u8>)>,
) -> Result<(), ConvertError> {
    check_free(folder)?;
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
