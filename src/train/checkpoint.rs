//! Crash-safe checkpoints: a folder each, from which a run goes on to the same bits and which is a model
//! folder for the other commands at the same time.
//!
//! ```text
//! step-00000250/
//!   config.json           model.safetensors        the model, in the Hugging Face layout, f32
//!   optimizer.safetensors  m.<name> and v.<name>: AdamW's moments
//!   run.toml  state.json   the run's configuration; step, data position, guard, data fingerprint
//!   manifest.json          SHA-256 of every file and of every tensor
//! ```
//!
//! Where adapters are trained, `adapter_model.safetensors` and `adapter_config.json` (PEFT's layout) stand in the place
//! of `model.safetensors`.
//!
//! A checkpoint is written beside its place, every file synced, then renamed, and the folder above synced;
//! only then are older ones removed, and at least the one before is kept. So whenever the power goes, the
//! newest folder with a manifest that holds is a whole checkpoint.

mod manifest;
mod names;
mod storage;
mod tensors;

use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use manifest::{Manifest, Writer};
use names::{MODEL, OPTIMIZER, OWN, OWN_OF_ADAPTERS, RUN, STATE, damaged, is_extra};
pub use storage::{Disk, Storage, create_folder};

use super::config::Config;
use super::error::{Result, TrainError};
use super::progress::{Progress, Tensors};
use crate::model::config::{CONFIG_FILE, ModelConfig};
use crate::model::lora::Lora;
use crate::model::lora::folder::{self, ADAPTER_CONFIG_FILE, ADAPTER_FILE};

/// Start of the names of folders that are being written or removed.
const BESIDE: &str = ".writing-";
const STEP: &str = "step-";

/// All that a run needs to go on.
#[derive(Clone, Debug, PartialEq)]
pub struct Checkpoint {
    /// The run's configuration.
    pub config: Config,
    /// The model's.
    pub model: ModelConfig,
    /// Weights and moments.
    pub tensors: Tensors,
    /// Step, data position, guard.
    pub progress: Progress,
    /// The data's identity.
    pub data: Fingerprints,
    /// Further files for users of the model folder, such as `tokenizer.json`: name and content.
    pub extra: Vec<(String, Vec<u8>)>,
}

/// [`fingerprint`](super::data::fingerprint)s of a run's documents, and of weights that it does not change.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fingerprints {
    /// Of those it trains on.
    pub train: String,
    /// Of those it validates on.
    pub validation: String,
    /// Of the weights that adapters are added to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<String>,
    /// Of the teacher's weights.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub teacher: Option<String>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    progress: Progress,
    data: Fingerprints,
    extra: Vec<String>,
}

/// Saves into `root`, keeps the newest `keep` checkpoints whose files hold, and returns the new one's folder. Damaged
/// ones do not count among those kept, and go when they are older than all that are kept.
///
/// # Errors
/// [`TrainError::Argument`] for a name in `extra` that is not of a file in the folder. [`TrainError::Io`]: checkpoints
/// that were there before are there still, and nothing half-written is left behind.
pub fn save(
    storage: &mut dyn Storage,
    root: &Path,
    checkpoint: &Checkpoint,
    keep: usize,
) -> Result<PathBuf> {
    for (name, _) in &checkpoint.extra {
        if !is_extra(name) {
            let expected = "the name of a further file in the checkpoint's folder";
            return Err(TrainError::argument("extra", expected, format!("{name:?}")));
        }
    }
    create_folder(storage, root)?;
    remove_leftovers(storage, root)?;
    let name = format!("{STEP}{:010}", checkpoint.progress.step);
    let (beside, place) = (free_place(root, &name), root.join(name));
    if let Err(error) = write_and_rename(storage, root, checkpoint, &beside, &place) {
        // What filled the disk must not keep it full.
        if beside.exists() {
            remove_if_possible(storage, &beside);
        }
        return Err(error);
    }
    let own = match checkpoint.model.lora {
        Some(_) => OWN_OF_ADAPTERS,
        None => OWN,
    };
    prune(storage, root, (&place, own), keep.max(2))?;
    Ok(place)
}

