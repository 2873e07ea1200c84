//! The arguments of a call on a GPU. They are checked by the same code as those of the CPU
//! ([`crate::attention::Problem`]), on slices of `()` as long as the device memory.

use super::error::Error;
use super::instances::Dtype;
use crate::attention::{
    Error as ArgumentError, Layout, PastLen, Problem as HostProblem, View, ViewMut,
};

/// A `[batch, rows, heads, head_dim]` tensor in device memory, of the problem's element type. Rows begin at multiples
/// of 16 bytes: the address is one, and strides and offsets are multiples of 8 elements.
#[derive(Debug, Clone, Copy)]
pub struct Tensor<'a> {
    /// Device address (`CUdeviceptr`) of the first element.
    pub data: u64,
    /// Elements that may be touched, counted from `data`.
    pub len: usize,
    /// Where the rows are.
    pub layout: Layout<'a>,
}

impl<'a> Tensor<'a> {
    /// A contiguous tensor.
    pub fn packed(data: u64, shape: [usize; 4]) -> Self {
        Tensor {
            data,
            len: shape.iter().fold(1, |len: usize, &n| len.saturating_mul(n)),
            layout: Layout::packed(shape),
        }
    }

    /// A source that is not there: `batch` entries of no rows.
    pub fn empty(batch: usize) -> Self {
        Tensor::packed(0, [batch, 0, 0, 0])
    }

    pub(super) fn view(&self) -> View<'a, ()> {
        View {
            data: units(self.len),
            layout: self.layout,
        }
    }

    pub(super) fn view_mut(&self) -> ViewMut<'a, ()> {
        ViewMut {
            data: units(self.len),
            layout: self.layout,
        }
    }

    pub(super) fn check_alignment(&self, argument: &'static str) -> Result<(), Error> {
        let layout = &self.layout;
        let wrong = |expected, got: u64| {
            Err(Error::Alignment {
                argument,
                expected,
                got,
            })
        };
        if layout.rows == 0 || layout.batch.is_empty() {
            return Ok(());
        }
        if self.data == 0 || !self.data.is_multiple_of(16) {
            return wrong(
                "an address that is a positive multiple of 16 bytes",
                self.data,
            );
        }
        let batch: &[usize] = match &layout.batch {
            crate::attention::Batch::Stride { stride, .. } => std::slice::from_ref(stride),
            crate::attention::Batch::Offsets(offsets) => offsets,
        };
        let strides = [layout.row_stride, layout.head_stride];
        match batch.iter().chain(&strides).find(|x| !x.is_multiple_of(8)) {
            Some(&x) => wrong(
                "strides and offsets that are multiples of 8 elements",
                x as u64,
            ),
            None => Ok(()),
        }
    }
}

/// `len` numbers in device memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceSlice {
    /// Device address of the first.
    pub data: u64,
    /// How many there are.
    pub len: usize,
}

impl DeviceSlice {
    /// The slice at an address.
    pub fn new(data: u64, len: usize) -> Self {
        DeviceSlice { data, len }
    }

    /// f32 lie at multiples of 4 bytes.
    pub(super) fn check_alignment(&self, argument: &'static str) -> Result<(), Error> {
        if self.len == 0 || (self.data != 0 && self.data.is_multiple_of(4)) {
            return Ok(());
        }
        Err(Error::Alignment {
            argument,
            expected: "an address that is a positive multiple of 4 bytes",
            got: self.data,
        })
    }
}

