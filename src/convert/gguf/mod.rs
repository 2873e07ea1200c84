//! GGUF files as model folders: configuration, weights, tokenizer and chat template.
//!
//! [`Gguf::open`] reads the header and decides whether the model is one that is computed; [`Gguf::save`] writes the
//! folder, one tensor in memory at a time.

mod architectures;
pub mod header;
mod metadata;
pub mod quants;
mod tokenizer;

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use self::architectures::Architecture;
use self::header::{Header, TensorInfo};
use super::{ConvertError, begin};
use crate::model::config::{ModelConfig, WeightType};
use crate::model::files;
use crate::model::parameters::specs;
use crate::model::tokenizer::TOKENIZER_FILE;
use crate::model::weights::{SaveOptions, save};

/// Factors of the rotary frequencies, where a file has them.
const ROPE_FACTORS: &str = "rope_freqs.weight";

/// A GGUF file whose model is computed here.
#[derive(Debug)]
pub struct Gguf {
    header: Header,
    architecture: &'static Architecture,
    config: ModelConfig,
}

impl Gguf {
    /// Reads the header and checks that every tensor has a place in the model and no other is there.
    ///
    /// # Errors
    /// [`ConvertError`]: a file that cannot be read or breaks its format, another architecture, tensors that
    /// are missing, surplus or of another shape, a quantisation that is not read.
    pub fn open(path: &Path) -> Result<Self, ConvertError> {
        let header = Header::read(path)?;
        let architecture = metadata::architecture(&header)?;
        let mut config = metadata::config(&header, architecture)?;
        let formats: BTreeSet<&str> = header.tensors.values().map(|t| t.block.name()).collect();
        config.dtype = Some(match (formats.contains("BF16"), formats.contains("F16")) {
            _ if formats.iter().any(|f| !["F32", "F16", "BF16"].contains(f)) => WeightType::F32,
            (true, false) => WeightType::Bf16,
            (false, true) => WeightType::F16,
            _ => WeightType::F32,
        });
        let gguf = Self {
            header,
            architecture,
            config,
        };
        gguf.check_tensors()?;
        Ok(gguf)
    }

    /// The model's configuration, without segments. Its `dtype` holds the file's numbers exactly: that of a file
    /// without quantised tensors, else F32.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Writes the model folder: `config`, which is [`Self::config`] with what the caller added to it, weights in
    /// `dtype`, tokenizer (the file's own, unless `tokenizer` gives the text of another `tokenizer.json`), chat
    /// template.
    ///
    /// # Errors
    /// [`ConvertError`]: a tokenizer that has no equal in `tokenizer.json`, values that do not fit `dtype`, a
    /// file that cannot be read or written, weights that are there already.
    pub fn save(
        &self,
        folder: &Path,
        config: &ModelConfig,
        dtype: WeightType,
        tokenizer: Option<String>,
    ) -> Result<(), ConvertError> {
        let own = || tokenizer::tokenizer(&self.header).map(|json| format!("{json}\n"));
        let tokenizer = tokenizer.map_or_else(own, Ok)?;
        let beside = tokenizer::beside(&self.header, config).into_iter();
        let beside = beside.map(|(name, json)| (name.to_string(), format!("{json:#}\n").into()));
        let tokenizer = (TOKENIZER_FILE.to_owned(), tokenizer.into_bytes());
        begin(folder, [tokenizer].into_iter().chain(beside))?;
        let specs = specs(config);
        let values = |i: usize| -> Result<Vec<f32>, ConvertError> {
            let mut values = Vec::new();
            for (name, shape) in &specs[i].parts {
                match self.architecture.tensor(name) {
                    Some(stored) => self.read(&stored, &mut values)?,
                    None => values.resize(values.len() + shape.iter().product::<usize>(), 1.0),
                }
            }
            specs[i].keep(&mut values);
            Ok(values)
        };
        save(folder, config, values, SaveOptions::new(dtype))
    }

    fn check_tensors(&self) -> Result<(), ConvertError> {
        let mut left: BTreeSet<&str> = self.header.tensors.keys().map(String::as_str).collect();
        for (name, shape) in specs(&self.config).iter().flat_map(|spec| &spec.parts) {
            let Some(stored) = self.architecture.tensor(name) else {
                continue;
            };
            let what = format!("tensor {stored:?}");
            let Some(found) = self.header.tensors.get(&stored) else {
                return Err(self.malformed(&what, "it there", "no tensor of that name"));
            };
            if found.shape != *shape {
                let (expected, got) = (format!("{shape:?}"), format!("{:?}", found.shape));
                return Err(self.malformed(&what, &expected, &got));
            }
            left.remove(stored.as_str());
        }
        left.remove(ROPE_FACTORS);
        match left.first() {
            None => Ok(()),
            Some(name) => Err(ConvertError::Unsupported {
                path: self.header.path.clone(),
                what: format!("tensor {name:?}"),
                remedy: format!("a plain {} has none of that name", self.architecture.name),
            }),
        }
    }

    fn malformed(&self, what: &str, expected: &str, got: &str) -> ConvertError {
        ConvertError::Malformed {
            path: self.header.path.clone(),
            what: what.to_owned(),
            expected: expected.to_owned(),
            got: got.to_owned(),
        }
    }

    /// Appends a tensor's values, with the rows of q and k in this crate's order.
    fn read(&self, name: &str, values: &mut Vec<f32>) -> Result<(), ConvertError> {
        let info = &self.header.tensors[name];
        let start = values.len();
        read_tensor(&self.header.path, info, values)?;
        if let Some(heads) = self.interleaved_heads(name) {
            let columns = info.shape.iter().skip(1).product();
            split_halves(&mut values[start..], heads, columns);
        }
        Ok(())
    }

    /// Heads of a tensor whose rows are pairs of rotated dimensions side by side.
    fn interleaved_heads(&self, name: &str) -> Option<usize> {
        let (stem, _) = name.rsplit_once('.')?;
        match stem {
            _ if !self.architecture.interleaved => None,
            _ if stem.ends_with("attn_q") => Some(self.config.num_attention_heads),
            _ if stem.ends_with("attn_k") => Some(self.config.num_key_value_heads),
            _ => None,
        }
    }
}

/// Appends all numbers of a tensor, read in pieces.
fn read_tensor(path: &Path, info: &TensorInfo, values: &mut Vec<f32>) -> Result<(), ConvertError> {
    let io = |error| ConvertError::File(files::io_error(path, error));
    let mut file = File::open(path).map_err(io)?;
    file.seek(SeekFrom::Start(info.start)).map_err(io)?;
    let block = info.block.block().1;
    let mut bytes = vec![0; block * 8192];
    let mut left = info.bytes;
    while left > 0 {
        let piece = left.min(bytes.len() as u64) as usize;
        file.read_exact(&mut bytes[..piece]).map_err(io)?;
        info.block.widen(&bytes[..piece], values);
        left -= piece as u64;
    }
    Ok(())
}

/// GGUF keeps the two dimensions that RoPE rotates together side by side, a model folder half a head apart.
fn split_halves(values: &mut [f32], heads: usize, columns: usize) {
    let head_len = values.len() / heads;
    let half = head_len / columns / 2;
    for head in values.chunks_exact_mut(head_len) {
        let stored = head.to_vec();
        for (row, from) in stored.chunks_exact(columns).enumerate() {
            let to = row % 2 * half + row / 2;
            head[to * columns..(to + 1) * columns].copy_from_slice(from);
        }
    }
}
