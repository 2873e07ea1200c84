//! Segment attention for [candle](https://docs.rs/candle-core), with gradients, on the CPU and on CUDA.
//!
//! The queries of one segment read the segment itself (causal), the tail of the segment before (*prior*), and rows that
//! were retrieved from earlier segments (*past*, without gradient), in one softmax. What is computed is in
//! `docs/contract.md`, section 1, of segattn.
//!
//! ```
//! use candle_core::{Device, Tensor, Var};
//! use segattn_candle::{Options, segment_attn};
//!
//! // One segment of 3 tokens, 2 query heads on 1 KV head, and 2 rows of the segment before.
//! let q = Var::ones((1, 3, 2, 8), candle_core::DType::F32, &Device::Cpu)?;
//! let kv = Tensor::ones((1, 3, 2, 1, 8), candle_core::DType::F32, &Device::Cpu)?;
//! let prior_kv = Tensor::zeros((1, 2, 2, 1, 8), candle_core::DType::F32, &Device::Cpu)?;
//! let out = segment_attn(&q, &kv, Some(&prior_kv), &Options::default())?;
//! assert_eq!(out.dims(), [1, 3, 2, 8]);
//! let gradients = out.sum_all()?.backward()?;
//! assert!(gradients.get(&q).is_some());
//! # Ok::<(), candle_core::Error>(())
//! ```
#![deny(missing_docs)]

#[cfg(feature = "cuda")]
mod gpu;
mod host;
mod op;
mod problem;

use candle_core::{Result, Tensor};

/// What a call does beside its tensors. The default: every row is valid, every head reads the prior, there is no past.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// `[q_heads]`: which query heads read the prior; `None`: all.
    pub prior_heads: Option<Vec<bool>>,
    /// Rows retrieved from earlier segments.
    pub past: Option<Past>,
    /// `[batch]`: valid rows of `kv`; `None`: all.
    pub segment_len: Option<Vec<i32>>,
    /// `[batch]`: valid rows of `prior_kv`; `None`: all.
    pub prior_len: Option<Vec<i32>>,
    /// `[batch]`: the position of the first query row in the segment, for decoding; `None`: 0. There is no backward
    /// pass for other positions.
    pub query_start: Option<Vec<i32>>,
    /// Factor on the scores; `None`: `1 / sqrt(head_dim)`.
    pub scale: Option<f32>,
}

/// Rows retrieved from earlier segments. They get no gradient, and nor does the gate.
#[derive(Debug, Clone)]
pub struct Past {
    /// `[batch, past, 2, kv_heads, head_dim]`: keys, then values.
    pub kv: Tensor,
    /// `[q_heads]`, finite, at least 0: the weight of these rows in each head; `None`: 1.
    pub gate: Option<Vec<f32>>,
    /// `[batch]`: valid rows; `None`: all.
    pub len: Option<Vec<i32>>,
    /// `[batch]`: the first rows that are sinks, which every head reads; `None`: 0.
    pub sink_len: Option<Vec<i32>>,
}

/// Attention of one segment, like `q`.
///
/// `q` is `[batch, rows, q_heads, head_dim]`; `kv` `[batch, segment, 2, kv_heads, head_dim]` has the keys of a row,
/// then its values; `prior_kv` `[batch, prior, 2, kv_heads, head_dim]` is the tail of the segment before. All three get
/// gradients. On the CPU they are f32, with a `head_dim` that is a multiple of 8 up to 256, or f64 for tests (slow, any
/// `head_dim`); on CUDA bf16 or f16, with a `head_dim` of 32, 64, 96, 128 or 256. Tensors that are not contiguous are
/// copied. Padding rows of the result are 0.
///
/// # Errors
/// A shape, length, gate, dtype or device that does not fit, with what was expected and what came; what the GPU's
/// driver says.
pub fn segment_attn(
    q: &Tensor,
    kv: &Tensor,
    prior_kv: Option<&Tensor>,
    options: &Options,
) -> Result<Tensor> {
    let op = op::SegmentAttention::new(options)?;
    let (q, kv) = (q.contiguous()?, kv.contiguous()?);
    match prior_kv {
        Some(prior_kv) => q.apply_op3(&kv, &prior_kv.contiguous()?, op),
        None => q.apply_op2(&kv, op),
    }
}
