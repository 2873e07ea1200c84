//! Arguments of [`Device`](super::Device) calls: views, the attention call, retrieval, the update.

use std::ops::Range;

use crate::attention::PerSource;

/// Role of a buffer's elements. It decides their precision on devices with mixed precision.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Inputs and outputs of GEMMs: rows of the residual stream, queries, keys, values, and their gradients. bf16 on a
    /// GPU.
    Activation,
    /// Accumulators and statistics: the optimizer's weights, their gradients and moments, statistics of rows, logits,
    /// log-probabilities, angle tables. At least f32 on every device.
    Exact,
}

/// Whether a result overwrites its destination or is added to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accumulate {
    /// `=`
    No,
    /// `+=`
    Yes,
}

/// Rows inside a buffer: row `r` starts at element `start + r * stride`.
#[derive(Debug)]
pub struct Rows<'a, B> {
    /// Where the rows lie.
    pub buffer: &'a B,
    /// Element of row 0.
    pub start: usize,
    /// Elements from one row to the next.
    pub stride: usize,
}

impl<B> Clone for Rows<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<B> Copy for Rows<'_, B> {}

impl<'a, B> Rows<'a, B> {
    /// Rows of `width` packed one after the other, from row `first` on.
    pub fn packed(buffer: &'a B, first: usize, width: usize) -> Self {
        Self {
            buffer,
            start: first * width,
            stride: width,
        }
    }

    /// The same rows from column `column` on.
    pub fn column(self, column: usize) -> Self {
        Self {
            start: self.start + column,
            ..self
        }
    }
}

/// Writable [`Rows`].
#[derive(Debug)]
pub struct RowsMut<'a, B> {
    /// Where the rows lie.
    pub buffer: &'a mut B,
    /// Element of row 0.
    pub start: usize,
    /// Elements from one row to the next.
    pub stride: usize,
}

impl<'a, B> RowsMut<'a, B> {
    /// The same rows, read-only.
    pub fn shared(&self) -> Rows<'_, B> {
        Rows {
            buffer: self.buffer,
            start: self.start,
            stride: self.stride,
        }
    }

    /// Reborrows the rows for one call.
    pub fn reborrow(&mut self) -> RowsMut<'_, B> {
        RowsMut {
            buffer: self.buffer,
            ..*self
        }
    }

    /// Rows of `width` packed one after the other, from row `first` on.
    pub fn packed(buffer: &'a mut B, first: usize, width: usize) -> Self {
        Self {
            buffer,
            start: first * width,
            stride: width,
        }
    }

    /// The same rows from column `column` on.
    pub fn column(self, column: usize) -> Self {
        Self {
            start: self.start + column,
            ..self
        }
    }
}

/// Rows of heads on their way to another place, see [`Device::move_rows`](super::Device::move_rows).
#[derive(Debug)]
pub struct Move<'a, B> {
    /// Where they lie `[rows, heads * head_dim]`.
    pub src: Rows<'a, B>,
    /// Index of the buffer that they go to.
    pub target: usize,
    /// Element of that buffer at which the first row begins.
    pub start: usize,
    /// Elements from one row to the next.
    pub stride: usize,
    /// Number of rows, at least 1.
    pub rows: usize,
    /// Heads of a row.
    pub heads: usize,
    /// Row of the angle tables for the first row, those of the next rows follow; `None`: they are not rotated.
    pub first_angle: Option<usize>,
}

/// Head counts and size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heads {
    /// Query heads.
    pub q: usize,
    /// Key and value heads; divides `q`.
    pub kv: usize,
    /// Elements of a head.
    pub dim: usize,
}

