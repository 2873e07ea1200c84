//! What the model needs from a device, as one trait.
//!
//! A device knows buffers of numbers, matrix products, row-wise functions, segment attention, the
//! pool of past keys and values, and the optimizer's update. It knows no layer and no model. Three
//! devices exist: [`cpu`] (f32, fast), [`gpu`] (bf16 activations, over a driver or a simulated GPU),
//! and [`mod@reference`] (f64, written for reading). The model's own code runs on each, so that the
//! model is checked in f64, the CPU against the reference, and the GPU against the CPU.
//!
//! **Bits.** Whatever a device computes for a row depends on that row's own inputs only: never on
//! how many rows there are, which rows stand beside it, or how many threads work
//! (segment-attention contract, section 4).

pub mod cpu;
mod error;
pub mod gpu;
mod host_memory;
pub mod reference;
mod runs;
pub mod sampler;
mod sampling;
mod split;
mod types;

use std::ops::Range;

pub use error::{DeviceError, OutOfMemory, Purpose};
pub use host_memory::HostMemory;
pub use sampling::HostSamplers;
pub use types::{
    AdamW, Attention, AttentionGrad, Fold, GradTensor, Heads, KeyStore, Kind, PastHeads, Pick,
    Probes, Rows, RowsMut, Sampled, SegmentCache, SlotSpan, StepRows, Update,
};

use sampler::SamplerConfig;

/// Results of device calls.
pub type Result<T> = std::result::Result<T, DeviceError>;

/// A device that can run the model: see the module's documentation.
///
/// Shapes are the caller's promise: every method may panic on a range outside its buffer, since the
/// model has validated its inputs once.
pub trait Device: Send + Sync + std::fmt::Debug {
    /// Memory on the device: a run of numbers, in the device's own precision for their [`Kind`].
    type Buffer: Send + Sync + std::fmt::Debug;
    /// A weight `[out, in]` prepared for products.
    type Matrix: Send + Sync + std::fmt::Debug;
    /// Keys and values of all completed tokens of one sequence and layer, for the KV heads that
    /// read the past, before rotation.
    type Pool: Send + Sync + std::fmt::Debug;
    /// Tokens that the heads of a pool have chosen, in order of position.
    type Picks: Send + Sync + std::fmt::Debug;
    /// What a step's rows need of the host, where the device's calls read it.
    type Step: Send + Sync + std::fmt::Debug + AsRef<StepRows>;
    /// How the sequences of a batch choose tokens, and what they have chosen last.
    type Samplers: Send + Sync + std::fmt::Debug;
    /// Calls that can be made again all at once.
    type Recording: Send + Sync + std::fmt::Debug;

    /// Rows of logits that exist at a time.
    const LOGIT_ROWS: usize = 128;

    /// One line for people: what this device is.
    fn description(&self) -> String;

