//! From the model's spans to plans of the operation: consecutive spans of equal length make one call, so that no
//! padding is computed.

use super::driver::Stream;
use super::{Buffer, Driver, Gpu, Step};
use crate::attention::Layout;
use crate::attention::cuda::{
    BackwardPlan, DeviceSlice, Dtype, ForwardPlan, Gates, Gradients, Lengths, Problem, Saved,
    Tensor,
};
use crate::device::shared::spans::{Sources, SpanBatch, span_batches};
use crate::device::{Attention, AttentionGrad, Result, Rows, RowsMut};

/// Runs the operation forward over all spans, which are the step's; `number` is the call's.
pub(super) fn forward<D: Driver>(
    gpu: &Gpu<D>,
    call: &Attention<'_, Buffer<D>>,
    (step, number): (&mut Step<D>, usize),
    out: &RowsMut<'_, Buffer<D>>,
    lse: &RowsMut<'_, Buffer<D>>,
) -> Result<()> {
    assert_eq!(call.spans, step.rows.spans, "the step's spans");
    let (heads, reach) = (call.heads, step.rows.reach);
    for (launch, batch) in span_batches(call.spans).iter().enumerate() {
        let [segment_len, query_start] = step.lengths(batch.spans.start);
        let sources = Sources::of(call, batch).reaching(reach.min(call.cache.rows[0]));
        let lengths = Lengths::Growing {
            segment_len,
            query_start,
            prior_len: &sources.prior_len,
            past_len: sources.past_len(),
        };
        let problem = &problem(call, batch, &sources, lengths);
        let out = tensor(out.buffer, out.start, out.stride, batch, heads.dim);
        let lse = log_sums(lse.buffer, lse.start, lse.stride, batch, heads.q);
        let plan = ForwardPlan::new(problem, &out, lse, None, gpu.driver().kernels())?;
        let workspace = gpu.block(plan.workspace_bytes())?;
        let slice = DeviceSlice::new(workspace.address, plan.workspace_bytes());
        let values = step.tell(gpu, [number, launch], plan.values())?;
        // SAFETY: the tensors lie in live buffers, which the plan has checked, and the step's lengths are those of its
        // spans; the workspace is nobody else's, and whoever gets it next uses it after this call.
        unsafe { plan.launch_with(&mut Stream(gpu.driver()), values, slice)? };
    }
    Ok(())
}

/// Runs the operation backward over all spans.
pub(super) fn backward<D: Driver>(
    gpu: &Gpu<D>,
    call: &Attention<'_, Buffer<D>>,
    grad: &AttentionGrad<'_, Buffer<D>>,
) -> Result<()> {
    let (heads, prior) = (call.heads, call.cache.rows[1]);
    for batch in &span_batches(call.spans) {
        let sources = Sources::of(call, batch);
        let lengths = Lengths::Host {
            segment_len: &sources.segment_len,
            prior_len: &sources.prior_len,
            past_len: sources.past_len(),
            query_start: sources.query_start(),
        };
        let problem = &problem(call, batch, &sources, lengths);
        let read =
            |rows: &Rows<'_, _>| tensor(rows.buffer, rows.start, rows.stride, batch, heads.dim);
        let write =
            |rows: &RowsMut<'_, _>| tensor(rows.buffer, rows.start, rows.stride, batch, heads.dim);
        let tail = |buffer: &Buffer<D>| {
            let start = batch.spans.start * prior * heads.kv * heads.dim;
            let shape = [batch.spans.len(), prior, heads.kv, heads.dim];
            let DeviceSlice { data, len } = buffer.slice(start);
            let layout = Layout::packed(shape);
            Tensor { data, len, layout }
        };
        let (first, count) = (batch.spans.start * heads.q, batch.spans.len() * heads.q);
        let saved = Saved {
            out: read(&grad.out),
            lse: log_sums(
                grad.lse.buffer,
                grad.lse.start,
                grad.lse.stride,
                batch,
                heads.q,
            ),
            d_out: read(&grad.d_out),
            d_lse: None,
        };
        let gradients = Gradients {
            d_q: write(&grad.d_q),
            d_k: write(&grad.d_k),
            d_v: write(&grad.d_v),
            d_prior: grad.d_prior.as_ref().map(|(k, v)| (tail(k), tail(v))),
            d_past_gate: DeviceSlice::new(grad.d_past_gate.address(first), count),
        };
        let plan = BackwardPlan::new(problem, &saved, &gradients, gpu.driver().kernels())?;
        let workspace = gpu.block(plan.workspace_bytes())?;
        let slice = DeviceSlice::new(workspace.address, plan.workspace_bytes());
        // SAFETY: as in the forward.
        unsafe { plan.run(&mut Stream(gpu.driver()), slice)? };
    }
    Ok(())
}

/// A batch's rows of heads.
fn tensor<D: Driver>(
    buffer: &Buffer<D>,
    start: usize,
    stride: usize,
    batch: &SpanBatch,
    head_dim: usize,
) -> Tensor<'static> {
    let DeviceSlice { data, len } = buffer.slice(start + batch.row * stride);
    let layout = batch.layout(stride, head_dim);
    Tensor { data, len, layout }
}

/// A batch's log-sum-exp.
fn log_sums<D: Driver>(
    buffer: &Buffer<D>,
    start: usize,
    stride: usize,
    batch: &SpanBatch,
    heads: usize,
) -> DeviceSlice {
    let count = batch.spans.len() * batch.rows * heads;
    DeviceSlice::new(buffer.address(start + batch.row * stride), count)
}

/// The problem of a batch.
fn problem<'a, D: Driver>(
    call: &Attention<'a, Buffer<D>>,
    batch: &'a SpanBatch,
    sources: &'a Sources,
    lengths: Lengths<'a>,
) -> Problem<'a> {
    let (heads, cache) = (call.heads, call.cache);
    let view = |buffer: &Buffer<D>, source: usize| {
        let DeviceSlice { data, len } = buffer.slice(0);
        let layout = sources.layout(source);
        Tensor { data, len, layout }
    };
    Problem {
        dtype: Dtype::Bf16,
        batch: batch.spans.len(),
        q_heads: heads.q,
        kv_heads: heads.kv,
        head_dim: heads.dim,
        q: tensor(call.q.buffer, call.q.start, call.q.stride, batch, heads.dim),
        k: view(&cache.k, 0),
        v: view(&cache.v, 0),
        prior_k: view(&cache.prior_k, 1),
        prior_v: view(&cache.prior_v, 1),
        past_k: view(&cache.past_k, 2),
        past_v: view(&cache.past_v, 2),
        lengths,
        past_gate: Gates::Host(call.past_gate),
        prior_heads: call.prior_heads,
        scale: None,
    }
}