/// Keys and values of the segments in flight of one layer. A *slot* holds one segment: its own rows,
/// the prior rows and the past rows, keys rotated, all `[slot, row, kv_head, head_dim]`.
#[derive(Debug)]
pub struct SegmentCache<B> {
    /// Rows a slot has room for.
    pub rows: PerSource<usize>,
    /// Current keys, rotated.
    pub k: B,
    /// Current keys before rotation; empty where no other segment will read them.
    pub raw_k: B,
    /// Current values.
    pub v: B,
    /// Prior keys, rotated to the positions before 0.
    pub prior_k: B,
    /// Prior values.
    pub prior_v: B,
    /// Past keys, rotated to the positions before the prior rows.
    pub past_k: B,
    /// Past values.
    pub past_v: B,
    /// Valid prior rows of each slot.
    pub prior_len: Vec<usize>,
    /// Valid past rows, `[slot, kv_head]`.
    pub past_len: Vec<usize>,
    /// How many of them, the first ones, are sinks, `[slot, kv_head]`; empty where no slot ever has one.
    pub sink_len: Vec<usize>,
}

/// The norms of queries and keys before rotation: of each head by itself, or of all heads of a row together, as their
/// weights are long.
#[derive(Debug)]
pub struct QkNorms<'a, B> {
    /// Weights of queries and of keys.
    pub weights: [&'a B; 2],
    /// Added to mean squares.
    pub eps: f64,
    /// Receive the reciprocal root mean squares `[rows, norms of a row]`.
    pub rstd: [&'a mut B; 2],
}

/// What the gradients of [`QkNorms`] are computed from, rows `[q | k | v]`.
#[derive(Debug)]
pub struct QkNormGrad<'a, B> {
    /// Upstream gradients of queries and keys after their norms, and of values.
    pub d_y: Rows<'a, B>,
    /// The rows before the norms.
    pub x: Rows<'a, B>,
    /// The forward's reciprocal root mean squares of queries and of keys.
    pub rstd: [Rows<'a, B>; 2],
    /// Number of rows.
    pub rows: usize,
    /// Head counts and size.
    pub heads: Heads,
}

/// Where the keys and values of a step's rows go.
#[derive(Debug)]
pub struct KeyStore<'a, B> {
    /// The slots.
    pub cache: &'a mut SegmentCache<B>,
    /// Queries before rotation, for retrieval `[rows, q_heads * head_dim]`.
    pub probes: Option<&'a mut B>,
}

/// Rows that are computed together, with the indices that the calls of a step need. A
/// [`Device::Step`](super::Device::Step) is made from it.
#[derive(Debug, Clone, Default)]
pub struct StepRows {
    /// The token of each row.
    pub tokens: Vec<u32>,
    /// Its row of the angle tables.
    pub angles: Vec<usize>,
    /// Its row of the slots' `k`, `raw_k` and `v`.
    pub cache_rows: Vec<usize>,
    /// Its row of the probes, if it is kept.
    pub probe_rows: Vec<Option<usize>>,
    /// The segments that the rows belong to, in the rows' order.
    pub spans: Vec<SlotSpan>,
    /// Largest end of a span that a recorded attention call supports, in rows of the segment.
    pub reach: usize,
}

impl AsRef<StepRows> for StepRows {
    fn as_ref(&self) -> &StepRows {
        self
    }
}

/// Rows of one segment that are computed in one call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SlotSpan {
    /// First row in the call's buffers.
    pub row: usize,
    /// Number of rows.
    pub rows: usize,
    /// Position of the first row in its segment.
    pub start: usize,
    /// The slot that holds the segment.
    pub slot: usize,
}

/// One attention call over the spans' rows.
#[derive(Debug)]
pub struct Attention<'a, B> {
    /// Head counts.
    pub heads: Heads,
    /// Factor on the products of queries and keys; `None`: `1 / sqrt(head_dim)`.
    pub scale: Option<f32>,
    /// Past gate of each query head; 0 for a head that reads no more of the past than its sinks.
    pub past_gate: &'a [f32],
    /// Whether each query head reads the prior rows.
    pub prior_heads: &'a [bool],
    /// The rows: queries, and the segment each reads.
    pub spans: &'a [SlotSpan],
    /// Rotated queries `[rows, q_heads * head_dim]`, row 0 is the buffer's row 0 of the spans.
    pub q: Rows<'a, B>,
    /// Keys and values.
    pub cache: &'a SegmentCache<B>,
}

