//! From a validated problem to the structs of `kernels/params.h`.

use super::tensor::Tensor;
use super::workspace::{Address, Bases, Workspace};
use crate::attention::layout::Batch;
use crate::attention::lengths::{Len, PastLen};
use crate::attention::problem::{Gates, Problem};
use crate::attention::source::{Part, Source};
use crate::cuda::kernels;
use crate::cuda::kernels::params::{SegattnKernelInfo, SegattnProblem, SegattnTensor};

/// A tensor's struct before the workspace has an address.
#[derive(Debug, Clone, Copy)]
pub(super) struct TensorParams {
    data: u64,
    offsets: Address,
    /// Batch, row and head stride, and rows.
    numbers: [i64; 4],
}

impl TensorParams {
    /// No tensor: null, of no rows.
    pub const NONE: TensorParams = TensorParams {
        data: 0,
        offsets: Address::NULL,
        numbers: [0; 4],
    };

    pub fn new(
        what: &'static str,
        tensor: &Tensor<'_>,
        workspace: &mut Workspace,
    ) -> Result<Self, kernels::Error> {
        let layout = &tensor.layout;
        // Tile arithmetic is in 32 bits, on multiples of up to 128 rows.
        limit(what, layout.rows, i32::MAX as usize - 128)?;
        let (stride, offsets) = match layout.batch {
            Batch::Stride { stride, .. } => (stride, Address::NULL),
            Batch::Offsets(_) | Batch::Packed(_) => {
                let starts = (0..layout.batch.len()).map(|b| layout.start(b));
                let starts = starts.map(|x| elements(what, x.unwrap_or(usize::MAX)));
                (0, workspace.upload(&starts.collect::<Result<Vec<_>, _>>()?))
            }
        };
        Ok(TensorParams {
            data: tensor.data,
            offsets,
            numbers: [
                elements(what, stride)?,
                elements(what, layout.row_stride)?,
                elements(what, layout.head_stride)?,
                layout.rows as i64,
            ],
        })
    }

    pub fn rows(&self) -> usize {
        self.numbers[3] as usize
    }

    pub fn fill(&self, bases: impl Into<Bases>) -> SegattnTensor {
        let (bases, [batch_stride, row_stride, head_stride, rows]) = (bases.into(), self.numbers);
        SegattnTensor {
            data: Address::Device(self.data).at(bases),
            batch_offsets: self.offsets.at(bases),
            batch_stride,
            row_stride,
            head_stride,
            rows,
        }
    }
}

/// A problem's struct before the workspace has an address.
#[derive(Debug)]
pub(super) struct ProblemParams {
    tensors: [TensorParams; 7],
    segment_len: Address,
    prior_len: Address,
    past_len: Address,
    past_len_strides: [i32; 2],
    sink_len: Address,
    sink_len_strides: [i32; 2],
    query_start: Address,
    row_offsets: Address,
    past_gate: Address,
    prior_heads: Address,
    counts: [i32; 3],
    scale: f32,
}

impl ProblemParams {
    /// A validated problem.
    pub fn new(
        problem: &Problem<'_, Tensor<'_>>,
        workspace: &mut Workspace,
    ) -> Result<Self, kernels::Error> {
        let mut tensors = [TensorParams::NONE; 7];
        for (params, (name, tensor)) in tensors.iter_mut().zip(problem.tensors()) {
            if let Some(tensor) = tensor {
                *params = TensorParams::new(name, tensor, workspace)?;
            }
        }
        let (batch, q_heads, kv_heads) = (problem.batch(), problem.q_heads(), problem.kv_heads());
        let count = |what, n| limit(what, n, i32::MAX as usize).map(|n| n as i32);
        let counts = [
            count("batch", batch)?,
            count("q_heads", q_heads)?,
            count("kv_heads", kv_heads)?,
        ];
        // The kernels index lengths in 32 bits.
        count("batch * kv_heads", batch.saturating_mul(kv_heads))?;
        let lengths = &problem.lengths;
        let strides = |len| match len {
            Some(PastLen::PerHead(_)) => [counts[2], 1],
            Some(PastLen::PerBatch(_)) | None => [1, 0],
        };
        let mut place = |source, len| match len {
            Some(Len::Host(len)) => workspace.upload(len),
            Some(Len::Device(address)) => Address::Device(address),
            // Every row of the tensors, whose number fits in 31 bits: see `TensorParams::new`.
            None => {
                let rows = (0..batch).map(|b| problem.capacity_of(source, b) as i32);
                workspace.upload(&rows.collect::<Vec<_>>())
            }
        };
        Ok(ProblemParams {
            tensors,
            segment_len: place(Source::Current, lengths.segment_len),
            prior_len: place(Source::Prior, lengths.prior_len),
            past_len: place(Source::Past, lengths.past_len.map(PastLen::values)),
            past_len_strides: strides(lengths.past_len),
            sink_len: match lengths.sink_len.map(PastLen::values) {
                Some(Len::Host(len)) => workspace.upload(len),
                Some(Len::Device(address)) => Address::Device(address),
                None => Address::NULL,
            },
            sink_len_strides: strides(lengths.sink_len),
            query_start: match lengths.query_start {
                Some(Len::Host(start)) if start.iter().any(|&x| x != 0) => workspace.upload(start),
                Some(Len::Device(address)) => Address::Device(address),
                Some(Len::Host(_)) | None => Address::NULL,
            },
            row_offsets: match problem.q.layout.batch {
                Batch::Packed(offsets) => {
                    let offsets = offsets.iter().map(|&rows| count("rows of q", rows));
                    workspace.upload(&offsets.collect::<Result<Vec<i32>, _>>()?)
                }
                Batch::Stride { .. } | Batch::Offsets(_) => Address::NULL,
            },
            past_gate: match problem.past.map(|past| past.gates) {
                Some(Gates::Host(gates)) => workspace.upload(gates),
                Some(Gates::Device { past_gate, .. }) => Address::Device(past_gate),
                None => workspace.upload(&vec![0f32; q_heads]),
            },
            prior_heads: {
                let reads = |head| u8::from(problem.reads(Source::Prior, head));
                workspace.upload(&(0..q_heads).map(reads).collect::<Vec<u8>>())
            },
            counts,
            scale: problem
                .scale
                .unwrap_or_else(|| 1.0 / (problem.head_dim() as f32).sqrt()),
        })
    }

