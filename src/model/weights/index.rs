//! `model.safetensors.index.json`: which file of a sharded model holds which tensor.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use serde::Deserialize;
use serde::de::{Deserializer, Error as _, IgnoredAny, MapAccess, Visitor};

use super::super::error::{FileError, WeightsError};
use super::super::files;
use super::header::shown;

/// Largest index accepted, in bytes.
const MAX_INDEX: u64 = 16 << 20;
/// Most files a model may be spread over.
const MAX_SHARDS: usize = 4096;

/// An index: the plain file name of each tensor's shard.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Index {
    /// File name by tensor.
    pub weight_map: BTreeMap<String, String>,
}

impl Index {
    /// Reads an index.
    ///
    /// # Errors
    /// [`WeightsError::File`], [`WeightsError::ShardName`], [`WeightsError::Malformed`].
    pub fn read(path: &Path) -> Result<Self, WeightsError> {
        Self::parse(&files::read_bounded(path, MAX_INDEX)?, path)
    }

    /// An index from its bytes; `path` is for messages.
    ///
    /// # Errors
    /// [`WeightsError::File`] where it is no JSON of this form, [`WeightsError::ShardName`],
    /// [`WeightsError::Malformed`] with more files than any model has.
    pub fn parse(bytes: &[u8], path: &Path) -> Result<Self, WeightsError> {
        let raw: RawIndex = files::parse_json(bytes, path)?;
        let index = Self {
            weight_map: raw.weight_map.0,
        };
        if let Some(name) = index.weight_map.values().find(|name| !plain(name)) {
            return Err(WeightsError::ShardName {
                path: path.to_owned(),
                shard: shown(name),
            });
        }
        match index.shards().len() {
            0 => Err(WeightsError::File(FileError::Json {
                path: path.to_owned(),
                message: "`weight_map` is empty".into(),
            })),
            1..=MAX_SHARDS => Ok(index),
            count => {
                let expected = format!("at most {MAX_SHARDS} files");
                Err(super::header::malformed(
                    path,
                    "weight_map",
                    expected,
                    count.to_string(),
                ))
            }
        }
    }

    /// The files' names, each once, in order.
    pub fn shards(&self) -> Vec<&str> {
        let mut names: Vec<&str> = self.weight_map.values().map(String::as_str).collect();
        names.sort_unstable();
        names.dedup();
        names
    }
}

/// Whether the name stays in the index's own folder, on every system.
fn plain(name: &str) -> bool {
    let stem = name.strip_suffix(".safetensors");
    stem.is_some_and(|stem| !stem.is_empty())
        && !name.starts_with('.')
        && !name.contains(['/', '\\', ':', '\0'])
}

#[derive(Deserialize)]
struct RawIndex {
    #[serde(default, rename = "metadata")]
    _metadata: IgnoredAny,
    weight_map: Once,
}

/// A map in which no name stands twice.
struct Once(BTreeMap<String, String>);

impl<'de> Deserialize<'de> for Once {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Names;
        impl<'de> Visitor<'de> for Names {
            type Value = Once;

            fn expecting(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
                out.write_str("an object of file names")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Once, A::Error> {
                let mut names = BTreeMap::new();
                while let Some((tensor, file)) = map.next_entry::<String, String>()? {
                    let message = format!("tensor `{}` stands there twice", shown(&tensor));
                    if names.insert(tensor, file).is_some() {
                        return Err(A::Error::custom(message));
                    }
                }
                Ok(Once(names))
            }
        }
        deserializer.deserialize_map(Names)
    }
}
