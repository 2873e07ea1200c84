//! Errors of device calls, and the setting that reduces memory when there is too little.

use std::fmt;

use thiserror::Error;

use super::sampler::SamplerError;
use crate::attention;
use crate::cuda::kernels;

/// Why a device call failed.
#[derive(Debug, Error)]
pub enum DeviceError {
    /// An allocation failed.
    #[error(transparent)]
    OutOfMemory(#[from] OutOfMemory),
    /// An invalid size, range or index. Nothing has been read or written.
    #[error("{argument}: expected {expected}, got {got}")]
    Argument {
        /// Name of the argument.
        argument: &'static str,
        /// What is accepted.
        expected: String,
        /// What was passed.
        got: String,
    },
    /// The GPU's driver or kernels failed.
    #[error(transparent)]
    Gpu(#[from] kernels::Error),
    /// The GPU kernels do not support the attention call.
    #[error(transparent)]
    GpuAttention(attention::cuda::Error),
    /// The arguments of the attention call are invalid.
    #[error(transparent)]
    Attention(#[from] attention::Error),
    /// The caller interrupted the work.
    #[error("interrupted")]
    Interrupted,
    /// What other processes compute did not come, or did not go there.
    #[error("{0}")]
    Exchange(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// Sampling a token failed.
    #[error(transparent)]
    Sampler(#[from] SamplerError),
}

impl From<attention::cuda::Error> for DeviceError {
    fn from(error: attention::cuda::Error) -> Self {
        match error {
            attention::cuda::Error::Kernels(error) => error.into(),
            attention::cuda::Error::Argument(error) => error.into(),
            error => DeviceError::GpuAttention(error),
        }
    }
}

impl DeviceError {
    /// An invalid argument.
    pub(crate) fn argument(
        argument: &'static str,
        expected: impl Into<String>,
        got: impl fmt::Display,
    ) -> Self {
        DeviceError::Argument {
            argument,
            expected: expected.into(),
            got: got.to_string(),
        }
    }

    /// Says what memory was wanted for, where that is not known yet. A forward's activations are a backward's in
    /// training.
    pub(crate) fn wanted_for(mut self, purpose: Purpose) -> Self {
        if let DeviceError::OutOfMemory(out) = &mut self {
            match (out.purpose, purpose) {
                (None, _) | (Some(Purpose::Activations), Purpose::Backward) => {
                    out.purpose = Some(purpose);
                }
                _ => {}
            }
        }
        self
    }
}

/// A failed allocation. Only the call that asked for it fails; later calls work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub struct OutOfMemory {
    /// Bytes asked for.
    pub bytes: usize,
    /// Whether pinned host memory was asked for, instead of device memory.
    pub pinned: bool,
    /// Bytes of this memory that the device already holds.
    pub held: usize,
    /// Free bytes, if known.
    pub free: Option<usize>,
    /// Purpose of the allocation, if known.
    pub purpose: Option<Purpose>,
}

impl OutOfMemory {
    /// The device's own memory.
    pub fn device(bytes: usize) -> Self {
        Self {
            bytes,
            pinned: false,
            held: 0,
            free: None,
            purpose: None,
        }
    }

    /// The host's, pinned for a device.
    pub fn pinned(bytes: usize) -> Self {
        Self {
            pinned: true,
            ..Self::device(bytes)
        }
    }
}

impl fmt::Display for OutOfMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            bytes,
            pinned,
            held,
            free,
            purpose,
        } = *self;
        let place = if pinned { "pinned host " } else { "" };
        write!(f, "out of {place}memory")?;
        if let Some(purpose) = purpose {
            write!(f, " for {}", purpose.name())?;
        }
        let [bytes, held] = [bytes, held].map(Size);
        write!(f, ": {bytes} were asked for, {held} are held")?;
        if let Some(free) = free.map(Size) {
            write!(f, ", {free} are free")?;
        }
        match purpose {
            Some(purpose) => write!(f, "; {}", purpose.remedy(pinned)),
            None => Ok(()),
        }
    }
}

/// Formats bytes with a unit.
struct Size(usize);

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.0 >> 20, self.0 as f64 / f64::from(1 << 20)) {
            (0, _) => write!(f, "{} bytes", self.0),
            (..1024, mib) => write!(f, "{mib:.1} MiB"),
            (_, mib) => write!(f, "{:.2} GiB", mib / 1024.0),
        }
    }
}

/// Purpose of an allocation. It decides which setting reduces it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// Packed weights.
    Weights,
    /// What the optimizer holds: weights in f32, gradients, moments.
    Optimizer,
    /// Segments in flight and prior tails.
    Segments,
    /// Keys and values of completed tokens, for the heads that read the past.
    Pool,
    /// Activations between the GEMMs of a segment.
    Activations,
    /// Activations kept for the backward pass, and gradients of activations.
    Backward,
}

impl Purpose {
    /// Its name in messages.
    pub fn name(self) -> &'static str {
        match self {
            Purpose::Weights => "weights",
            Purpose::Optimizer => "weights, gradients and moments",
            Purpose::Segments => "segments in flight",
            Purpose::Pool => "the pool",
            Purpose::Activations => "activations",
            Purpose::Backward => "activations and their gradients",
        }
    }

    fn remedy(self, pinned: bool) -> &'static str {
        match self {
            Purpose::Weights => "take a smaller model or a device with more memory",
            Purpose::Optimizer => "train a smaller model or take a device with more memory",
            Purpose::Segments => {
                "lower `segments_per_step`, the batch, `segment_len`, or without segments the length of sequences"
            }
            Purpose::Pool if pinned => {
                "lower the batch or the length of sequences, or give the pool more device memory"
            }
            Purpose::Pool => {
                "lower the batch or the length of sequences; on a GPU give the pool less device memory, so that it \
                 goes on in host memory (`--pool host`)"
            }
            Purpose::Activations => {
                "lower `segments_per_step`, the batch or `segment_len`; on a GPU, give the pool less device memory \
                 (`--pool host`)"
            }
            Purpose::Backward => {
                "set `recompute`, or lower `segments_per_step`, the batch, `tbptt` or `segment_len`"
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn out_of_memory_says_how_much_is_short_and_what_to_change() {
        let mut out = OutOfMemory::device(3 << 29);
        assert_eq!(
            out.to_string(),
            "out of memory: 1.50 GiB were asked for, 0 bytes are held"
        );
        (out.held, out.free) = (5 << 20, Some(1000));
        let error = DeviceError::from(out).wanted_for(Purpose::Activations);
        let text = error.to_string();
        let expected = "out of memory for activations: 1.50 GiB were asked for, 5.0 MiB are held, 1000 bytes are \
                        free; lower `segments_per_step`";
        assert!(text.starts_with(expected), "{text}");
        // A forward's activations are a backward's in training; the pool is the pool everywhere.
        let text = error.wanted_for(Purpose::Backward).to_string();
        assert!(text.contains("set `recompute`"), "{text}");
        let error = DeviceError::from(OutOfMemory::pinned(1)).wanted_for(Purpose::Pool);
        let text = error.wanted_for(Purpose::Backward).to_string();
        assert!(
            text.starts_with("out of pinned host memory for the pool"),
            "{text}"
        );
    }
}
