//! The spans of a step as one call of the attention operation, whatever their lengths.
//!
//! All devices use [`SpanBatch`] and [`Sources`]. Devices with buffers in host memory also share [`forward`] and
//! [`backward`], each with its own [`Operation`].

use std::ops::Range;

use crate::attention::{
    Batch, Error, Gradients, HostGradients, HostProblem, HostSaved, Layout, Lengths, PerSource,
    Problem, Saved, Source, View, ViewMut,
};
use crate::device::{Attention, AttentionGrad, Rows, RowsMut, SlotSpan};

/// The operation ([`crate::attention`]) in one precision.
pub(in crate::device) trait Operation {
    /// The type of all elements.
    type Number: Copy;
    /// The device's buffer type.
    type Buffer: AsRef<[Self::Number]> + AsMut<[Self::Number]>;

    /// Computes `out` and `lse`.
    fn forward(
        problem: &HostProblem<'_, Self::Number>,
        out: ViewMut<'_, Self::Number>,
        lse: &mut [Self::Number],
    ) -> Result<(), Error>;

    /// Computes the gradients. `saved` is what the forward pass left, and the upstream gradients.
    fn backward(
        problem: &HostProblem<'_, Self::Number>,
        saved: &HostSaved<'_, Self::Number>,
        grads: HostGradients<'_, Self::Number>,
    ) -> Result<(), Error>;
}

/// Runs the operation forward over all spans.
pub(in crate::device) fn forward<O: Operation>(
    call: &Attention<'_, O::Buffer>,
    out: RowsMut<'_, O::Buffer>,
    lse: RowsMut<'_, O::Buffer>,
) -> Result<(), Error> {
    with_problem(call, |problem, batch| {
        let out = batch.write(
            out.buffer,
            out.start,
            out.stride,
            [call.heads.q, call.heads.dim],
        );
        let range = batch.log_sums(lse.start, lse.stride, call.heads.q);
        O::forward(problem, out, &mut lse.buffer.as_mut()[range])
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
        d_lse,
        d_q,
        d_k,
        d_v,
        d_prior,
        d_past_gate,
    } = grad;
    let (heads, prior) = (call.heads, call.cache.rows.prior);
    with_problem(call, |problem, batch| {
        let prior_layout = Layout::packed([batch.spans.len(), prior, heads.kv, heads.dim]);
        let (q, kv) = ([heads.q, heads.dim], [heads.kv, heads.dim]);
        let grads = Gradients {
            d_q: batch.write(d_q.buffer, d_q.start, d_q.stride, q),
            d_k: batch.write(d_k.buffer, d_k.start, d_k.stride, kv),
            d_v: batch.write(d_v.buffer, d_v.start, d_v.stride, kv),
            d_prior: d_prior.map(|(k, v)| {
                let tail = |data| ViewMut {
                    data,
                    layout: prior_layout,
                };
                (tail(k.as_mut()), tail(v.as_mut()))
            }),
            d_past_gate: &mut d_past_gate.as_mut()[..batch.spans.len() * heads.q],
        };
        let [out, d_out] = [out, d_out].map(|rows| batch.read(rows, q));
        let log_sums = |rows: Rows<'_, O::Buffer>| {
            let Rows { start, stride, .. } = rows;
            batch.log_sums(start, stride, heads.q)
        };
        let saved = Saved {
            out,
            lse: &lse.buffer.as_ref()[log_sums(lse)],
            d_out,
            d_lse: d_lse.map(|d_lse| &d_lse.buffer.as_ref()[log_sums(d_lse)]),
        };
        O::backward(problem, &saved, grads)
    })
}

/// The spans of a call as one batch. Their rows lie one after another.
pub(in crate::device) struct SpanBatch<'a> {
    pub spans: &'a [SlotSpan],
    /// Their first row in the call's buffers.
    row: usize,
    /// Rows of the longest span.
    rows: usize,
    /// Rows before each span, and at last of all.
    offsets: Vec<usize>,
}

