//! Sampling on the host, for devices whose memory is the host's.

use super::sampler::{Sampler, SamplerConfig, SamplerError};
use super::{Device, Result, RowsMut, Sampled};

/// How the sequences of a batch choose their tokens, and what they have chosen last.
#[derive(Debug)]
pub struct HostSamplers {
    sequences: Vec<Sequence>,
    selected: Vec<usize>,
    /// Of the selected sequences.
    chosen: Vec<std::result::Result<Sampled, SamplerError>>,
    vocab: usize,
}

#[derive(Debug)]
struct Sequence {
    sampler: Sampler,
    /// What the repetition penalty sees; empty where there is none.
    history: Vec<u32>,
}

impl HostSamplers {
    /// See [`Device::samplers`].
    pub(super) fn new(
        config: &SamplerConfig,
        streams: &[u64],
        histories: &[&[u32]],
        vocab: usize,
    ) -> Result<Self> {
        let sequence = |(stream, history): (&u64, &&[u32])| {
            let sampler = Sampler::new(*config, *stream)?;
            let penalised = config.repetition_penalty != 1.0;
            let history = if penalised {
                history.to_vec()
            } else {
                Vec::new()
            };
            Ok(Sequence { sampler, history })
        };
        let sequences = streams.iter().zip(histories).map(sequence);
        Ok(Self {
            sequences: sequences.collect::<std::result::Result<_, SamplerError>>()?,
            selected: Vec::new(),
            chosen: Vec::new(),
            vocab,
        })
    }

    /// See [`Device::select`].
    pub(super) fn select(&mut self, sequences: &[usize]) {
        self.selected = sequences.to_vec();
    }

    /// See [`Device::sample`].
    pub(super) fn sample<D: Device>(&mut self, device: &D, logits: &mut D::Buffer) -> Result<()> {
        self.chosen.clear();
        for index in &self.selected {
            let Sequence { sampler, history } = &mut self.sequences[*index];
            let row = index * self.vocab..(index + 1) * self.vocab;
            let token = match sampler.sample(&device.read(logits, row)?, history) {
                Ok(token) => token,
                Err(error) => {
                    self.chosen.push(Err(error));
                    continue;
                }
            };
            if sampler.config().repetition_penalty != 1.0 {
                history.push(token);
            }
            let mut score = device.empty(super::Kind::Exact, 1)?;
            let (row, to) = (
                RowsMut::packed(logits, *index, self.vocab),
                RowsMut::packed(&mut score, 0, 1),
            );
            device.log_probabilities(row, self.vocab, &[token], None, to)?;
            self.chosen.push(Ok(Sampled {
                token,
                log_probability: device.read(&score, 0..1)?[0],
            }));
        }
        Ok(())
    }

    /// See [`Device::sampled`].
    pub(super) fn sampled(&self) -> Result<Vec<Sampled>> {
        let chosen = self.chosen.iter().cloned();
        Ok(chosen.collect::<std::result::Result<_, SamplerError>>()?)
    }
}
