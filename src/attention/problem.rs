//! The arguments of one attention call, for every backend.

use std::ops::Range;

use super::layout::{Batch, Strided, View, ViewMut};
use super::lengths::{Len, Lengths, PastLen};
use super::source::{Part, Source};

/// Queries of one segment and the sources they read. `X` is a tensor `[batch, rows, heads, head_dim]`: a [`View`] of
/// host memory, a [`cuda::Tensor`](super::cuda::Tensor) of device memory, or a slice of cudarc's
/// (`cuda::slices::Input`).
///
/// Shapes and element type are those of the tensors. Rows at or beyond a batch element's length are never read. The
/// call checks every argument, see [`Problem::validate`].
#[derive(Debug, Clone, Copy)]
pub struct Problem<'a, X> {
    /// Queries `[batch, rows, q_heads, head_dim]`; row 0 is position `query_start[b]` of its segment.
    pub q: X,
    /// Keys of the segment `[batch, segment, kv_heads, head_dim]`; `q_heads` is a multiple of `kv_heads`.
    pub k: X,
    /// Values of the segment, like `k`.
    pub v: X,
    /// The KV tail of the segment before; `None`: there is none.
    pub prior: Option<Prior<'a, X>>,
    /// KV rows of earlier segments; `None`: there are none.
    pub past: Option<Past<'a, X>>,
    /// Valid rows of every batch element.
    pub lengths: Lengths<'a>,
    /// Factor on the scores; `None` is `1/sqrt(head_dim)`.
    pub scale: Option<f32>,
}

/// Keys and values carried over from the segment before: the only source through which gradients leave the segment.
#[derive(Debug, Clone, Copy)]
pub struct Prior<'a, X> {
    /// `[batch, prior, kv_heads, head_dim]`.
    pub k: X,
    /// Like `k`.
    pub v: X,
    /// `[q_heads]`: whether the head reads them.
    pub heads: &'a [bool],
}

/// Retrieved keys and values, which get no gradient.
#[derive(Debug, Clone, Copy)]
pub struct Past<'a, X> {
    /// `[batch, past, kv_heads, head_dim]`.
    pub k: X,
    /// Like `k`.
    pub v: X,
    /// The weight of these rows in each head.
    pub gates: Gates<'a>,
}

/// `[q_heads]`, finite, at least 0: the weight of the past in each head. A head whose gate is 0 does not read it.
#[derive(Debug, Clone, Copy)]
pub enum Gates<'a> {
    /// Host values; validated, and copied with the call to a GPU.
    Host(&'a [f32]),
    /// Learned gates in device memory; trusted.
    Device {
        /// Device address of `[q_heads]` f32.
        past_gate: u64,
        /// `[q_heads]`: whether the gate is above 0.
        reads_past: &'a [bool],
    },
}

/// Slices, arrays and vectors.
impl<'a, X: AsRef<[f32]> + ?Sized> From<&'a X> for Gates<'a> {
    fn from(gates: &'a X) -> Self {
        Gates::Host(gates.as_ref())
    }
}

impl Gates<'_> {
    /// Whether a head reads the past.
    pub(super) fn reads(&self, head: usize) -> bool {
        match self {
            Gates::Host(gates) => gates[head] > 0.0,
            Gates::Device { reads_past, .. } => reads_past[head],
        }
    }
}

impl<'a, X> Problem<'a, X> {
    /// Causal attention within one segment: each query row reads the keys up to its own position.
    pub fn causal(q: X, k: X, v: X) -> Self {
        Problem {
            q,
            k,
            v,
            prior: None,
            past: None,
            lengths: Lengths::default(),
            scale: None,
        }
    }

    /// Adds the KV tail of the segment before. `heads` `[q_heads]` says which query heads read it.
    pub fn prior(self, k: X, v: X, heads: &'a [bool]) -> Self {
        Problem {
            prior: Some(Prior { k, v, heads }),
            ..self
        }
    }

