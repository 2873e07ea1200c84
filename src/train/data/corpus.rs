//! Files and folders become documents: token files are read where they lie, everything else is encoded once
//! into a scratch file that vanishes with the run. Tokens are read from files at known places, not mapped:
//! a file that shrinks under a run is then an error and not a crash.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use sha2::{Digest, Sha256};

use super::ids::read_ids;
use crate::train::config::{BinType, DataSection};
use crate::train::error::{Result, TrainError};

/// Text is encoded in pieces of at most this many bytes, cut after a line where there is one, so that a file
/// of any size takes bounded memory.
const TEXT_PIECE: usize = 1 << 20;
/// Longest line of a JSONL file.
const MAX_LINE: u64 = 1 << 28;
/// Tokens that are read at a time while hashing and checking.
const SCAN: u64 = 1 << 16;

/// Turns text into token ids.
pub type Encode<'a> = dyn Fn(&str) -> std::result::Result<Vec<u32>, String> + 'a;

/// How files become tokens.
pub struct Reading<'a> {
    /// Section `data` of the configuration.
    pub section: &'a DataSection,
    /// Ids must be below it.
    pub vocab_size: usize,
    /// Put before each text.
    pub before: Vec<u32>,
    /// Put after each text.
    pub after: Vec<u32>,
    /// The tokenizer.
    pub encode: &'a Encode<'a>,
    /// Folder for the scratch file.
    pub scratch: &'a Path,
}

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

#[derive(Debug)]
struct TokenFile {
    path: PathBuf,
    file: Mutex<File>,
    width: u64,
}

/// Documents of a set of files.
#[derive(Debug)]
pub struct Corpus {
    files: Vec<TokenFile>,
    documents: Vec<Document>,
    fingerprint: String,
}

impl Corpus {
    /// Reads files, and folders with all below them, in order of their names.
    ///
    /// # Errors
    /// [`TrainError::Io`], or [`TrainError::Data`] with file and line for content that does not fit.
    pub fn read(paths: &[PathBuf], reading: &Reading<'_>) -> Result<Self> {
        let mut list = Vec::new();
        for path in paths {
            collect(path, &reading.section.extensions, true, &mut list)?;
        }
        let mut scratch = Scratch::new(reading.scratch)?;
        let (mut files, mut spans) = (Vec::new(), Vec::new());
        for path in &list {
            if path.extension().is_some_and(|e| e == "bin") {
                let file = open_bin(path, reading.section.bin_type)?;
                files.push(file);
                spans.push((files.len(), 0..files[files.len() - 1].len()?));
            } else {
                read_encoded(path, reading, &mut scratch, &mut spans)?;
            }
        }
        files.insert(0, scratch.finish()?);
        let mut corpus = Self {
            files,
            documents: Vec::new(),
            fingerprint: String::new(),
        };
        corpus.index(&spans, reading)?;
        Ok(corpus)
    }

    /// All documents, files in order of their names.
    pub fn documents(&self) -> &[Document] {
        &self.documents
    }

    /// Hash of all documents, in hexadecimal: equal for equal data.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// Tokens `range` of a document.
    ///
    /// # Errors
    /// [`TrainError::Io`].
    pub fn tokens(&self, document: &Document, range: Range<u64>) -> Result<Vec<u32>> {
        let start = document.start + range.start;
        self.files[document.file].read(start..start + range.end - range.start)
    }

    /// Checks every id, cuts token files at the end mark, and hashes.
    fn index(&mut self, spans: &[(usize, Range<u64>)], reading: &Reading<'_>) -> Result<()> {
        let mut all = Sha256::new();
        for (file, span) in spans {
            let mark = reading.section.document_end.filter(|_| *file > 0);
            let (mut start, mut hash) = (span.start, Sha256::new());
            let mut close = |start: u64, end: u64, hash: &mut Sha256| {
                let digest: [u8; 32] = std::mem::take(hash).finalize().into();
                let first = digest.first_chunk::<8>().expect("a digest has 32 bytes");
                all.update(digest);
                let hash = u64::from_le_bytes(*first);
                let (file, len) = (*file, end - start);
                let document = Document {
                    file,
                    start,
                    len,
                    hash,
                };
                self.documents.push(document);
            };
            let mut at = span.start;
            while at < span.end {
                let part = self.files[*file].read(at..span.end.min(at + SCAN))?;
                for (i, id) in part.iter().enumerate() {
                    if *id as usize >= reading.vocab_size {
                        return Err(TrainError::Data {
                            path: self.files[*file].path.clone(),
                            line: None,
                            expected: format!(
                                "ids below the model's vocab_size = {}",
                                reading.vocab_size
                            ),
                            got: format!("{id} at token {}", at + i as u64),
                        });
                    }
                    hash.update(id.to_le_bytes());
                    if Some(*id) == mark {
                        let end = at + i as u64 + 1;
                        close(start, end, &mut hash);
                        start = end;
                    }
                }
                at += part.len() as u64;
            }
            if start < span.end {
                close(start, span.end, &mut hash);
            }
        }
        self.fingerprint = hex(&all.finalize());
        Ok(())
    }
}

