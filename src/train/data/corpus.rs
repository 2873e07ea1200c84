//! Files and folders become documents: token files are read where they lie, everything else is encoded once into a
//! file of tokens, in the cache or without a name. Tokens are read from files at known places, not mapped: a file that
//! shrinks under a run is then an error and not a crash.

use std::ops::Range;
use std::path::PathBuf;

use rayon::prelude::*;
use sha2::{Digest, Sha256};

use super::cache::Cache;
use super::encoded::{Source, encode_all, hash_file};
use super::error::{io_error, vocabulary_error};
use super::listing::{Format, list_files};
use super::marks::{id, unmark};
use super::reading::Reading;
use super::store::{Stored, Writer};
use super::token_files::{STORED, TokenFiles};
use crate::model::segmentation::Tokens;
use crate::train::error::Result;
use crate::train::hex::hex;

/// Texts of fewer bytes are encoded each time: that takes no time, and the cache is for large ones.
const MIN_CACHED: u64 = 1 << 20;
/// Tokens that are read at a time while hashing and checking.
const SCAN: u64 = 1 << 16;
/// Part of every key of the cache: another way to make tokens has another number.
const ENCODING: &str = "segattn tokens 1";

/// A run of tokens in one file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Document {
    pub(super) file: usize,
    /// First token in its file.
    pub(super) start: u64,
    /// Number of tokens.
    pub len: u64,
    /// Hash of its tokens.
    pub(super) hash: u64,
}

/// Documents of a set of files.
#[derive(Debug)]
pub struct Corpus {
    files: TokenFiles,
    documents: Vec<Document>,
    /// Documents in all groups up to and with each.
    ends: Vec<usize>,
}

impl Corpus {
    /// Reads several groups of files and folders, see [`list_files`] for which files. Documents are in the order of
    /// the groups, the files and the files' content.
    ///
    /// # Errors
    /// [`TrainError::Io`](crate::train::TrainError::Io), or [`TrainError::Data`](crate::train::TrainError::Data) with
    /// file and line for content that does not fit.
    pub fn read(groups: &[&[PathBuf]], reading: &Reading<'_>) -> Result<Self> {
        let (mut sources, mut files) = (Vec::new(), Vec::new());
        for (group, paths) in groups.iter().enumerate() {
            for path in list_files(paths, Some(&reading.section.extensions))? {
                let format = Format::of(&path);
                match format {
                    Format::Binary => files.push((group, Some(path))),
                    _ => {
                        files.push((group, None));
                        sources.push(Source {
                            path,
                            format,
                            hash: None,
                        });
                    }
                }
            }
        }
        let Stored {
            file, documents, ..
        } = stored(sources, reading)?;
        let mut corpus = Self {
            files: TokenFiles::new(file, reading.section.bin_type),
            documents: Vec::new(),
            ends: Vec::new(),
        };
        let (mut documents, mut at) = (documents.into_iter(), 0);
        for group in 0..groups.len() {
            for (_, binary) in files.iter().filter(|f| f.0 == group) {
                match binary {
                    Some(path) => {
                        let (file, len) = corpus.files.add(path)?;
                        let cuts = Cuts::Mark(reading.section.document_end);
                        corpus.index(file, 0..len, cuts, reading.vocab_size)?;
                    }
                    None => {
                        let lens = documents.next().unwrap_or_default();
                        let span = at..at + lens.iter().sum::<u64>();
                        at = span.end;
                        corpus.index(
                            STORED,
                            span,
                            Cuts::Lens(lens.into_iter()),
                            reading.vocab_size,
                        )?;
                    }
                }
            }
            corpus.ends.push(corpus.documents.len());
        }
        Ok(corpus)
    }

    /// All documents.
    pub fn documents(&self) -> &[Document] {
        &self.documents
    }

    /// The documents of a group; none for a group that there is not.
    pub fn group(&self, group: usize) -> &[Document] {
        let end = |i: usize| self.ends.get(i).copied().unwrap_or(self.documents.len());
        let start = if group == 0 { 0 } else { end(group - 1) };
        &self.documents[start..end(group)]
    }

    /// Tokens `range` of a document, with the breaks behind them.
    ///
    /// # Errors
    /// [`TrainError::Io`](crate::train::TrainError::Io); [`TrainError::Data`](crate::train::TrainError::Data) if the
    /// file has changed since the corpus was read.
    pub fn tokens(&self, document: &Document, range: Range<u64>) -> Result<Tokens> {
        let start = document.start + range.start;
        let end = start + range.end.saturating_sub(range.start);
        Ok(unmark(self.files.read(document.file, start..end)?))
    }

    /// Checks every id of `span`, cuts it into documents, and hashes them.
    fn index(
        &mut self,
        file: usize,
        span: Range<u64>,
        mut cuts: Cuts,
        vocab_size: usize,
    ) -> Result<()> {
        let (mut start, mut hash, mut at) = (span.start, Sha256::new(), span.start);
        let mut end = cuts.next_end(start);
        while at < span.end {
            let part = self.files.read(file, at..span.end.min(at + SCAN))?;
            if let Some(i) = part.iter().position(|t| id(*t) as usize >= vocab_size) {
                let (path, got) = (self.files.path(file), id(part[i]));
                return Err(vocabulary_error(path, vocab_size, got, at + i as u64));
            }
            let mut done = 0;
            while let Some(cut) = cuts.find(end, at, &part, done) {
                hash.update(bytes(&part[done..cut]));
                let next = at + cut as u64;
                self.close(file, start..next, &mut hash);
                (start, done) = (next, cut);
                end = cuts.next_end(start);
            }
            hash.update(bytes(&part[done..]));
            at += part.len() as u64;
        }
        if start < span.end {
            self.close(file, start..span.end, &mut hash);
        }
        Ok(())
    }

