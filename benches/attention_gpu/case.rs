//! What is measured: shapes, what they cost, and their tensors on the GPU.

use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DevicePtrMut};
use half::bf16;
use segattn::attention::cuda::{DeviceSlice, Dtype, Tensor};
use segattn::attention::{Lengths, Problem};
use segattn::cuda::{Error, alloc};

/// More than any GPU's cache keeps.
const CACHED_BYTES: f64 = 4e8;

/// A batch of equal segments; the first `past_heads` heads read the past, all heads the prior.
#[derive(Debug, Clone, PartialEq)]
pub struct Case {
    pub batch: usize,
    pub q_heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    /// Query rows: the last of the segment.
    pub rows: usize,
    pub segment: usize,
    pub prior: usize,
    pub past: usize,
    /// KV heads that have past rows.
    pub past_heads: usize,
    /// The first of them, whose gate is 1; that of the others is 0, so that nobody reads their rows.
    pub reading_heads: usize,
}

impl Case {
    /// A folded batch of 16,384 tokens, 16 heads, the past on a quarter of them.
    pub fn prefill(head_dim: usize, segment: usize, prior: usize, past: usize) -> Self {
        Case {
            batch: (16_384 / segment).max(1),
            q_heads: 16,
            kv_heads: 16,
            head_dim,
            rows: segment,
            segment,
            prior,
            past,
            past_heads: if past > 0 { 4 } else { 0 },
            reading_heads: if past > 0 { 4 } else { 0 },
        }
    }

    /// One token of each of `batch` sequences at the end of its segment, every head reading everything, `keys` in all.
    pub fn decode(head_dim: usize, batch: usize, keys: usize) -> Self {
        let part = 512.min(keys / 4);
        Case {
            batch,
            q_heads: 32,
            kv_heads: 8,
            head_dim,
            rows: 1,
            segment: keys - 2 * part,
            prior: part,
            past: part,
            past_heads: 8,
            reading_heads: 8,
        }
    }

    /// The same with a past of so many rows of every KV head, which the first `reading_heads` read.
    pub fn gated(&self, past: usize, reading_heads: usize) -> Self {
        Case {
            past,
            past_heads: self.kv_heads,
            reading_heads,
            ..self.clone()
        }
    }

    /// The same without the rows that nobody reads.
    pub fn without_closed(&self) -> Self {
        Case {
            past: if self.reading_heads > 0 { self.past } else { 0 },
            past_heads: self.reading_heads,
            ..self.clone()
        }
    }

    pub fn is_decode(&self) -> bool {
        self.rows < self.segment
    }

    /// Copies of the tensors that take turns, so that a decoding step's keys come from memory and not from a cache.
    pub fn copies(&self) -> usize {
        match self.is_decode() {
            true => (CACHED_BYTES / self.kv_bytes()).ceil().clamp(1.0, 64.0) as usize,
            false => 1,
        }
    }

    pub fn name(&self) -> String {
        let Case {
            batch,
            head_dim,
            segment,
            prior,
            past,
            ..
        } = self;
        let closed = match self.past_heads - self.reading_heads {
            0 => String::new(),
            closed => format!(" {closed} gates 0"),
        };
        match self.is_decode() {
            true => {
                let keys = segment + prior + past;
                format!("decode D{head_dim} {batch} sequences, {keys} keys{closed}")
            }
            false => format!("D{head_dim} S{segment} M{prior} R{past}{closed}"),
        }
    }

    /// Visible pairs of query and key: of past keys, of all others.
    fn pairs(&self) -> [f64; 2] {
        let [rows, segment, prior, past] =
            [self.rows, self.segment, self.prior, self.past].map(|n| n as f64);
        let group = (self.q_heads / self.kv_heads) as f64;
        // Row i of the segment sees i + 1 current keys.
        let current = rows * (segment - rows) + rows * (rows + 1.0) / 2.0;
        let entries = self.batch as f64;
        [
            entries * group * self.reading_heads as f64 * rows * past,
            entries * self.q_heads as f64 * (current + rows * prior),
        ]
    }

    /// Operations of a pass: 2 products a pair forward; 5 backward, 3 for past keys, which get no gradients.
    pub fn operations(&self, backward: bool) -> f64 {
        let [past, own] = self.pairs();
        let products = if backward {
            3.0 * past + 5.0 * own
        } else {
            2.0 * (past + own)
        };
        2.0 * products * self.head_dim as f64
    }

    /// Bytes of keys and values that a decoding step reads.
    pub fn kv_bytes(&self) -> f64 {
        let rows = self.kv_heads * (self.segment + self.prior) + self.reading_heads * self.past;
        (2 * Dtype::BYTES * self.head_dim * self.batch * rows) as f64
    }
}

/// Random bf16 numbers on the device, a block of which is repeated.
pub struct Source {
    stream: Arc<CudaStream>,
    block: CudaSlice<bf16>,
}

