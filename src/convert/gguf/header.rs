//! The header of a GGUF file: metadata and the list of tensors (GGUF specification, versions 2 and 3, little endian).
//!
//! Every count is compared with the bytes that are left before anything is allocated for it.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

use super::super::ConvertError;
use super::quants::BlockType;
use crate::model::files;

/// Largest header read, in bytes; a vocabulary of 256,000 tokens with merges takes some 12 MB.
const MAX_HEADER: u64 = 256 << 20;
/// Longest name of a key or tensor, in bytes.
const MAX_NAME: u64 = 1 << 16;
/// Most dimensions of a tensor.
const MAX_DIMENSIONS: u32 = 4;
/// Arrays in arrays: none are known, two are read.
const MAX_DEPTH: usize = 2;
const DEFAULT_ALIGNMENT: u64 = 32;

/// A value of the metadata. Integers of every width are `Integer`.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// Any integer type.
    Integer(i128),
    /// `float32` or `float64`.
    Float(f64),
    /// `bool`.
    Bool(bool),
    /// UTF-8 text.
    Text(String),
    /// Values of one type.
    Array(Vec<Value>),
}

/// Where a tensor lies and how it is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Row-major shape, outermost first (GGUF writes the innermost first).
    pub shape: Vec<usize>,
    /// How its numbers are stored.
    pub block: BlockType,
    /// First byte, from the start of the file.
    pub start: u64,
    /// Bytes.
    pub bytes: u64,
}

/// Metadata and tensors of a GGUF file.
#[derive(Debug)]
pub struct Header {
    /// The file.
    pub path: PathBuf,
    /// By key.
    pub metadata: BTreeMap<String, Value>,
    /// By name.
    pub tensors: BTreeMap<String, TensorInfo>,
}

impl Header {
    /// Reads the header.
    ///
    /// # Errors
    /// [`ConvertError`]: a file that cannot be read, that is no GGUF file, or whose counts, types, names or
    /// places break the format.
    pub fn read(path: &Path) -> Result<Self, ConvertError> {
        let (file, len) = files::open_regular(path)?;
        let mut reader = Reader {
            path,
            file: BufReader::with_capacity(1 << 20, file),
            at: 0,
            len,
        };
        let magic = reader.bytes::<4>("magic")?;
        if &magic != b"GGUF" {
            return Err(reader.malformed("magic", "the letters GGUF", format!("{magic:02x?}")));
        }
        let version = reader.u32("version")?;
        if !(2..=3).contains(&version) {
            return Err(reader.malformed("version", "2 or 3, little endian", version));
        }
        let tensor_count = reader.count("number of tensors", 8 + 4 + 8 + 4 + 8)?;
        let key_count = reader.count("number of keys", 8 + 4 + 1)?;
        let mut metadata = BTreeMap::new();
        for _ in 0..key_count {
            let key = reader.text("key", MAX_NAME)?;
            let kind = reader.u32(&key)?;
            let value = reader.value(&key, kind, 0)?;
            if metadata.insert(key.clone(), value).is_some() {
                return Err(reader.malformed(&format!("key {key:?}"), "it once", "it twice"));
            }
        }
        let mut relative = Vec::new();
        for _ in 0..tensor_count {
            relative.push(reader.tensor()?);
        }
        let alignment = match metadata.get("general.alignment") {
            None => DEFAULT_ALIGNMENT,
            Some(Value::Integer(n)) if (1..=1 << 20).contains(n) && *n % 8 == 0 => *n as u64,
            Some(other) => {
                let expected = "a multiple of 8 of at most 1048576";
                return Err(reader.malformed("general.alignment", expected, format!("{other:?}")));
            }
        };
        let data = reader.at.next_multiple_of(alignment);
        let mut tensors = BTreeMap::new();
        for (name, mut info) in relative {
            info.start = info.start.saturating_add(data);
            let end = info.start.checked_add(info.bytes);
            if end.is_none_or(|end| end > len) {
                let expected = format!("it inside the file of {len} bytes");
                let got = format!("{} bytes from {}", info.bytes, info.start);
                return Err(reader.malformed(&format!("tensor {name:?}"), expected, got));
            }
            if tensors.insert(name.clone(), info).is_some() {
                return Err(reader.malformed(&format!("tensor {name:?}"), "it once", "it twice"));
            }
        }
        Ok(Self {
            path: path.to_owned(),
            metadata,
            tensors,
        })
    }
}

struct Reader<'a> {
    path: &'a Path,
    file: BufReader<File>,
    at: u64,
    len: u64,
}

