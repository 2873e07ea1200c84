//! Weights in a Hugging Face model folder: `model.safetensors`, or the shards that
//! `model.safetensors.index.json` names, or a complete set of shards without an index. Numbers are F64, F32, F16 or
//! BF16.
//!
//! [`Checkpoint::open`] reads headers only. Tensors are then read one at a time and in pieces, so that
//! memory is bounded by what is asked for; files are never mapped, since a mapped file that someone cuts
//! short kills the process instead of giving an error.

pub mod header;
pub mod index;
mod initial;
mod numbers;
mod samples;
mod save;
mod shards;

use std::collections::BTreeMap;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use super::config::{ModelConfig, Part};
use super::decoder::Decoder;
use super::error::{ModelError, NameList, WeightsError};
use super::files;
use super::parameters::{Role, TensorSpec, Weights, base_specs};
use super::stage::Stage;
use crate::device::{Device, Kind, Purpose};
use header::{Entry, FloatType, Format, Header, malformed, shown};
use index::Index;
pub use initial::{Initial, initial};
pub(crate) use save::check_free;
pub use save::{MAX_SHARD_BYTES, SaveOptions, save};
use sha2::{Digest, Sha256};

/// The only weight file of a small model.
pub const WEIGHTS_FILE: &str = "model.safetensors";
/// The index of a sharded model.
pub const INDEX_FILE: &str = "model.safetensors.index.json";
/// Beginning of the names of all tensors but the head.
const MODEL_PREFIX: &str = "model.";
/// Name of the embedding table.
const EMBEDDING: &str = "model.embed_tokens.weight";
/// Name of the head.
const HEAD: &str = "lm_head.weight";
/// Tensors that older models carry and that are computed from the configuration instead.
const COMPUTED: &str = ".rotary_emb.inv_freq";
/// Numbers of a tensor in memory as they are in the file.
const PIECE: usize = 1 << 18;
/// Most tensors of all files together.
const MAX_TENSORS: usize = 1 << 18;

/// The tensors of a model folder; their values stay in the files until they are read.
#[derive(Debug)]
pub struct Checkpoint {
    folder: PathBuf,
    shards: Vec<PathBuf>,
    /// By name: which shard, and where in it.
    tensors: BTreeMap<String, (usize, Entry)>,
}

impl Checkpoint {
    /// Reads the headers of the folder's weight files. A single file counts before an index, and an index before
    /// shards by their names alone.
    ///
    /// # Errors
    /// [`WeightsError`]: no weights, a file that cannot be read or breaks its format, an index that does not fit its
    /// files, shards that are not a complete set, one name in two files.
    pub fn open(folder: &Path) -> Result<Self, WeightsError> {
        let (single, path) = (folder.join(WEIGHTS_FILE), folder.join(INDEX_FILE));
        let mut checkpoint = Self {
            folder: folder.to_owned(),
            shards: Vec::new(),
            tensors: BTreeMap::new(),
        };
        if !files::is_absent(&single) {
            checkpoint.add(single)?;
            checkpoint.name_in_full();
            return Ok(checkpoint);
        }
        if files::is_absent(&path) {
            let shards = shards::find(folder)?;
            if shards.is_empty() {
                return Err(WeightsError::NoWeights {
                    folder: folder.to_owned(),
                    found: other_weights(folder),
                });
            }
            for shard in shards {
                checkpoint.add(folder.join(shard))?;
            }
            checkpoint.name_in_full();
            return Ok(checkpoint);
        }
        let index = Index::read(&path)?;
        for shard in index.shards() {
            checkpoint.add(folder.join(shard))?;
        }
        for (name, shard) in &index.weight_map {
            let found = checkpoint
                .tensors
                .get(name)
                .map(|t| &checkpoint.shards[t.0]);
            if found != Some(&folder.join(shard)) {
                let what = format!("tensor `{}`", shown(name));
                let got = found.map_or("none of that name".into(), |p| p.display().to_string());
                return Err(malformed(
                    &path,
                    what,
                    format!("it in {}", shown(shard)),
                    got,
                ));
            }
        }
        checkpoint.name_in_full();
        Ok(checkpoint)
    }