impl<'a> SpanBatch<'a> {
    pub fn of(spans: &'a [SlotSpan]) -> Self {
        let mut offsets = vec![0];
        for span in spans {
            offsets.push(offsets[offsets.len() - 1] + span.rows);
        }
        Self {
            spans,
            row: spans.first().map_or(0, |span| span.row),
            rows: spans.iter().map(|span| span.rows).max().unwrap_or(0),
            offsets,
        }
    }

    /// The first row of the batch in the call's buffers.
    pub fn first_row(&self) -> usize {
        self.row
    }

    /// Rows before each span, and at last of all.
    pub fn offsets(&self) -> &[usize] {
        &self.offsets
    }

    /// For each row, where the log-sum-exp of its first head is, and how far that of the next head is from it.
    pub fn lse_places(&self, heads: usize) -> impl Iterator<Item = [usize; 2]> {
        let spans = self.spans.iter().zip(&self.offsets);
        spans.flat_map(move |(span, before)| {
            let first = (self.row + before) * heads;
            (0..span.rows).map(move |row| [first + row, span.rows])
        })
    }

    /// Rows of all spans.
    pub fn all_rows(&self) -> usize {
        self.offsets[self.spans.len()]
    }

    /// The first element of the batch's rows, of rows that begin at element `start` and are `stride` elements apart.
    pub fn start(&self, start: usize, stride: usize) -> usize {
        self.row.saturating_mul(stride).saturating_add(start)
    }

    /// The layout of rows with a distance of `stride` elements. Heads are packed within a row. Spans of unequal length
    /// are packed, so that no padding is computed.
    pub fn layout(&self, stride: usize, [heads, head_dim]: [usize; 2]) -> Layout<'_> {
        let equal = self.spans.iter().all(|span| span.rows == self.rows);
        Layout {
            rows: self.rows,
            heads,
            head_dim,
            row_stride: stride,
            head_stride: head_dim,
            batch: match equal {
                true => Batch::Stride {
                    len: self.spans.len(),
                    stride: self.rows.saturating_mul(stride),
                },
                false => Batch::Packed(&self.offsets),
            },
        }
    }

    /// The rows of the batch in an input.
    fn read<'b, T, B: AsRef<[T]>>(&'b self, rows: Rows<'b, B>, heads: [usize; 2]) -> View<'b, T> {
        View {
            data: &rows.buffer.as_ref()[self.start(rows.start, rows.stride)..],
            layout: self.layout(rows.stride, heads),
        }
    }

    /// The rows of the batch in an output.
    fn write<'b, T>(
        &'b self,
        buffer: &'b mut impl AsMut<[T]>,
        start: usize,
        stride: usize,
        heads: [usize; 2],
    ) -> ViewMut<'b, T> {
        ViewMut {
            data: &mut buffer.as_mut()[self.start(start, stride)..],
            layout: self.layout(stride, heads),
        }
    }

    /// The elements of the log-sum-exp of rows that begin at element `start` and are `stride` elements apart.
    fn log_sums(&self, start: usize, stride: usize, heads: usize) -> Range<usize> {
        let first = self.start(start, stride);
        first..first + self.all_rows() * heads
    }
}

/// The three sources that the spans of a call read: the location of their slots, and the number of valid rows.
pub(in crate::device) struct Sources {
    /// Rows of a slot.
    rows: PerSource<usize>,
    /// For each span, the first element of its slot.
    offsets: PerSource<Vec<usize>>,
    /// `[kv_heads, head_dim]`.
    shape: [usize; 2],
    start: Vec<i32>,
    pub segment_len: Vec<i32>,
    pub prior_len: Vec<i32>,
    past_len: Vec<i32>,
    /// Empty where no slot ever has sinks.
    sink_len: Vec<i32>,
}

