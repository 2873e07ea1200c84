//! From the model's spans to plans of the operation: consecutive spans of equal length make one call, so that no
//! padding is computed.

use super::driver::Stream;
use super::{Buffer, Driver, Gpu, Step};
use crate::attention::cuda::{BackwardPlan, DeviceSlice, Dtype, ForwardPlan, Tensor};
use crate::attention::{Gradients, Layout, Len, Lengths, Problem, Saved};
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
        let sources = Sources::of(call, batch).reaching(reach.min(call.cache.rows.current));
        let problem = problem(call, batch, &sources);
        // Segments grow from step to step, and so their lengths are the device's; the rest changes only with the
        // segment.
        let lengths = problem.lengths.query_start(Len::Device(query_start));
        let problem = &problem.lengths(Lengths {
            segment_len: Some(Len::Device(segment_len)),
            ..lengths
        });
        let out = tensor(
            out.buffer,
            out.start,
            out.stride,
            batch,
            [heads.q, heads.dim],
        );
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
    let (heads, prior) = (call.heads, call.cache.rows.prior);
    let (q, kv) = ([heads.q, heads.dim], [heads.kv, heads.dim]);
    for batch in &span_batches(call.spans) {
        let sources = Sources::of(call, batch);
        let problem = &problem(call, batch, &sources);
        let read = |rows: &Rows<'_, _>| tensor(rows.buffer, rows.start, rows.stride, batch, q);
        let write = |rows: &RowsMut<'_, _>, heads| {
            tensor(rows.buffer, rows.start, rows.stride, batch, heads)
        };
        let tail = |buffer: &Buffer<D>| {
            let start = batch.spans.start * prior * heads.kv * heads.dim;
            let shape = [batch.spans.len(), prior, heads.kv, heads.dim];
            strided(buffer, start, Layout::packed(shape))
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
            d_q: write(&grad.d_q, q),
            d_k: write(&grad.d_k, kv),
            d_v: write(&grad.d_v, kv),
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
    heads: [usize; 2],
) -> Tensor<'static> {
    strided(
        buffer,
        start + batch.row * stride,
        batch.layout(stride, heads),
    )
}

/// The rows of a buffer of activations from an element on.
fn strided<'a, D: Driver>(buffer: &Buffer<D>, start: usize, layout: Layout<'a>) -> Tensor<'a> {
    let DeviceSlice { data, len } = buffer.slice(start);
    Tensor {
        data,
        len,
        dtype: Dtype::Bf16,
        layout,
    }
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
    batch: &SpanBatch,
    sources: &'a Sources,
) -> Problem<'a, Tensor<'a>> {
    let (rows, heads) = (call.q, call.heads);
    let q = tensor(
        rows.buffer,
        rows.start,
        rows.stride,
        batch,
        [heads.q, heads.dim],
    );
    sources.problem(call, q, |buffer, layout| strided(buffer, 0, layout))
}