    /// Adds retrieved rows, weighted by the gate `[q_heads]` of each query head.
    pub fn past(self, k: X, v: X, gates: impl Into<Gates<'a>>) -> Self {
        let gates = gates.into();
        Problem {
            past: Some(Past { k, v, gates }),
            ..self
        }
    }

    /// Sets how many rows are valid.
    pub fn lengths(self, lengths: Lengths<'a>) -> Self {
        Problem { lengths, ..self }
    }

    /// Sets the factor on the scores; `None` is `1/sqrt(head_dim)`.
    pub fn scale(self, scale: impl Into<Option<f32>>) -> Self {
        Problem {
            scale: scale.into(),
            ..self
        }
    }

    /// Keys and values of a source, if it is there.
    pub fn source(&self, source: Source) -> Option<[&X; 2]> {
        match source {
            Source::Past => self.past.as_ref().map(|past| [&past.k, &past.v]),
            Source::Prior => self.prior.as_ref().map(|prior| [&prior.k, &prior.v]),
            Source::Current => Some([&self.k, &self.v]),
        }
    }

    /// Whether a query head reads a source. It reads the sinks of the past in any case; for the past this says whether
    /// it reads the other rows too.
    pub fn reads(&self, source: Source, head: usize) -> bool {
        match source {
            Source::Past => self
                .past
                .as_ref()
                .is_some_and(|past| past.gates.reads(head)),
            Source::Prior => self.prior.as_ref().is_some_and(|prior| prior.heads[head]),
            Source::Current => true,
        }
    }

    /// Whether a query head reads a part of the keys.
    pub(super) fn reads_part(&self, part: Part, head: usize) -> bool {
        match part {
            Part::Sinks => self.past.is_some(),
            Part::Gated | Part::Prior | Part::Current => self.reads(part.source(), head),
        }
    }

    /// The weight of the past in a query head; 0 without a past. For gates in device memory it is 1 or 0: read or not.
    pub fn gate(&self, head: usize) -> f32 {
        match self.past.as_ref().map(|past| past.gates) {
            None => 0.0,
            Some(Gates::Host(gates)) => gates[head],
            Some(gates) => f32::from(gates.reads(head)),
        }
    }

    /// Every tensor by name, in the order of the kernels' params; `None`: its source is not there.
    pub(super) fn tensors(&self) -> [(&'static str, Option<&X>); 7] {
        let (prior, past) = (self.prior.as_ref(), self.past.as_ref());
        [
            ("q", Some(&self.q)),
            ("k", Some(&self.k)),
            ("v", Some(&self.v)),
            ("prior_k", prior.map(|prior| &prior.k)),
            ("prior_v", prior.map(|prior| &prior.v)),
            ("past_k", past.map(|past| &past.k)),
            ("past_v", past.map(|past| &past.v)),
        ]
    }

    /// The problem with each tensor replaced.
    #[cfg(feature = "cuda")]
    pub(super) fn try_map<Y, E>(
        &self,
        mut f: impl FnMut(&'static str, &X) -> Result<Y, E>,
    ) -> Result<Problem<'a, Y>, E> {
        let mut mapped = Problem::causal(f("q", &self.q)?, f("k", &self.k)?, f("v", &self.v)?);
        if let Some(Prior { k, v, heads }) = &self.prior {
            mapped = mapped.prior(f("prior_k", k)?, f("prior_v", v)?, heads);
        }
        if let Some(Past { k, v, gates }) = &self.past {
            mapped = mapped.past(f("past_k", k)?, f("past_v", v)?, *gates);
        }
        Ok(mapped.lengths(self.lengths).scale(self.scale))
    }
}

/// Sizes and lengths. Lengths need a validated problem; those in device memory count as the largest possible.
impl<X: Strided> Problem<'_, X> {
    /// Number of batch elements.
    pub fn batch(&self) -> usize {
        self.q.layout().batch.len()
    }