/// Bytes in hexadecimal.
pub(in crate::train) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

impl TokenFile {
    fn len(&self) -> Result<u64> {
        let file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes = file
            .metadata()
            .map_err(|e| io_error("read", &self.path, e))?;
        Ok(bytes.len() / self.width)
    }

    fn read(&self, range: Range<u64>) -> Result<Vec<u32>> {
        let bytes = ((range.end - range.start) * self.width) as usize;
        let mut buffer = vec![0; bytes];
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        file.seek(SeekFrom::Start(range.start * self.width))
            .and_then(|_| file.read_exact(&mut buffer))
            .map_err(|e| io_error("read", &self.path, e))?;
        Ok(match self.width {
            2 => ids(&buffer, |b| u16::from_le_bytes(b).into()),
            _ => ids(&buffer, u32::from_le_bytes),
        })
    }
}

fn ids<const N: usize>(bytes: &[u8], id: impl Fn([u8; N]) -> u32) -> Vec<u32> {
    bytes.as_chunks::<N>().0.iter().map(|b| id(*b)).collect()
}

/// The file that encoded tokens go to; it has no name, so nothing is left behind.
pub(super) struct Scratch {
    path: PathBuf,
    out: BufWriter<File>,
    pub(super) len: u64,
}

impl Scratch {
    fn new(folder: &Path) -> Result<Self> {
        let failed = |e| io_error("create a scratch file in", folder, e);
        Ok(Self {
            path: folder.join("(encoded tokens)"),
            out: BufWriter::new(tempfile::tempfile_in(folder).map_err(failed)?),
            len: 0,
        })
    }

    pub(super) fn push(&mut self, tokens: &[u32]) -> Result<()> {
        self.len += tokens.len() as u64;
        tokens
            .iter()
            .try_for_each(|t| self.out.write_all(&t.to_le_bytes()))
            .map_err(|e| io_error("write", &self.path, e))
    }

    fn finish(self) -> Result<TokenFile> {
        let file = self.out.into_inner();
        let file = file.map_err(|e| io_error("write", &self.path, e.into_error()))?;
        Ok(TokenFile {
            path: self.path,
            file: Mutex::new(file),
            width: 4,
        })
    }
}

fn io_error(action: &'static str, path: &Path, source: io::Error) -> TrainError {
    let path = path.to_owned();
    TrainError::Io {
        action,
        path,
        source,
    }
}

pub(super) fn data_error(
    path: &Path,
    line: Option<usize>,
    expected: &str,
    got: impl ToString,
) -> TrainError {
    TrainError::Data {
        path: path.to_owned(),
        line,
        expected: expected.to_owned(),
        got: got.to_string(),
    }
}

/// Files at and below `path`, sorted. What is named itself is read whatever its extension.
fn collect(path: &Path, extensions: &[String], named: bool, list: &mut Vec<PathBuf>) -> Result<()> {
    let failed = |e| io_error("read", path, e);
    let kind = fs::metadata(path).map_err(failed)?;
    if kind.is_dir() {
        let entries = fs::read_dir(path).map_err(failed)?;
        let entries: io::Result<Vec<_>> = entries
            .map(|e| e.map(|e| (e.path(), e.file_type())))
            .collect();
        let mut entries = entries.map_err(failed)?;
        entries.sort_by(|a, b| a.0.cmp(&b.0));
        for (entry, kind) in entries {
            // A link inside a folder could lead back up to it.
            if !kind.map_err(failed)?.is_symlink() {
                collect(&entry, extensions, false, list)?;
            }
        }
        return Ok(());
    }
    let extension = path.extension().and_then(|e| e.to_str()).unwrap_or("");
    let wanted = extensions
        .iter()
        .any(|e| e.trim_start_matches('.') == extension);
    match (named, kind.is_file()) {
        (_, true) if named || wanted => list.push(path.to_owned()),
        (true, false) => return Err(data_error(path, None, "a file or folder", "something else")),
        _ => {}
    }
    Ok(())
}

