//! Writes a model folder that this crate and Hugging Face libraries read.
//!
//! Every file is written beside its place, synced and renamed; the file that makes the folder a
//! model (`model.safetensors` or the index) comes last. So a folder holds a whole model or, to any
//! reader, no weights. Weights that are there already are never replaced.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::Path;

use serde_json::{Map, Value, json};

use super::super::error::{FileError, WeightsError};
use super::super::files;
use super::{INDEX_FILE, WEIGHTS_FILE, numbers};
use crate::model::config::{ModelConfig, WeightType};
use crate::model::parameters::{Role, TensorSpec, base_specs};

/// Bytes of tensors in one file where nothing else is asked for.
pub const MAX_SHARD_BYTES: u64 = 5_000_000_000;
/// The header is padded so that tensors start at a multiple of this.
const ALIGNMENT: usize = 8;
/// Numbers converted at a time.
const PIECE: usize = 1 << 18;

/// How weights are written.
#[derive(Debug, Clone, Copy)]
pub struct SaveOptions {
    /// Number format; past gates and sink logits are always F32.
    pub dtype: WeightType,
    /// Bytes of tensors in one file, unless a single tensor has more.
    pub max_shard_bytes: u64,
}

impl SaveOptions {
    /// This format, with [`MAX_SHARD_BYTES`].
    pub fn new(dtype: WeightType) -> Self {
        Self {
            dtype,
            max_shard_bytes: MAX_SHARD_BYTES,
        }
    }
}

/// Writes `config.json` and the weights into `folder`, which is made where it is missing. `values(i)`
/// gives tensor `i` in the order of [`base_specs`]; one is held at a time. Past gates are asked for twice; those
/// of a layer that does not read the past and has all of them 1 are left out.
///
/// # Errors
/// [`WeightsError`]: weights already there, a value that is not finite or does not fit the format, a
/// length that is not the configuration's, a file that cannot be written; and those of `values`.
pub fn save<E: From<WeightsError>>(
    folder: &Path,
    config: &ModelConfig,
    mut values: impl FnMut(usize) -> Result<Vec<f32>, E>,
    options: SaveOptions,
) -> Result<(), E> {
    let specs = base_specs(config);
    let mut kept = Vec::new();
    for (i, spec) in specs.iter().enumerate() {
        if !matches!(spec.role, Role::Gate { .. })
            || reads_past(config, i)
            || values(i)?.iter().any(|gate| *gate != 1.0)
        {
            kept.push(i);
        }
    }
    prepare_folder(folder)?;
    let dtype = |i: usize| match specs[i].role {
        Role::Gate { .. } | Role::Sink { .. } => WeightType::F32,
        _ => options.dtype,
    };
    let bytes = |i: usize| (specs[i].role.len() * dtype(i).size()) as u64;
    let shards = into_shards(&kept, bytes, options.max_shard_bytes);
    let name = |shard: usize| match shards.len() {
        1 => WEIGHTS_FILE.to_owned(),
        count => format!("model-{:05}-of-{count:05}.safetensors", shard + 1),
    };
    let saved = ModelConfig {
        dtype: Some(options.dtype),
        ..config.clone()
    };
    saved.save(folder).map_err(WeightsError::from)?;
    for (n, shard) in shards.iter().enumerate() {
        write_shard(&folder.join(name(n)), &specs, shard, dtype, &mut values)?;
    }
    if shards.len() > 1 {
        let mut map = BTreeMap::new();
        for (n, shard) in shards.iter().enumerate() {
            let parts = shard.iter().flat_map(|i| &specs[*i].parts);
            map.extend(parts.map(|(part, _)| (part, name(n))));
        }
        let total: u64 = kept.iter().map(|i| bytes(*i)).sum();
        let index = json!({"metadata": {"total_size": total}, "weight_map": map});
        let text = format!("{index:#}\n");
        files::write_renamed(&folder.join(INDEX_FILE), text.as_bytes())
            .map_err(WeightsError::from)?;
    }
    Ok(())
}

/// Whether spec `i`, a gate, is of a layer that reads the past.
fn reads_past(config: &ModelConfig, i: usize) -> bool {
    (0..config.num_hidden_layers).any(|l| {
        i == crate::model::parameters::index::past_gate(l)
            && (0..config.num_key_value_heads).any(|g| config.reads_past(l, g))
    })
}

