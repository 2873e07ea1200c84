//! Files of a model folder that go along with its weights, whatever they are: a copy of the model that lacks one of
//! them (the ids that end a text, a chat template, a licence) is another model.

use std::path::Path;

use super::config::CONFIG_FILE;
use super::error::FileError;
use super::files;

/// Largest file that goes along, in bytes; the largest tokenizers take some 35 MB.
const MAX_FILE: u64 = 128 << 20;
/// Ends of the names of weights, and of what says where weights lie.
const WEIGHTS: [&str; 12] = [
    ".safetensors",
    ".index.json",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".ggml",
    ".h5",
    ".msgpack",
    ".onnx",
    ".npz",
];
/// The folder with chat templates of other names than the default one.
pub(super) const TEMPLATE_FOLDER: &str = "additional_chat_templates";
/// What a run's checkpoint or an adapter holds beside its model.
pub(crate) const STATE: [&str; 4] = [
    "adapter_config.json",
    "manifest.json",
    "state.json",
    "run.toml",
];

/// The files of `folder`, name and content in order of the names, that are neither weights, nor `config.json`, nor the
/// state of a training run. Hidden files are passed over, and so are folders inside, except the one with further chat
/// templates: its files are named `additional_chat_templates/NAME`. A file too large for memory is left behind with a
/// warning.
///
/// # Errors
/// [`FileError::Io`] where the folder or a file cannot be read.
pub fn companions(folder: &Path) -> Result<Vec<(String, Vec<u8>)>, FileError> {
    let mut found = Vec::new();
    add(folder, "", &mut found)?;
    let templates = folder.join(TEMPLATE_FOLDER);
    if templates.is_dir() {
        add(&templates, &format!("{TEMPLATE_FOLDER}/"), &mut found)?;
    }
    found.sort();
    Ok(found)
}

/// Adds the files of one folder, under names that begin with `before`.
fn add(folder: &Path, before: &str, found: &mut Vec<(String, Vec<u8>)>) -> Result<(), FileError> {
    let failed = |error| files::io_error(folder, error);
    for entry in std::fs::read_dir(folder).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        let name = path.file_name().and_then(|name| name.to_str());
        let Some(name) = name else {
            tracing::warn!("{}: left behind, its name is not UTF-8", path.display());
            continue;
        };
        if name.starts_with('.') || is_weights(name) {
            continue;
        }
        // Links are followed: caches of models are made of them.
        let to = std::fs::metadata(&path).map_err(|error| files::io_error(&path, error))?;
        if !to.is_file() {
            continue;
        }
        match files::read_bounded(&path, MAX_FILE) {
            Ok(content) => found.push((format!("{before}{name}"), content)),
            Err(error @ FileError::TooLarge { .. }) => {
                tracing::warn!("{error}; it does not go along with the model");
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn is_weights(name: &str) -> bool {
    let lower = name.to_ascii_lowercase();
    let own = STATE.contains(&lower.as_str()) || lower == CONFIG_FILE;
    own || WEIGHTS.iter().any(|end| lower.ends_with(end))
}