fn open_bin(path: &Path, kind: BinType) -> Result<TokenFile> {
    let width = match kind {
        BinType::U16 => 2,
        BinType::U32 => 4,
    };
    let failed = |e| io_error("read", path, e);
    let file = File::open(path).map_err(failed)?;
    let bytes = file.metadata().map_err(failed)?.len();
    if bytes % width != 0 {
        let expected = format!("ids of {width} bytes (`data.bin_type`)");
        return Err(data_error(path, None, &expected, format!("{bytes} bytes")));
    }
    Ok(TokenFile {
        path: path.to_owned(),
        file: Mutex::new(file),
        width,
    })
}

fn read_encoded(
    path: &Path,
    reading: &Reading<'_>,
    scratch: &mut Scratch,
    spans: &mut Vec<(usize, Range<u64>)>,
) -> Result<()> {
    let file = File::open(path).map_err(|e| io_error("read", path, e))?;
    let input = BufReader::new(file);
    let (start, known) = (scratch.len, spans.len());
    match path.extension().and_then(|e| e.to_str()) {
        Some("jsonl") => return read_lines(path, input, reading, scratch, spans),
        Some("json") => {
            let ends = read_ids(path, input, scratch)?;
            let mut from = start;
            for end in ends {
                spans.push((0, from..end));
                from = end;
            }
        }
        _ => {
            scratch.push(&reading.before)?;
            read_text(path, input, reading, scratch)?;
            scratch.push(&reading.after)?;
        }
    }
    if spans.len() == known && scratch.len > start {
        spans.push((0, start..scratch.len));
    }
    Ok(())
}

fn read_text(
    path: &Path,
    mut input: impl Read,
    reading: &Reading<'_>,
    scratch: &mut Scratch,
) -> Result<()> {
    let (mut pending, mut offset) = (Vec::new(), 0u64);
    loop {
        let room = (TEXT_PIECE - pending.len()) as u64;
        let read = input.by_ref().take(room).read_to_end(&mut pending);
        let read = read.map_err(|e| io_error("read", path, e))?;
        let full = pending.len() == TEXT_PIECE;
        let valid = match std::str::from_utf8(&pending) {
            Ok(text) => text.len(),
            // A character may continue in the next piece.
            Err(e) if e.error_len().is_none() && full && read > 0 => e.valid_up_to(),
            Err(e) => {
                let at = offset + e.valid_up_to() as u64;
                return Err(data_error(
                    path,
                    None,
                    "UTF-8 text",
                    format!("another byte at {at}"),
                ));
            }
        };
        let line_end = pending[..valid].iter().rposition(|b| *b == b'\n');
        let cut = line_end.filter(|_| full).map_or(valid, |i| i + 1);
        let text = std::str::from_utf8(&pending[..cut]).expect("cut after whole characters");
        scratch.push(&encode(path, None, text, reading)?)?;
        pending.drain(..cut);
        offset += cut as u64;
        if !full {
            return Ok(());
        }
    }
}

fn encode(path: &Path, line: Option<usize>, text: &str, reading: &Reading<'_>) -> Result<Vec<u32>> {
    (reading.encode)(text).map_err(|e| data_error(path, line, "text the tokenizer accepts", e))
}

/// One document a line.
fn read_lines(
    path: &Path,
    mut input: impl BufRead,
    reading: &Reading<'_>,
    scratch: &mut Scratch,
    spans: &mut Vec<(usize, Range<u64>)>,
) -> Result<()> {
    let (mut line, mut number) = (Vec::new(), 0);
    loop {
        line.clear();
        number += 1;
        let read = input.by_ref().take(MAX_LINE).read_until(b'\n', &mut line);
        if read.map_err(|e| io_error("read", path, e))? == 0 {
            return Ok(());
        }
        if line.len() as u64 == MAX_LINE && line.last() != Some(&b'\n') {
            let expected = format!("lines below {MAX_LINE} bytes");
            return Err(data_error(path, Some(number), &expected, "a longer one"));
        }
        if line.trim_ascii().is_empty() {
            continue;
        }
        let start = scratch.len;
        let field = &reading.section.jsonl_field;
        let wrong = |got: String| {
            let expected = format!("an object with `{field}`, a string or a list of ids");
            data_error(path, Some(number), &expected, got)
        };
        let mut object: serde_json::Map<String, serde_json::Value> =
            serde_json::from_slice(&line).map_err(|e| wrong(e.to_string()))?;
        match object.remove(field) {
            Some(serde_json::Value::String(text)) => {
                scratch.push(&reading.before)?;
                scratch.push(&encode(path, Some(number), &text, reading)?)?;
                scratch.push(&reading.after)?;
            }
            Some(list @ serde_json::Value::Array(_)) => {
                let ids: Vec<u32> =
                    serde_json::from_value(list).map_err(|e| wrong(e.to_string()))?;
                scratch.push(&ids)?;
            }
            _ => return Err(wrong("another line".into())),
        }
        spans.push((0, start..scratch.len));
    }
}
