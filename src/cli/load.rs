//! Reads the weights of a model folder onto a device, one tensor at a time.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use safetensors::tensor::{Dtype, Metadata, TensorInfo};
use segattn::device::{Device, DeviceError};
use segattn::model::config::ModelConfig;
use segattn::model::decoder::Decoder;
use segattn::model::parameters::{Role, TensorSpec, specs};
use serde::Deserialize;

/// Largest header of a safetensors file, as in the format's own library.
const MAX_HEADER: u64 = 100_000_000;
/// Largest index file.
const MAX_INDEX: u64 = 100_000_000;
/// Bytes of a tensor read at a time.
const PIECE: usize = 1 << 22;

/// One weight file: where each tensor lies in it.
struct Shard {
    path: PathBuf,
    file: File,
    /// Byte at which the tensors begin.
    start: u64,
    header: Metadata,
}

/// Which file of a sharded model holds which tensor.
#[derive(Deserialize)]
struct Index {
    weight_map: HashMap<String, String>,
}

/// The model of `config` with the weights in `folder`: `model.safetensors`, or the files that
/// `model.safetensors.index.json` names. Past gates that are absent are 1.
pub fn load<D: Device + Clone>(
    folder: &Path,
    config: ModelConfig,
    device: D,
) -> Result<Decoder<D>> {
    let mut shards = open(folder)?;
    let tensors = specs(&config);
    let (target, mut failed) = (device.clone(), None);
    let values = |i: usize| {
        let values = read_tensor(&mut shards, &tensors[i]).map_err(|error| {
            // Only device errors can pass through the decoder; this one is returned below.
            failed = Some(error);
            DeviceError::OutOfMemory { bytes: 0 }
        })?;
        let mut buffer = target.zeros(tensors[i].role.len())?;
        target.write(&mut buffer, 0, &values)?;
        Ok(buffer)
    };
    let decoder = Decoder::new(device, config, values, false);
    match failed {
        Some(error) => Err(error.context(format!("weights in {}", folder.display()))),
        None => Ok(decoder?),
    }
}

fn open(folder: &Path) -> Result<Vec<Shard>> {
    let single = folder.join("model.safetensors");
    let index = folder.join("model.safetensors.index.json");
    if single.is_file() {
        return Ok(vec![Shard::open(single)?]);
    }
    ensure!(
        index.is_file(),
        "{}: expected model.safetensors or model.safetensors.index.json, found neither",
        folder.display()
    );
    let mut text = Vec::new();
    File::open(&index)
        .and_then(|file| file.take(MAX_INDEX).read_to_end(&mut text))
        .with_context(|| format!("cannot read {}", index.display()))?;
    let read: Index = serde_json::from_slice(&text)
        .with_context(|| format!("{}: not an index of weights", index.display()))?;
    let mut names: Vec<String> = read.weight_map.into_values().collect();
    names.sort_unstable();
    names.dedup();
    let open = |name: &String| {
        let plain = Path::new(name)
            .file_name()
            .is_some_and(|n| n == name.as_str());
        ensure!(
            plain && name.ends_with(".safetensors"),
            "{}: {name:?} is not the plain name of a .safetensors file",
            index.display()
        );
        Shard::open(folder.join(name))
    };
    names.iter().map(open).collect()
}

impl Shard {
    fn open(path: PathBuf) -> Result<Self> {
        let named = || path.display().to_string();
        let mut file = File::open(&path).with_context(named)?;
        let size = file.metadata().with_context(named)?.len();
        let mut length = [0; 8];
        file.read_exact(&mut length).with_context(named)?;
        let length = u64::from_le_bytes(length);
        ensure!(
            length <= MAX_HEADER.min(size.saturating_sub(8)),
            "{}: expected a header of at most {} bytes, got {length}",
            named(),
            MAX_HEADER.min(size.saturating_sub(8))
        );
        let mut head = Vec::new();
        (&mut file)
            .take(length)
            .read_to_end(&mut head)
            .with_context(named)?;
        let header: Metadata = serde_json::from_slice(&head)
            .with_context(|| format!("{}: the header is not understood", named()))?;
        let start = length + 8;
        let end = start.saturating_add(header.data_len() as u64);
        ensure!(
            end == size,
            "{}: expected {end} bytes, got {size}; the file was cut short or is damaged",
            named()
        );
        Ok(Self {
            path,
            file,
            start,
            header,
        })
    }

    fn read(&mut self, info: &TensorInfo, values: &mut Vec<f32>) -> Result<()> {
        let convert: fn(&[u8], &mut Vec<f32>) = match info.dtype {
            Dtype::F32 => |bytes, out| {
                let values = bytes.as_chunks().0.iter();
                out.extend(values.map(|b| f32::from_le_bytes(*b)));
            },
            Dtype::F16 => |bytes, out| {
                let values = bytes.as_chunks().0.iter();
                out.extend(values.map(|b| half::f16::from_le_bytes(*b).to_f32()));
            },
            Dtype::BF16 => |bytes, out| {
                let values = bytes.as_chunks().0.iter();
                out.extend(values.map(|b| half::bf16::from_le_bytes(*b).to_f32()));
            },
            other => bail!("expected F32, F16 or BF16, got {other:?}"),
        };
        let (from, to) = info.data_offsets;
        self.file.seek(SeekFrom::Start(self.start + from as u64))?;
        let mut piece = vec![0; PIECE.min(to - from)];
        let mut left = to - from;
        while left > 0 {
            let bytes = &mut piece[..left.min(PIECE)];
            self.file
                .read_exact(bytes)
                .with_context(|| self.path.display().to_string())?;
            convert(bytes, values);
            left -= bytes.len();
        }
        Ok(())
    }
}

/// The values of one tensor, its parts one after the other.
fn read_tensor(shards: &mut [Shard], spec: &TensorSpec) -> Result<Vec<f32>> {
    let mut values = Vec::new();
    for (name, shape) in &spec.parts {
        let found = shards
            .iter_mut()
            .find_map(|s| Some((s.header.info(name)?.clone(), s)));
        match found {
            Some((info, shard)) => {
                ensure!(
                    &info.shape == shape,
                    "tensor `{name}`: expected shape {shape:?}, got {:?}",
                    info.shape
                );
                shard
                    .read(&info, &mut values)
                    .with_context(|| format!("tensor `{name}`"))?;
            }
            None if matches!(spec.role, Role::Gate { .. }) => {
                values.resize(values.len() + shape.iter().product::<usize>(), 1.0);
            }
            None => bail!("tensor `{name}` is missing"),
        }
    }
    if matches!(spec.role, Role::Gate { .. }) {
        let bad = values.iter().find(|g| !(g.is_finite() && **g >= 0.0));
        if let Some(gate) = bad {
            let name = &spec.parts[0].0;
            bail!("tensor `{name}`: expected finite numbers of at least 0, got {gate}");
        }
    }
    Ok(values)
}