    /// Rows of q.
    pub fn rows(&self) -> usize {
        self.tensors[0].rows()
    }

    pub fn fill(&self, bases: impl Into<Bases>) -> SegattnProblem {
        let bases = bases.into();
        let [q, k, v, prior_k, prior_v, past_k, past_v] =
            self.tensors.map(|tensor| tensor.fill(bases));
        let [batch, q_heads, kv_heads] = self.counts;
        let [past_len_batch_stride, past_len_head_stride] = self.past_len_strides;
        let [sink_len_batch_stride, sink_len_head_stride] = self.sink_len_strides;
        SegattnProblem {
            q,
            k,
            v,
            prior_k,
            prior_v,
            past_k,
            past_v,
            segment_len: self.segment_len.at(bases),
            prior_len: self.prior_len.at(bases),
            past_len: self.past_len.at(bases),
            sink_len: self.sink_len.at(bases),
            query_start: self.query_start.at(bases),
            row_offsets: self.row_offsets.at(bases),
            past_gate: self.past_gate.at(bases),
            prior_heads: self.prior_heads.at(bases),
            past_len_batch_stride,
            past_len_head_stride,
            sink_len_batch_stride,
            sink_len_head_stride,
            batch,
            q_heads,
            kv_heads,
            scale: self.scale,
        }
    }
}

/// The most KV splits of a query tile.
pub(super) fn most_splits(problem: &Problem<'_, Tensor<'_>>, info: &SegattnKernelInfo) -> usize {
    match (
        usize::try_from(info.key_rows),
        usize::try_from(info.split_keys),
    ) {
        (Ok(rows @ 1..), Ok(keys)) if keys >= rows => {
            most_key_tiles(problem, rows).div_ceil(keys / rows).max(1)
        }
        _ => 1,
    }
}

/// Most key tiles of `key_rows` rows that a query of the problem sees, over batch elements and heads.
fn most_key_tiles(problem: &Problem<'_, Tensor<'_>>, key_rows: usize) -> usize {
    let is_read = |part| (0..problem.q_heads()).any(|head| problem.reads_part(part, head));
    let parts = Part::ALL.into_iter().filter(|&part| is_read(part));
    // With a length in device memory the plan must hold for any lengths that fit the tensors.
    let on_device = |len| matches!(len, Len::Device(_));
    if problem.lengths.named().any(|(_, len)| on_device(len)) {
        let tiles = |source| problem.capacity(source).div_ceil(key_rows);
        let sources = Source::ALL.into_iter().map(|source| match source {
            // Two parts of a tensor fill at most one tile more than the tensor.
            Source::Past if problem.lengths.sink_len.is_some() => tiles(source) + 1,
            Source::Past if !is_read(Part::Gated) => 0,
            Source::Prior if !is_read(Part::Prior) => 0,
            source => tiles(source),
        });
        return if problem.batch() > 0 {
            sources.sum()
        } else {
            0
        };
    }
    let rows = |part, batch_index| {
        let rows = |head| problem.part_rows(part, batch_index, head).len();
        (0..problem.kv_heads()).map(rows).max().unwrap_or(0)
    };
    let tiles = |batch_index| {
        let tiles = |part| rows(part, batch_index).div_ceil(key_rows);
        parts.clone().map(tiles).sum()
    };
    (0..problem.batch()).map(tiles).max().unwrap_or(0)
}

/// `got`, if it is at most `most`.
pub(super) fn limit(what: &'static str, got: usize, most: usize) -> Result<usize, kernels::Error> {
    if got <= most {
        return Ok(got);
    }
    Err(kernels::Error::TooLarge {
        what,
        expected: most as u64,
        got: got as u64,
    })
}

/// The product of `factors`, which must fit in an i32: blocks of a grid, or an index.
pub(super) fn count(what: &'static str, factors: &[usize]) -> Result<u32, kernels::Error> {
    let product = factors
        .iter()
        .fold(1, |product: usize, &n| product.saturating_mul(n));
    limit(what, product, i32::MAX as usize).map(|n| n as u32)
}

fn elements(what: &'static str, n: usize) -> Result<i64, kernels::Error> {
    i64::try_from(n).map_err(|_| kernels::Error::TooLarge {
        what,
        expected: i64::MAX as u64,
        got: n as u64,
    })
}
