//! Sampling for devices with buffers in host memory.

use crate::device::sampler::{Sampler, SamplerConfig, SamplerError};
use crate::device::{Device, DeviceError, Kind, Result, RowsMut, Sampled, Samplers};

/// The samplers of a batch, and the tokens that were sampled last.
#[derive(Debug)]
pub struct HostSamplers {
    sequences: Vec<Sequence>,
    selected: Vec<usize>,
    /// For each selected sequence, the sampled token and the sampler after it.
    chosen: Vec<(std::result::Result<Sampled, SamplerError>, Sampler)>,
    vocab: usize,
}

#[derive(Debug)]
struct Sequence {
    sampler: Sampler,
    /// The ids to which the repetition penalty applies; empty if there is no penalty.
    history: Vec<u32>,
}

impl Sequence {
    fn new(config: &SamplerConfig, stream: u64, history: &[u32]) -> Result<Self> {
        let penalised = config.repetition_penalty != 1.0;
        Ok(Self {
            sampler: Sampler::new(*config, stream)?,
            history: if penalised {
                history.to_vec()
            } else {
                Vec::new()
            },
        })
    }
}

impl<D: Device> Samplers<D> for HostSamplers {
    fn new(
        _: &D,
        config: &SamplerConfig,
        streams: &[u64],
        histories: &[&[u32]],
        vocab: usize,
    ) -> Result<Self> {
        check_histories(histories, streams.len(), vocab)?;
        let sequence = |(stream, history): (&u64, &&[u32])| Sequence::new(config, *stream, history);
        Ok(Self {
            sequences: streams
                .iter()
                .zip(histories)
                .map(sequence)
                .collect::<Result<_>>()?,
            selected: Vec::new(),
            chosen: Vec::new(),
            vocab,
        })
    }

    fn set(
        &mut self,
        _: &D,
        sequence: usize,
        config: &SamplerConfig,
        stream: u64,
        history: &[u32],
    ) -> Result<()> {
        check_selection(&[sequence], self.sequences.len())?;
        check_histories(&[history], 1, self.vocab)?;
        self.sequences[sequence] = Sequence::new(config, stream, history)?;
        self.selected.clear();
        self.chosen.clear();
        Ok(())
    }

    fn select(&mut self, _: &D, sequences: &[usize]) -> Result<()> {
        check_selection(sequences, self.sequences.len())?;
        self.chosen.clear();
        self.selected = sequences.to_vec();
        Ok(())
    }

    fn sample(&mut self, device: &D, logits: &mut D::Buffer) -> Result<()> {
        self.chosen.clear();
        for index in &self.selected {
            let Sequence { sampler, history } = &self.sequences[*index];
            let (mut sampler, vocab) = (sampler.clone(), self.vocab);
            let row = device.read(logits, index * vocab..(index + 1) * vocab)?;
            let chosen = match sampler.sample(&row, history) {
                Ok(token) => {
                    let mut score = device.empty(Kind::Exact, 1)?;
                    let (row, to) = (
                        RowsMut::packed(&mut *logits, *index, vocab),
                        RowsMut::packed(&mut score, 0, 1),
                    );
                    device.log_probabilities(row, vocab, &[token], None, to)?;
                    let log_probability = device.read(&score, 0..1)?[0];
                    Ok(Sampled {
                        token,
                        log_probability,
                    })
                }
                Err(error) => Err(error),
            };
            self.chosen.push((chosen, sampler));
        }
        Ok(())
    }

    fn sampled(&mut self, _: &D, _: &D::Buffer) -> Result<Vec<Sampled>> {
        let chosen = self.chosen.iter().map(|(chosen, _)| chosen.clone());
        let chosen: Vec<Sampled> = chosen.collect::<std::result::Result<_, SamplerError>>()?;
        let samplers = self.chosen.drain(..).map(|(_, sampler)| sampler);
        for ((index, sampled), sampler) in self.selected.iter().zip(&chosen).zip(samplers) {
            let sequence = &mut self.sequences[*index];
            if sampler.config().repetition_penalty != 1.0 {
                sequence.history.push(sampled.token);
            }
            sequence.sampler = sampler;
        }
        Ok(chosen)
    }
}

/// Checks that there is one history for each sequence, and that its tokens are below `vocab`.
pub(in crate::device) fn check_histories(
    histories: &[&[u32]],
    sequences: usize,
    vocab: usize,
) -> Result<()> {
    if histories.len() != sequences {
        let expected = format!("one for each of {sequences} sequences");
        return Err(DeviceError::argument(
            "histories",
            expected,
            histories.len(),
        ));
    }
    let outside = |token: &&u32| **token as usize >= vocab;
    match histories.iter().copied().flatten().find(outside) {
        Some(token) => {
            let expected = format!("tokens below {vocab}");
            Err(DeviceError::argument("histories", expected, token))
        }
        None => Ok(()),
    }
}

/// Checks that the selected sequences are in the batch, and that none appears twice.
pub(in crate::device) fn check_selection(selected: &[usize], sequences: usize) -> Result<()> {
    let mut seen = vec![false; sequences];
    let wrong = |index: &&usize| match seen.get_mut(**index) {
        Some(seen) => std::mem::replace(seen, true),
        None => true,
    };
    match selected.iter().find(wrong) {
        Some(index) => {
            let expected = format!("distinct numbers below {sequences}");
            Err(DeviceError::argument("selected sequences", expected, index))
        }
        None => Ok(()),
    }
}