impl Reader<'_> {
    fn malformed(
        &self,
        what: &str,
        expected: impl Into<String>,
        got: impl ToString,
    ) -> ConvertError {
        ConvertError::Malformed {
            path: self.path.to_owned(),
            what: what.to_owned(),
            expected: expected.into(),
            got: got.to_string(),
        }
    }

    fn left(&self) -> u64 {
        self.len.min(MAX_HEADER).saturating_sub(self.at)
    }

    fn fill(&mut self, what: &str, bytes: &mut [u8]) -> Result<(), ConvertError> {
        if bytes.len() as u64 > self.left() {
            let (expected, got) = (format!("{} bytes", bytes.len()), self.left());
            return Err(self.malformed(what, expected, format!("{got} left")));
        }
        self.file
            .read_exact(bytes)
            .map_err(|error| files::io_error(self.path, error))?;
        self.at += bytes.len() as u64;
        Ok(())
    }

    fn bytes<const N: usize>(&mut self, what: &str) -> Result<[u8; N], ConvertError> {
        let mut bytes = [0; N];
        self.fill(what, &mut bytes)?;
        Ok(bytes)
    }

    fn u32(&mut self, what: &str) -> Result<u32, ConvertError> {
        Ok(u32::from_le_bytes(self.bytes(what)?))
    }

    fn u64(&mut self, what: &str) -> Result<u64, ConvertError> {
        Ok(u64::from_le_bytes(self.bytes(what)?))
    }

    /// A number of things of at least `each` bytes, which must fit into what is left.
    fn count(&mut self, what: &str, each: u64) -> Result<u64, ConvertError> {
        let count = self.u64(what)?;
        if count
            .checked_mul(each)
            .is_none_or(|bytes| bytes > self.left())
        {
            let expected = format!("at most what {} bytes hold", self.left());
            return Err(self.malformed(what, expected, count));
        }
        Ok(count)
    }

    fn text(&mut self, what: &str, limit: u64) -> Result<String, ConvertError> {
        let len = self.count(what, 1)?;
        if len > limit {
            return Err(self.malformed(what, format!("at most {limit} bytes"), len));
        }
        let mut bytes = vec![0; len as usize];
        self.fill(what, &mut bytes)?;
        String::from_utf8(bytes).map_err(|_| self.malformed(what, "UTF-8", "other bytes"))
    }

    fn value(&mut self, key: &str, kind: u32, depth: usize) -> Result<Value, ConvertError> {
        Ok(match kind {
            0 => Value::Integer(u8::from_le_bytes(self.bytes(key)?).into()),
            1 => Value::Integer(i8::from_le_bytes(self.bytes(key)?).into()),
            2 => Value::Integer(u16::from_le_bytes(self.bytes(key)?).into()),
            3 => Value::Integer(i16::from_le_bytes(self.bytes(key)?).into()),
            4 => Value::Integer(u32::from_le_bytes(self.bytes(key)?).into()),
            5 => Value::Integer(i32::from_le_bytes(self.bytes(key)?).into()),
            6 => Value::Float(f32::from_le_bytes(self.bytes(key)?).into()),
            7 => match self.bytes::<1>(key)?[0] {
                0 => Value::Bool(false),
                1 => Value::Bool(true),
                other => return Err(self.malformed(key, "a bool of 0 or 1", other)),
            },
            8 => Value::Text(self.text(key, MAX_HEADER)?),
            9 if depth < MAX_DEPTH => {
                let element = self.u32(key)?;
                let each = match element {
                    0 | 1 | 7 => 1,
                    2 | 3 => 2,
                    4..=6 => 4,
                    9 => 12,
                    _ => 8,
                };
                let count = self.count(key, each)?;
                let mut values = Vec::new();
                for _ in 0..count {
                    values.push(self.value(key, element, depth + 1)?);
                }
                Value::Array(values)
            }
            10 => Value::Integer(self.u64(key)?.into()),
            11 => Value::Integer(i64::from_le_bytes(self.bytes(key)?).into()),
            12 => Value::Float(f64::from_le_bytes(self.bytes(key)?)),
            other => return Err(self.malformed(key, "a value type of 0 to 12", other)),
        })
    }

    /// A tensor's name and place, from the start of the tensors' data.
    fn tensor(&mut self) -> Result<(String, TensorInfo), ConvertError> {
        let name = self.text("tensor name", MAX_NAME)?;
        let what = format!("tensor {name:?}");
        let dimensions = self.u32(&what)?;
        if !(1..=MAX_DIMENSIONS).contains(&dimensions) {
            return Err(self.malformed(&what, "1 to 4 dimensions", dimensions));
        }
        let mut shape = Vec::new();
        for _ in 0..dimensions {
            let rows = self.u64(&what)?;
            let rows = usize::try_from(rows).ok().filter(|rows| *rows > 0);
            shape.push(rows.ok_or_else(|| self.malformed(&what, "dimensions above 0", "other"))?);
        }
        shape.reverse();
        let kind = self.u32(&what)?;
        let start = self.u64(&what)?;
        let block = BlockType::from_id(kind).ok_or_else(|| ConvertError::Unsupported {
            path: self.path.to_owned(),
            what: format!("{what} of quantisation type {kind}"),
            remedy: format!("those that are: {}", BlockType::names()),
        })?;
        let bytes = block
            .bytes_of(&shape)
            .ok_or_else(|| self.malformed(&what, block.row_rule(), format!("{shape:?}")))?;
        let info = TensorInfo {
            shape,
            block,
            start,
            bytes,
        };
        Ok((name, info))
    }
}