    /// Rows of `q`, valid and padding together; of packed batch elements the most that one has.
    pub fn rows(&self) -> usize {
        self.q.layout().rows
    }

    /// Rows of a batch element in `q`, valid and padding together.
    pub fn rows_of(&self, batch_index: usize) -> usize {
        self.q.layout().rows_of(batch_index)
    }

    /// Rows of all batch elements in `q`, valid and padding together.
    pub(super) fn all_rows(&self) -> usize {
        match self.q.layout().batch {
            Batch::Packed(offsets) => offsets.last().map_or(0, |rows| *rows),
            batch => batch.len().saturating_mul(self.rows()),
        }
    }

    /// Index of a row in numbers `[batch, q_heads, rows]`, such as `lse`.
    pub(super) fn row_index(&self, [batch_index, row, head]: [usize; 3]) -> usize {
        let before = match self.q.layout().batch {
            Batch::Packed(offsets) => offsets[batch_index],
            _ => batch_index * self.rows(),
        };
        before * self.q_heads() + head * self.rows_of(batch_index) + row
    }

    /// Number of query heads.
    pub fn q_heads(&self) -> usize {
        self.q.layout().heads
    }

    /// Number of key/value heads.
    pub fn kv_heads(&self) -> usize {
        self.k.layout().heads
    }

    /// Elements of one row.
    pub fn head_dim(&self) -> usize {
        self.q.layout().head_dim
    }

    /// Query heads that share a KV head.
    pub fn group(&self) -> usize {
        self.q_heads() / self.kv_heads()
    }

    /// Rows of a batch element that a source's tensors have, valid and padding together; 0 where it is not there. Of
    /// packed batch elements the most that one has.
    pub fn capacity(&self, source: Source) -> usize {
        let rows = |[k, v]: [&X; 2]| k.layout().rows.min(v.layout().rows);
        self.source(source).map_or(0, rows)
    }

    /// [`Problem::capacity`] of one batch element.
    pub(super) fn capacity_of(&self, source: Source, batch_index: usize) -> usize {
        let rows = |[k, v]: [&X; 2]| {
            let of = |tensor: &X| tensor.layout().rows_of(batch_index);
            of(k).min(of(v))
        };
        self.source(source).map_or(0, rows)
    }

    /// Position of a batch element's first query row.
    pub fn query_start(&self, batch_index: usize) -> usize {
        match self.lengths.query_start {
            None => 0,
            Some(Len::Host(start)) => start[batch_index] as usize,
            Some(Len::Device(_)) => match self.lengths.segment_len {
                Some(Len::Host(len)) => {
                    (len[batch_index] as usize).saturating_sub(self.rows_of(batch_index))
                }
                _ => self
                    .capacity_of(Source::Current, batch_index)
                    .saturating_sub(self.rows_of(batch_index)),
            },
        }
    }

    /// Valid query rows of a batch element.
    pub fn query_rows(&self, batch_index: usize) -> usize {
        self.source_rows(Source::Current, batch_index, 0) - self.query_start(batch_index)
    }

    /// Valid rows of a source.
    pub fn source_rows(&self, source: Source, batch_index: usize, kv_head: usize) -> usize {
        let len = match source {
            Source::Current => self.lengths.segment_len.map(PastLen::PerBatch),
            Source::Prior => self.lengths.prior_len.map(PastLen::PerBatch),
            Source::Past => self.lengths.past_len,
        };
        match (self.host_len(len, batch_index, kv_head), source) {
            (Some(rows), _) => rows,
            // No more than there are query rows for.
            (None, Source::Current) if len.is_some() => {
                let end = self.query_start(batch_index) + self.rows_of(batch_index);
                end.min(self.capacity_of(source, batch_index))
            }
            _ => self.capacity_of(source, batch_index),
        }
    }

