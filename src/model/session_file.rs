//! Sessions saved to a file or, one sequence at a time, in memory ([`SavedSequence`]), and restored: a long prompt is
//! read once and used again.
//!
//! The file is a safetensors file. Its metadata hold the format's name, the number of tokens each sequence has read,
//! how many of them belong to its current segment, and what the state depends on in the model. Of each sequence `s` it
//! has `s.logits [vocab]`, where they were known the tokens read `s.tokens [position]` (U32), and of each layer `l`,
//! keys (before rotation, but in layers whose heads read nothing of other segments) and values one after the other:
//!
//! - `s.l.prior [2, rows, kv_heads, head_dim]`, the prior tail, and `s.l.sinks` of the same shape, the sinks;
//! - `s.l.pool.i [2, rows, heads, head_dim]`, the tokens of complete segments that are held, in parts of `segment_len`,
//!   of which the last may be shorter, of the KV heads that read the past, and of each of them `s.l.selected.h [rows]`
//!   (I64), the tokens selected for the current segment, counted among those held;
//! - `s.l.segment [2, rows, kv_heads, head_dim]`, what has been read of the current segment, and
//!   `s.l.probes [rows, q_heads, head_dim]`, the last queries of it: that of position `p` is row `p % probe_rows`.
//!
//! Where several processes have the layers, rank 0 writes the same file with what all of them have, and each restores
//! its own layers from it (`session_file::stages`).
//!
//! Its last tensor is `checksum [32]` (U8), the SHA-256 of every byte before it. Numbers are f32, so that on an f32
//! device a restored session goes on to the same bits.

mod layout;
mod memory;
mod reader;
mod restore;
pub(super) mod stages;

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use safetensors::tensor::Dtype;
use sha2::{Digest, Sha256};

use super::error::FileError;
use super::files::{OutputFile, io_error};
use super::segmentation::Cursor;
use super::session::Session;
use crate::device::{Device, DeviceError};
use layout::{Part, Shapes, fingerprint};
pub use memory::SavedSequence;
use reader::Reader;
use restore::Source;

/// The format's name in the metadata.
const FORMAT: &str = "segattn session 5";

/// A session that cannot be saved, or a file that cannot be restored.
#[derive(Debug, thiserror::Error)]
pub enum StateFileError {
    /// The file itself.
    #[error(transparent)]
    File(#[from] FileError),
    /// The file breaks the format.
    #[error("{path}: {what}: expected {expected}, got {got}")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// The part of it.
        what: String,
        /// What would be accepted.
        expected: String,
        /// What is there.
        got: String,
    },
    /// The file is good, but belongs to another model or does not fit the session.
    #[error("{path}: does not fit: {what}: expected {expected}, got {got}")]
    Mismatch {
        /// The file.
        path: PathBuf,
        /// What differs.
        what: &'static str,
        /// What the session needs.
        expected: String,
        /// What the file has.
        got: String,
    },
    /// The tokens given are not those that a sequence has read.
    #[error("tokens of sequence {sequence}: expected {expected}, got {got}")]
    Origin {
        /// The sequence.
        sequence: usize,
        /// Tokens it has read.
        expected: usize,
        /// Tokens given.
        got: usize,
    },
    /// The device failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

/// What a session does not know of itself.
#[derive(Debug, Clone, Copy, Default)]
pub struct Origin<'a> {
    /// The tokens that each sequence has read, as many as it has; empty where they are not known.
    pub tokens: &'a [Vec<u32>],
    /// A digest of the model's weights: a state of other weights is not restored.
    pub weights: &'a str,
    /// Whatever the caller wants to have with the state; may be empty.
    pub note: &'a str,
}

/// A saved session, checked against its own header and checksum.
#[derive(Debug)]
pub struct StateFile {
    reader: Reader,
    positions: Vec<usize>,
    /// Rows of each sequence's current segment.
    rows: Vec<usize>,
}

