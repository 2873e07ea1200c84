//! The header of a safetensors file: eight bytes of length (little endian), that many bytes of JSON, then
//! the tensors' bytes, without gaps (format: huggingface/safetensors, "Format").
//!
//! Read here rather than by that library since a name that stands there twice must be an error, and
//! since only the header may be in memory.

use std::collections::BTreeMap;
use std::fmt;
use std::io::Read;
use std::path::Path;

use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, Visitor};

use super::super::error::WeightsError;
use super::super::files;
use crate::model::config::WeightType;

/// Longest header accepted, in bytes: some 100,000 tensors.
const MAX_HEADER: u64 = 16 << 20;
/// Bytes before the header.
const PREFIX: u64 = 8;
/// Most dimensions of a tensor.
const MAX_RANK: usize = 8;
const METADATA: &str = "__metadata__";

/// A number format that is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FloatType {
    /// Double precision, rounded when it is read.
    F64,
    /// Single precision.
    F32,
    /// Half precision.
    F16,
    /// The upper half of single precision.
    Bf16,
}

impl FloatType {
    /// Bytes of one number.
    pub fn size(self) -> usize {
        match self {
            Self::F64 => 8,
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }
}

impl From<WeightType> for FloatType {
    fn from(written: WeightType) -> Self {
        match written {
            WeightType::F32 => Self::F32,
            WeightType::F16 => Self::F16,
            WeightType::Bf16 => Self::Bf16,
        }
    }
}

/// The number format of a tensor in a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Format {
    /// One that is read.
    Float(FloatType),
    /// Any other, by its name in the file.
    Other(String),
}

impl Format {
    fn from_name(name: String) -> Self {
        match name.as_str() {
            "F64" => Self::Float(FloatType::F64),
            "F32" => Self::Float(FloatType::F32),
            "F16" => Self::Float(FloatType::F16),
            "BF16" => Self::Float(FloatType::Bf16),
            _ => Self::Other(name),
        }
    }

    /// Its name in safetensors files.
    pub fn name(&self) -> &str {
        match self {
            Self::Float(FloatType::F64) => "F64",
            Self::Float(FloatType::F32) => "F32",
            Self::Float(FloatType::F16) => "F16",
            Self::Float(FloatType::Bf16) => "BF16",
            Self::Other(name) => name,
        }
    }
}

/// A tensor as its file describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Number format.
    pub format: Format,
    /// Row-major shape.
    pub shape: Vec<usize>,
    /// First byte in the file.
    pub start: u64,
    /// Number of bytes.
    pub bytes: u64,
}

/// Where each tensor of a file lies, in order of position.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// Name and place of each.
    pub tensors: Vec<(String, Entry)>,
}

impl Header {
    /// Reads the header of a file; its tensors are not touched.
    ///
    /// # Errors
    /// [`WeightsError::File`], [`WeightsError::Malformed`], [`WeightsError::Duplicate`].
    pub fn read(path: &Path) -> Result<Self, WeightsError> {
        let (mut file, size) = files::open_regular(path)?;
        Self::read_from(&mut file, size, path)
    }

    /// The header of a file whose bytes are all here; `path` is for messages.
    ///
    /// # Errors
    /// [`WeightsError::Malformed`], [`WeightsError::Duplicate`].
    pub fn parse(mut bytes: &[u8], path: &Path) -> Result<Self, WeightsError> {
        let size = bytes.len() as u64;
        Self::read_from(&mut bytes, size, path)
    }

    fn read_from(file: &mut impl Read, size: u64, path: &Path) -> Result<Self, WeightsError> {
        let wrong =
            |what: &str, expected: String, got: String| malformed(path, what, expected, got);
        let io = |error| files::io_error(path, error);
        if size < PREFIX {
            let expected = format!("at least {PREFIX} bytes");
            return Err(wrong("file", expected, format!("{size}")));
        }
        let mut length = [0; PREFIX as usize];
        file.read_exact(&mut length).map_err(io)?;
        let length = u64::from_le_bytes(length);
        let most = MAX_HEADER.min(size - PREFIX);
        // The first bytes of a pointer are text, which makes an absurd length.
        if length.to_le_bytes() == *b"version " {
            let expected = "a safetensors file".to_owned();
            return Err(wrong("file", expected, files::LFS_POINTER.to_owned()));
        }
        if length == 0 || length > most {
            let expected = format!("1 to {most} bytes");
            return Err(wrong("header length", expected, format!("{length}")));
        }
        let mut json = vec![0; length as usize];
        file.read_exact(&mut json).map_err(io)?;
        let raw: RawHeader = serde_json::from_slice(&json).map_err(|error| {
            let expected = "a JSON object of tensors".into();
            wrong("header", expected, error.to_string())
        })?;
        let start = PREFIX + length;
        let tensors = raw.check(path, start, size - start)?;
        Ok(Self { tensors })
    }
}