    /// First rows of the past that are sinks.
    pub fn sink_rows(&self, batch_index: usize, kv_head: usize) -> usize {
        match self.lengths.sink_len {
            None => 0,
            len => self
                .host_len(len, batch_index, kv_head)
                .unwrap_or_else(|| self.source_rows(Source::Past, batch_index, kv_head)),
        }
    }

    /// A length, if it is in host memory.
    fn host_len(
        &self,
        len: Option<PastLen<'_>>,
        batch_index: usize,
        kv_head: usize,
    ) -> Option<usize> {
        let len = len?;
        match len.values() {
            Len::Host(values) => {
                Some(values[len.index(batch_index, kv_head, self.kv_heads())] as usize)
            }
            Len::Device(_) => None,
        }
    }

    /// The rows of a part of the keys, within its source.
    pub(super) fn part_rows(&self, part: Part, batch_index: usize, kv_head: usize) -> Range<usize> {
        let end = self.source_rows(part.source(), batch_index, kv_head);
        match part {
            Part::Sinks => 0..self.sink_rows(batch_index, kv_head),
            Part::Gated => self.sink_rows(batch_index, kv_head)..end,
            Part::Prior | Part::Current => 0..end,
        }
    }
}

/// What a backward pass reads besides the problem. `X` is a tensor like `q`; `F` is a slice `[batch, q_heads, rows]` of
/// f32, or of f64 in the reference. Where `q` is [packed](super::Batch::Packed), the slice has `[q_heads, rows]` of one
/// batch element after another, each with its own number of rows.
#[derive(Debug, Clone, Copy)]
pub struct Saved<X, F> {
    /// What the forward pass wrote.
    pub out: X,
    /// Log-sum-exp of the forward pass.
    pub lse: F,
    /// The loss's gradient with respect to `out`.
    pub d_out: X,
    /// The loss's gradient with respect to `lse`; `None` is zero.
    pub d_lse: Option<F>,
}

/// What a backward pass writes. `Y` is a tensor that is written, `F` a slice of f32, or of f64 in the reference. Every
/// row is overwritten (`=`, not `+=`), padding rows with 0.
#[derive(Debug, Clone, Copy)]
pub struct Gradients<Y, F> {
    /// Like `q`.
    pub d_q: Y,
    /// Like `k`.
    pub d_k: Y,
    /// Like `v`.
    pub d_v: Y,
    /// Like the prior's keys and values; `None` leaves them out (a read-only prior).
    pub d_prior: Option<(Y, Y)>,
    /// `[batch, q_heads]`: each batch element's part of the gradient of the gates. The caller sums over the batch, in
    /// an order of its choice.
    pub d_past_gate: F,
}

impl<X, F> Saved<X, F> {
    /// For a loss that does not depend on `lse`.
    pub fn new(out: X, lse: F, d_out: X) -> Self {
        Saved {
            out,
            lse,
            d_out,
            d_lse: None,
        }
    }
}

impl<Y, F> Gradients<Y, F> {
    /// The gradients that every call writes; those of the prior are left out.
    pub fn new(d_q: Y, d_k: Y, d_v: Y, d_past_gate: F) -> Self {
        Gradients {
            d_q,
            d_k,
            d_v,
            d_prior: None,
            d_past_gate,
        }
    }

    /// Adds the gradients of the prior's keys and values.
    pub fn prior(self, d_k: Y, d_v: Y) -> Self {
        Gradients {
            d_prior: Some((d_k, d_v)),
            ..self
        }
    }
}

/// A problem in host memory.
pub type HostProblem<'a, T> = Problem<'a, View<'a, T>>;
/// What a backward pass reads, in host memory.
pub type HostSaved<'a, T> = Saved<View<'a, T>, &'a [T]>;
/// What a backward pass writes, in host memory.
pub type HostGradients<'a, T> = Gradients<ViewMut<'a, T>, &'a mut [T]>;