    /// Runs `work`, which makes many calls: where a device can make them cheaper together, it does.
    fn together<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        work()
    }

    /// Records the calls that `work` makes, without making them; [`Device::replay`] makes them, as often as asked. `None`,
    /// and `work` not called, where a device has nothing to win.
    ///
    /// Only calls that nobody on the host waits for can be recorded, and that write nothing from there: those between
    /// [`Device::renew`] and [`Device::sampled`], after a first step with the same objects that was not recorded. Every
    /// buffer in them has to be there at each replay. Calls of other threads meanwhile would be recorded as well.
    fn record<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<Option<(T, Self::Recording)>>;
    /// Makes the recorded calls.
    fn replay(&self, recording: &Self::Recording) -> Result<()>;

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
        fold: Fold,
    ) -> Result<()>;

    /// Prepares rows `[0, out)` of the row-major weight in `values` for products;
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
        fold: Fold,
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
        self.linear(x, rows, weight, y.reborrow(), Fold::Set)?;
        self.copy(residual, y, rows, width, Fold::Add)
    }
    /// `d_x (+)= d_y w`.
    fn linear_input_grad(
        &self,
        d_y: Rows<'_, Self::Buffer>,
        rows: usize,
        weight: &Self::Matrix,
        d_x: RowsMut<'_, Self::Buffer>,
        fold: Fold,
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
        fold: Fold,
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
        split::split(self, qkv, heads, tables, step.as_ref(), q, store)
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
        split::join(self, d, heads, tables, angles, d_qkv)
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

    /// Samplers for the sequences of a batch, one random stream each. The repetition penalty sees their histories, tokens
    /// below `vocab`, and what they choose.
    fn samplers(
        &self,
        config: &SamplerConfig,
        streams: &[u64],
        histories: &[&[u32]],
        vocab: usize,
    ) -> Result<Self::Samplers>;
    /// Says which sequences of the batch the next calls choose for.
    fn select(&self, samplers: &mut Self::Samplers, sequences: &[usize]) -> Result<()>;
    /// Chooses a token for each sequence selected, from its row of `logits [sequences, vocab]`, which stay as they are.
    fn sample(&self, logits: &mut Self::Buffer, samplers: &mut Self::Samplers) -> Result<()>;
    /// What was chosen, in the order of the selection; the host waits for it. `logits` are those of the last
    /// [`Device::sample`].
    fn sampled(&self, logits: &Self::Buffer, samplers: &Self::Samplers) -> Result<Vec<Sampled>>;

    /// Segment attention, forward: `out [rows, q_heads * head_dim]` and `lse [rows, q_heads]`, rows
    /// as in the spans, which are the step's. `number` tells the step's calls of attention apart.
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

    /// An empty pool for `heads` heads of `head_dim`, which will be appended to `run` tokens at a time.
    fn pool(&self, heads: usize, head_dim: usize, run: usize) -> Result<Self::Pool>;
    /// Tokens in the pool.
    fn pool_len(&self, pool: &Self::Pool) -> usize;
    /// Appends `rows` tokens: the `heads` named, from rows of `kv_heads * head_dim`.
    fn pool_append(
        &self,
        pool: &mut Self::Pool,
        heads: &[usize],
        k: Rows<'_, Self::Buffer>,
        v: Rows<'_, Self::Buffer>,
        rows: usize,
    ) -> Result<()>;
    /// Keys, then values, each `[tokens, heads, head_dim]`, of a range of whole runs: for saving.
    fn pool_read(&self, pool: &Self::Pool, tokens: Range<usize>) -> Result<(Vec<f32>, Vec<f32>)>;
    /// Appends a run that [`Device::pool_read`] gave.
    fn pool_write(&self, pool: &mut Self::Pool, k: &[f32], v: &[f32]) -> Result<()>;
    /// Picks of these tokens, for each head of a pool: whole blocks of `block_len`, in order.
    fn picks(&self, tokens: &[Vec<usize>], block_len: usize) -> Result<Self::Picks>;
    /// How many tokens a head of the pool has picked.
    fn pick_count(&self, picks: &Self::Picks, head: usize) -> usize;
    /// The tokens of every head: for saving.
    fn pick_tokens(&self, picks: &Self::Picks) -> Result<Vec<Vec<usize>>>;
    /// Retrieval (contract section 2): for every head of the pool the best blocks for its probes, in
    /// order of position.
    fn pick_blocks(
        &self,
        pool: &Self::Pool,
        probes: &Probes<'_, Self::Buffer>,
        pick: &Pick<'_>,
    ) -> Result<Self::Picks>;
    /// Copies each head's picked tokens to the rows' columns of its KV head: keys rotated, the last
    /// one by the angles in the row of the tables before `ends[head]`.
    fn pool_gather(
        &self,
        pool: &Self::Pool,
        picks: &Self::Picks,
        past: &PastHeads<'_>,
        tables: (&Self::Buffer, &Self::Buffer),
        k: RowsMut<'_, Self::Buffer>,
        v: RowsMut<'_, Self::Buffer>,
    ) -> Result<()>;

    /// The norm of all gradients, and one AdamW update of every tensor unless the norm is not
    /// finite or `update.only_measure` is set; nothing is touched then.
    fn adamw(&self, tensors: &mut [GradTensor<'_, Self::Buffer>], update: &AdamW)
    -> Result<Update>;
}
