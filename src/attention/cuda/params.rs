//! From a problem to the structs of `kernels/params.h`: where everything lies, in the caller's memory or in the
//! workspace, and the host values that travel with a call.

use super::error::Error;
use super::problem::{DeviceSlice, Gates, Lengths, PastLengths, Problem, Tensor};
use crate::attention::{Batch, PastLen};
use crate::cuda::kernels;
use crate::cuda::kernels::params::{SegattnKernelInfo, SegattnProblem, SegattnTensor};

/// Parts of the workspace begin at multiples of this.
const ALIGNMENT: usize = 256;

/// An address that is known, or that is once there is memory for the host's values and a workspace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    Device(u64),
    Value(usize),
    Workspace(usize),
}

/// Where the host's values and the workspace begin.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bases {
    pub values: u64,
    pub workspace: u64,
}

impl From<u64> for Bases {
    /// The host's values lie at the beginning of the workspace.
    fn from(workspace: u64) -> Self {
        Bases {
            values: workspace,
            workspace,
        }
    }
}

impl Place {
    pub const NULL: Place = Place::Device(0);

    /// The address, given where everything begins.
    pub fn at<T>(self, bases: impl Into<Bases>) -> *mut T {
        let bases = bases.into();
        let address = match self {
            Place::Device(address) => address,
            Place::Value(offset) => bases.values + offset as u64,
            Place::Workspace(offset) => bases.workspace + offset as u64,
        };
        address as usize as *mut T
    }
}

/// A workspace as it grows: the host's values first, then memory for the kernels.
#[derive(Debug, Default)]
pub(super) struct Workspace {
    bytes: usize,
    uploads: Vec<u8>,
}

impl Workspace {
    /// Host values that are copied to the beginning of the workspace. Before any [`reserve`](Self::reserve).
    pub fn upload<T: bytemuck::NoUninit>(&mut self, values: &[T]) -> Place {
        debug_assert_eq!(self.bytes, self.uploads.len());
        self.uploads.resize(self.bytes.next_multiple_of(16), 0);
        let place = Place::Value(self.uploads.len());
        self.uploads.extend_from_slice(bytemuck::cast_slice(values));
        self.bytes = self.uploads.len();
        place
    }

    /// Memory for `product(counts)` elements of `size` bytes.
    pub fn reserve(
        &mut self,
        what: &'static str,
        size: usize,
        counts: &[usize],
    ) -> Result<Place, kernels::Error> {
        let begin = self.bytes.next_multiple_of(ALIGNMENT);
        let bytes = counts
            .iter()
            .try_fold(size, |bytes, &n| bytes.checked_mul(n));
        let end = bytes.and_then(|bytes| begin.checked_add(bytes));
        match end {
            Some(end) if end < isize::MAX as usize => self.bytes = end,
            _ => {
                return Err(kernels::Error::TooLarge {
                    what,
                    expected: isize::MAX as u64,
                    got: u64::MAX,
                });
            }
        }
        Ok(Place::Workspace(begin))
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }

    pub fn uploads(&self) -> &[u8] {
        &self.uploads
    }

    /// Checks that what the caller brings is large enough.
    pub fn check(&self, workspace: DeviceSlice) -> Result<(), Error> {
        let aligned = workspace.data.is_multiple_of(ALIGNMENT as u64) && workspace.data != 0;
        if self.bytes == 0 || (aligned && workspace.len >= self.bytes) {
            return Ok(());
        }
        Err(Error::Workspace {
            expected: self.bytes,
            got: workspace.len,
            address: workspace.data,
        })
    }
}

/// A tensor's struct but for addresses in the workspace.
#[derive(Debug, Clone, Copy)]
pub(super) struct TensorParams {
    data: u64,
    offsets: Place,
    /// Batch, row and head stride, and rows.
    numbers: [i64; 4],
}

impl TensorParams {
    /// No tensor: null, of no rows.
    pub const NONE: TensorParams = TensorParams {
        data: 0,
        offsets: Place::NULL,
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
            Batch::Stride { stride, .. } => (stride, Place::NULL),
            Batch::Offsets(offsets) => {
                let offsets = offsets.iter().map(|&x| elements(what, x));
                (
                    0,
                    workspace.upload(&offsets.collect::<Result<Vec<_>, _>>()?),
                )
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
            data: Place::Device(self.data).at(bases),
            batch_offsets: self.offsets.at(bases),
            batch_stride,
            row_stride,
            head_stride,
            rows,
        }
    }
}

/// A problem's struct but for addresses in the workspace.
#[derive(Debug)]
pub(super) struct ProblemParams {
    tensors: [TensorParams; 7],
    segment_len: Place,
    prior_len: Place,
    past_len: Place,
    past_len_strides: [i32; 2],
    query_start: Place,
    past_gate: Place,
    prior_heads: Place,
    counts: [i32; 3],
    scale: f32,
}