impl Sources {
    pub fn of<B>(call: &Attention<'_, B>) -> Self {
        let (heads, cache) = (call.heads, call.cache);
        let spans = call.spans;
        let width = heads.kv * heads.dim;
        let ints = |f: &dyn Fn(&SlotSpan) -> usize| -> Vec<i32> {
            spans.iter().map(|s| f(s) as i32).collect()
        };
        let per_head = |lens: &[usize]| -> Vec<i32> {
            let of = |s: &SlotSpan| s.slot * heads.kv..(s.slot + 1) * heads.kv;
            let lens = spans.iter().flat_map(|s| &lens[of(s)]);
            lens.map(|n| *n as i32).collect()
        };
        // No more than the rows in use: the gradients of current keys have as many rows.
        let used = spans.iter().map(|s| s.start + s.rows).max().unwrap_or(0);
        Self {
            rows: PerSource {
                current: used,
                ..cache.rows
            },
            offsets: cache
                .rows
                .map(|rows| spans.iter().map(|s| s.slot * rows * width).collect()),
            shape: [heads.kv, heads.dim],
            start: ints(&|s| s.start),
            segment_len: ints(&|s| s.start + s.rows),
            prior_len: ints(&|s| cache.prior_len[s.slot]),
            past_len: per_head(&cache.past_len),
            sink_len: match cache.sink_len.is_empty() {
                true => Vec::new(),
                false => per_head(&cache.sink_len),
            },
        }
    }

    /// The same, but with room for `rows` rows in the current segments.
    pub fn reaching(mut self, rows: usize) -> Self {
        self.rows.current = self.rows.current.max(rows);
        self
    }

    /// The layout of the keys and values of a source.
    pub fn layout(&self, source: Source) -> Layout<'_> {
        let [heads, head_dim] = self.shape;
        Layout {
            rows: self.rows[source],
            heads,
            head_dim,
            row_stride: heads * head_dim,
            head_stride: head_dim,
            batch: Batch::Offsets(&self.offsets[source]),
        }
    }

    /// The valid rows of every source, and the start of the queries where it is not the start of their segment.
    pub fn lengths(&self) -> Lengths<'_> {
        let lengths = Lengths::segment(&self.segment_len)
            .prior(&self.prior_len)
            .past_per_head(&self.past_len);
        let lengths = match self.sink_len.is_empty() {
            true => lengths,
            false => lengths.sinks_per_head(&self.sink_len),
        };
        match self.start.iter().any(|start| *start > 0) {
            true => lengths.query_start(&self.start),
            false => lengths,
        }
    }

    /// The problem of a call. `q` is the tensor of its queries; `tensor` makes one from a buffer and its layout.
    pub fn problem<'a, B, X, E>(
        &'a self,
        call: &Attention<'a, B>,
        q: X,
        tensor: impl Fn(&'a B, Layout<'a>) -> Result<X, E>,
    ) -> Result<Problem<'a, X>, E> {
        let cache = call.cache;
        let source = |buffer, source| tensor(buffer, self.layout(source));
        let current = [&cache.k, &cache.v].map(|buffer| source(buffer, Source::Current));
        let prior = [&cache.prior_k, &cache.prior_v].map(|buffer| source(buffer, Source::Prior));
        let past = [&cache.past_k, &cache.past_v].map(|buffer| source(buffer, Source::Past));
        let ([k, v], [prior_k, prior_v], [past_k, past_v]) = (current, prior, past);
        Ok(Problem::causal(q, k?, v?)
            .prior(prior_k?, prior_v?, call.prior_heads)
            .past(past_k?, past_v?, call.past_gate)
            .lengths(self.lengths())
            .scale(call.scale))
    }
}

/// Calls `f` with the problem of a call, and its rows.
fn with_problem<T, B: AsRef<[T]>>(
    call: &Attention<'_, B>,
    f: impl FnOnce(&HostProblem<'_, T>, &SpanBatch<'_>) -> Result<(), Error>,
) -> Result<(), Error> {
    let (batch, sources) = (SpanBatch::of(call.spans), Sources::of(call));
    let q = batch.read(call.q, [call.heads.q, call.heads.dim]);
    let problem = sources.problem(call, q, |buffer, layout| {
        let data = buffer.as_ref();
        Ok::<_, Error>(View { data, layout })
    })?;
    f(&problem, &batch)
}
