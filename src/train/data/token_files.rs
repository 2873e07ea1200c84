//! The files that tokens are read from: the encoded ones, held open, and `.bin` files, of which only those used last
//! are open. A `.bin` file that changes under a run is an error.

use std::fs::{File, Metadata};
use std::io::{Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

use super::error::{data_error, io_error};
use super::marks::{Mark, id, mark, read_companions};
use crate::train::config::BinType;
use crate::train::error::Result;

/// The number of the file of encoded tokens; `.bin` files follow.
pub(super) const STORED: usize = 0;
/// `.bin` files that are open at the same time at most: limits of 256 open files are usual.
const OPEN: usize = 16;

/// All files of a corpus.
#[derive(Debug)]
pub(super) struct TokenFiles {
    stored: Mutex<File>,
    bin_type: BinType,
    bins: Vec<Bin>,
    /// Open `.bin` files, those used last at the end.
    open: Mutex<Vec<(usize, File)>>,
}

/// A `.bin` file as it was when the corpus was read.
#[derive(Debug)]
struct Bin {
    path: PathBuf,
    bytes: u64,
    changed: Option<SystemTime>,
    /// Marks, each with positions in the file, ascending.
    marks: [(Mark, Vec<u64>); 2],
}

impl TokenFiles {
    pub(super) fn new(stored: File, bin_type: BinType) -> Self {
        Self {
            stored: Mutex::new(stored),
            bin_type,
            bins: Vec::new(),
            open: Mutex::new(Vec::new()),
        }
    }

    /// Adds a `.bin` file: its number, and how many tokens it holds.
    pub(super) fn add(&mut self, path: &Path) -> Result<(usize, u64)> {
        let failed = |e| io_error("read", path, e);
        let found = std::fs::metadata(path).map_err(failed)?;
        let (bytes, width) = (found.len(), self.width());
        if !bytes.is_multiple_of(width) {
            let expected = format!("ids of {width} bytes (`data.bin_type`)");
            return Err(data_error(path, None, &expected, format!("{bytes} bytes")));
        }
        self.bins.push(Bin {
            path: path.to_owned(),
            bytes,
            changed: found.modified().ok(),
            marks: read_companions(path, bytes / width)?,
        });
        Ok((self.bins.len(), bytes / width))
    }

    /// A file's place, for messages.
    pub(super) fn path(&self, file: usize) -> &Path {
        match file {
            STORED => Path::new("(encoded tokens)"),
            n => &self.bins[n - 1].path,
        }
    }

    /// Tokens `range` of file number `file`, marked where breaks or rereads follow.
    pub(super) fn read(&self, file: usize, range: Range<u64>) -> Result<Vec<u32>> {
        let len = range.end - range.start;
        if file == STORED {
            let mut stored = self.stored.lock().unwrap_or_else(PoisonError::into_inner);
            let bytes = read_at(&mut stored, range.start * 4, len * 4);
            let bytes = bytes.map_err(|e| io_error("read", self.path(file), e))?;
            return Ok(ids(&bytes, u32::from_le_bytes));
        }
        let (bin, width) = (&self.bins[file - 1], self.width());
        let failed = |e| io_error("read", &bin.path, e);
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        // It is used last from now on.
        let mut handle = match open.iter().position(|o| o.0 == file) {
            Some(at) => open.remove(at).1,
            None => {
                let handle = File::open(&bin.path).map_err(failed)?;
                if !bin.is_unchanged(&handle.metadata().map_err(failed)?) {
                    let expected = "a file that does not change during a run";
                    return Err(data_error(&bin.path, None, expected, "a change"));
                }
                handle
            }
        };
        let bytes = read_at(&mut handle, range.start * width, len * width);
        if open.len() == OPEN {
            open.remove(0);
        }
        open.push((file, handle));
        let bytes = bytes.map_err(failed)?;
        let mut tokens = match self.bin_type {
            BinType::U16 => ids(&bytes, |b| u16::from_le_bytes(b).into()),
            BinType::U32 => ids(&bytes, u32::from_le_bytes),
        };
        // An id in a file must not pass for a mark.
        if let Some(i) = tokens.iter().position(|token| id(*token) != *token) {
            let got = format!("{} at token {}", tokens[i], range.start + i as u64);
            return Err(data_error(&bin.path, None, "ids below 2^28", got));
        }
        for (kind, positions) in &bin.marks {
            let first = positions.partition_point(|b| *b <= range.start);
            let within = positions[first..].iter().take_while(|b| **b <= range.end);
            mark(
                &mut tokens,
                *kind,
                within.map(|b| (b - range.start) as usize),
            );
        }
        Ok(tokens)
    }

    /// Bytes of an id in `.bin` files.
    fn width(&self) -> u64 {
        match self.bin_type {
            BinType::U16 => 2,
            BinType::U32 => 4,
        }
    }
}

impl Bin {
    fn is_unchanged(&self, now: &Metadata) -> bool {
        now.len() == self.bytes && now.modified().ok() == self.changed
    }
}

fn read_at(file: &mut File, at: u64, bytes: u64) -> std::io::Result<Vec<u8>> {
    let mut buffer = vec![0; bytes as usize];
    file.seek(SeekFrom::Start(at))?;
    file.read_exact(&mut buffer)?;
    Ok(buffer)
}

fn ids<const N: usize>(bytes: &[u8], id: impl Fn([u8; N]) -> u32) -> Vec<u32> {
    bytes.as_chunks::<N>().0.iter().map(|b| id(*b)).collect()
}