    /// The tensors of this file alone.
    ///
    /// # Errors
    /// [`WeightsError`]: a file that cannot be read or breaks its format.
    pub fn of_file(path: &Path) -> Result<Self, WeightsError> {
        let mut checkpoint = Self {
            folder: path.parent().unwrap_or(Path::new("")).to_owned(),
            shards: Vec::new(),
            tensors: BTreeMap::new(),
        };
        checkpoint.add(path.to_owned())?;
        Ok(checkpoint)
    }

    /// Whether the parts of a tensor are there, in their shapes and in formats that are read.
    ///
    /// # Errors
    /// [`WeightsError::Names`], [`WeightsError::Shape`], [`WeightsError::NumberFormat`].
    pub fn check_spec(&self, spec: &TensorSpec) -> Result<(), WeightsError> {
        for (name, shape) in &spec.parts {
            match self.tensors.get(name) {
                Some((_, entry)) => float(name, shape, entry).map(drop)?,
                None => return Err(self.names(vec![name.clone()], Vec::new())),
            }
        }
        Ok(())
    }

    /// Files of the decoder alone, without the head, leave out the names' beginning.
    fn name_in_full(&mut self) {
        let part = self.tensors.contains_key("embed_tokens.weight");
        if !part
            || self
                .tensors
                .keys()
                .any(|name| name.starts_with(MODEL_PREFIX))
        {
            return;
        }
        let tensors = std::mem::take(&mut self.tensors).into_iter();
        let full = |name: String| match name.as_str() {
            HEAD => name,
            _ => format!("{MODEL_PREFIX}{name}"),
        };
        self.tensors = tensors.map(|(name, tensor)| (full(name), tensor)).collect();
    }

    /// SHA-256 over every tensor: name, format, shape and bytes, in order of the names. Reads all files.
    ///
    /// # Errors
    /// [`WeightsError::File`], [`WeightsError::Malformed`] where a file changed since it was opened.
    pub fn fingerprint(&self) -> Result<String, WeightsError> {
        let mut digest = Sha256::new();
        for (name, (shard, entry)) in &self.tensors {
            let described = format!("{name:?} {:?} {:?}", entry.format.name(), entry.shape);
            digest.update(described.as_bytes());
            let mut pieces = Pieces::open(&self.shards[*shard], entry, FloatType::F32)?;
            while pieces.left > 0 {
                digest.update(pieces.take()?);
            }
        }
        let bytes = digest.finalize();
        Ok(bytes.iter().map(|b| format!("{b:02x}")).collect())
    }

    fn add(&mut self, path: PathBuf) -> Result<(), WeightsError> {
        let header = Header::read(&path)?;
        let shard = self.shards.len();
        if self.tensors.len() + header.tensors.len() > MAX_TENSORS {
            let expected = format!("at most {MAX_TENSORS} tensors in all files together");
            return Err(malformed(&path, "file", expected, "more"));
        }
        self.shards.push(path);
        for (name, entry) in header.tensors {
            if let Some((first, _)) = self.tensors.get(&name) {
                return Err(WeightsError::Duplicate {
                    name: shown(&name),
                    first: self.shards[*first].clone(),
                    second: self.shards[shard].clone(),
                });
            }
            self.tensors.insert(name, (shard, entry));
        }
        Ok(())
    }

    /// The weight files.
    pub fn shards(&self) -> &[PathBuf] {
        &self.shards
    }

