//! Samples of weight files: they tell files of other weights apart, and are read at once where the files take minutes.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use sha2::{Digest, Sha256};

use super::Checkpoint;
use super::header::{Entry, malformed};
use crate::model::error::WeightsError;
use crate::model::files;

/// Bytes at each end of a tensor that are in a sample.
const SAMPLE: u64 = 1 << 12;

impl Checkpoint {
    /// Of each weight file its name, and a SHA-256 over name, format and shape of each of its tensors and the bytes at
    /// both ends of it, 4 KiB each. A change that is nowhere but between them is not in it.
    ///
    /// # Errors
    /// [`WeightsError::File`], [`WeightsError::Malformed`] where a file changed since it was opened.
    pub fn samples(&self) -> Result<Vec<(String, String)>, WeightsError> {
        let shards = self.shards.iter().enumerate();
        let samples = shards.map(|(i, path)| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            Ok((name.into_owned(), self.sample(i, path)?))
        });
        samples.collect()
    }

    fn sample(&self, shard: usize, path: &Path) -> Result<String, WeightsError> {
        let (mut file, size) = files::open_regular(path)?;
        let mut digest = Sha256::new();
        let own = self.tensors.iter().filter(|(_, (of, _))| *of == shard);
        for (name, (_, entry)) in own {
            let Entry {
                format,
                shape,
                start,
                bytes,
            } = entry;
            if start.checked_add(*bytes).is_none_or(|end| end > size) {
                let expected = "the file as it was when it was opened";
                return Err(malformed(path, "file", expected, format!("{size} bytes")));
            }
            digest.update(format!("{name:?} {:?} {shape:?}", format.name()).as_bytes());
            let len = SAMPLE.min(*bytes);
            for at in [*start, start + bytes - len] {
                let part = part(&mut file, at, len);
                digest.update(part.map_err(|error| files::io_error(path, error))?);
            }
        }
        let bytes = digest.finalize();
        Ok(bytes.iter().map(|b| format!("{b:02x}")).collect())
    }
}

fn part(file: &mut File, at: u64, len: u64) -> std::io::Result<Vec<u8>> {
    let mut part = vec![0; len as usize];
    file.seek(SeekFrom::Start(at))?;
    file.read_exact(&mut part)?;
    Ok(part)
}
