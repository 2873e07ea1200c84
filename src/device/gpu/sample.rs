//! Sampling on the device, with one thread block per sequence. The host reads back tokens and log-probabilities.

use super::bounds::{below, int, of_kind, product, rows_at};
use super::memory::Block;
use super::rows::{Grid, entry, launch, row_threads};
use super::{Buffer, Driver, Gpu};
use crate::cuda::kernels::File;
use crate::cuda::kernels::layer_params::{SegattnSampleParams, SegattnSampler};
use crate::device::sampler::{SamplerConfig, SamplerError};
use crate::device::shared::samplers::{check_histories, check_selection};
use crate::device::{self, Device, Kind, Result, Rows, Sampled};

/// Tokens whose marks share a word.
const WORD_TOKENS: usize = 32;

/// Settings, random streams, histories and last choices of a batch's sequences.
#[derive(Debug)]
pub struct Samplers<D: Driver> {
    /// [`SegattnSampler`] `[sequences]`, tokens `[sequences]`, log-probabilities `[sequences]`.
    state: Block<D>,
    /// Marks of the tokens in each history, `[sequences, pitch]` words.
    seen: Block<D>,
    /// i32: indices of the selected sequences, at most as many as there are sequences.
    row_indices: Block<D>,
    sequences: usize,
    selected: Vec<usize>,
    vocab: usize,
    /// Copy of `state` and `seen` after the last choice that the host has read.
    read: Read,
    /// Whether the device may have chosen a token since then.
    unread: bool,
}

#[derive(Debug)]
struct Read {
    state: Vec<u8>,
    seen: Vec<u32>,
}

impl<D: Driver> device::Samplers<Gpu<D>> for Samplers<D> {
    fn new(
        gpu: &Gpu<D>,
        config: &SamplerConfig,
        streams: &[u64],
        histories: &[&[u32]],
        vocab: usize,
    ) -> Result<Self> {
        config.validate()?;
        let sequences = streams.len();
        check_histories(histories, sequences, vocab)?;
        int("vocabulary", vocab)?;
        let state: Vec<u8> = streams
            .iter()
            .flat_map(|stream| bytes(config, *stream))
            .chain(std::iter::repeat_n(0, sequences * RESULT_BYTES))
            .collect();
        let pitch = vocab.div_ceil(WORD_TOKENS);
        let mut seen = vec![0u32; product("histories", &[sequences, pitch])?];
        for (marks, history) in seen.chunks_mut(pitch.max(1)).zip(histories) {
            for token in *history {
                mark(marks, *token);
            }
        }
        Ok(Self {
            state: gpu.upload(&state)?,
            seen: gpu.upload(&seen)?,
            row_indices: gpu.upload(&vec![0i32; sequences])?,
            sequences,
            selected: Vec::new(),
            vocab,
            read: Read { state, seen },
            unread: false,
        })
    }

    fn set(
        &mut self,
        _: &Gpu<D>,
        sequence: usize,
        config: &SamplerConfig,
        stream: u64,
        history: &[u32],
    ) -> Result<()> {
        config.validate()?;
        check_selection(&[sequence], self.sequences)?;
        check_histories(&[history], 1, self.vocab)?;
        let entry = size_of::<SegattnSampler>();
        self.read.state[sequence * entry..][..entry].copy_from_slice(&bytes(config, stream));
        let pitch = self.vocab.div_ceil(WORD_TOKENS);
        let marks = &mut self.read.seen[sequence * pitch..][..pitch];
        marks.fill(0);
        history.iter().for_each(|token| mark(marks, *token));
        // The next selection uploads the host's copy.
        self.unread = true;
        Ok(())
    }

    fn select(&mut self, gpu: &Gpu<D>, sequences: &[usize]) -> Result<()> {
        check_selection(sequences, self.sequences)?;
        if self.unread {
            let [state, seen] = [gpu.at(&self.state)?, gpu.at(&self.seen)?];
            let marks = bytemuck::cast_slice(&self.read.seen);
            // SAFETY: both blocks were made with as many bytes.
            unsafe {
                gpu.driver().upload(state, &self.read.state)?;
                gpu.driver().upload(seen, marks)?;
            }
            self.unread = false;
        }
        if self.selected != sequences {
            let indices: Vec<i32> = sequences.iter().map(|index| *index as i32).collect();
            let at = gpu.at(&self.row_indices)?;
            self.selected.clear();
            // SAFETY: the block holds a number for each sequence, and none is selected twice.
            unsafe { gpu.driver().upload(at, bytemuck::cast_slice(&indices))? };
            self.selected = sequences.to_vec();
        }
        // From here on the device may choose, also by calls that were recorded.
        self.unread = true;
        Ok(())
    }