    /// Every tensor in the files, by name.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &Entry)> {
        self.tensors
            .iter()
            .map(|(name, (_, entry))| (name.as_str(), entry))
    }

    /// Whether these are the weights of `config`: every tensor there in its shape and a format that is
    /// read, none that the configuration does not know. Absent past gates are 1, so nothing is missing. Of a
    /// tied model the files may hold embedding, head, or both with the same values.
    ///
    /// # Errors
    /// [`WeightsError::Names`], [`WeightsError::Shape`], [`WeightsError::NumberFormat`],
    /// [`WeightsError::TiedHead`].
    pub fn check(&self, config: &ModelConfig) -> Result<(), WeightsError> {
        let specs = base_specs(config);
        let tied = config.tie_word_embeddings && self.tensors.contains_key(HEAD);
        let (mut missing, mut known) = (Vec::new(), std::collections::HashSet::new());
        for spec in &specs {
            for (name, shape) in &spec.parts {
                match self.find(name, config.tie_word_embeddings) {
                    Some((_, entry)) => float(name, shape, entry).map(drop)?,
                    None if matches!(spec.role, Role::Gate { .. }) => {}
                    None => missing.push(name.clone()),
                }
                known.insert(name.as_str());
            }
        }
        let harmless = |name: &str| name.ends_with(COMPUTED) || tied && name == HEAD;
        let unknown = |name: &&String| !(known.contains(name.as_str()) || harmless(name));
        let unexpected: Vec<String> = self
            .tensors
            .keys()
            .filter(unknown)
            .map(|n| shown(n))
            .collect();
        if !missing.is_empty() || !unexpected.is_empty() {
            return Err(self.names(missing, unexpected));
        }
        if tied && self.tensors.contains_key(EMBEDDING) {
            self.check_tied(&specs[super::parameters::index::EMBEDDING])?;
        }
        Ok(())
    }

    /// A head beside the embedding it is tied to must be the same: which of them a library uses
    /// where they differ depends on its version.
    fn check_tied(&self, embedding: &TensorSpec) -> Result<(), WeightsError> {
        let shape = &embedding.parts[0].1;
        let (mut a, mut b) = (self.pieces(EMBEDDING, shape)?, self.pieces(HEAD, shape)?);
        let (mut left, mut right) = (Vec::new(), Vec::new());
        loop {
            let more = a.next(&mut left)?;
            b.next(&mut right)?;
            if left != right {
                return Err(WeightsError::TiedHead {
                    folder: self.folder.clone(),
                });
            }
            if !more {
                return Ok(());
            }
            left.clear();
            right.clear();
        }
    }

    /// Where a tensor lies; a tied embedding may stand in the head's place.
    fn find(&self, name: &str, tied: bool) -> Option<&(usize, Entry)> {
        let head = || {
            (tied && name == EMBEDDING)
                .then(|| self.tensors.get(HEAD))
                .flatten()
        };
        self.tensors.get(name).or_else(head)
    }

    fn names(&self, missing: Vec<String>, unexpected: Vec<String>) -> WeightsError {
        WeightsError::Names {
            folder: self.folder.clone(),
            missing: NameList(missing),
            unexpected: NameList(unexpected),
        }
    }

    fn pieces(&self, name: &str, shape: &[usize]) -> Result<Pieces, WeightsError> {
        let Some((shard, entry)) = self.find(name, name == EMBEDDING) else {
            return Err(self.names(vec![name.to_owned()], Vec::new()));
        };
        let format = float(name, shape, entry)?;
        Pieces::open(&self.shards[*shard], entry, format)
    }

    /// The values of a tensor, its parts one after the other. Parts of past gates that are absent are 1,
    /// an absent embedding is the head ([`Checkpoint::check`] accepts that only where they are tied).
    ///
    /// # Errors
    /// [`WeightsError::Names`] for a missing part, [`WeightsError::Shape`], [`WeightsError::NumberFormat`],
    /// [`WeightsError::NotFinite`], [`WeightsError::Gate`], [`WeightsError::OutOfMemory`],
    /// [`WeightsError::File`] where the file changed since it was opened.
    pub fn read(&self, spec: &TensorSpec) -> Result<Vec<f32>, WeightsError> {
        let gate = matches!(spec.role, Role::Gate { .. });
        let mut values = Vec::new();
        // Nothing is allocated before all parts are known to be there in full.
        let mut parts = Vec::with_capacity(spec.parts.len());
        for (name, shape) in &spec.parts {
            let absent = gate && !self.tensors.contains_key(name);
            parts.push((!absent).then(|| self.pieces(name, shape)).transpose()?);
        }
        let (first, len) = (&spec.parts[0].0, spec.role.len());
        values
            .try_reserve_exact(len)
            .map_err(|_| WeightsError::OutOfMemory {
                name: first.clone(),
                bytes: len.saturating_mul(size_of::<f32>()),
            })?;
        for ((name, shape), pieces) in spec.parts.iter().zip(parts) {
            let start = values.len();
            match pieces {
                Some(mut pieces) => while pieces.next(&mut values)? {},
                None => values.resize(start + shape.iter().product::<usize>(), 1.0),
            }
            check_values(name, &values[start..], gate)?;
        }
        spec.keep(&mut values);
        Ok(values)
    }

    /// The model on a device, or a part of it, without adapters. Host memory beside it: one tensor. `training` also
    /// prepares what gradients need.
    ///
    /// # Errors
    /// [`ModelError::Weights`] as [`Checkpoint::check`] and [`Checkpoint::read`],
    /// [`ModelError::Device`].
    pub fn load<D: Device>(
        &self,
        device: D,
        config: ModelConfig,
        training: bool,
    ) -> Result<Decoder<D>, ModelError> {
        if config.part == Part::WHOLE {
            self.check(&config)?;
        }
        let specs = base_specs(&config);
        let upload = |i: usize| -> Result<D::Buffer, ModelError> {
            let values = self.read(&specs[i])?;
            let buffer = device.empty(Kind::Exact, values.len());
            let mut buffer = buffer.map_err(|error| error.wanted_for(Purpose::Weights))?;
            device.write(&mut buffer, 0, &values)?;
            Ok(buffer)
        };
        let weights = Weights::prepare(&device, &specs, upload, training)?;
        Ok(Decoder {
            device,
            stage: Stage::planned(&config.part),
            config: ModelConfig {
                lora: None,
                ..config
            },
            specs,
            weights,
        })
    }
}

