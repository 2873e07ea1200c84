//! State that a sequence carries from segment to segment, and the slots that hold segments in flight.

mod carry;
mod remember;
mod sinks;
mod slots;

pub use carry::{Carry, SequenceState};
pub use sinks::Sinks;
pub use slots::{Angles, LayerSlots, Slots};

pub(in crate::model) use carry::{
    Complete, Opening, allocate_segment, close_segments, open_segments,
};
pub(in crate::model) use remember::PastCalls;

use std::ops::Range;

use super::config::{ModelConfig, RetrievalConfig};
use crate::device::{
    DeviceError, Heads, OutOfMemory, PoolBits, PoolShape, Purpose, Result, SelectionRule,
};

/// Elements of a buffer of this shape, whose sizes a caller has chosen.
///
/// # Errors
/// [`OutOfMemory`] where they cannot be counted.
pub(in crate::model) fn elements<const N: usize>(shape: [usize; N]) -> Result<usize> {
    let count = shape
        .iter()
        .try_fold(1usize, |n, size| n.checked_mul(*size));
    let beyond = || DeviceError::from(OutOfMemory::device(usize::MAX));
    count.ok_or_else(|| beyond().wanted_for(Purpose::Segments))
}

/// The sources that the KV heads of a layer read.
#[derive(Debug, Clone)]
pub struct LayerReads {
    /// Whether each KV head reads the prior tail.
    pub prior: Vec<bool>,
    /// KV heads that read the past, ascending.
    pub past: Vec<usize>,
}

/// Sizes of one run of a model: segments, sources, and the heads that read each source.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Head counts.
    pub heads: Heads,
    /// Most tokens of a segment; the length of the sequence in a model without segments.
    pub segment_len: usize,
    /// Whether the model has segments. Without, the only one never ends.
    pub segmented: bool,
    /// Tokens that end their segment, ascending.
    pub break_ids: Vec<u32>,
    /// Rows of the prior tail.
    pub prior_len: usize,
    /// Largest number of selected past rows.
    pub past_len: usize,
    /// First rows of the sequence that every head of every later segment reads.
    pub sink_len: usize,
    /// Last rows of a segment, whose queries are averaged into probes.
    pub probe_rows: usize,
    /// What pools keep of an element.
    pub pool_bits: PoolBits,
    /// Most tokens that a pool holds between segments.
    pub pool_len: Option<usize>,
    /// How past rows are selected.
    pub rule: SelectionRule,
    /// Scale of attention; `None`: `1 / sqrt(head_dim)`.
    pub scale: Option<f32>,
    /// Per layer.
    pub reads: Vec<LayerReads>,
}

impl Plan {
    /// The plan of `config` for sequences of at most `longest` tokens.
    pub fn new(config: &ModelConfig, longest: usize) -> Self {
        let heads = Heads {
            q: config.num_attention_heads,
            kv: config.num_key_value_heads,
            dim: config.head_dim,
        };
        let segment = config.segment.as_ref();
        let [prior_len, past_len, sink_len] =
            segment.map_or([0; 3], |s| [s.prior_len, s.past_len, s.sink_len]);
        // No head reads a source without rows: it needs no pool, no probes and no slots.
        let prior = |l, g| prior_len > 0 && config.reads_prior(l, g);
        let past = |l, g| past_len > 0 && config.reads_past(l, g);
        let layer = |l: usize| LayerReads {
            prior: (0..heads.kv).map(|g| prior(l, g)).collect(),
            past: (0..heads.kv).filter(|g| past(l, *g)).collect(),
        };
        let reads = (0..config.num_hidden_layers).map(layer).collect();
        let scale = config.switches.attention_scale.map(|scale| scale as f32);
        let Some(segment) = &config.segment else {
            let segment_len = longest.max(1);
            return Self {
                heads,
                segment_len,
                segmented: false,
                break_ids: Vec::new(),
                prior_len: 0,
                past_len: 0,
                sink_len: 0,
                probe_rows: 0,
                pool_bits: PoolBits::default(),
                pool_len: None,
                rule: RetrievalConfig::default().rule(),
                scale,
                reads,
            };
        };
        let mut break_ids = segment.break_ids.clone();
        break_ids.sort_unstable();
        Self {
            heads,
            segment_len: segment.segment_len,
            segmented: true,
            break_ids,
            prior_len,
            past_len,
            sink_len,
            probe_rows: segment.retrieval.queries().min(segment.segment_len),
            pool_bits: segment.pool_bits,
            pool_len: (segment.pool_len > 0).then_some(segment.pool_len),
            rule: segment.retrieval.rule(),
            scale,
            reads,
        }
    }

    /// Whether rows of the past are selected, in whatever layers: these may be a part of the model's.
    pub fn retrieves(&self) -> bool {
        self.past_len > 0
    }

    /// A layer's pool, if it has `heads` heads that read the past.
    pub fn pool(&self, heads: usize) -> PoolShape {
        PoolShape {
            heads,
            head_dim: self.heads.dim,
            run: self.segment_len,
            bits: self.pool_bits,
        }
    }

    /// Tokens that a pool holds after so many have joined it: whole blocks are dropped.
    pub fn held(&self, tokens: usize) -> usize {
        let block_len = self.rule.block_len();
        let beyond = self.pool_len.map_or(0, |len| tokens.saturating_sub(len));
        tokens - beyond.next_multiple_of(block_len)
    }

    /// Number of prior rows and of past rows, sinks included, that a layer with these reads needs.
    pub fn sources(&self, reads: &LayerReads) -> [usize; 2] {
        let prior = reads.prior.contains(&true);
        let past = !reads.past.is_empty();
        [
            if prior { self.prior_len } else { 0 },
            self.sink_len + if past { self.past_len } else { 0 },
        ]
    }

    /// The tokens that a KV head can select of the `tokens` that its pool holds, of which the last `prior_rows` are the
    /// tail.
    pub fn eligible(
        &self,
        reads: &LayerReads,
        head: usize,
        [tokens, prior_rows]: [usize; 2],
    ) -> Range<usize> {
        let tail = if reads.prior[head] { prior_rows } else { 0 };
        self.sinks(tokens, tail)..tokens - tail
    }

    /// Sinks that a head sees in a segment before which `tokens` tokens are complete: no token twice, so none of the
    /// last `tail` ones, which it reads as prior rows.
    pub fn sinks(&self, tokens: usize, tail: usize) -> usize {
        self.sink_len.min(tokens - tail)
    }

    /// Elements of a row of keys.
    pub fn kv_width(&self) -> usize {
        self.heads.kv * self.heads.dim
    }

    /// Elements of a row of queries.
    pub fn q_width(&self) -> usize {
        self.heads.q * self.heads.dim
    }

    /// Elements of a row of queries, keys and values.
    pub fn qkv_width(&self) -> usize {
        self.q_width() + 2 * self.kv_width()
    }

    /// Row of the probes that holds the query of a position of the segment in `slot`, for rows up to `end`. The rows of
    /// a slot are a ring, since it is not known ahead where the segment ends: position `p` is row `p % probe_rows`, and
    /// only the last `probe_rows` positions before `end` have one.
    pub fn probe_row(&self, slot: usize, position: usize, end: usize) -> Option<usize> {
        let kept = position + self.probe_rows >= end && self.probe_rows > 0;
        kept.then(|| slot * self.probe_rows + position % self.probe_rows)
    }

    /// Row of the angle tables that holds position 0.
    pub fn origin(&self) -> usize {
        self.prior_len + self.past_len + self.sink_len
    }
}