fn write_and_rename(
    storage: &mut dyn Storage,
    root: &Path,
    checkpoint: &Checkpoint,
    beside: &Path,
    place: &Path,
) -> Result<()> {
    storage::run("create", beside, |p| storage.create_folder(p))?;
    write(storage, beside, checkpoint)?;
    storage::run("sync", beside, |p| storage.sync_folder(p))?;
    if place.symlink_metadata().is_ok() {
        discard(storage, root, place)?;
    }
    storage::run("rename", beside, |p| storage.rename(p, place))?;
    storage::run("sync", root, |p| storage.sync_folder(p))
}

/// Removes what is older than the newest `keep` checkpoints that hold, `saved` among them. `own`: their files.
fn prune(
    storage: &mut dyn Storage,
    root: &Path,
    (saved, own): (&Path, &[&str]),
    keep: usize,
) -> Result<()> {
    let mut kept = 1;
    for (_, folder) in list(root)? {
        if folder == saved {
            continue;
        }
        if kept < keep {
            match Manifest::read(&folder).and_then(|m| m.check(&folder, own)) {
                Ok(()) => kept += 1,
                Err(error) => tracing::warn!("{error}; it does not count among those to keep"),
            }
        } else if let Err(error) = discard(storage, root, &folder) {
            // The new checkpoint is safe.
            tracing::warn!("an old checkpoint stays: {error}");
        }
    }
    Ok(())
}

fn write(storage: &mut dyn Storage, folder: &Path, checkpoint: &Checkpoint) -> Result<()> {
    let Checkpoint { config, model, .. } = checkpoint;
    let mut writer = Writer::new(storage, folder);
    let weights = tensors::parts(model, "", &checkpoint.tensors.values);
    let name = match &model.lora {
        Some(lora) => {
            let base = config.model.folder.as_deref();
            let json = format!("{:#}\n", folder::to_json(&lora.config, base));
            writer.file(ADAPTER_CONFIG_FILE, json.as_bytes())?;
            ADAPTER_FILE
        }
        None => MODEL,
    };
    writer.tensors(name, &weights)?;
    let mut moments = tensors::parts(model, "m.", &checkpoint.tensors.m);
    moments.extend(tensors::parts(model, "v.", &checkpoint.tensors.v));
    writer.tensors(OPTIMIZER, &moments)?;
    let json = match model.lora {
        Some(_) => folder::model_json(model),
        None => model.to_json(),
    };
    let json = format!("{json:#}\n");
    writer.file(CONFIG_FILE, json.as_bytes())?;
    writer.file(RUN, config.to_toml()?.as_bytes())?;
    let state = State {
        progress: checkpoint.progress.clone(),
        data: checkpoint.data.clone(),
        extra: checkpoint.extra.iter().map(|f| f.0.clone()).collect(),
    };
    let state = serde_json::to_vec_pretty(&state).expect("numbers, strings and lists are JSON");
    writer.file(STATE, &state)?;
    for (name, content) in &checkpoint.extra {
        writer.file(name, content)?;
    }
    writer.finish()
}

/// Loads one checkpoint and checks every hash.
///
/// # Errors
/// [`TrainError::Checkpoint`] that names the file or tensor that does not hold, [`TrainError::Io`].
pub fn load(folder: &Path) -> Result<Checkpoint> {
    let manifest = Manifest::read(folder)?;
    let broken = |what: &str, got: String| damaged(folder, what, "a readable file", got);
    let state = manifest.read_file(folder, STATE)?;
    let state: State = serde_json::from_slice(&state).map_err(|e| broken(STATE, e.to_string()))?;
    let run = manifest.read_file(folder, RUN)?;
    let run = String::from_utf8(run).map_err(|e| broken(RUN, e.to_string()))?;
    let config = Config::parse(&run, &[]).map_err(|e| broken(RUN, e.to_string()))?;
    let name = CONFIG_FILE;
    let json = manifest.read_file(folder, name)?;
    let json = serde_json::from_slice(&json).map_err(|e| broken(name, e.to_string()))?;
    let mut model = ModelConfig::from_json(json).map_err(|e| broken(name, e.to_string()))?;
    let mut weights = MODEL;
    if config.lora.is_on() {
        let name = ADAPTER_CONFIG_FILE;
        let json = manifest.read_file(folder, name)?;
        let json = serde_json::from_slice(&json).map_err(|e| broken(name, e.to_string()))?;
        let lora = folder::from_json(&json).and_then(|lora| Lora::new(&model, lora));
        model.lora = Some(lora.map_err(|e| broken(name, e.to_string()))?);
        weights = ADAPTER_FILE;
    }
    let weights = manifest.read_tensors(folder, weights)?;
    let values = weights.take(folder, &model, "", 1.0)?;
    let moments = manifest.read_tensors(folder, OPTIMIZER)?;
    let extra = state.extra.into_iter().map(|name| {
        if !is_extra(&name) {
            let expected = "names of further files in the folder";
            return Err(damaged(folder, STATE, expected, format!("{name:?}")));
        }
        let content = manifest.read_file(folder, &name)?;
        Ok((name, content))
    });
    Ok(Checkpoint {
        tensors: Tensors {
            values,
            m: moments.take(folder, &model, "m.", 0.0)?,
            v: moments.take(folder, &model, "v.", 0.0)?,
        },
        config,
        model,
        progress: state.progress,
        data: state.data,
        extra: extra.collect::<Result<_>>()?,
    })
}