    fn sample(&mut self, gpu: &Gpu<D>, logits: &mut Buffer<D>) -> Result<()> {
        of_kind(logits, Kind::Exact)?;
        let at = gpu.rows(
            &Rows::packed(logits, 0, self.vocab),
            self.sequences,
            self.vocab,
        )?;
        let state = gpu.at(&self.state)? as usize as *mut u8;
        let tokens = state.wrapping_add(self.sequences * size_of::<SegattnSampler>());
        let log_probability = tokens.wrapping_add(self.sequences * size_of::<u32>());
        let params = SegattnSampleParams {
            logits: rows_at(at, self.vocab),
            sampler: state.cast(),
            seen: gpu.at(&self.seen)? as usize as *mut u32,
            tokens: tokens.cast(),
            log_probability: log_probability.cast(),
            indices: gpu.at(&self.row_indices)? as usize as *const i32,
            seen_pitch: self.vocab.div_ceil(WORD_TOKENS) as i64,
            rows: self.selected.len() as i64,
            vocab: self.vocab as i32,
        };
        let grid = Grid::Sized(self.selected.len(), row_threads(self.vocab));
        launch(gpu, entry(File::Sampling, "sample_f32"), grid, &params)
    }

    fn sampled(&mut self, gpu: &Gpu<D>, logits: &Buffer<D>) -> Result<Vec<Sampled>> {
        let entry = size_of::<SegattnSampler>();
        let mut state = vec![0; self.sequences * (entry + RESULT_BYTES)];
        // SAFETY: the block has that size, all of it written when it was made.
        unsafe { gpu.driver().download(gpu.at(&self.state)?, &mut state)? };
        let (samplers, results) = state.split_at(self.sequences * entry);
        let (tokens, scores) = results.split_at(self.sequences * size_of::<u32>());
        let word = |words: &[u8], i: usize| words.as_chunks::<4>().0[i];
        let one = |index: &usize| {
            let sampler: SegattnSampler =
                bytemuck::pod_read_unaligned(&samplers[index * entry..][..entry]);
            match sampler.failure {
                1 | 2 => Err(self.failure(gpu, logits, *index)?.into()),
                _ => Ok(Sampled {
                    token: match gpu.driver().computes() {
                        true => u32::from_le_bytes(word(tokens, *index)),
                        false => 0,
                    },
                    log_probability: f32::from_le_bytes(word(scores, *index)),
                }),
            }
        };
        let chosen: Vec<Sampled> = self.selected.iter().map(one).collect::<Result<_>>()?;
        let largest = chosen.iter().map(|sampled| sampled.token as usize).max();
        below("token chosen on the device", largest, self.vocab)?;
        let pitch = self.vocab.div_ceil(WORD_TOKENS);
        for (index, sampled) in self.selected.iter().zip(&chosen) {
            mark(&mut self.read.seen[index * pitch..][..pitch], sampled.token);
        }
        self.read.state = state;
        self.unread = false;
        Ok(chosen)
    }
}

impl<D: Driver> Samplers<D> {
    /// Error in the logits of a sequence.
    fn failure(&self, gpu: &Gpu<D>, logits: &Buffer<D>, index: usize) -> Result<SamplerError> {
        let logits = gpu.read(logits, index * self.vocab..(index + 1) * self.vocab)?;
        let wrong = |x: &f32| x.is_nan() || *x == f32::INFINITY;
        Ok(match logits.iter().position(wrong) {
            Some(id) => SamplerError::Logit {
                id,
                got: logits[id],
            },
            None => SamplerError::NoCandidate { len: logits.len() },
        })
    }
}

/// Marks a token in a history.
fn mark(marks: &mut [u32], token: u32) {
    let token = token as usize;
    marks[token / WORD_TOKENS] |= 1 << (token % WORD_TOKENS);
}

/// Bytes of a token and its log-probability.
const RESULT_BYTES: usize = size_of::<u32>() + size_of::<f32>();

// SAFETY: numbers without gaps between them, as the size says.
unsafe impl bytemuck::Zeroable for SegattnSampler {}
// SAFETY: as above.
unsafe impl bytemuck::Pod for SegattnSampler {}
const _: () = assert!(size_of::<SegattnSampler>() == 3 * 8 + 6 * 4);

/// A sequence's entry at its stream's beginning.
fn bytes(config: &SamplerConfig, stream: u64) -> [u8; size_of::<SegattnSampler>()] {
    bytemuck::cast(SegattnSampler {
        seed: config.seed,
        stream,
        position: 0,
        temperature: config.temperature,
        top_p: config.top_p,
        min_p: config.min_p,
        penalty: config.repetition_penalty,
        top_k: u32::try_from(config.top_k).unwrap_or(u32::MAX),
        failure: 0,
    })
}
