//! Perplexity over documents, each cut into windows of a fixed length or read whole.
//!
//! Every window is a context of its own: nothing goes from one to the next. With a stride shorter
//! than the window, windows overlap and each token counts once, in the first window that reaches
//! it, with the context before it there. The first token of a document is never counted.

use super::error::EvalError;
use crate::device::Device;
use crate::model::decoder::Decoder;
use crate::model::segmentation::Sequence;
use crate::model::session::{Feed, Session};
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// How documents are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PerplexityConfig {
    /// Tokens of a window, at least 2; whole documents where left out.
    pub window: Option<usize>,
    /// Tokens from the start of a window to that of the next, at least 1 and less than a window;
    /// one less than a window where left out, so that windows share one token and every token but
    /// a document's first counts.
    pub stride: Option<usize>,
    /// Windows read side by side.
    pub batch: usize,
    /// Segments of a window computed side by side. Neither this nor `batch` changes a bit.
    pub segments_per_step: usize,
}

impl Default for PerplexityConfig {
    fn default() -> Self {
        Self {
            window: None,
            stride: None,
            batch: 1,
            segments_per_step: 1,
        }
    }
}

/// Mean loss of the tokens that had between `context.start` and `context.end` tokens before them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ByContext {
    /// Tokens before, in their window.
    pub context: Range<usize>,
    /// Tokens counted.
    pub tokens: u64,
    /// Their mean negative natural-log probability.
    pub loss: f64,
}

/// Mean loss of the tokens of a window that count.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct WindowLoss {
    /// Its document, counted from 0 among all that were given.
    pub document: usize,
    /// Tokens counted.
    pub tokens: u64,
    /// Their mean negative natural-log probability.
    pub loss: f64,
}

/// What a model makes of documents.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PerplexityReport {
    /// Documents with at least two tokens.
    pub documents: usize,
    /// Windows they were cut into.
    pub windows: usize,
    /// Tokens counted.
    pub tokens: u64,
    /// Mean negative natural-log probability of a token.
    pub loss: f64,
    /// `exp(loss)`.
    pub perplexity: f64,
    /// Bits for each byte of text, where the text was given. A first token that is part of the text
    /// (not a begin token) is counted in the bytes only.
    pub bits_per_byte: Option<f64>,
    /// The loss by length of context, in ranges that double.
    pub by_context: Vec<ByContext>,
    /// The loss of each window.
    pub by_window: Vec<WindowLoss>,
}

/// A document: its tokens, and the bytes of text they stand for where that is known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Document {
    /// Its tokens.
    pub tokens: Vec<u32>,
    /// Its breaks, as [`Sequence::breaks`].
    pub breaks: Vec<usize>,
    /// Its rereads, as [`Sequence::rereads`].
    pub rereads: Vec<usize>,
    /// Bytes of its text.
    pub bytes: Option<u64>,
}

impl Document {
    fn sequence(&self) -> Sequence<'_> {
        Sequence {
            tokens: &self.tokens,
            breaks: &self.breaks,
            rereads: &self.rereads,
        }
    }
}

/// A window of a document and the part of it that counts.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Window {
    document: usize,
    tokens: Range<usize>,
    /// First token that counts.
    counted: usize,
}

fn windows(documents: &[Document], config: &PerplexityConfig) -> Vec<Window> {
    let mut windows = Vec::new();
    for (document, tokens) in documents.iter().map(|d| &d.tokens).enumerate() {
        let len = config.window.unwrap_or(usize::MAX);
        let stride = config.stride.unwrap_or(len - 1);
        let (mut start, mut counted) = (0usize, 1);
        while counted < tokens.len() {
            let end = tokens.len().min(start.saturating_add(len));
            windows.push(Window {
                document,
                tokens: start..end,
                counted,
            });
            counted = end;
            start = start.saturating_add(stride);
        }
    }
    windows
}

fn check<D: Device>(
    model: &Decoder<D>,
    documents: &[Document],
    config: &PerplexityConfig,
) -> Result<(), EvalError> {
    if let Some(window) = config.window.filter(|w| *w < 2) {
        return Err(EvalError::argument("window", "at least 2 tokens", window));
    }
    if let Some(stride) = config.stride {
        let most = config.window.map_or(0, |w| w - 1);
        if stride == 0 || stride > most {
            let expected = format!("from 1 to {most}, less than the window");
            return Err(EvalError::argument("stride", expected, stride));
        }
    }
    for document in documents {
        document.sequence().check().map_err(EvalError::model)?;
    }
    let vocab = model.config.vocab_size;
    let ids = documents.iter().flat_map(|d| &d.tokens);
    if let Some(id) = ids.into_iter().find(|t| **t as usize >= vocab) {
        let expected = format!("ids below the vocabulary's size, {vocab}");
        return Err(EvalError::argument("tokens", expected, id));
    }
    if documents.iter().all(|d| d.tokens.len() < 2) {
        let expected = "at least one document of two or more tokens";
        return Err(EvalError::argument("documents", expected, "none"));
    }
    Ok(())
}