/// How many rows are valid, as host values (validated, copied with the call) or device addresses (trusted). Where an
/// address stands for a length, the work is cut for as many rows as the tensors have, so that a plan serves as long as
/// they suffice.
#[derive(Debug, Clone, Copy)]
pub enum Lengths<'a> {
    /// As in [`crate::attention::Problem`].
    Host {
        /// `[batch]`: valid rows of `k` and `v`.
        segment_len: &'a [i32],
        /// `[batch]`: valid rows of `prior_k` and `prior_v`.
        prior_len: &'a [i32],
        /// Valid rows of `past_k` and `past_v`.
        past_len: PastLen<'a>,
        /// `[batch]`: position of each entry's first query row; `None` is 0.
        query_start: Option<&'a [i32]>,
    },
    /// Of segments that grow from call to call: the device has their lengths, and the rest changes only with the segment.
    Growing {
        /// Device address of `[batch]`, as in [`Lengths::Device`].
        segment_len: u64,
        /// Device address of `[batch]`, as in [`Lengths::Device`].
        query_start: u64,
        /// As in [`Lengths::Host`].
        prior_len: &'a [i32],
        /// As in [`Lengths::Host`].
        past_len: PastLen<'a>,
    },
    /// Device addresses of i32, whose values must be what validation would accept: `0 <= prior_len <= rows of prior_k`,
    /// `0 <= past_len <= rows of past_k`, `0 <= query_start <= segment_len <= rows of k`, and
    /// `segment_len - query_start <= rows of q`. Every row of every tensor lies inside its memory.
    Device {
        /// `[batch]`.
        segment_len: u64,
        /// `[batch]`.
        prior_len: u64,
        /// `[batch]` or `[batch, kv_heads]`.
        past_len: PastLengths,
        /// `[batch]`; `None` is 0.
        query_start: Option<u64>,
    },
}

/// Device address of the number of valid past rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PastLengths {
    /// `[batch]`.
    PerBatch(u64),
    /// `[batch, kv_heads]`.
    PerHead(u64),
}

