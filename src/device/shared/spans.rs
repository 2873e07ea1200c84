//! Spans of a step grouped into calls of the attention operation: consecutive spans of equal length
//! form one batch, so that no padding is computed.
//!
//! All three devices use [`span_batches`] and [`Sources`]. The devices on host memory also share the
//! calls themselves, [`forward`] and [`backward`], each with its own [`Operation`].

use std::ops::Range;

use crate::attention::{Batch, Error, Grads, Layout, PastLen, Problem, View, ViewMut};
use crate::device::{Attention, AttentionGrad, Rows, RowsMut, SlotSpan};

/// The operation in one precision, see [`crate::attention`].
pub(in crate::device) trait Operation {
    /// Its precision.
    type Number: Copy;
    /// The device's memory.
    type Buffer: AsRef<[Self::Number]> + AsMut<[Self::Number]>;

    /// Computes `out` and `lse`.
    fn forward(
        problem: &Problem<'_, Self::Number>,
        out: ViewMut<'_, Self::Number>,
        lse: &mut [Self::Number],
    ) -> Result<(), Error>;

    /// Computes the gradients from `[out, d_out]` and `lse`.
    fn backward(
        problem: &Problem<'_, Self::Number>,
        outs: [View<'_, Self::Number>; 2],
        lse: &[Self::Number],
        grads: Grads<'_, Self::Number>,
    ) -> Result<(), Error>;
}

/// Runs the operation forward over all spans.
pub(in crate::device) fn forward<O: Operation>(
    call: &Attention<'_, O::Buffer>,
    out: RowsMut<'_, O::Buffer>,
    lse: RowsMut<'_, O::Buffer>,
) -> Result<(), Error> {
    let (out_buffer, lse_buffer) = (out.buffer.as_mut(), lse.buffer.as_mut());
    for_each(call, |problem, batch| {
        let out = ViewMut {
            data: &mut out_buffer[out.start + batch.row * out.stride..],
            layout: batch.layout(out.stride, call.heads.dim),
        };
        let first = lse.start + batch.row * lse.stride;
        let count = batch.spans.len() * batch.rows * call.heads.q;
        O::forward(problem, out, &mut lse_buffer[first..first + count])
    })
}

/// Runs the operation backward over all spans.
pub(in crate::device) fn backward<O: Operation>(
    call: &Attention<'_, O::Buffer>,
    grad: AttentionGrad<'_, O::Buffer>,
) -> Result<(), Error> {
    let AttentionGrad {
        out,
        lse,
        d_out,
        d_q,
        d_k,
        d_v,
        mut d_prior,
        d_past_gate,
    } = grad;
    let (heads, prior) = (call.heads, call.cache.rows[1]);
    for_each(call, |problem, batch| {
        let first = lse.start + batch.row * lse.stride;
        let count = batch.spans.len() * batch.rows * heads.q;
        let prior_layout = Layout::packed([batch.spans.len(), prior, heads.kv, heads.dim]);
        let prior_start = batch.spans.start * prior * heads.kv * heads.dim;
        let grads = Grads {
            d_q: batch.write(d_q.buffer, d_q.start, d_q.stride, heads.dim),
            d_k: batch.write(d_k.buffer, d_k.start, d_k.stride, heads.dim),
            d_v: batch.write(d_v.buffer, d_v.start, d_v.stride, heads.dim),
            d_prior: d_prior.as_mut().map(|(k, v)| {
                let tail = |data| ViewMut {
                    data,
                    layout: prior_layout,
                };
                (
                    tail(&mut k.as_mut()[prior_start..]),
                    tail(&mut v.as_mut()[prior_start..]),
                )
            }),
            d_past_gate: &mut d_past_gate.as_mut()
                [batch.spans.start * heads.q..batch.spans.end * heads.q],
        };
        let lse = &lse.buffer.as_ref()[first..first + count];
        O::backward(
            problem,
            [out, d_out].map(|r| batch.read(r, heads.dim)),
            lse,
            grads,
        )
    })
}

/// Consecutive spans of equal length.
pub(in crate::device) struct SpanBatch {
    /// Their indices.
    pub spans: Range<usize>,
    /// First row in the call's buffers.
    pub row: usize,
    /// Rows of each span.
    pub rows: usize,
}

impl SpanBatch {
    /// The layout of rows of `heads` heads that lie packed `stride` apart.
    pub fn layout(&self, stride: usize, head_dim: usize) -> Layout<'static> {
        Layout {
            rows: self.rows,
            row_stride: stride,
            head_stride: head_dim,
            batch: Batch::Stride {
                len: self.spans.len(),
                stride: self.rows * stride,
            },
        }
    }

