//! A safetensors file read one tensor at a time, every size checked against the file's before memory
//! is taken.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use safetensors::tensor::{Dtype, Metadata};
use sha2::{Digest, Sha256};

use super::StateFileError;
use crate::model::files::{io_error, open_regular};

/// Largest header accepted, in bytes.
const MAX_HEADER: u64 = 1 << 26;

#[derive(Debug)]
pub(super) struct Reader {
    path: PathBuf,
    file: File,
    /// Byte at which the tensors begin.
    start: u64,
    header: Metadata,
}

/// Bytes that go into a digest.
struct Hashed<'a>(&'a mut Sha256);

impl io::Write for Hashed<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Reader {
    pub(super) fn open(path: &Path) -> Result<Self, StateFileError> {
        let (mut file, size) = open_regular(path)?;
        let malformed = |what: &str, expected: String, got: String| StateFileError::Malformed {
            path: path.to_owned(),
            what: what.to_owned(),
            expected,
            got,
        };
        let failed = |error| io_error(path, error);
        let mut length = [0; 8];
        if size < 8 {
            let expected = "a header of its length, 8 bytes".to_owned();
            return Err(malformed("size", expected, format!("{size} bytes")));
        }
        file.read_exact(&mut length).map_err(failed)?;
        let length = u64::from_le_bytes(length);
        let most = MAX_HEADER.min(size - 8);
        if length > most {
            let expected = format!("at most {most}");
            return Err(malformed("header length", expected, length.to_string()));
        }
        let mut head = vec![0; length as usize];
        file.read_exact(&mut head).map_err(failed)?;
        let header: Metadata = serde_json::from_slice(&head).map_err(|error| {
            let expected = "a safetensors header".to_owned();
            malformed("header", expected, error.to_string())
        })?;
        let start = length + 8;
        let end = start.saturating_add(header.data_len() as u64);
        if end != size {
            let expected = format!("{end} bytes by its header");
            return Err(malformed("size", expected, format!("{size} bytes")));
        }
        Ok(Self {
            path: path.to_owned(),
            file,
            start,
            header,
        })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Compares the last tensor, of this name, with the SHA-256 of every byte before it.
    pub(super) fn verify(&mut self, name: &str) -> Result<(), StateFileError> {
        let expected = self.read(name, Dtype::U8, Some(&[32]))?;
        let before = self.start + self.header.data_len() as u64 - expected.len() as u64;
        let mut digest = Sha256::new();
        self.file
            .seek(SeekFrom::Start(0))
            .and_then(|_| io::copy(&mut (&self.file).take(before), &mut Hashed(&mut digest)))
            .map_err(|error| io_error(&self.path, error))?;
        match digest.finalize()[..] == expected[..] {
            true => Ok(()),
            false => Err(self.malformed(name, "that of the bytes before it", "another: damaged")),
        }
    }

    /// Whether there is a tensor of this name.
    pub(super) fn has(&self, name: &str) -> bool {
        self.header.info(name).is_some()
    }

    pub(super) fn metadata(&self, key: &str) -> Result<&str, StateFileError> {
        let found = self.header.metadata().as_ref().and_then(|m| m.get(key));
        let what = format!("metadata `{key}`");
        let missing = || self.malformed(&what, "a text", "none: not a saved session");
        found.map(String::as_str).ok_or_else(missing)
    }

    /// The bytes of a tensor, which must have this type, and this shape or any of one dimension.
    pub(super) fn read(
        &mut self,
        name: &str,
        dtype: Dtype,
        shape: Option<&[usize]>,
    ) -> Result<Vec<u8>, StateFileError> {
        let what = format!("tensor `{name}`");
        let expected = match shape {
            Some(shape) => format!("{dtype:?} {shape:?}"),
            None => format!("{dtype:?} of one dimension"),
        };
        let Some(info) = self.header.info(name) else {
            return Err(self.malformed(&what, &expected, "none"));
        };
        let good = shape.map_or(info.shape.len() == 1, |shape| info.shape == shape);
        if info.dtype != dtype || !good {
            let got = format!("{:?} {:?}", info.dtype, info.shape);
            return Err(self.malformed(&what, &expected, &got));
        }
        let (from, to) = info.data_offsets;
        let mut bytes = vec![0; to - from];
        self.file
            .seek(SeekFrom::Start(self.start + from as u64))
            .and_then(|_| self.file.read_exact(&mut bytes))
            .map_err(|error| io_error(&self.path, error))?;
        Ok(bytes)
    }

    pub(super) fn malformed(&self, what: &str, expected: &str, got: &str) -> StateFileError {
        StateFileError::Malformed {
            path: self.path.clone(),
            what: what.to_owned(),
            expected: expected.to_owned(),
            got: got.to_owned(),
        }
    }

    pub(super) fn mismatch(&self, what: &'static str, expected: &str, got: &str) -> StateFileError {
        StateFileError::Mismatch {
            path: self.path.clone(),
            what,
            expected: expected.to_owned(),
            got: got.to_owned(),
        }
    }
}
