//! Files and folders become documents: token files are read where they lie, everything else is encoded once into a
//! file of tokens, in the cache or without a name. Tokens are read from files at known places, not mapped: a file that
//! shrinks under a run is then an error and not a crash.

use std::ops::Range;
use std::path::PathBuf;

use rayon::prelude::*;
use sha2::{Digest, Sha256};

use super::cache::Cache;
use super::encoded::{Source, encode_all, hash_file};
use super::error::{data_error, io_error, vocabulary_error};
use super::example::Example;
use super::listing::{Format, is_compressed, list_files};
use super::marks::{id, unmark};
use super::reading::Reading;
use super::store::{Entry, Stored, Writer};
use super::token_files::{STORED, TokenFiles};
use crate::model::segmentation::Tokens;
use crate::train::error::Result;
use crate::train::hex::hex;

/// Texts of fewer bytes are encoded each time: that takes no time, and the cache is for large ones.
const MIN_CACHED: u64 = 1 << 20;
/// Tokens that are read at a time while hashing and checking.
const SCAN: u64 = 1 << 16;
/// Part of every key of the cache: another way to make tokens has another number.
const ENCODING: &str = "segattn tokens 3";

/// A run of tokens in one file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Document {
    file: u32,
    /// How far behind each token its weight stands, if it has one: as many words as the whole document has tokens.
    weights: Option<u32>,
    /// First token in its file.
    start: u64,
    /// Number of tokens.
    pub len: u64,
    /// Hash of its tokens, and of what stands beside them.
    pub(super) hash: u64,
}

impl Document {
    /// A part of it, as a document of its own.
    pub(super) fn part(self, range: Range<u64>) -> Self {
        Self {
            start: self.start + range.start,
            len: range.end - range.start,
            ..self
        }
    }
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
                if is_compressed(&path) && matches!(format, Format::Binary | Format::Table) {
                    let expected = "text, JSONL or JSON in a .zst file";
                    return Err(data_error(
                        &path,
                        None,
                        expected,
                        "a table or ids in binary",
                    ));
                }
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
                        let entries = documents.next().unwrap_or_default();
                        let span = at..at + entries.iter().map(|e| e.words()).sum::<u64>();
                        at = span.end;
                        let cuts = Cuts::Entries(entries.into_iter());
                        corpus.index(STORED, span, cuts, reading.vocab_size)?;
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

    /// Tokens `range` of a document, with the breaks and rereads behind them.
    ///
    /// # Errors
    /// [`TrainError::Io`](crate::train::TrainError::Io); [`TrainError::Data`](crate::train::TrainError::Data) if the
    /// file has changed since the corpus was read.
    pub fn tokens(&self, document: &Document, range: Range<u64>) -> Result<Tokens> {
        let start = document.start + range.start;
        let end = start + range.end.saturating_sub(range.start);
        let read = self.files.read(document.file as usize, start..end)?;
        Ok(unmark(read))
    }

    /// Tokens `range` of a document, with the breaks and rereads behind them and their weights.
    ///
    /// # Errors
    /// As [`Corpus::tokens`].
    pub fn example(&self, document: &Document, range: Range<u64>) -> Result<Example> {
        let tokens = self.tokens(document, range.clone())?;
        let weights = match document.weights {
            Some(offset) => {
                let start = document.start + u64::from(offset) + range.start;
                let end = start + tokens.ids.len() as u64;
                let bits = self.files.read(document.file as usize, start..end)?;
                Some(bits.into_iter().map(f32::from_bits).collect())
            }
            None => None,
        };
        Ok(Example {
            tokens: tokens.ids,
            weights,
            breaks: tokens.breaks,
            rereads: tokens.rereads,
            policy: None,
        })
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
        let mut entry = cuts.next();
        while at < span.end {
            let part = self.files.read(file, at..span.end.min(at + SCAN))?;
            let mut done = 0;
            while done < part.len() {
                let end = entry.map(|e| start + e.words());
                let cut = cuts.find(end, at, &part, done);
                let piece = &part[done..cut.unwrap_or(part.len())];
                // Behind the tokens stand their weights.
                let tokens = entry.map_or(u64::MAX, |e| start + e.len);
                self.check(file, piece, at + done as u64, tokens, vocab_size)?;
                hash.update(bytes(piece));
                done += piece.len();
                if cut.is_some() {
                    let next = at + done as u64;
                    self.close(file, start..next, entry, &mut hash);
                    start = next;
                    entry = cuts.next();
                }
            }
            at += part.len() as u64;
        }
        if start < span.end {
            self.close(file, start..span.end, None, &mut hash);
        }
        Ok(())
    }

    /// Checks the ids among the words `piece`, which begin at word `at` of the file: those before word `end`.
    fn check(
        &self,
        file: usize,
        piece: &[u32],
        at: u64,
        end: u64,
        vocab_size: usize,
    ) -> Result<()> {
        let ids = &piece[..piece.len().min(end.saturating_sub(at) as usize)];
        match ids.iter().position(|t| id(*t) as usize >= vocab_size) {
            Some(i) => {
                let (path, got) = (self.files.path(file), id(ids[i]));
                Err(vocabulary_error(path, vocab_size, got, at + i as u64))
            }
            None => Ok(()),
        }
    }

    fn close(&mut self, file: usize, span: Range<u64>, entry: Option<Entry>, hash: &mut Sha256) {
        let digest: [u8; 32] = std::mem::take(hash).finalize().into();
        let first = digest.first_chunk().expect("a digest has 32 bytes");
        let (start, words) = (span.start, span.end - span.start);
        // The lines that weights stand in are far shorter than 2^32 tokens.
        let weights = entry.filter(|e| e.weighted).map(|e| e.len as u32);
        self.documents.push(Document {
            file: file as u32,
            weights,
            start,
            len: entry.map_or(words, |e| e.len),
            hash: u64::from_le_bytes(*first),
        });
    }
}

/// Where a span of words is cut into documents.
enum Cuts {
    /// After the words of each of these.
    Entries(std::vec::IntoIter<Entry>),
    /// After each of these ids.
    Mark(Option<u32>),
}

impl Cuts {
    /// The document that begins now, if it is known beforehand.
    fn next(&mut self) -> Option<Entry> {
        match self {
            Self::Entries(entries) => entries.next(),
            Self::Mark(_) => None,
        }
    }

    /// The first cut in `part`, the words from `at` on, behind the `done` first: at `end`, or after a mark.
    fn find(&self, end: Option<u64>, at: u64, part: &[u32], done: usize) -> Option<usize> {
        match self {
            Self::Entries(_) => end
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
    key.update(format!("{:?}", reading.prompt_break));
    for source in sources {
        key.update([source.format as u8]);
        key.update(source.hash.unwrap_or_default());
    }
    Ok(hex(&key.finalize()))
}

fn bytes(ids: &[u32]) -> Vec<u8> {
    ids.iter().flat_map(|id| id.to_le_bytes()).collect()
}
