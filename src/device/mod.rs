//! What the model needs from a device, as one trait.
//!
//! A device provides buffers, GEMMs, row-wise functions, segment attention, the pool of past keys and values, and the
//! update of the optimizer. It knows no layer and no model. There are three devices:
//!
//! - [`cpu`]: f32, optimized;
//! - [`gpu`]: bf16 activations, on a GPU, a simulated GPU or a dry run;
//! - [`mod@reference`]: f64, written for readability.
//!
//! The same model code runs on each. Tests check the gradients of the model in f64, the CPU against the reference, and
//! the GPU against the CPU.
//!
//! **Bits.** The result of a row depends only on the inputs of that row. It does not depend on the number of rows, on
//! the other rows, or on the number of threads (docs/contract.md, section 4).

pub mod cpu;
mod error;
pub mod gpu;
mod host_memory;
mod lesson;
mod past;
pub mod reference;
pub mod sampler;
mod sampling;
mod shared;
mod types;

use std::ops::Range;

pub use crate::attention::PerSource;
pub use error::{DeviceError, OutOfMemory, Purpose};
pub use host_memory::HostMemory;
pub use lesson::Lesson;
pub use past::{Asking, Gathering, Joining, PastPool, SelectedBlocks};
pub use sampling::{Sampled, Samplers};
pub use shared::blocks::HostBlocks;
pub use shared::samplers::HostSamplers;
pub use types::{
    Accumulate, AdamW, Attention, AttentionGrad, GradTensor, Heads, KeyStore, Kind, Move,
    PastHeads, PoolBits, PoolShape, Probes, QkNormGrad, QkNorms, Rows, RowsMut, SegmentCache,
    Selection, SelectionRule, SinkLogits, SinkLogitsGrad, SlotSpan, StepRows, Update,
};

/// Results of device calls.
pub type Result<T> = std::result::Result<T, DeviceError>;

/// A device that can run the model: see the module's documentation.
///
/// The caller guarantees shapes: a method may panic on a range outside its buffer. The model validates its inputs
/// before it calls a device.
pub trait Device: Sized + Send + Sync + std::fmt::Debug {
    /// A one-dimensional array in device memory, in the device's precision for its [`Kind`].
    type Buffer: Send + Sync + std::fmt::Debug;
    /// A weight `[out, in]` packed for GEMMs.
    type Matrix: Send + Sync + std::fmt::Debug;
    /// Keys and values of completed tokens, see [`PastPool`].
    type Pool: PastPool<Self>;
    /// Blocks that retrieval has selected, see [`SelectedBlocks`].
    type Blocks: SelectedBlocks<Self>;
    /// The host's description of the rows of a step ([`StepRows`]), in device memory.
    type Step: Send + Sync + std::fmt::Debug + AsRef<StepRows>;
    /// Samplers for the sequences of a batch, see [`Samplers`].
    type Samplers: Samplers<Self>;
    /// Recorded calls, see [`Device::record`].
    type Recording: Recording;

    /// Largest number of rows of logits in memory at a time.
    const LOGIT_ROWS: usize = 128;

    /// One-line description of the device, for display.
    fn description(&self) -> String;