    /// The batch's rows of an input.
    fn read<'a, T, B: AsRef<[T]>>(&self, rows: Rows<'a, B>, head_dim: usize) -> View<'a, T> {
        View {
            data: &rows.buffer.as_ref()[rows.start + self.row * rows.stride..],
            layout: self.layout(rows.stride, head_dim),
        }
    }

    /// The batch's rows of a result.
    fn write<'a, T>(
        &self,
        buffer: &'a mut impl AsMut<[T]>,
        start: usize,
        stride: usize,
        head_dim: usize,
    ) -> ViewMut<'a, T> {
        ViewMut {
            data: &mut buffer.as_mut()[start + self.row * stride..],
            layout: self.layout(stride, head_dim),
        }
    }
}

pub(in crate::device) fn span_batches(spans: &[SlotSpan]) -> Vec<SpanBatch> {
    let mut batches: Vec<SpanBatch> = Vec::new();
    for (i, span) in spans.iter().enumerate() {
        match batches.last_mut() {
            Some(batch) if batch.rows == span.rows => batch.spans.end = i + 1,
            _ => batches.push(SpanBatch {
                spans: i..i + 1,
                row: span.row,
                rows: span.rows,
            }),
        }
    }
    batches
}

/// What a batch's spans read: where their slots lie, and how much of them is valid.
pub(in crate::device) struct Sources {
    /// Of current, prior and past: rows of a slot in use.
    rows: [usize; 3],
    /// Of each source: element at which each span's slot begins.
    offsets: [Vec<usize>; 3],
    /// KV heads and elements of a head.
    shape: [usize; 2],
    start: Vec<i32>,
    pub segment_len: Vec<i32>,
    pub prior_len: Vec<i32>,
    past_len: Vec<i32>,
}

impl Sources {
    pub fn of<B>(call: &Attention<'_, B>, batch: &SpanBatch) -> Self {
        let (heads, cache) = (call.heads, call.cache);
        let spans = &call.spans[batch.spans.clone()];
        let width = heads.kv * heads.dim;
        let ints = |f: &dyn Fn(&SlotSpan) -> usize| -> Vec<i32> {
            spans.iter().map(|s| f(s) as i32).collect()
        };
        // Exactly the rows in use, so that gradients of keys need no more.
        let used = spans.iter().map(|s| s.start + s.rows).max().unwrap_or(0);
        Self {
            rows: [used, cache.rows[1], cache.rows[2]],
            offsets: cache
                .rows
                .map(|rows| spans.iter().map(|s| s.slot * rows * width).collect()),
            shape: [heads.kv, heads.dim],
            start: ints(&|s| s.start),
            segment_len: ints(&|s| s.start + s.rows),
            prior_len: ints(&|s| cache.prior_len[s.slot]),
            past_len: spans
                .iter()
                .flat_map(|s| &cache.past_len[s.slot * heads.kv..(s.slot + 1) * heads.kv])
                .map(|n| *n as i32)
                .collect(),
        }
    }

    /// The same where the current segments may grow to `rows` rows.
    pub fn reaching(mut self, rows: usize) -> Self {
        self.rows[0] = self.rows[0].max(rows);
        self
    }

    /// Of a source: 0 current, 1 prior, 2 past.
    pub fn layout(&self, source: usize) -> Layout<'_> {
        let [kv_heads, head_dim] = self.shape;
        Layout {
            rows: self.rows[source],
            row_stride: kv_heads * head_dim,
            head_stride: head_dim,
            batch: Batch::Offsets(&self.offsets[source]),
        }
    }

    pub fn past_len(&self) -> PastLen<'_> {
        PastLen::PerHead(&self.past_len)
    }

    /// Where the queries do not begin with the segment.
    pub fn query_start(&self) -> Option<&[i32]> {
        let later = self.start.iter().any(|s| *s > 0);
        later.then_some(&self.start[..])
    }
}

/// Calls `f` with the problem of each batch.
fn for_each<T, B: AsRef<[T]>>(
    call: &Attention<'_, B>,
    mut f: impl FnMut(&Problem<'_, T>, &SpanBatch) -> Result<(), Error>,
) -> Result<(), Error> {
    let (heads, cache) = (call.heads, call.cache);
    for batch in span_batches(call.spans) {
        let sources = Sources::of(call, &batch);
        let view = |buffer, source: usize| View {
            data: B::as_ref(buffer),
            layout: sources.layout(source),
        };
        let problem = Problem {
            batch: batch.spans.len(),
            q_heads: heads.q,
            kv_heads: heads.kv,
            head_dim: heads.dim,
            q: batch.read(call.q, heads.dim),
            k: view(&cache.k, 0),
            v: view(&cache.v, 0),
            prior_k: view(&cache.prior_k, 1),
            prior_v: view(&cache.prior_v, 1),
            past_k: view(&cache.past_k, 2),
            past_v: view(&cache.past_v, 2),
            segment_len: &sources.segment_len,
            prior_len: &sources.prior_len,
            past_len: sources.past_len(),
            query_start: sources.query_start(),
            past_gate: call.past_gate,
            prior_heads: call.prior_heads,
            scale: None,
        };
        f(&problem, &batch)?;
    }
    Ok(())
}