impl StateFile {
    /// Opens a file, reads its header, and compares its checksum.
    ///
    /// # Errors
    /// [`StateFileError::File`] and [`StateFileError::Malformed`].
    pub fn open(path: &Path) -> Result<Self, StateFileError> {
        let reader = Reader::open(path)?;
        let format = reader.metadata("format")?;
        if format != FORMAT {
            let expected = format!("{FORMAT}; other versions cannot be read: save the state again");
            return Err(reader.malformed("metadata `format`", &expected, format));
        }
        let numbers = |key, what| -> Result<Vec<usize>, StateFileError> {
            let text = reader.metadata(key)?;
            let malformed = |_| reader.malformed(what, "an array of numbers", text);
            serde_json::from_str(text).map_err(malformed)
        };
        let positions = numbers("positions", "metadata `positions`")?;
        let rows = numbers("rows", "metadata `rows`")?;
        if rows.len() != positions.len() || rows.iter().zip(&positions).any(|(r, p)| r > p) {
            let expected = format!("numbers of at most the positions {positions:?}");
            return Err(reader.malformed("metadata `rows`", &expected, &format!("{rows:?}")));
        }
        let mut file = Self {
            reader,
            positions,
            rows,
        };
        file.reader.verify(CHECKSUM)?;
        Ok(file)
    }

    /// The tokens that a saved sequence has read; none where they were not known.
    ///
    /// # Errors
    /// [`StateFileError::File`] and [`StateFileError::Malformed`].
    pub fn tokens(&mut self, sequence: usize) -> Result<Vec<u32>, StateFileError> {
        let name = Part::Tokens.name(sequence);
        if !self.reader.has(&name) {
            return Ok(Vec::new());
        }
        let shape = [self.positions[sequence]];
        let bytes = self.reader.read(&name, Dtype::U32, Some(&shape))?;
        let ids = bytes.as_chunks().0.iter();
        Ok(ids.map(|b| u32::from_le_bytes(*b)).collect())
    }

    /// What [`Origin::note`] was.
    pub fn note(&self) -> &str {
        self.reader.metadata("note").unwrap_or_default()
    }

    /// Tokens that each sequence has read.
    pub fn positions(&self) -> &[usize] {
        &self.positions
    }

    /// Puts the saved sequences into those of `session`; a single saved one into each. `weights` is the digest of the
    /// model's weights that [`Origin`] had. What the session has read before is lost, also after an error.
    ///
    /// # Errors
    /// Every [`StateFileError`].
    pub fn restore<D: Device>(
        &mut self,
        session: &mut Session<'_, D>,
        weights: &str,
    ) -> Result<(), StateFileError> {
        let got = self.reader.metadata("weights")?;
        if got != weights {
            let got = got.to_owned();
            return Err(self.reader.mismatch("the model's weights", weights, &got));
        }
        let wanted = fingerprint(session)?;
        let got = self.reader.metadata("model")?;
        if got != wanted {
            let (got, wanted) = (got.to_owned(), wanted);
            return Err(self.reader.mismatch("the model", &wanted, &got));
        }
        session.restore_on_others(self.reader.path())?;
        self.restore_all(session)
    }

    /// [`StateFile::restore`] without a look at the model, in the layers that are here.
    fn restore_all<D: Device>(
        &mut self,
        session: &mut Session<'_, D>,
    ) -> Result<(), StateFileError> {
        let (saved, sequences) = (self.positions.len(), session.sequences());
        if saved != sequences && saved != 1 {
            let expected = format!("1 or {sequences}");
            return Err(self
                .reader
                .mismatch("sequences", &expected, &saved.to_string()));
        }
        for to in 0..sequences {
            let from = if saved == 1 { 0 } else { to };
            let (position, rows) = (self.positions[from], self.rows[from]);
            if position > session.capacity() {
                let expected = format!("at most {}", session.capacity());
                let got = position.to_string();
                return Err(self
                    .reader
                    .mismatch("tokens of a sequence", &expected, &got));
            }
            let plan = &session.plan;
            if plan.segmented && rows >= plan.segment_len || !plan.segmented && rows != position {
                let expected = match plan.segmented {
                    true => format!("fewer than segment_len = {}", plan.segment_len),
                    false => format!("all {position} tokens, since the model has no segments"),
                };
                let what = "metadata `rows`";
                return Err(self.reader.malformed(what, &expected, &rows.to_string()));
            }
            let cursor = Cursor {
                position,
                rows,
                ..Cursor::default()
            };
            self.restore_sequence(from, to, cursor, session)?;
        }
        Ok(())
    }