/// Weights of the past.
#[derive(Debug, Clone, Copy)]
pub enum Gates<'a> {
    /// `[q_heads]`, finite and at least 0; copied with the call.
    Host(&'a [f32]),
    /// Learned gates that live on the device.
    Device {
        /// Device address of `[q_heads]` f32, finite and at least 0.
        past_gate: u64,
        /// `[q_heads]`: whether the gate is above 0.
        reads_past: &'a [bool],
    },
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

/// Queries of one segment and the three sources they read, in device memory. The fields are those of
/// [`crate::attention::Problem`]; `X` is a tensor by its address, or a borrowed slice in a safe call.
#[derive(Debug, Clone, Copy)]
pub struct Problem<'a, X = Tensor<'a>> {
    /// Element type of every tensor.
    pub dtype: Dtype,
    /// Number of batch entries.
    pub batch: usize,
    /// Number of query heads, a multiple of `kv_heads`.
    pub q_heads: usize,
    /// Number of key/value heads.
    pub kv_heads: usize,
    /// Elements of one row.
    pub head_dim: usize,
    /// Queries `[batch, rows, q_heads, head_dim]`.
    pub q: X,
    /// Keys of the segment `[batch, segment, kv_heads, head_dim]`.
    pub k: X,
    /// Values of the segment, like `k`.
    pub v: X,
    /// Keys carried over from the segment before `[batch, prior, kv_heads, head_dim]`.
    pub prior_k: X,
    /// Values carried over, like `prior_k`.
    pub prior_v: X,
    /// Retrieved keys `[batch, past, kv_heads, head_dim]`.
    pub past_k: X,
    /// Retrieved values, like `past_k`.
    pub past_v: X,
    /// Valid rows of every entry.
    pub lengths: Lengths<'a>,
    /// Weight of the past in each head; 0 does not read it.
    pub past_gate: Gates<'a>,
    /// `[q_heads]`: whether the head reads the prior rows.
    pub prior_heads: &'a [bool],
    /// Factor on the scores, default `1/sqrt(head_dim)`.
    pub scale: Option<f32>,
}

#[cfg(feature = "cuda")]
impl<'a, X> Problem<'a, X> {
    /// The problem with each tensor replaced.
    pub(super) fn try_map<Y, E>(
        &self,
        mut f: impl FnMut(&'static str, &X) -> Result<Y, E>,
    ) -> Result<Problem<'a, Y>, E> {
        Ok(Problem {
            dtype: self.dtype,
            batch: self.batch,
            q_heads: self.q_heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            q: f("q", &self.q)?,
            k: f("k", &self.k)?,
            v: f("v", &self.v)?,
            prior_k: f("prior_k", &self.prior_k)?,
            prior_v: f("prior_v", &self.prior_v)?,
            past_k: f("past_k", &self.past_k)?,
            past_v: f("past_v", &self.past_v)?,
            lengths: self.lengths,
            past_gate: self.past_gate,
            prior_heads: self.prior_heads,
            scale: self.scale,
        })
    }
}

impl Problem<'_> {
    pub(super) fn tensors(&self) -> [(&'static str, &Tensor<'_>); 7] {
        [
            ("q", &self.q),
            ("k", &self.k),
            ("v", &self.v),
            ("prior_k", &self.prior_k),
            ("prior_v", &self.prior_v),
            ("past_k", &self.past_k),
            ("past_v", &self.past_v),
        ]
    }

    /// Runs `check` on the host's form of the problem. Device-resident lengths stand at their largest there, and
    /// device-resident gates at 1 or 0.
    pub(super) fn check(
        &self,
        check: impl FnOnce(&HostProblem<'_, ()>) -> Result<(), ArgumentError>,
    ) -> Result<(), Error> {
        let largest = |tensor: &Tensor<'_>, count| {
            vec![i32::try_from(tensor.layout.rows).unwrap_or(i32::MAX); count]
        };
        let (prior, past) = (
            largest(&self.prior_k, self.batch),
            largest(&self.past_k, self.batch),
        );
        let (mut segment, rows) = (largest(&self.k, self.batch), largest(&self.q, self.batch));
        let start: Vec<i32> = segment
            .iter()
            .zip(&rows)
            .map(|(len, rows)| (len - rows).max(0))
            .collect();
        if let Lengths::Device {
            query_start: None, ..
        } = self.lengths
        {
            segment
                .iter_mut()
                .zip(&rows)
                .for_each(|(len, rows)| *len = (*len).min(*rows));
        }
        let (segment_len, prior_len, past_len, query_start) = match self.lengths {
            Lengths::Host {
                segment_len,
                prior_len,
                past_len,
                query_start,
            } => (segment_len, prior_len, past_len, query_start),
            Lengths::Growing {
                prior_len,
                past_len,
                ..
            } => (&segment[..], prior_len, past_len, Some(&start[..])),
            Lengths::Device { query_start, .. } => (
                &segment[..],
                &prior[..],
                PastLen::PerBatch(&past[..]),
                query_start.map(|_| &start[..]),
            ),
        };
        let gates: Vec<f32> = match self.past_gate {
            Gates::Host(gates) => gates.to_vec(),
            Gates::Device { reads_past, .. } => reads_past.iter().map(|&x| f32::from(x)).collect(),
        };
        check(&HostProblem {
            batch: self.batch,
            q_heads: self.q_heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            q: self.q.view(),
            k: self.k.view(),
            v: self.v.view(),
            prior_k: self.prior_k.view(),
            prior_v: self.prior_v.view(),
            past_k: self.past_k.view(),
            past_v: self.past_v.view(),
            segment_len,
            prior_len,
            past_len,
            query_start,
            past_gate: &gates,
            prior_heads: self.prior_heads,
            scale: self.scale,
        })?;
        self.tensors()
            .iter()
            .try_for_each(|(name, tensor)| tensor.check_alignment(name))
    }
}

/// As many units as there are elements: what the host's checks count.
pub(super) fn units(len: usize) -> &'static mut [()] {
    // Nothing is allocated: an array of units has no bytes.
    &mut Box::leak(Box::new([(); usize::MAX]))[..len]
}