/// Upstream gradients and results of an attention backward. Rows as in the call's spans, each of
/// which starts at position 0.
#[derive(Debug)]
pub struct AttentionGrad<'a, B> {
    /// The forward's output.
    pub out: Rows<'a, B>,
    /// The forward's log-sum-exp, `[q_heads, rows]` for each span, spans packed.
    pub lse: Rows<'a, B>,
    /// Upstream gradient `[rows, q_heads * head_dim]`.
    pub d_out: Rows<'a, B>,
    /// Upstream gradient of the log-sum-exp, laid out as it is; `None`: zeros.
    pub d_lse: Option<Rows<'a, B>>,
    /// Of the rotated queries.
    pub d_q: RowsMut<'a, B>,
    /// Of the rotated current keys `[rows, kv_heads * head_dim]`.
    pub d_k: RowsMut<'a, B>,
    /// Of the current values.
    pub d_v: RowsMut<'a, B>,
    /// Of the rotated prior keys and of the prior values `[span, prior rows, kv_heads * head_dim]`,
    /// packed in order of the spans; `None`: `read_only_prior`.
    pub d_prior: Option<(&'a mut B, &'a mut B)>,
    /// Of the gates `[span, q_heads]`, set.
    pub d_past_gate: &'a mut B,
}

/// Attention's output and the sink logits that scale it (docs/contract.md, section 2).
#[derive(Debug)]
pub struct SinkLogits<'a, B> {
    /// The logits `[q_heads]`.
    pub logits: &'a B,
    /// Head counts and size.
    pub heads: Heads,
    /// Attention's output `[rows, q_heads * head_dim]`; row 0 is the buffer's row 0 of the spans.
    pub out: Rows<'a, B>,
    /// Its log-sum-exp, `[q_heads, rows]` for each span, spans packed.
    pub lse: Rows<'a, B>,
}

/// Upstream gradient of the scaled output, and what it becomes. Each span starts at position 0.
#[derive(Debug)]
pub struct SinkLogitsGrad<'a, B> {
    /// The rows. They lie one after another.
    pub spans: &'a [SlotSpan],
    /// Upstream gradient `[rows, q_heads * head_dim]`.
    pub d_y: Rows<'a, B>,
    /// Of attention's output.
    pub d_out: RowsMut<'a, B>,
    /// Of its log-sum-exp, laid out as it is.
    pub d_lse: RowsMut<'a, B>,
    /// Of the logits `[span, q_heads]`, set.
    pub d_logits: &'a mut B,
}

/// The last queries of a segment, which probes are made of. They lie in a ring: query `t`, counted from the earliest
/// one, is row `(first + t) % capacity`.
#[derive(Debug)]
pub struct Probes<'a, B> {
    /// Queries before rotation `[capacity, q_heads * head_dim]`.
    pub q: Rows<'a, B>,
    /// Number of queries, from 1 to `capacity`.
    pub rows: usize,
    /// Row of the earliest query, below `capacity`.
    pub first: usize,
    /// Rows of the ring.
    pub capacity: usize,
    /// Query heads of a KV head.
    pub group: usize,
}

impl<B> Clone for Probes<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<B> Copy for Probes<'_, B> {}

impl<B> Probes<'_, B> {
    /// Row of `q` that holds query `t`.
    pub fn row(&self, t: usize) -> usize {
        (self.first + t) % self.capacity
    }
}

/// A pool's heads, and what it keeps of their keys and values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PoolShape {
    /// Heads of the pool.
    pub heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Tokens that memory is taken for at a time.
    pub run: usize,
    /// What is kept of an element.
    pub bits: PoolBits,
}

/// Bits that a pool keeps of an element (docs/contract.md, section 2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PoolBits {
    /// The device's own type.
    #[default]
    Sixteen,
    /// Multiples, from -127 to 127, of a step for each 32 elements.
    Eight,
    /// Multiples from -7 to 7.
    Four,
}

impl PoolBits {
    /// By their number.
    pub fn new(bits: usize) -> Option<Self> {
        match bits {
            16 => Some(Self::Sixteen),
            8 => Some(Self::Eight),
            4 => Some(Self::Four),
            _ => None,
        }
    }

    /// Their number.
    pub fn count(self) -> usize {
        match self {
            Self::Sixteen => 16,
            Self::Eight => 8,
            Self::Four => 4,
        }
    }

