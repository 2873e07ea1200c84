//! The structs of the interface. A struct of zeros is "nothing": an absent source, lengths that are not given.

use std::ffi::c_void;

/// What the elements of tensors are: the values of `SegattnProblem.dtype`.
#[repr(i32)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dtype {
    /// 32-bit floats: the CPU.
    F32 = 0,
    /// bfloat16: GPUs.
    Bf16 = 1,
    /// IEEE half precision: GPUs.
    F16 = 2,
}

/// `SegattnLengths.flags`: there are `[batch, kv_heads]` numbers; of `past_len` and `sink_len` only.
pub const PER_HEAD: u32 = 1;
/// `SegattnLengths.flags`: the numbers are in device memory. They are trusted: the host does not read them.
pub const ON_DEVICE: u32 = 2;

/// A tensor `[batch, rows, heads, head_dim]` whose last dimension is contiguous. Every row, valid or padding, lies in
/// the caller's memory. On the GPU rows are aligned to 16 bytes: the address is a multiple of 16, the strides are
/// multiples of 8 elements.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Tensor {
    /// The first element, in host memory for the CPU and in device memory for a GPU.
    pub data: *mut c_void,
    /// Batch, rows, heads, head_dim.
    pub shape: [usize; 4],
    /// Elements from one batch element, row and head to the next.
    pub strides: [usize; 3],
    /// `[batch]` numbers in host memory: the element at which each batch element begins, counted from `data`; NULL:
    /// they are `strides[0]` apart.
    pub offsets: *const usize,
}

/// Numbers of rows: `[batch]` numbers.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Lengths {
    /// The numbers; NULL: the default.
    pub values: *const i32,
    /// 0, or `SEGATTN_PER_HEAD` and `SEGATTN_ON_DEVICE`, added.
    pub flags: u32,
}

/// The arguments of a call (docs/contract.md, section 1). `prior_k`, `prior_v` and `past_k`, `past_v` may be zeros:
/// there is no such source. A call reads the struct and everything in host memory before it returns.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Problem {
    /// A `SegattnDtype`.
    pub dtype: i32,
    /// Queries `[batch, rows, q_heads, head_dim]`.
    pub q: Tensor,
    /// Keys of the segment `[batch, segment, kv_heads, head_dim]`; `q_heads` is a multiple of `kv_heads`.
    pub k: Tensor,
    /// Values of the segment, like `k`.
    pub v: Tensor,
    /// Keys of the tail of the segment before `[batch, prior, kv_heads, head_dim]`.
    pub prior_k: Tensor,
    /// Values, like `prior_k`.
    pub prior_v: Tensor,
    /// Keys retrieved from earlier segments `[batch, past, kv_heads, head_dim]`.
    pub past_k: Tensor,
    /// Values, like `past_k`.
    pub past_v: Tensor,
    /// `[q_heads]` in host memory: not 0 where the head reads the prior; NULL: every head does.
    pub prior_heads: *const u8,
    /// `[q_heads]`, finite, at least 0: the weight of the past in each head; NULL: 1 in every head.
    pub past_gate: *const f32,
    /// NULL where `past_gate` is in host memory. For gates in device memory `[q_heads]` in host memory: not 0 where the
    /// gate is above 0.
    pub reads_past: *const u8,
    /// Valid rows of `k` and `v`; by default all.
    pub segment_len: Lengths,
    /// Valid rows of the prior; by default all.
    pub prior_len: Lengths,
    /// Valid rows of the past; by default all.
    pub past_len: Lengths,
    /// The first rows of the past that are sinks, which every head reads; by default 0.
    pub sink_len: Lengths,
    /// The position of the first query row in the segment; by default 0.
    pub query_start: Lengths,
    /// The factor on the scores, in host memory; NULL: `1 / sqrt(head_dim)`.
    pub scale: *const f32,
}

/// What a forward call writes: every row, padding rows with 0 and -inf.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Forward {
    /// Like `q`.
    pub out: Tensor,
    /// `[batch, q_heads, rows]`, contiguous.
    pub lse: *mut f32,
}

/// What a backward call reads beside the problem, and what it writes: every row (`=`, not `+=`), padding rows with 0.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Backward {
    /// What the forward call wrote.
    pub out: Tensor,
    /// `[batch, q_heads, rows]`: what the forward call wrote.
    pub lse: *const f32,
    /// The gradient of the loss with respect to `out`.
    pub d_out: Tensor,
    /// The gradient of the loss with respect to `lse`, like it; NULL: 0.
    pub d_lse: *const f32,
    /// Written; like `q`.
    pub d_q: Tensor,
    /// Written; like `k`.
    pub d_k: Tensor,
    /// Written; like `v`.
    pub d_v: Tensor,
    /// Written; like `prior_k`. Zeros here and in `d_prior_v` leave both out.
    pub d_prior_k: Tensor,
    /// Written; like `prior_v`.
    pub d_prior_v: Tensor,
    /// Written; `[batch, q_heads]`: the part of each batch element in the gradient of the gates.
    pub d_past_gate: *mut f32,
}

impl Tensor {
    /// Nothing is there.
    pub(crate) fn is_absent(&self) -> bool {
        self.data.is_null() && self.shape == [0; 4] && self.strides == [0; 3]
    }
}