/// Whether a model may be written into `folder`, which is looked at before anything in it changes.
///
/// # Errors
/// [`WeightsError::AlreadyThere`] where it holds weights.
pub(crate) fn check_free(folder: &Path) -> Result<(), WeightsError> {
    let mut paths = [WEIGHTS_FILE, INDEX_FILE]
        .map(|file| folder.join(file))
        .into_iter();
    match paths.find(|path| fs::symlink_metadata(path).is_ok()) {
        Some(path) => Err(WeightsError::AlreadyThere { path }),
        None => Ok(()),
    }
}

fn prepare_folder(folder: &Path) -> Result<(), WeightsError> {
    let io = |error| WeightsError::File(files::io_error(folder, error));
    let made = !folder.exists();
    fs::create_dir_all(folder).map_err(io)?;
    check_free(folder)?;
    match folder.canonicalize().map_err(io)?.parent() {
        Some(parent) if made => Ok(files::sync_folder(parent)?),
        _ => Ok(()),
    }
}

/// Consecutive tensors of at most `most` bytes together, or one that is larger.
fn into_shards(kept: &[usize], bytes: impl Fn(usize) -> u64, most: u64) -> Vec<Vec<usize>> {
    let (mut shards, mut filled) = (vec![Vec::new()], 0u64);
    for i in kept {
        if filled > 0 && filled.saturating_add(bytes(*i)) > most {
            shards.push(Vec::new());
            filled = 0;
        }
        filled += bytes(*i);
        if let Some(last) = shards.last_mut() {
            last.push(*i);
        }
    }
    shards
}

fn write_shard<E: From<WeightsError>>(
    path: &Path,
    specs: &[TensorSpec],
    shard: &[usize],
    dtype: impl Fn(usize) -> WeightType,
    values: &mut impl FnMut(usize) -> Result<Vec<f32>, E>,
) -> Result<(), E> {
    let folder = path.parent().unwrap_or(Path::new("."));
    let io = |error| WeightsError::File(files::io_error(path, error));
    // Wide numbers first, so that each starts at a multiple of its size.
    let mut order = shard.to_vec();
    order.sort_by_key(|i| std::cmp::Reverse(dtype(*i).size()));
    let beside = files::new_beside(folder).map_err(WeightsError::from)?;
    let mut out = std::io::BufWriter::with_capacity(1 << 20, beside);
    out.write_all(&header(specs, &order, &dtype)).map_err(io)?;
    let mut bytes = Vec::with_capacity(PIECE * size_of::<f32>());
    for i in order {
        let mut values = values(i)?;
        let (name, expected) = (&specs[i].parts[0].0, specs[i].role.len());
        if values.len() != expected {
            return Err(WeightsError::Length {
                name: name.clone(),
                expected,
                got: values.len(),
            }
            .into());
        }
        specs[i].for_file(&mut values);
        let mut rest = values.as_slice();
        for (name, shape) in &specs[i].parts {
            let (part, more) = rest.split_at(shape.iter().product());
            rest = more;
            for (n, piece) in part.chunks(PIECE).enumerate() {
                bytes.clear();
                numbers::encode(dtype(i), piece, &mut bytes)
                    .map_err(|at| unfit(name, n * PIECE + at, piece[at], dtype(i)))?;
                out.write_all(&bytes).map_err(io)?;
            }
        }
    }
    let beside = out.into_inner().map_err(|error| io(error.into_error()))?;
    let placed = files::persist(beside, path).and_then(|()| files::sync_folder(folder));
    placed.map_err(|error: FileError| WeightsError::from(error).into())
}

fn unfit(name: &str, index: usize, got: f32, dtype: WeightType) -> WeightsError {
    let name = name.to_owned();
    match got.is_finite() {
        true => WeightsError::Overflow {
            name,
            index,
            got,
            dtype: dtype.config_name(),
        },
        false => WeightsError::NotFinite { name, index, got },
    }
}

/// Length and JSON of a file's header, tensors in this order.
fn header(specs: &[TensorSpec], order: &[usize], dtype: impl Fn(usize) -> WeightType) -> Vec<u8> {
    let (mut entries, mut start) = (Map::new(), 0);
    // What Hugging Face's loader asks of every file.
    entries.insert("__metadata__".into(), json!({"format": "pt"}));
    for i in order {
        let dtype = dtype(*i);
        for (name, shape) in &specs[*i].parts {
            let end = start + shape.iter().product::<usize>() * dtype.size();
            let entry = json!({
                "dtype": super::Format::Float(dtype.into()).name(),
                "shape": shape,
                "data_offsets": [start, end],
            });
            entries.insert(name.clone(), entry);
            start = end;
        }
    }
    let mut json = Value::Object(entries).to_string().into_bytes();
    json.resize(json.len().next_multiple_of(ALIGNMENT), b' ');
    let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
    bytes.extend(json);
    bytes
}
