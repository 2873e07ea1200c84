//! Shards without an index: files `model-00001-of-00003.safetensors` to `model-00003-of-00003.safetensors`.

use std::path::Path;

use crate::model::error::{NameList, WeightsError};

/// The numbers in a shard's name.
struct ShardName {
    number: usize,
    count: usize,
}

impl ShardName {
    fn parse(name: &str) -> Option<Self> {
        let (rest, count) = name.strip_suffix(".safetensors")?.rsplit_once("-of-")?;
        let (stem, number) = rest.rsplit_once('-')?;
        let digits = |text: &str| text.bytes().all(|b| b.is_ascii_digit());
        if stem != "model" || !digits(number) || !digits(count) {
            return None;
        }
        Some(Self {
            number: number.parse().ok()?,
            count: count.parse().ok()?,
        })
    }
}

/// The names of all shards in the folder, in order; none where there is no shard.
///
/// # Errors
/// [`WeightsError::Shards`] where one is missing, or where shards of two sets lie in the folder.
pub(super) fn find(folder: &Path) -> Result<Vec<String>, WeightsError> {
    let entries = std::fs::read_dir(folder).into_iter().flatten();
    let mut names: Vec<String> = entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| ShardName::parse(name).is_some())
        .collect();
    names.sort_by_cached_key(|name| ShardName::parse(name).map(|shard| shard.number));
    let shards: Vec<ShardName> = names.iter().filter_map(|n| ShardName::parse(n)).collect();
    let Some(first) = shards.first() else {
        return Ok(Vec::new());
    };
    let numbers: Vec<usize> = shards.iter().map(|shard| shard.number).collect();
    let complete = shards.iter().all(|shard| shard.count == first.count)
        && numbers.iter().copied().eq(1..=first.count);
    if complete {
        return Ok(names);
    }
    Err(WeightsError::Shards {
        folder: folder.to_owned(),
        expected: format!("the {} shards to which {} belongs", first.count, names[0]),
        found: NameList(names),
    })
}
