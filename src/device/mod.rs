//! What the model needs from a device, as one trait.
//!
//! A device knows buffers of numbers, GEMMs, row-wise functions, segment attention, the
//! pool of past keys and values, and the optimizer's update. It knows no layer and no model. Three
//! devices exist: [`cpu`] (f32, fast), [`gpu`] (bf16 activations, over a driver or a simulated GPU),
//! and [`mod@reference`] (f64, written for reading). The model's own code runs on each, so that the
//! model is checked in f64, the CPU against the reference, and the GPU against the CPU.
//!
//! **Bits.** Whatever a device computes for a row depends on that row's own inputs only: never on
//! how many rows there are, which rows stand beside it, or how many threads work
//! (docs/contract.md, section 4).

pub mod cpu;
mod error;
pub mod gpu;
mod host_memory;
mod past;
pub mod reference;
pub mod sampler;
mod sampling;
mod shared;
mod types;

use std::ops::Range;

pub use error::{DeviceError, OutOfMemory, Purpose};
pub use host_memory::HostMemory;
pub use past::{PastPool, SelectedBlocks};
pub use sampling::{Sampled, Samplers};
pub use shared::blocks::HostBlocks;
pub use shared::samplers::HostSamplers;
pub use types::{
    Accumulate, AdamW, Attention, AttentionGrad, GradTensor, Heads, KeyStore, Kind, PastHeads,
    Probes, Rows, RowsMut, SegmentCache, Selection, SlotSpan, StepRows, Update,
};

/// Results of device calls.
pub type Result<T> = std::result::Result<T, DeviceError>;

/// A device that can run the model: see the module's documentation.
///
/// Shapes are the caller's promise: every method may panic on a range outside its buffer, since the
/// model has validated its inputs once.
pub trait Device: Sized + Send + Sync + std::fmt::Debug {
    /// Memory on the device: a run of numbers, in the device's own precision for their [`Kind`].
    type Buffer: Send + Sync + std::fmt::Debug;
    /// A weight `[out, in]` packed for GEMMs.
    type Matrix: Send + Sync + std::fmt::Debug;
    /// Keys and values of completed tokens, see [`PastPool`].
    type Pool: PastPool<Self>;
    /// Blocks that retrieval has selected, see [`SelectedBlocks`].
    type Blocks: SelectedBlocks<Self>;
    /// What a step's rows need of the host, where the device's calls read it.
    type Step: Send + Sync + std::fmt::Debug + AsRef<StepRows>;
    /// Samplers for the sequences of a batch, see [`Samplers`].
    type Samplers: Samplers<Self>;
    /// Recorded calls, see [`Device::record`].
    type Recording: Recording;

    /// Rows of logits that exist at a time.
    const LOGIT_ROWS: usize = 128;

    /// One line for people: what this device is.
    fn description(&self) -> String;