    fn restore_sequence<D: Device>(
        &mut self,
        from: usize,
        to: usize,
        cursor: Cursor,
        session: &mut Session<'_, D>,
    ) -> Result<(), StateFileError> {
        session.decoding = Default::default();
        let (file, first_layer) = (self, session.model.config.part.first_layer);
        let mut saved = Saved {
            file,
            from,
            first_layer,
        };
        restore::sequence(&mut saved, to, cursor, session)
    }
}

/// A sequence of a file.
struct Saved<'f> {
    file: &'f mut StateFile,
    from: usize,
    /// Number of the session's first layer in the whole model.
    first_layer: usize,
}

impl Source for Saved<'_> {
    type Error = StateFileError;

    fn floats(&mut self, part: Part, shape: &[usize]) -> Result<Cow<'_, [f32]>, StateFileError> {
        if shape.contains(&0) {
            return Ok(Cow::default());
        }
        let name = part.behind(self.first_layer).name(self.from);
        let bytes = (self.file.reader).read(&name, Dtype::F32, Some(shape))?;
        let numbers = bytes.as_chunks().0.iter();
        Ok(numbers.map(|b| f32::from_le_bytes(*b)).collect())
    }

    fn selected(
        &mut self,
        l: usize,
        h: usize,
        shapes: &Shapes,
        block_len: usize,
    ) -> Result<Vec<usize>, StateFileError> {
        if shapes.completed == 0 {
            return Ok(Vec::new());
        }
        let name = Part::Selected(l + self.first_layer, h).name(self.from);
        let reader = &mut self.file.reader;
        let bytes = reader.read(&name, Dtype::I64, None)?;
        let tokens = shapes.held;
        let selected: Vec<usize> = bytes
            .as_chunks()
            .0
            .iter()
            .map(|b| usize::try_from(i64::from_le_bytes(*b)).unwrap_or(usize::MAX))
            .collect();
        let ascending = selected.windows(2).all(|w| w[0] < w[1]);
        let whole = |block: &[usize]| {
            block.len() == block_len
                && block[0].is_multiple_of(block_len)
                && block.windows(2).all(|w| w[1] - w[0] == 1)
        };
        if !ascending
            || selected.len() > shapes.past_len
            || selected.last().is_some_and(|token| *token >= tokens)
            || !selected.chunks(block_len).all(whole)
        {
            let expected = format!(
                "at most {} ascending numbers below {tokens}, whole blocks of {block_len}",
                shapes.past_len
            );
            let what = format!("tensor `{name}`");
            return Err(reader.malformed(&what, &expected, "other numbers"));
        }
        Ok(selected)
    }
}

/// Name of the last tensor.
const CHECKSUM: &str = "checksum";

/// Saves all sequences of a session; the file appears whole or not at all.
///
/// # Errors
/// [`StateFileError::Origin`] for tokens that are not those of the positions; [`StateFileError::File`] and
/// [`StateFileError::Device`].
pub fn save<D: Device>(
    session: &Session<'_, D>,
    origin: Origin<'_>,
    place: &OutputFile,
) -> Result<(), StateFileError> {
    for (sequence, tokens) in origin.tokens.iter().enumerate() {
        let expected = session.cursors.get(sequence).map_or(0, |c| c.position);
        if !tokens.is_empty() && tokens.len() != expected {
            return Err(StateFileError::Origin {
                sequence,
                expected,
                got: tokens.len(),
            });
        }
    }
    let model = fingerprint(session)?;
    // From here on the other stages send what they have.
    let parts = stages::all(session, origin)?;
    let header = layout::header(session, origin, &model, &parts);
    let failed = |error| StateFileError::from(io_error(place.path(), error));
    place.write(|out| {
        let mut digest = Sha256::new();
        let mut push = |bytes: &[u8]| {
            digest.update(bytes);
            out.write_all(bytes).map_err(failed)
        };
        push(&(header.len() as u64).to_le_bytes())?;
        push(&header)?;
        for saved in &parts {
            push(&stages::bytes(session, origin, saved)?)?;
        }
        out.write_all(&digest.finalize()).map_err(failed)
    })
}