/// Perplexity of a model on documents; documents of fewer than two tokens are left out.
/// `progress` hears after every chunk how many tokens have been read, of how many.
///
/// # Errors
/// [`EvalError::Argument`] for settings out of range, ids the model does not have and no documents;
/// [`EvalError::Model`] if the device fails.
pub fn perplexity<D: Device>(
    model: &Decoder<D>,
    documents: &[Document],
    config: &PerplexityConfig,
    mut progress: impl FnMut(u64, u64),
) -> Result<PerplexityReport, EvalError> {
    check(model, documents, config)?;
    let windows = windows(documents, config);
    let total: u64 = windows.iter().map(|w| w.tokens.len() as u64 - 1).sum();
    let mut done = 0;
    let (mut sums, mut by_window) = (Sums::default(), Vec::new());
    for group in windows.chunks(config.batch.max(1)) {
        let marks = |w: &Window| {
            let document = documents[w.document].sequence();
            let breaks = document.breaks_within(w.tokens.clone());
            [breaks, document.rereads_within(w.tokens.clone())]
        };
        let marks: Vec<[Vec<usize>; 2]> = group.iter().map(marks).collect();
        let sequences: Vec<Sequence<'_>> = (group.iter().zip(&marks))
            .map(|(w, [breaks, rereads])| Sequence {
                tokens: &documents[w.document].tokens[w.tokens.clone()],
                breaks,
                rereads,
            })
            .collect();
        let scored = log_probabilities(model, &sequences, config.segments_per_step, |read| {
            done += read as u64;
            progress(done, total);
        })?;
        for (window, scored) in group.iter().zip(scored) {
            let first = window.counted - window.tokens.start;
            let mut sum = 0.0;
            for (i, value) in scored.iter().enumerate().skip(first - 1) {
                sums.add(i + 1, f64::from(*value));
                sum -= f64::from(*value);
            }
            let tokens = (scored.len() + 1 - first) as u64;
            by_window.push(WindowLoss {
                document: window.document,
                tokens,
                loss: sum / tokens as f64,
            });
        }
    }
    let bytes = documents.iter().filter(|d| d.tokens.len() >= 2);
    let bytes: Option<u64> = bytes.map(|d| d.bytes).sum();
    let documents = documents.iter().filter(|d| d.tokens.len() >= 2).count();
    Ok(sums.report(documents, by_window, bytes))
}

/// Log-probability of each token but the first of some sequences read side by side, in bounded
/// memory: the bits of [`score`](crate::model::session::score). `progress` hears how many tokens
/// each call has read.
///
/// # Errors
/// [`EvalError::NotFinite`] for a log-probability that is none, [`EvalError::Model`] if the device fails.
pub fn log_probabilities<D: Device>(
    model: &Decoder<D>,
    sequences: &[Sequence<'_>],
    segments_per_step: usize,
    mut progress: impl FnMut(usize),
) -> Result<Vec<Vec<f32>>, EvalError> {
    for sequence in sequences {
        sequence.check().map_err(EvalError::model)?;
    }
    let inputs: Vec<Sequence<'_>> = sequences.iter().map(Sequence::inputs).collect();
    let longest = inputs.iter().map(|s| s.tokens.len()).max().unwrap_or(0);
    let mut session = Session::new(model, sequences.len(), longest, segments_per_step)
        .map_err(EvalError::model)?;
    let chunk = session.chunk();
    let mut scored = vec![Vec::new(); sequences.len()];
    loop {
        let pieces: Vec<(usize, Range<usize>, [Vec<usize>; 2])> = inputs
            .iter()
            .enumerate()
            .filter(|(sequence, s)| session.position(*sequence) < s.tokens.len())
            .map(|(sequence, s)| {
                let from = session.position(sequence);
                let piece = session.next_piece(sequence, *s, from, chunk);
                let breaks = s.breaks_within(piece.clone());
                let rereads = s.rereads_within(piece.clone());
                (sequence, piece, [breaks, rereads])
            })
            .collect();
        if pieces.is_empty() {
            return Ok(scored);
        }
        let feeds: Vec<Feed<'_>> = pieces
            .iter()
            .map(|(sequence, piece, [breaks, rereads])| Feed {
                sequence: *sequence,
                tokens: &inputs[*sequence].tokens[piece.clone()],
                targets: &sequences[*sequence].tokens[piece.start + 1..=piece.end],
                breaks,
                rereads,
            })
            .collect();
        let more = session.feed(&feeds).map_err(EvalError::model)?;
        for ((sequence, piece, _), more) in pieces.iter().zip(more) {
            if let Some(i) = more.iter().position(|x| !x.is_finite()) {
                return Err(EvalError::NotFinite {
                    sequence: *sequence,
                    token: piece.start + i + 1,
                    got: more[i],
                });
            }
            scored[*sequence].extend(more);
        }
        progress(feeds.iter().map(|f| f.tokens.len()).sum());
    }
}

/// Sums of losses by the doubling range their context falls in.
#[derive(Debug, Default)]
struct Sums {
    ranges: Vec<(u64, f64)>,
}

impl Sums {
    /// Counts a token with `context` >= 1 tokens before it. Range r is [2^r, 2^(r+1)).
    fn add(&mut self, context: usize, log_probability: f64) {
        let range = context.ilog2() as usize;
        if self.ranges.len() <= range {
            self.ranges.resize(range + 1, (0, 0.0));
        }
        self.ranges[range].0 += 1;
        self.ranges[range].1 -= log_probability;
    }

    fn report(
        &self,
        documents: usize,
        by_window: Vec<WindowLoss>,
        bytes: Option<u64>,
    ) -> PerplexityReport {
        let tokens: u64 = self.ranges.iter().map(|r| r.0).sum();
        let sum: f64 = self.ranges.iter().map(|r| r.1).sum();
        let loss = sum / tokens as f64;
        let by_context = self
            .ranges
            .iter()
            .enumerate()
            .filter(|(_, r)| r.0 > 0)
            .map(|(i, (tokens, sum))| ByContext {
                context: 1 << i..1 << (i + 1),
                tokens: *tokens,
                loss: sum / *tokens as f64,
            })
            .collect();
        PerplexityReport {
            documents,
            windows: by_window.len(),
            tokens,
            loss,
            perplexity: loss.exp(),
            bits_per_byte: bytes
                .filter(|b| *b > 0)
                .map(|b| sum / std::f64::consts::LN_2 / b as f64),
            by_context,
            by_window,
        }
    }
}