impl ProblemParams {
    /// A validated problem.
    pub fn new(problem: &Problem<'_>, workspace: &mut Workspace) -> Result<Self, kernels::Error> {
        let mut tensors = [TensorParams::NONE; 7];
        for (params, (name, tensor)) in tensors.iter_mut().zip(problem.tensors()) {
            *params = TensorParams::new(name, tensor, workspace)?;
        }
        let count = |what, n| limit(what, n, i32::MAX as usize).map(|n| n as i32);
        let kv_heads = count("kv_heads", problem.kv_heads)?;
        let counts = [
            count("batch", problem.batch)?,
            count("q_heads", problem.q_heads)?,
            kv_heads,
        ];
        // The kernels index lengths in 32 bits.
        limit(
            "batch * kv_heads",
            problem.batch.saturating_mul(problem.kv_heads),
            i32::MAX as usize,
        )?;
        let [segment_len, prior_len, past_len, query_start] = lengths(&problem.lengths, workspace);
        let per_head = matches!(
            problem.lengths,
            Lengths::Host {
                past_len: PastLen::PerHead(_),
                ..
            } | Lengths::Growing {
                past_len: PastLen::PerHead(_),
                ..
            } | Lengths::Device {
                past_len: PastLengths::PerHead(_),
                ..
            }
        );
        let prior_heads: Vec<u8> = problem.prior_heads.iter().map(|&x| u8::from(x)).collect();
        Ok(ProblemParams {
            tensors,
            segment_len,
            prior_len,
            past_len,
            past_len_strides: if per_head { [kv_heads, 1] } else { [1, 0] },
            query_start,
            past_gate: match problem.past_gate {
                Gates::Host(gates) => workspace.upload(gates),
                Gates::Device { past_gate, .. } => Place::Device(past_gate),
            },
            prior_heads: workspace.upload(&prior_heads),
            counts,
            scale: problem
                .scale
                .unwrap_or_else(|| 1.0 / (problem.head_dim as f32).sqrt()),
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
            query_start: self.query_start.at(bases),
            past_gate: self.past_gate.at(bases),
            prior_heads: self.prior_heads.at(bases),
            past_len_batch_stride,
            past_len_head_stride,
            batch,
            q_heads,
            kv_heads,
            scale: self.scale,
        }
    }
}

/// Places of segment_len, prior_len, past_len and query_start.
fn lengths(lengths: &Lengths<'_>, workspace: &mut Workspace) -> [Place; 4] {
    match *lengths {
        Lengths::Host {
            segment_len,
            prior_len,
            past_len,
            query_start,
        } => {
            let (PastLen::PerBatch(past_len) | PastLen::PerHead(past_len)) = past_len;
            let start = query_start.filter(|start| start.iter().any(|&x| x != 0));
            [
                workspace.upload(segment_len),
                workspace.upload(prior_len),
                workspace.upload(past_len),
                start.map_or(Place::NULL, |start| workspace.upload(start)),
            ]
        }
        Lengths::Growing {
            segment_len,
            query_start,
            prior_len,
            past_len,
        } => {
            let (PastLen::PerBatch(past_len) | PastLen::PerHead(past_len)) = past_len;
            [
                Place::Device(segment_len),
                workspace.upload(prior_len),
                workspace.upload(past_len),
                Place::Device(query_start),
            ]
        }
        Lengths::Device {
            segment_len,
            prior_len,
            past_len,
            query_start,
        } => {
            let (PastLengths::PerBatch(past_len) | PastLengths::PerHead(past_len)) = past_len;
            [segment_len, prior_len, past_len, query_start.unwrap_or(0)].map(Place::Device)
        }
    }
}

/// Most items that a query tile's keys are split into by a kernel.
pub(super) fn most_splits(problem: &Problem<'_>, info: &SegattnKernelInfo) -> usize {
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

/// Most key tiles of `key_rows` rows that a query of the problem sees, over entries and heads.
fn most_key_tiles(problem: &Problem<'_>, key_rows: usize) -> usize {
    let heads = problem.q_heads;
    let reads_past = (0..heads).any(|head| problem.past_gate.reads(head));
    let reads_prior = problem.prior_heads.contains(&true);
    let tiles = |len: usize| len.div_ceil(key_rows);
    let sum = |past: usize, prior: usize, segment: usize| {
        usize::from(reads_past) * tiles(past)
            + usize::from(reads_prior) * tiles(prior)
            + tiles(segment)
    };
    match problem.lengths {
        Lengths::Growing { .. } | Lengths::Device { .. } => sum(
            problem.past_k.layout.rows,
            problem.prior_k.layout.rows,
            problem.k.layout.rows,
        ),
        Lengths::Host {
            segment_len,
            prior_len,
            past_len,
            ..
        } => {
            let past = |entry: usize| match past_len {
                PastLen::PerBatch(len) => len[entry],
                PastLen::PerHead(len) => {
                    let heads = entry * problem.kv_heads..(entry + 1) * problem.kv_heads;
                    len[heads].iter().copied().max().unwrap_or(0)
                }
            };
            let entry = |i: usize| {
                sum(
                    past(i) as usize,
                    prior_len[i] as usize,
                    segment_len[i] as usize,
                )
            };
            (0..problem.batch).map(entry).max().unwrap_or(0)
        }
    }
}

/// `got`, if the kernels can count it.
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

/// The number of blocks of a grid, or an index, which fits in an i32.
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
