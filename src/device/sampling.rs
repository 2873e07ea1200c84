//! Sampling of the next tokens of a batch, on the device.

use std::fmt::Debug;

use super::sampler::SamplerConfig;
use super::{Device, Result};

/// A sampled token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampled {
    /// Its id.
    pub token: u32,
    /// Its log-probability in nats, from the logits before penalty, temperature and filters.
    pub log_probability: f32,
}

/// Samplers for the sequences of a batch, each with its own random stream.
///
/// To sample takes three calls: [`select`](Self::select), [`sample`](Self::sample), [`sampled`](Self::sampled). Random
/// streams and histories advance when `sampled` returns the tokens. If a call fails before that, the next `select`
/// restores them, so that the same tokens can be sampled again.
pub trait Samplers<D: Device>: Sized + Send + Sync + Debug {
    /// Samplers at the start of the random streams `streams [sequences]`. The repetition penalty applies to the tokens
    /// in `histories [sequences][any]`, ids below `vocab`, and to the tokens that are sampled later.
    ///
    /// # Errors
    /// A setting outside its range, a token that is not below `vocab`, or an error of the device.
    fn new(
        device: &D,
        config: &SamplerConfig,
        streams: &[u64],
        histories: &[&[u32]],
        vocab: usize,
    ) -> Result<Self>;

    /// Sets the sampler of one sequence anew: at the start of its random stream, with another history. The others go on
    /// as they were. A selection made before is lost.
    ///
    /// # Errors
    /// As [`new`](Self::new), and a sequence that is not in the batch. Nothing has changed then.
    fn set(
        &mut self,
        device: &D,
        sequence: usize,
        config: &SamplerConfig,
        stream: u64,
        history: &[u32],
    ) -> Result<()>;

    /// Selects the sequences for which the next calls sample. Each may appear once.
    ///
    /// # Errors
    /// A sequence that is not in the batch or appears twice, or an error of the device.
    fn select(&mut self, device: &D, sequences: &[usize]) -> Result<()>;

    /// Samples a token for each selected sequence from its row of `logits [sequences, vocab]`. The values of `logits`
    /// are the same afterwards.
    ///
    /// # Errors
    /// `logits` has another size, or an error of the device.
    fn sample(&mut self, device: &D, logits: &mut D::Buffer) -> Result<()>;

    /// The sampled tokens, in the order of the selection. Waits for the device. `logits` are those of the last
    /// [`sample`](Self::sample).
    ///
    /// # Errors
    /// [`DeviceError::Sampler`](super::DeviceError::Sampler) if no token could be sampled, or an error of the device.
    fn sampled(&mut self, device: &D, logits: &D::Buffer) -> Result<Vec<Sampled>>;
}