/// The model in a folder, with the configuration that lies there.
///
/// # Errors
/// [`ModelError`]: configuration, weights or device.
pub fn load<D: Device>(device: D, folder: &Path, training: bool) -> Result<Decoder<D>, ModelError> {
    let config = ModelConfig::load(folder)?;
    Checkpoint::open(folder)?.load(device, config, training)
}

/// Files in the folder that hold weights of another kind or have other names.
pub(crate) fn other_weights(folder: &Path) -> NameList {
    let entries = std::fs::read_dir(folder).into_iter().flatten();
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let ends = [
        ".safetensors",
        ".bin",
        ".pth",
        ".pt",
        ".gguf",
        ".h5",
        ".msgpack",
    ];
    let mut found: Vec<String> = names
        .filter(|name| ends.iter().any(|end| name.ends_with(end)))
        .collect();
    found.sort();
    NameList(found)
}

/// The format of a tensor that has the expected shape.
fn float(name: &str, shape: &[usize], entry: &Entry) -> Result<FloatType, WeightsError> {
    if entry.shape != shape {
        return Err(WeightsError::Shape {
            name: name.to_owned(),
            expected: shape.to_vec(),
            got: entry.shape.clone(),
        });
    }
    match &entry.format {
        Format::Float(format) => Ok(*format),
        Format::Other(got) => Err(WeightsError::NumberFormat {
            name: name.to_owned(),
            got: shown(got),
        }),
    }
}

fn check_values(name: &str, values: &[f32], gate: bool) -> Result<(), WeightsError> {
    let wrong = |x: &f32| !x.is_finite() || gate && *x < 0.0;
    let Some(index) = values.iter().position(wrong) else {
        return Ok(());
    };
    let (name, got) = (name.to_owned(), values[index]);
    Err(match gate {
        true => WeightsError::Gate { name, index, got },
        false => WeightsError::NotFinite { name, index, got },
    })
}

/// A tensor in its file, read a piece at a time.
struct Pieces {
    file: std::fs::File,
    path: PathBuf,
    format: FloatType,
    left: u64,
    bytes: Vec<u8>,
}

impl Pieces {
    fn open(path: &Path, entry: &Entry, format: FloatType) -> Result<Self, WeightsError> {
        let (mut file, size) = files::open_regular(path)?;
        if entry
            .start
            .checked_add(entry.bytes)
            .is_none_or(|end| end > size)
        {
            let expected = "the file as it was when it was opened";
            return Err(malformed(path, "file", expected, format!("{size} bytes")));
        }
        file.seek(SeekFrom::Start(entry.start))
            .map_err(|error| files::io_error(path, error))?;
        Ok(Self {
            file,
            path: path.to_owned(),
            format,
            left: entry.bytes,
            bytes: Vec::new(),
        })
    }

    /// Appends the next numbers; false after the last.
    fn next(&mut self, values: &mut Vec<f32>) -> Result<bool, WeightsError> {
        let format = self.format;
        numbers::decode(format, self.take()?, values);
        Ok(self.left > 0)
    }

    /// The bytes of the next numbers.
    fn take(&mut self) -> Result<&[u8], WeightsError> {
        let take = self.left.min((PIECE * self.format.size()) as u64) as usize;
        self.bytes.resize(take, 0);
        self.file
            .read_exact(&mut self.bytes)
            .map_err(|error| files::io_error(&self.path, error))?;
        self.left -= take as u64;
        Ok(&self.bytes)
    }
}