    /// Runs `work`, which makes many calls: where a device can make them cheaper together, it does.
    fn together<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        work()
    }

    /// Records the calls that `work` makes, without making them; [`Recording::replay`] makes them, as often as asked.
    /// `None`, and `work` is not called, on a device that gains nothing by it.
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
    /// A buffer of `len` numbers that may be anything: whoever asks for it writes before they read.
    fn empty(&self, kind: Kind, len: usize) -> Result<Self::Buffer> {
        self.zeros(kind, len)
    }
    /// Writes `values` from element `start` on.
    fn write(&self, buffer: &mut Self::Buffer, start: usize, values: &[f32]) -> Result<()>;
    /// Reads a range back to the host.
    fn read(&self, buffer: &Self::Buffer, range: Range<usize>) -> Result<Vec<f32>>;
    /// Elements in the buffer.
    fn len(&self, buffer: &Self::Buffer) -> usize;
    /// Reads a range back in all the precision that it was computed in.
    fn read_wide(&self, buffer: &Self::Buffer, range: Range<usize>) -> Result<Vec<f64>> {
        Ok(self
            .read(buffer, range)?
            .into_iter()
            .map(f64::from)
            .collect())
    }
    /// Bytes that an element of this kind takes on this device.
    fn element_bytes(&self, kind: Kind) -> usize;
    /// Sets every element to zero.
    fn clear(&self, buffer: &mut Self::Buffer) -> Result<()>;
    /// `dst = src` (or `dst += src`) for `rows` rows of `width` elements.
    fn copy(
        &self,
        src: Rows<'_, Self::Buffer>,
        dst: RowsMut<'_, Self::Buffer>,
        rows: usize,
        width: usize,
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
    /// Takes over changed values.
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

    /// Puts what the host knows of a step's rows on the device, in one go.
    fn step(&self, rows: StepRows) -> Result<Self::Step>;
    /// The same for the next step, in the same place: as many spans, of as many rows each.
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
    /// `y = x / rms(x) * weight`; `rstd[first..]` receives `1 / rms(x)` of each row.
    #[allow(clippy::too_many_arguments)]
    fn rms_norm(
        &self,
        x: Rows<'_, Self::Buffer>,
        rows: usize,
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
        rows: usize,
        weight: &Self::Buffer,
        d_x: RowsMut<'_, Self::Buffer>,
    ) -> Result<()>;
    /// `d_weight += sum over rows of d_y * x * rstd`, rows in ascending order.
    fn rms_norm_weight_grad(
        &self,
        d_y: Rows<'_, Self::Buffer>,
        x: Rows<'_, Self::Buffer>,
        rstd: Rows<'_, Self::Buffer>,
        rows: usize,
        d_weight: &mut Self::Buffer,
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
    /// Takes the step's rows `[q | k | v]` apart: rotated queries to `q`, and in `store` keys rotated
    /// and not, values, and queries before rotation as probes.
    fn split_qkv(
        &self,
        qkv: Rows<'_, Self::Buffer>,
        heads: Heads,
        tables: (&Self::Buffer, &Self::Buffer),
        step: &Self::Step,
        q: RowsMut<'_, Self::Buffer>,
        store: KeyStore<'_, Self::Buffer>,
    ) -> Result<()> {
        shared::qkv::split(self, qkv, heads, tables, step.as_ref(), q, store)
    }
    /// The way back of [`Device::split_qkv`] for gradients: `d_qkv = [d_q | d_k | d_v]`, the first two turned back.
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
    /// Log-probability of each row's target under `softmax(logits[r])`, into `scores`. With `scale`,
    /// the logits are replaced by `scale * (softmax - onehot)`, the gradient of
    /// `-scale * log-probability`. Nobody waits: the host reads the scores when it needs them.
    fn log_probabilities(
        &self,
        logits: RowsMut<'_, Self::Buffer>,
        vocab: usize,
        targets: &[u32],
        scale: Option<f64>,
        scores: RowsMut<'_, Self::Buffer>,
    ) -> Result<()>;

    /// Segment attention, forward: `out [rows, q_heads * head_dim]`, and of each span `lse [q_heads, rows]`, the spans'
    /// blocks of `lse` one after the other. The spans are the step's. `number` tells the step's calls of attention
    /// apart.
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

    /// The norm of all gradients, and one AdamW update of every tensor unless the norm is not
    /// finite or `update.only_measure` is set; nothing is touched then.
    fn adamw(&self, tensors: &mut [GradTensor<'_, Self::Buffer>], update: &AdamW)
    -> Result<Update>;
}

/// Calls of a device that were recorded, see [`Device::record`].
pub trait Recording: Send + Sync + std::fmt::Debug {
    /// Makes the recorded calls.
    ///
    /// # Errors
    /// [`DeviceError::Argument`] where a buffer of theirs has been dropped, or what the device says.
    fn replay(&self) -> Result<()>;
}

/// Of devices that record nothing.
impl Recording for std::convert::Infallible {
    fn replay(&self) -> Result<()> {
        match *self {}
    }
}
