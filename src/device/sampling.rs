//! How the sequences of a batch choose their next tokens.

use std::fmt::Debug;

use super::sampler::SamplerConfig;
use super::{Device, Result};

/// A token that a sequence has chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampled {
    /// Its id.
    pub token: u32,
    /// Its natural-log probability by the logits as they are.
    pub log_probability: f32,
}

/// Samplers for the sequences of a batch, one random stream each.
///
/// One choice takes three calls: [`select`](Self::select), [`sample`](Self::sample), [`sampled`](Self::sampled). A
/// choice counts once `sampled` has returned it. If a call before that fails, the next `select` restores random streams
/// and histories, so that the same choice can be made again.
pub trait Samplers<D: Device>: Sized + Send + Sync + Debug {
    /// Samplers at the beginning of their random streams. The repetition penalty sees `histories`, tokens below
    /// `vocab`, and what the sequences choose.
    ///
    /// # Errors
    /// A setting out of its range, a token that is not below `vocab`, or what the device says.
    fn new(
        device: &D,
        config: &SamplerConfig,
        streams: &[u64],
        histories: &[&[u32]],
        vocab: usize,
    ) -> Result<Self>;

    /// The sequences that the next calls choose for, each at most once.
    ///
    /// # Errors
    /// A sequence that is not of the batch, or what the device says.
    fn select(&mut self, device: &D, sequences: &[usize]) -> Result<()>;

    /// Chooses a token for each selected sequence from its row of `logits [sequences, vocab]`, which stay as they are.
    ///
    /// # Errors
    /// Logits of another size, or what the device says.
    fn sample(&mut self, device: &D, logits: &mut D::Buffer) -> Result<()>;

    /// The chosen tokens, in the order of the selection; waits for the device. `logits` are those of the last
    /// [`sample`](Self::sample).
    ///
    /// # Errors
    /// [`DeviceError::Sampler`](super::DeviceError::Sampler) where logits allow no choice, or what the device says.
    fn sampled(&mut self, device: &D, logits: &D::Buffer) -> Result<Vec<Sampled>>;
}