    /// Runs `work`, which makes many calls. A device may use this to lower the cost of a call.
    fn together<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        work()
    }

    /// Records the calls of `work` without executing them. [`Recording::replay`] executes them, any number of times. A
    /// device without recordings returns `None` and does not call `work`.
    ///
    /// Calls that exchange data with the host are refused while recording: reads, writes, and calls that upload tables.
    /// A decoding step between [`Device::renew`] and [`Samplers::sampled`] has none after a first step with the same
    /// objects that was not recorded. Calls of other threads meanwhile are recorded as well.
    ///
    /// # Errors
    /// Those of `work`, and what the device says.
    fn record<T>(&self, _work: impl FnOnce() -> Result<T>) -> Result<Option<(T, Self::Recording)>> {
        Ok(None)
    }

    /// A buffer of `len` zeros.
    fn zeros(&self, kind: Kind, len: usize) -> Result<Self::Buffer>;
    /// A buffer of `len` elements with arbitrary contents, which the caller writes before it reads.
    fn empty(&self, kind: Kind, len: usize) -> Result<Self::Buffer> {
        self.zeros(kind, len)
    }
    /// Writes `values` to the elements from `start` on.
    fn write(&self, buffer: &mut Self::Buffer, start: usize, values: &[f32]) -> Result<()>;
    /// Reads a range back to the host.
    fn read(&self, buffer: &Self::Buffer, range: Range<usize>) -> Result<Vec<f32>>;
    /// Elements in the buffer.
    fn len(&self, buffer: &Self::Buffer) -> usize;
    /// Reads a range back to the host in the precision in which it was computed.
    fn read_wide(&self, buffer: &Self::Buffer, range: Range<usize>) -> Result<Vec<f64>> {
        Ok(self
            .read(buffer, range)?
            .into_iter()
            .map(f64::from)
            .collect())
    }
    /// Bytes of an element of this kind on this device.
    fn element_bytes(&self, kind: Kind) -> usize;
    /// Sets every element to zero.
    fn clear(&self, buffer: &mut Self::Buffer) -> Result<()>;
    /// `dst = src` (or `dst += src`) for `rows` rows of `width` elements. A `src` with stride 0 is one row for all.
    fn copy(
        &self,
        src: Rows<'_, Self::Buffer>,
        dst: RowsMut<'_, Self::Buffer>,
        rows: usize,
        width: usize,
        accumulate: Accumulate,
    ) -> Result<()>;

    /// `dst = factor * src` (or `dst += factor * src`) for the `shape = [rows, width]` of `src`.
    fn scale(
        &self,
        factor: f64,
        src: Rows<'_, Self::Buffer>,
        dst: RowsMut<'_, Self::Buffer>,
        shape: [usize; 2],
        accumulate: Accumulate,
    ) -> Result<()>;

    /// Prepares rows `[0, out)` of the row-major weight in `values` for GEMMs;
    /// `training` also prepares it for gradients of the input.
    fn matrix(
        &self,
        values: &Self::Buffer,
        out: usize,
        inner: usize,
        training: bool,
    ) -> Result<Self::Matrix>;
    /// Packs changed values again.
    fn refresh(&self, matrix: &mut Self::Matrix, values: &Self::Buffer) -> Result<()>;
    /// `y (+)= x wᵀ`: `x [rows, in]`, `y [rows, out]`.
    fn linear(
        &self,
        x: Rows<'_, Self::Buffer>,
        rows: usize,
        weight: &Self::Matrix,
        y: RowsMut<'_, Self::Buffer>,
        accumulate: Accumulate,
    ) -> Result<()>;
    /// `y = residual + x wᵀ`, rows of `width`; `residual` and `y` are two buffers.
    fn linear_residual(
        &self,
        x: Rows<'_, Self::Buffer>,
        rows: usize,
        weight: &Self::Matrix,
        residual: Rows<'_, Self::Buffer>,
        mut y: RowsMut<'_, Self::Buffer>,
        width: usize,
    ) -> Result<()> {
        self.linear(x, rows, weight, y.reborrow(), Accumulate::No)?;
        self.copy(residual, y, rows, width, Accumulate::Yes)
    }
    /// `d_x (+)= d_y w`.
    fn linear_input_grad(
        &self,
        d_y: Rows<'_, Self::Buffer>,
        rows: usize,
        weight: &Self::Matrix,
        d_x: RowsMut<'_, Self::Buffer>,
        accumulate: Accumulate,
    ) -> Result<()>;
    /// `d_w += d_yᵀ x`, `d_w [out, in]`, rows in ascending order.
    fn linear_weight_grad(
        &self,
        d_y: Rows<'_, Self::Buffer>,
        x: Rows<'_, Self::Buffer>,
        rows: usize,
        shape: [usize; 2],
        d_w: &mut Self::Buffer,
    ) -> Result<()>;

    /// Uploads the description of the rows of a step.
    fn step(&self, rows: StepRows) -> Result<Self::Step>;
    /// Uploads the description of the next step to the same memory. It must have as many spans, of as many rows each.
    fn renew(&self, step: &mut Self::Step, rows: StepRows) -> Result<()>;

    /// `y[r] = table[tokens[r]]`, rows and tokens of the step.
    fn embed(
        &self,
        table: &Self::Matrix,
        step: &Self::Step,
        y: RowsMut<'_, Self::Buffer>,
    ) -> Result<()>;
    /// `d_table[tokens[r]] += d_y[r]`, rows in ascending order.
    fn embed_grad(
        &self,
        d_y: Rows<'_, Self::Buffer>,
        width: usize,
        tokens: &[u32],
        d_table: &mut Self::Buffer,
    ) -> Result<()>;
    /// `shape = [rows, groups]`: `y = x / rms(x) * weight` for each of the groups of a row, which lie one after the
    /// other and have the width of the weight; `rstd [rows, groups]` receives their `1 / rms(x)`.
    #[allow(clippy::too_many_arguments)]
    fn rms_norm(
        &self,
        x: Rows<'_, Self::Buffer>,
        shape: [usize; 2],
        weight: &Self::Buffer,
        eps: f64,
        y: RowsMut<'_, Self::Buffer>,
        rstd: RowsMut<'_, Self::Buffer>,
    ) -> Result<()>;
    /// `d_x += ` the gradient of [`Device::rms_norm`] for the upstream `d_y`.
    fn rms_norm_grad(
        &self,
        d_y: Rows<'_, Self::Buffer>,
        x: Rows<'_, Self::Buffer>,
        rstd: Rows<'_, Self::Buffer>,
        shape: [usize; 2],
        weight: &Self::Buffer,
        d_x: RowsMut<'_, Self::Buffer>,
    ) -> Result<()>;
    /// `d_weight += sum over rows and groups of d_y * x * rstd`: the groups of a row are summed first, in ascending
    /// order, then the rows, in one chain in ascending order.
    fn rms_norm_weight_grad(
        &self,
        d_y: Rows<'_, Self::Buffer>,
        x: Rows<'_, Self::Buffer>,
        rstd: Rows<'_, Self::Buffer>,
        shape: [usize; 2],
        d_weight: &mut Self::Buffer,
    ) -> Result<()>;
    /// `sums += sum over rows of x`, rows in ascending order: the gradient of a bias.
    fn column_sums(
        &self,
        x: Rows<'_, Self::Buffer>,
        rows: usize,
        sums: &mut Self::Buffer,
    ) -> Result<()>;
    /// Rotates `heads` heads of every row (RoPE, "rotate half"): row `r` by the angles in row
    /// `angles[r]` of the tables, backwards if `inverse`.
    #[allow(clippy::too_many_arguments)]
    fn rope(
        &self,
        src: Rows<'_, Self::Buffer>,
        dst: RowsMut<'_, Self::Buffer>,
        heads: usize,
        head_dim: usize,
        tables: (&Self::Buffer, &Self::Buffer),
        angles: &[usize],
        inverse: bool,
        accumulate: Accumulate,
    ) -> Result<()>;
    /// Moves many pieces of rows of heads, of `head_dim` elements each, to rows of the `targets`. What a move writes no
    /// other move of the call reads or writes. With `inverse` the rotation is undone.
    #[allow(clippy::too_many_arguments)]
    fn move_rows(
        &self,
        moves: &[Move<'_, Self::Buffer>],
        targets: &mut [&mut Self::Buffer],
        head_dim: usize,
        tables: (&Self::Buffer, &Self::Buffer),
        inverse: bool,
        accumulate: Accumulate,
    ) -> Result<()> {
        shared::moves::one_by_one(self, moves, targets, head_dim, tables, inverse, accumulate)
    }
    /// Splits the step's rows `[q | k | v]`, after `norms` of queries and keys. Rotated queries go to `q`. `store`
    /// receives keys before and after rotation, values, and the queries before rotation that probes are made of;
    /// without it they go nowhere.
    #[allow(clippy::too_many_arguments)]
    fn split_qkv(
        &self,
        qkv: Rows<'_, Self::Buffer>,
        norms: Option<QkNorms<'_, Self::Buffer>>,
        heads: Heads,
        tables: (&Self::Buffer, &Self::Buffer),
        step: &Self::Step,
        q: RowsMut<'_, Self::Buffer>,
        store: Option<KeyStore<'_, Self::Buffer>>,
    ) -> Result<()> {
        shared::qkv::split(self, qkv, norms, heads, tables, step.as_ref(), q, store)
    }
    /// Backward of [`Device::split_qkv`]: `d_qkv = [d_q | d_k | d_v]`, with the rotation of the first two undone.
    fn join_qkv(
        &self,
        d: [Rows<'_, Self::Buffer>; 3],
        heads: Heads,
        tables: (&Self::Buffer, &Self::Buffer),
        angles: &[usize],
        d_qkv: RowsMut<'_, Self::Buffer>,
    ) -> Result<()> {
        shared::qkv::join(self, d, heads, tables, angles, d_qkv)
    }
    /// Backward of the norms of queries and keys, of these weights: `d_x = ` the gradient of the rows before them. That
    /// of values is copied.
    fn qk_norm_grad(
        &self,
        grad: &QkNormGrad<'_, Self::Buffer>,
        weights: [&Self::Buffer; 2],
        d_x: RowsMut<'_, Self::Buffer>,
    ) -> Result<()> {
        shared::qkv::norm_grad(self, grad, weights, d_x)
    }
    /// The gradients of the weights of these norms, as [`Device::rms_norm_weight_grad`]: `d_weights +=`, for those that
    /// are asked for.
    fn qk_norm_weight_grad(
        &self,
        grad: &QkNormGrad<'_, Self::Buffer>,
        d_weights: [Option<&mut Self::Buffer>; 2],
    ) -> Result<()> {
        shared::qkv::norm_weight_grad(self, grad, d_weights)
    }
    /// `y = silu(gate) * up` for rows `[gate | up]` of `2 * inner`.
    fn swiglu(
        &self,
        gate_up: Rows<'_, Self::Buffer>,
        rows: usize,
        inner: usize,
        y: RowsMut<'_, Self::Buffer>,
    ) -> Result<()>;
    /// `d_gate_up = ` the gradient of [`Device::swiglu`].
    fn swiglu_grad(
        &self,
        d_y: Rows<'_, Self::Buffer>,
        gate_up: Rows<'_, Self::Buffer>,
        rows: usize,
        inner: usize,
        d_gate_up: RowsMut<'_, Self::Buffer>,
    ) -> Result<()>;
    /// Log-probability of each row's target under `softmax(logits[r])`, into `scores`. With `scales`, one finite
    /// number a row, the logits are replaced by `scales[r] * (softmax - onehot)`, the gradient of `-scales[r] *
    /// log-probability`; a scale of 0 gives zeros. A row's bits depend on its own scale alone. The call does not
    /// synchronize with the host.
    fn log_probabilities(
        &self,
        logits: RowsMut<'_, Self::Buffer>,
        vocab: usize,
        targets: &[u32],
        scales: Option<&[f64]>,
        scores: RowsMut<'_, Self::Buffer>,
    ) -> Result<()>;

    /// Log-probabilities of targets as [`Device::log_probabilities`], to the bit, and the divergences of rows from a
    /// teacher's, `D = sum of q (ln q - ln p)` with `p = softmax(logits / T)` and `q = softmax(teacher / T)`, into
    /// `scores`. The logits are replaced by the gradient of `-a * log-probability + b * T^2 * D` with the row's
    /// `scales = [a, b]`: zeros where both are 0. A row's bits depend on its own numbers alone.
    fn divergences(
        &self,
        logits: RowsMut<'_, Self::Buffer>,
        vocab: usize,
        targets: &[u32],
        lesson: &Lesson<'_, Self::Buffer>,
        scores: [RowsMut<'_, Self::Buffer>; 2],
    ) -> Result<()>;

    /// Segment attention, forward. Writes `out [rows, q_heads * head_dim]`, and `lse [q_heads, rows]` for each span,
    /// spans packed. The spans are those of the step. `number` is the index of this attention call within the step.
    fn attention(
        &self,
        call: &Attention<'_, Self::Buffer>,
        step: &mut Self::Step,
        number: usize,
        out: RowsMut<'_, Self::Buffer>,
        lse: RowsMut<'_, Self::Buffer>,
    ) -> Result<()>;
    /// Segment attention, backward.
    fn attention_grad(
        &self,
        call: &Attention<'_, Self::Buffer>,
        grad: AttentionGrad<'_, Self::Buffer>,
    ) -> Result<()>;
    /// `y = ` attention's output, each head of a row scaled by what its sink logit leaves. The spans are those of the
    /// step.
    fn sink_logits(
        &self,
        sinks: &SinkLogits<'_, Self::Buffer>,
        step: &Self::Step,
        y: RowsMut<'_, Self::Buffer>,
    ) -> Result<()>;
    /// Backward of [`Device::sink_logits`]. A span's gradient of the logits is a sum over its rows, in an order that
    /// depends on their number alone.
    fn sink_logits_grad(
        &self,
        sinks: &SinkLogits<'_, Self::Buffer>,
        grad: SinkLogitsGrad<'_, Self::Buffer>,
    ) -> Result<()>;

    /// Elements of a chunk, see [`Device::grad_squares`].
    ///
    /// # Errors
    /// What the device says.
    fn norm_chunk(&self) -> Result<usize>;
    /// The sum of squares of every chunk of these ranges of gradients, in f64, where squares of f32 cannot overflow. A
    /// range is cut into chunks of [`Device::norm_chunk`] elements; the last may be shorter. A sum depends on the
    /// elements of its chunk alone.
    fn grad_squares(&self, grads: &[(&Self::Buffer, Range<usize>)]) -> Result<Vec<f64>>;
    /// Computes the norm of all gradients from the sums of squares of all their chunks, in an order that depends on
    /// the number of chunks alone, then one AdamW update of `tensors`. These may be a part of all. If the norm is not
    /// finite, or if `update.only_measure` is set, no tensor changes.
    fn adamw(
        &self,
        tensors: &mut [GradTensor<'_, Self::Buffer>],
        squares: &[f64],
        update: &AdamW,
    ) -> Result<Update>;
}

/// Calls of a device that were recorded, see [`Device::record`].
pub trait Recording: Send + Sync + std::fmt::Debug {
    /// Executes the recorded calls.
    ///
    /// # Errors
    /// [`DeviceError::Argument`] if a buffer of the calls was dropped, or an error of the device.
    fn replay(&self) -> Result<()>;
}

/// For devices without recordings.
impl Recording for std::convert::Infallible {
    fn replay(&self) -> Result<()> {
        match *self {}
    }
}