impl Source {
    pub fn new(stream: &Arc<CudaStream>) -> Result<Self, Box<dyn std::error::Error>> {
        // Sums of four uniform numbers are close to normal; the odd length keeps repeated rows apart.
        let mut state = 1u32;
        let mut uniform = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / 8_388_608.0 - 1.0
        };
        let values: Vec<bf16> = (0..(1 << 22) + 1)
            .map(|_| bf16::from_f32((uniform() + uniform() + uniform() + uniform()) * 0.866))
            .collect();
        Ok(Source {
            stream: stream.clone(),
            block: stream.clone_htod(&values)?,
        })
    }

    /// A tensor of random numbers, other ones for another seed.
    pub fn tensor(&self, len: usize, seed: usize) -> Result<CudaSlice<bf16>, Error> {
        let copy = |error| segattn::cuda::driver_error("copying random numbers", error);
        // SAFETY: every element is written below.
        let mut tensor = unsafe { alloc::<bf16>(&self.stream, len.max(1)) }?;
        let (mut at, mut from) = (0, seed * 65_537 % self.block.len());
        while at < len {
            let n = (len - at).min(self.block.len() - from);
            let (block, mut part) = (
                self.block.slice(from..from + n),
                tensor.slice_mut(at..at + n),
            );
            self.stream.memcpy_dtod(&block, &mut part).map_err(copy)?;
            (at, from) = (at + n, 0);
        }
        Ok(tensor)
    }

    fn empty<T: cudarc::driver::DeviceRepr>(&self, len: usize) -> Result<CudaSlice<T>, Error> {
        // SAFETY: kernels write it before anything reads it.
        unsafe { alloc(&self.stream, len.max(1)) }
    }
}

/// Names of the tensors of a case, in order: inputs, then outputs.
pub const Q: usize = 0;
pub const K: usize = 1;
pub const V: usize = 2;
pub const PRIOR_K: usize = 3;
pub const PRIOR_V: usize = 4;
pub const PAST_K: usize = 5;
pub const PAST_V: usize = 6;
pub const D_OUT: usize = 7;
pub const OUT: usize = 8;
pub const D_Q: usize = 9;
pub const D_K: usize = 10;
pub const D_V: usize = 11;
pub const D_PRIOR_K: usize = 12;
pub const D_PRIOR_V: usize = 13;

/// A case's tensors.
pub struct Data {
    pub case: Case,
    pub stream: Arc<CudaStream>,
    pub tensors: Vec<CudaSlice<bf16>>,
    pub lse: CudaSlice<f32>,
    pub d_past_gate: CudaSlice<f32>,
    lens: [Vec<i32>; 4],
    gates: Vec<f32>,
    prior_heads: Vec<bool>,
}

impl Data {
    pub fn new(case: &Case, source: &Source) -> Result<Self, Error> {
        let mut tensors = Vec::new();
        for i in Q..=D_PRIOR_V {
            let len = shape(case, i).iter().product();
            tensors.push(match i {
                Q..=D_OUT => source.tensor(len, i + 1)?,
                _ => source.empty(len)?,
            });
        }
        let each = |len: usize| vec![len as i32; case.batch];
        let group = case.q_heads / case.kv_heads;
        let past = (0..case.batch * case.kv_heads).map(|i| {
            let reads = i % case.kv_heads < case.past_heads;
            if reads { case.past as i32 } else { 0 }
        });
        Ok(Data {
            case: case.clone(),
            stream: source.stream.clone(),
            tensors,
            lse: source.empty(case.batch * case.q_heads * case.rows)?,
            d_past_gate: source.empty(case.batch * case.q_heads)?,
            lens: [
                each(case.segment),
                each(case.prior),
                past.collect(),
                each(case.segment - case.rows),
            ],
            gates: (0..case.q_heads)
                .map(|head| f32::from(u8::from(head / group < case.reading_heads)))
                .collect(),
            prior_heads: vec![case.prior > 0; case.q_heads],
        })
    }

    /// A tensor by its number. Heads that do not read the past have no rows there, so its tensor has none of them.
    pub fn tensor(&mut self, i: usize) -> Tensor<'static> {
        let [batch, rows, heads, head_dim] = shape(&self.case, i);
        let (data, _guard) = self.tensors[i].device_ptr_mut(&self.stream);
        Tensor::packed(data, Dtype::Bf16, [batch, rows, heads, head_dim])
    }

    pub fn lse(&self) -> DeviceSlice {
        DeviceSlice::new(self.lse.device_ptr(&self.stream).0, self.lse.len())
    }

    pub fn d_past_gate(&self) -> DeviceSlice {
        let address = self.d_past_gate.device_ptr(&self.stream).0;
        DeviceSlice::new(address, self.d_past_gate.len())
    }

    pub fn problem(&mut self) -> Problem<'_, Tensor<'_>> {
        let [q, k, v, prior_k, prior_v, mut past_k, mut past_v] =
            [Q, K, V, PRIOR_K, PRIOR_V, PAST_K, PAST_V].map(|i| self.tensor(i));
        // The other heads have no past rows by their lengths.
        past_k.layout.heads = self.case.kv_heads;
        past_v.layout.heads = self.case.kv_heads;
        let [segment_len, prior_len, past_len, query_start] = &self.lens;
        let lengths = Lengths::segment(segment_len)
            .prior(prior_len)
            .past_per_head(past_len);
        let lengths = match self.case.is_decode() {
            true => lengths.query_start(query_start),
            false => lengths,
        };
        Problem::causal(q, k, v)
            .prior(prior_k, prior_v, &self.prior_heads)
            .past(past_k, past_v, &self.gates)
            .lengths(lengths)
    }
}

/// `[batch, rows, heads, head_dim]` of a tensor by its number.
pub fn shape(case: &Case, i: usize) -> [usize; 4] {
    let (rows, heads) = match i {
        Q | D_OUT | OUT | D_Q => (case.rows, case.q_heads),
        K | V | D_K | D_V => (case.segment, case.kv_heads),
        PRIOR_K | PRIOR_V | D_PRIOR_K | D_PRIOR_V => (case.prior, case.kv_heads),
        _ => (case.past, case.past_heads),
    };
    [case.batch, rows, heads, case.head_dim]
}