    fn close(&mut self, file: usize, span: Range<u64>, hash: &mut Sha256) {
        let digest: [u8; 32] = std::mem::take(hash).finalize().into();
        let first = digest.first_chunk().expect("a digest has 32 bytes");
        self.documents.push(Document {
            file,
            start: span.start,
            len: span.end - span.start,
            hash: u64::from_le_bytes(*first),
        });
    }
}

/// Where a span of tokens is cut into documents.
enum Cuts {
    /// After so many tokens each.
    Lens(std::vec::IntoIter<u64>),
    /// After each of these ids.
    Mark(Option<u32>),
}

impl Cuts {
    /// Where the document ends that begins at token `start`, if that is known beforehand.
    fn next_end(&mut self, start: u64) -> Option<u64> {
        match self {
            Self::Lens(lens) => lens.next().map(|len| start + len),
            Self::Mark(_) => None,
        }
    }

    /// The first cut in `part`, the tokens from `at` on, behind the `done` first: at `end`, or after a mark.
    fn find(&self, end: Option<u64>, at: u64, part: &[u32], done: usize) -> Option<usize> {
        match self {
            Self::Lens(_) => end
                .map(|end| (end - at) as usize)
                .filter(|cut| *cut <= part.len()),
            Self::Mark(mark) => {
                let found = part[done..].iter().position(|t| Some(id(*t)) == *mark);
                found.map(|i| done + i + 1)
            }
        }
    }
}

/// What the documents are, in hexadecimal: equal for the same tokens and breaks in the same documents in the same
/// order.
pub fn fingerprint(documents: &[Document]) -> String {
    let mut hash = Sha256::new();
    for document in documents {
        hash.update(document.hash.to_le_bytes());
        hash.update(document.len.to_le_bytes());
    }
    hex(&hash.finalize())
}

/// The tokens of `sources`, from the cache or encoded now.
fn stored(mut sources: Vec<Source>, reading: &Reading<'_>) -> Result<Stored> {
    let size = |source: &Source| {
        let found = std::fs::metadata(&source.path);
        found
            .map(|m| m.len())
            .map_err(|e| io_error("read", &source.path, e))
    };
    let sizes = sources.iter().map(size).collect::<Result<Vec<u64>>>()?;
    let total = sizes.iter().sum();
    let cache = reading.cache.filter(|_| total >= MIN_CACHED);
    if let Some(folder) = cache {
        let key = key(&mut sources, reading)?;
        // A cache that cannot be used must not keep a run from starting.
        let opened = Cache::open(folder).map(|cache| (cache.find(&key), cache));
        let begun = opened.and_then(|(found, cache)| match found {
            Some(stored) => Ok(Err(stored)),
            None => cache.begin().map(|file| Ok((cache, file))),
        });
        match begun {
            Ok(Err(stored)) => return Ok(stored),
            Ok(Ok((cache, file))) => {
                let path = file.path().to_owned();
                let copy = file.as_file().try_clone();
                let copy = copy.map_err(|e| io_error("open", &path, e))?;
                let writer = Writer::new(copy, &path, reading.vocab_size);
                let stored = encode_all(&sources, total, writer, reading)?;
                if let Err(error) = cache.keep(file, &key) {
                    tracing::warn!("the tokens are not kept in {}: {error}", folder.display());
                }
                return Ok(stored);
            }
            Err(error) => {
                tracing::warn!("the tokens are not kept in {}: {error}", folder.display());
                sources.iter_mut().for_each(|source| source.hash = None);
            }
        }
    }
    let file = tempfile::tempfile_in(reading.scratch);
    let file = file.map_err(|e| io_error("create a scratch file in", reading.scratch, e))?;
    let writer = Writer::new(
        file,
        &reading.scratch.join("(encoded tokens)"),
        reading.vocab_size,
    );
    encode_all(&sources, total, writer, reading)
}

/// A hash of all that the tokens of `sources` depend on; notes the hashes of their content.
fn key(sources: &mut [Source], reading: &Reading<'_>) -> Result<String> {
    sources
        .par_iter_mut()
        .try_for_each(|source| -> Result<()> {
            source.hash = Some(hash_file(&source.path)?);
            Ok(())
        })?;
    let mut key = Sha256::new();
    for part in [ENCODING, reading.tokenizer, &reading.section.jsonl_field] {
        key.update((part.len() as u64).to_le_bytes());
        key.update(part);
    }
    for ids in [reading.before, reading.after] {
        key.update((ids.len() as u64).to_le_bytes());
        key.update(bytes(ids));
    }
    for source in sources {
        key.update([source.format as u8]);
        key.update(source.hash.unwrap_or_default());
    }
    Ok(hex(&key.finalize()))
}

fn bytes(ids: &[u32]) -> Vec<u8> {
    ids.iter().flat_map(|id| id.to_le_bytes()).collect()
}
