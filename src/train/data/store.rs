//! Where encoded tokens lie: one file, with the lengths of the documents behind them and a hash over all.
//!
//! ```text
//! words      u32 each, little endian. For each document its tokens, the highest bit set where a break follows, and
//!            then, if it has weights, as many f32
//! documents  for each source file: their number, then for each twice its length in tokens, plus 1 if it has weights;
//!            u64 each
//! end        number of words, number of these numbers (u64 each), SHA-256 of all before
//! ```

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::error::{io_error, vocabulary_error};
use super::ids::Listed;
use super::marks::{Mark, mark};
use crate::train::error::Result;

/// Bytes of the two numbers and the hash at the end.
const END: u64 = 16 + 32;
/// A document that has only begun.
const NOTHING: Entry = Entry {
    len: 0,
    weighted: false,
};
/// Bytes that are read at a time.
const PART: usize = 1 << 20;

/// Encoded documents: where their tokens are, and how long each is.
#[derive(Debug)]
pub(super) struct Stored {
    pub(super) file: File,
    /// For each source file its documents, none of them empty.
    pub(super) documents: Vec<Vec<Entry>>,
}

/// What is stored of a document.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    /// Tokens.
    pub(super) len: u64,
    /// Whether each token has a weight.
    pub(super) weighted: bool,
}

impl Entry {
    /// Words of its tokens and weights.
    pub(super) fn words(self) -> u64 {
        if self.weighted {
            2 * self.len
        } else {
            self.len
        }
    }
}

/// Writes encoded documents.
pub(super) struct Writer {
    /// For messages.
    path: PathBuf,
    out: BufWriter<File>,
    hash: Sha256,
    vocab_size: usize,
    words: u64,
    /// Of the open document.
    open: Entry,
    /// The source file whose documents come now.
    source: PathBuf,
    documents: Vec<Vec<Entry>>,
}

impl Writer {
    /// A writer into `file`, which lies at or in `path`.
    pub(super) fn new(file: File, path: &Path, vocab_size: usize) -> Self {
        Self {
            path: path.to_owned(),
            out: BufWriter::with_capacity(PART, file),
            hash: Sha256::new(),
            vocab_size,
            words: 0,
            open: NOTHING,
            source: PathBuf::new(),
            documents: Vec::new(),
        }
    }

    /// The documents that follow are those of the source file `path`.
    pub(super) fn begin_file(&mut self, path: &Path) {
        self.source = path.to_owned();
        self.documents.push(Vec::new());
    }

    /// The source file whose documents come now.
    pub(super) fn source(&self) -> &Path {
        &self.source
    }

    /// Tokens of the open document that have breaks and rereads.
    pub(super) fn push_marked(&mut self, listed: Listed) -> Result<()> {
        let mut tokens = listed.tokens;
        self.check(&tokens)?;
        mark(&mut tokens, Mark::Break, listed.breaks);
        mark(&mut tokens, Mark::Reread, listed.rereads);
        self.write_tokens(&tokens)
    }

    /// Tokens of the open document.
    pub(super) fn push(&mut self, tokens: &[u32]) -> Result<()> {
        self.check(tokens)?;
        self.write_tokens(tokens)
    }

    fn check(&self, tokens: &[u32]) -> Result<()> {
        if let Some(i) = tokens.iter().position(|t| *t as usize >= self.vocab_size) {
            let at = self.open.len + i as u64;
            return Err(vocabulary_error(
                &self.source,
                self.vocab_size,
                tokens[i],
                at,
            ));
        }
        Ok(())
    }

    fn write_tokens(&mut self, tokens: &[u32]) -> Result<()> {
        self.open.len += tokens.len() as u64;
        self.write_words(tokens.iter().copied())
    }

    /// Weights of the tokens of the open document, which are complete, one for each.
    pub(super) fn push_weights(&mut self, weights: &[f32]) -> Result<()> {
        self.open.weighted = true;
        self.write_words(weights.iter().map(|w| w.to_bits()))
    }

    fn write_words(&mut self, words: impl Iterator<Item = u32>) -> Result<()> {
        let bytes: Vec<u8> = words.flat_map(u32::to_le_bytes).collect();
        self.words += bytes.len() as u64 / 4;
        self.write(&bytes)
    }

    /// Closes the open document; one without tokens is none.
    pub(super) fn end_document(&mut self) {
        let open = std::mem::replace(&mut self.open, NOTHING);
        if let (Some(documents), 1..) = (self.documents.last_mut(), open.len) {
            documents.push(open);
        }
    }

    pub(super) fn finish(mut self) -> Result<Stored> {
        let documents = std::mem::take(&mut self.documents);
        let mut numbers = 0u64;
        for file in &documents {
            numbers += 1 + file.len() as u64;
            self.write(&(file.len() as u64).to_le_bytes())?;
            for entry in file {
                let number = 2 * entry.len + u64::from(entry.weighted);
                self.write(&number.to_le_bytes())?;
            }
        }
        self.write(&self.words.to_le_bytes())?;
        self.write(&numbers.to_le_bytes())?;
        let failed = |e| io_error("write", &self.path, e);
        self.out.write_all(&self.hash.finalize()).map_err(failed)?;
        let file = self.out.into_inner().map_err(|e| failed(e.into_error()))?;
        Ok(Stored { file, documents })
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.hash.update(bytes);
        let written = self.out.write_all(bytes);
        written.map_err(|e| io_error("write", &self.path, e))
    }
}

impl Stored {
    /// What a finished [`Writer`] has left in `file`; `None` if it is not whole.
    ///
    /// # Errors
    /// What the operating system says.
    pub(super) fn open(file: File) -> io::Result<Option<Self>> {
        let len = file.metadata()?.len();
        let mut input = BufReader::with_capacity(PART, file);
        if len < END {
            return Ok(None);
        }
        input.seek(SeekFrom::Start(len - END))?;
        let (words, numbers) = (number(&mut input)?, number(&mut input)?);
        let mut expected = [0; 32];
        input.read_exact(&mut expected)?;
        let bytes = words.checked_mul(4).zip(numbers.checked_mul(8));
        let whole = bytes.and_then(|(w, n)| w.checked_add(n)?.checked_add(END));
        if whole != Some(len) || hash(&mut input, len - 32)? != expected {
            return Ok(None);
        }
        input.seek(SeekFrom::Start(words * 4))?;
        let (mut documents, mut left) = (Vec::new(), numbers);
        while left > 0 {
            let count = number(&mut input)?;
            let entry = |_| {
                let number = number(&mut input)?;
                Ok(Entry {
                    len: number / 2,
                    weighted: number % 2 == 1,
                })
            };
            let entries: io::Result<Vec<Entry>> = (0..count).map(entry).collect();
            documents.push(entries?);
            left = left.saturating_sub(1 + count);
        }
        Ok(Some(Self {
            file: input.into_inner(),
            documents,
        }))
    }
}

/// SHA-256 of the first `len` bytes.
fn hash(input: &mut (impl Read + Seek), len: u64) -> io::Result<[u8; 32]> {
    input.seek(SeekFrom::Start(0))?;
    let (mut hash, mut part, mut left) = (Sha256::new(), vec![0; PART], len);
    while left > 0 {
        let size = left.min(PART as u64) as usize;
        input.read_exact(&mut part[..size])?;
        hash.update(&part[..size]);
        left -= size as u64;
    }
    Ok(hash.finalize().into())
}

fn number(input: &mut impl Read) -> io::Result<u64> {
    let mut bytes = [0; 8];
    input.read_exact(&mut bytes)?;
    Ok(u64::from_le_bytes(bytes))
}
