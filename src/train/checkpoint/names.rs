//! The names of a checkpoint's files, and the error for what does not hold.

use std::path::{Component, Path, PathBuf};

use crate::model::config::CONFIG_FILE;
use crate::model::lora::folder::{ADAPTER_CONFIG_FILE, ADAPTER_FILE};
use crate::train::error::TrainError;

pub(super) const MODEL: &str = "model.safetensors";
pub(super) const OPTIMIZER: &str = "optimizer.safetensors";
pub(super) const STATE: &str = "state.json";
pub(super) const RUN: &str = "run.toml";
/// Files that every checkpoint of a whole model has beside its manifest.
pub(super) const OWN: &[&str] = &[MODEL, OPTIMIZER, STATE, RUN, CONFIG_FILE];
/// Those of a checkpoint of adapters.
pub(super) const OWN_OF_ADAPTERS: &[&str] = &[
    ADAPTER_FILE,
    ADAPTER_CONFIG_FILE,
    OPTIMIZER,
    STATE,
    RUN,
    CONFIG_FILE,
];
/// The manifest, which lists the others.
pub(super) const MANIFEST: &str = "manifest.json";

/// Whether `name` is that of a file inside the folder that no part of the checkpoint has.
pub(super) fn is_extra(name: &str) -> bool {
    let own = OWN.iter().chain(OWN_OF_ADAPTERS).chain([&MANIFEST]);
    is_inside(name) && own.into_iter().all(|own| !own.eq_ignore_ascii_case(name))
}

/// Whether `name`, joined to a folder, stays inside it.
pub(super) fn is_inside(name: &str) -> bool {
    let path = Path::new(name);
    let mut plain = PathBuf::new();
    plain.extend(
        path.components()
            .filter(|c| matches!(c, Component::Normal(_))),
    );
    !name.is_empty() && plain.as_os_str() == path.as_os_str()
}

pub(super) fn damaged(
    path: &Path,
    what: &str,
    expected: impl Into<String>,
    got: String,
) -> TrainError {
    TrainError::Checkpoint {
        path: path.to_owned(),
        what: what.to_owned(),
        expected: expected.into(),
        got,
    }
}