    /// The largest multiple of a step, where elements are rounded.
    pub fn limit(self) -> Option<u8> {
        match self {
            Self::Sixteen => None,
            Self::Eight => Some(127),
            Self::Four => Some(7),
        }
    }
}

/// How the tokens of a pool are scored and selected (docs/contract.md, section 2). Lengths in tokens, all at least 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SelectionRule {
    /// Whole blocks with the highest product of a probe and a key. A probe is the mean over a window of queries.
    Blocks {
        /// Tokens of a block; blocks are counted from the start of the sequence.
        block_len: usize,
        /// Queries of a window; all queries where there are fewer.
        probe_window: usize,
        /// Queries between the starts of two windows.
        probe_stride: usize,
    },
    /// Windows around the tokens with the largest share of attention. A probe is a query by itself.
    Windows {
        /// Tokens of a window.
        window_len: usize,
        /// Tokens of a whole window that come before its best token: 0 to `window_len - 1`.
        window_before: usize,
    },
}

impl SelectionRule {
    /// Selected tokens come in whole blocks of so many tokens, counted from the start of the sequence.
    pub fn block_len(&self) -> usize {
        match self {
            Self::Blocks { block_len, .. } => *block_len,
            Self::Windows { .. } => 1,
        }
    }
}

/// Which tokens the heads of a pool may select, how many, and by which rule.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Selection<'a> {
    /// The KV head of each head of the pool.
    pub kv_heads: &'a [usize],
    /// The tokens of the pool that each may select.
    pub eligible: &'a [Range<usize>],
    /// Tokens that each head selects, at most.
    pub rows: usize,
    /// How they are chosen.
    pub rule: SelectionRule,
    /// The scale of attention; `None`: `1 / sqrt(head_dim)`.
    pub scale: Option<f32>,
}

impl Selection<'_> {
    /// The scale of attention.
    pub(in crate::device) fn scale(&self, head_dim: usize) -> f32 {
        self.scale.unwrap_or((head_dim as f32).sqrt().recip())
    }

    /// How many tokens a head selects.
    pub fn count(&self, head: usize) -> usize {
        let block_len = self.rule.block_len();
        let blocks = self.blocks(head, block_len).len();
        blocks.min(self.rows / block_len) * block_len
    }

    /// The blocks of `block_len` tokens that lie wholly inside the eligible tokens of a head.
    pub(in crate::device) fn blocks(&self, head: usize, block_len: usize) -> Range<usize> {
        let Range { start, end } = self.eligible[head];
        let (first, end) = (start.div_ceil(block_len), end / block_len);
        first..end.max(first)
    }
}

/// Where the selected tokens of a pool's heads go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PastHeads<'a> {
    /// The KV head of each.
    pub kv_heads: &'a [usize],
    /// Row of the angle tables behind each head's last token.
    pub ends: &'a [usize],
}

/// A part of a parameter tensor, or all of it, in an update.
#[derive(Debug)]
pub struct GradTensor<'a, B> {
    /// The weights of the whole tensor.
    pub values: &'a mut B,
    /// Their gradients.
    pub grads: &'a B,
    /// Which elements of both are updated.
    pub range: Range<usize>,
    /// First moment of these elements alone.
    pub m: &'a mut B,
    /// Second moment, likewise.
    pub v: &'a mut B,
    /// Whether weight decay applies.
    pub decay: bool,
    /// Factor on the learning rate; 0 leaves the tensor as it is.
    pub lr_scale: f64,
    /// Positive values stay at or above this (past gates).
    pub floor: Option<f64>,
}

/// Settings of one AdamW update (Loshchilov & Hutter 2019).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamW {
    /// Learning rate.
    pub lr: f64,
    /// Decay of the first and second moment.
    pub betas: [f64; 2],
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Gradients are scaled down to this global norm.
    pub clip_norm: Option<f64>,
    /// Number of this update, from 1 (bias correction).
    pub step: u64,
    /// Only compute the norm.
    pub only_measure: bool,
}

/// Result of an update.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Update {
    /// Norm of all gradients before clipping.
    pub grad_norm: f64,
    /// Whether the tensors changed.
    pub applied: bool,
}