pub(super) fn malformed(
    path: &Path,
    what: impl Into<String>,
    expected: impl Into<String>,
    got: impl Into<String>,
) -> WeightsError {
    WeightsError::Malformed {
        path: path.to_owned(),
        what: what.into(),
        expected: expected.into(),
        got: got.into(),
    }
}

/// One tensor's JSON.
/// Further keys are passed over.
#[derive(Deserialize)]
struct RawEntry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

/// All of them in the order of the text, repeated names included.
struct RawHeader(Vec<(String, RawEntry)>);

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = RawHeader;

            fn expecting(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
                out.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
                let (mut entries, mut described) = (Vec::new(), false);
                while let Some(name) = map.next_key::<String>()? {
                    if name != METADATA {
                        entries.push((name, map.next_value()?));
                        continue;
                    }
                    if described {
                        return Err(A::Error::duplicate_field(METADATA));
                    }
                    // Notes for people; they must be well-formed and are not kept.
                    map.next_value::<Option<BTreeMap<String, String>>>()?;
                    described = true;
                }
                Ok(RawHeader(entries))
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

impl RawHeader {
    /// The tensors in order of position, which must fill `data` bytes from `start` on.
    fn check(
        mut self,
        path: &Path,
        start: u64,
        data: u64,
    ) -> Result<Vec<(String, Entry)>, WeightsError> {
        self.0
            .sort_by(|a, b| (a.1.data_offsets, &a.0).cmp(&(b.1.data_offsets, &b.0)));
        let mut next = 0;
        let mut tensors = Vec::with_capacity(self.0.len());
        for (name, raw) in self.0 {
            let wrong = |expected: String, got: String| {
                malformed(path, format!("tensor `{}`", shown(&name)), expected, got)
            };
            let [from, to] = raw.data_offsets;
            if from != next || to < from || to > data {
                let expected = format!(
                    "bytes from {next} on, without gap or overlap, of the {data} there are"
                );
                return Err(wrong(expected, format!("{from} to {to}")));
            }
            next = to;
            let format = Format::from_name(raw.dtype);
            let shape = dimensions(&raw.shape).ok_or_else(|| {
                let expected = format!("at most {MAX_RANK} dimensions whose product is below 2^64");
                wrong(
                    expected,
                    format!("shape {:?}", &raw.shape[..raw.shape.len().min(MAX_RANK)]),
                )
            })?;
            if let Format::Float(float) = format {
                let numbers: u64 = raw.shape.iter().product();
                let bytes = numbers.checked_mul(float.size() as u64);
                if bytes != Some(to - from) {
                    let expected = format!("the bytes of {} {shape:?}", format.name());
                    return Err(wrong(expected, format!("{} bytes", to - from)));
                }
            }
            let (start, bytes) = (start + from, to - from);
            tensors.push((
                name,
                Entry {
                    format,
                    shape,
                    start,
                    bytes,
                },
            ));
        }
        if next != data {
            let got = format!("{} bytes", start + data);
            return Err(malformed(
                path,
                "file",
                format!("{} bytes", start + next),
                got,
            ));
        }
        unique(&tensors, path)?;
        Ok(tensors)
    }
}

fn unique(tensors: &[(String, Entry)], path: &Path) -> Result<(), WeightsError> {
    let mut names: Vec<&String> = tensors.iter().map(|(name, _)| name).collect();
    names.sort_unstable();
    match names.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => Err(WeightsError::Duplicate {
            name: shown(pair[0]),
            first: path.to_owned(),
            second: path.to_owned(),
        }),
        None => Ok(()),
    }
}

/// The dimensions, unless there are too many or their product overflows. A zero does not hide an
/// overflow of the others.
fn dimensions(shape: &[u64]) -> Option<Vec<usize>> {
    if shape.len() > MAX_RANK {
        return None;
    }
    shape
        .iter()
        .try_fold(1u64, |product, n| product.checked_mul((*n).max(1)))?;
    shape.iter().map(|n| usize::try_from(*n).ok()).collect()
}

/// A name shortened for messages.
pub(super) fn shown(name: &str) -> String {
    const SHOWN: usize = 120;
    match name.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}…", &name[..end]),
        None => name.to_owned(),
    }
}