/// Loads the newest checkpoint in `root` that holds, with its folder. One that does not is logged as an error and
/// passed over.
///
/// # Errors
/// [`TrainError::NoValidCheckpoint`] if none holds, [`TrainError::Checkpoint`] if there is none.
pub fn load_latest(root: &Path) -> Result<(PathBuf, Checkpoint)> {
    let mut newest = None;
    for (_, folder) in list(root)? {
        match load(&folder) {
            Ok(checkpoint) => return Ok((folder, checkpoint)),
            Err(error) => {
                tracing::error!("{error}; trying the one before");
                newest.get_or_insert(error);
            }
        }
    }
    Err(match newest {
        Some(newest) => TrainError::NoValidCheckpoint {
            path: root.to_owned(),
            newest: Box::new(newest),
        },
        None => damaged(root, "folder", "a checkpoint in it", "none".into()),
    })
}

/// Checkpoints in `root`, newest first, with their steps. None if there is no such folder.
///
/// # Errors
/// [`TrainError::Io`].
pub fn list(root: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let step = |name: &str| name.strip_prefix(STEP)?.parse::<u64>().ok();
    let mut found: Vec<_> = names(root)?
        .into_iter()
        .filter_map(|name| Some((step(&name)?, root.join(name))))
        .filter(|(_, folder)| folder.is_dir())
        .collect();
    found.sort_unstable_by(|a, b| b.cmp(a));
    Ok(found)
}

fn names(root: &Path) -> Result<Vec<String>> {
    let failed = |source| TrainError::Io {
        action: "read",
        path: root.to_owned(),
        source,
    };
    if !root.exists() {
        return Ok(Vec::new());
    }
    let mut names = Vec::new();
    for entry in fs::read_dir(root).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        names.extend(entry.file_name().into_string());
    }
    names.sort_unstable();
    Ok(names)
}

/// Takes the name away first, so that no half-removed checkpoint has one.
fn discard(storage: &mut dyn Storage, root: &Path, folder: &Path) -> Result<()> {
    let name = folder.file_name().unwrap_or_default().to_string_lossy();
    let beside = free_place(root, &format!("removed-{name}"));
    storage::run("rename", folder, |p| storage.rename(p, &beside))?;
    remove_if_possible(storage, &beside);
    Ok(())
}

/// A hidden name for `name` that is not taken, not even by something that cannot be removed.
fn free_place(root: &Path, name: &str) -> PathBuf {
    let mut place = root.join(format!("{BESIDE}{name}"));
    for n in 1u64.. {
        if place.symlink_metadata().is_err() {
            break;
        }
        place = root.join(format!("{BESIDE}{n}-{name}"));
    }
    place
}

/// Removes what interrupted saves have left in `root`. Not while another process saves there.
///
/// # Errors
/// [`TrainError::Io`] if `root` cannot be read. What cannot be removed is a warning.
pub fn remove_leftovers(storage: &mut dyn Storage, root: &Path) -> Result<()> {
    let leftovers = names(root)?.into_iter().filter(|n| n.starts_with(BESIDE));
    for name in leftovers {
        remove_if_possible(storage, &root.join(name));
    }
    Ok(())
}

fn remove_if_possible(storage: &mut dyn Storage, path: &Path) {
    if let Err(error) = storage::run("remove", path, |p| storage.remove(p)) {
        tracing::warn!("{error}");
    }
}
