//! Plans of the attention operation for the spans of a step: one call, whatever their lengths.

use super::bounds::{below, equal, int, of_kind, product};
use super::driver::Stream;
use super::{Buffer, Driver, Gpu, Step};
use crate::attention::cuda::{BackwardPlan, DeviceSlice, Dtype, ForwardPlan, Tensor};
use crate::attention::{Gradients, Layout, Len, Lengths, Problem, Saved, Source};
use crate::device::shared::spans::{Sources, SpanBatch};
use crate::device::{Attention, AttentionGrad, DeviceError, Kind, Result, Rows, RowsMut};

/// Runs the operation forward over all spans of the step. `number` is the index of the call within the step.
pub(super) fn forward<D: Driver>(
    gpu: &Gpu<D>,
    call: &Attention<'_, Buffer<D>>,
    (step, number): (&mut Step<D>, usize),
    out: &RowsMut<'_, Buffer<D>>,
    lse: &RowsMut<'_, Buffer<D>>,
) -> Result<()> {
    check_call(call)?;
    if call.spans != step.rows.spans {
        let [expected, got] = [&step.rows.spans[..], call.spans].map(|s| format!("{s:?}"));
        return Err(DeviceError::argument("spans of the step", expected, got));
    }
    let (heads, reach) = (call.heads, step.rows.reach);
    let batch = SpanBatch::of(call.spans);
    let [segment_len, query_start] = step.lengths(gpu)?;
    let sources = Sources::of(call).reaching(reach.min(call.cache.rows.current));
    let problem = problem(gpu, call, &batch, &sources)?;
    // Segments grow from step to step, and so their lengths are the device's; the rest changes only with the segment.
    let lengths = problem.lengths.query_start(Len::Device(query_start));
    let problem = &problem.lengths(Lengths {
        segment_len: Some(Len::Device(segment_len)),
        ..lengths
    });
    let out = tensor(gpu, &out.shared(), &batch, [heads.q, heads.dim])?;
    let lse = log_sums(gpu, &lse.shared(), &batch, heads.q)?;
    let plan = ForwardPlan::new(problem, &out, lse, None, gpu.driver().kernels())?;
    let workspace = gpu.block(plan.workspace_bytes())?;
    let slice = DeviceSlice::new(workspace.address(), plan.workspace_bytes());
    let geometry = geometry(gpu, call, &sources)?;
    let values = step.place_values(gpu, number, geometry, plan.values())?;
    // SAFETY: the tensors lie in live buffers, which the plan has checked, and the step's lengths are those of its
    // spans; the workspace is nobody else's, and whoever gets it next uses it after this call.
    unsafe { plan.launch_with(&mut Stream(gpu.driver()), values, slice)? };
    Ok(())
}

/// Runs the operation backward over all spans.
pub(super) fn backward<D: Driver>(
    gpu: &Gpu<D>,
    call: &Attention<'_, Buffer<D>>,
    grad: &AttentionGrad<'_, Buffer<D>>,
) -> Result<()> {
    check_call(call)?;
    let (heads, prior) = (call.heads, call.cache.rows.prior);
    let (q, kv) = ([heads.q, heads.dim], [heads.kv, heads.dim]);
    let (batch, sources) = (SpanBatch::of(call.spans), Sources::of(call));
    let problem = &problem(gpu, call, &batch, &sources)?;
    let read = |rows: &Rows<'_, _>| tensor(gpu, rows, &batch, q);
    let write = |rows: &RowsMut<'_, _>, heads| tensor(gpu, &rows.shared(), &batch, heads);
    let tail = |buffer: &Buffer<D>| {
        let shape = [batch.spans.len(), prior, heads.kv, heads.dim];
        strided(gpu, buffer, 0, Layout::packed(shape))
    };
    let saved = Saved {
        out: read(&grad.out)?,
        lse: log_sums(gpu, &grad.lse, &batch, heads.q)?,
        d_out: read(&grad.d_out)?,
        d_lse: match &grad.d_lse {
            Some(d_lse) => Some(log_sums(gpu, d_lse, &batch, heads.q)?),
            None => None,
        },
    };
    let gates = product("gate gradients", &[batch.spans.len(), heads.q])?;
    let gradients = Gradients {
        d_q: write(&grad.d_q, q)?,
        d_k: write(&grad.d_k, kv)?,
        d_v: write(&grad.d_v, kv)?,
        d_prior: match &grad.d_prior {
            Some((k, v)) => Some((tail(k)?, tail(v)?)),
            None => None,
        },
        d_past_gate: DeviceSlice::new(gpu.exact(grad.d_past_gate, 0, gates)? as u64, gates),
    };
    let plan = BackwardPlan::new(problem, &saved, &gradients, gpu.driver().kernels())?;
    let workspace = gpu.block(plan.workspace_bytes())?;
    let slice = DeviceSlice::new(workspace.address(), plan.workspace_bytes());
    // SAFETY: as in the forward.
    unsafe { plan.run(&mut Stream(gpu.driver()), slice)? };
    Ok(())
}

/// Checks that the cache has the slots of all spans.
fn check_call<D: Driver>(call: &Attention<'_, Buffer<D>>) -> Result<()> {
    let (heads, cache) = (call.heads, call.cache);
    let count = cache.prior_len.len();
    let past_lengths = product("slots and KV heads", &[count, heads.kv])?;
    equal(
        "past lengths of the slots",
        past_lengths,
        cache.past_len.len(),
    )?;
    if !cache.sink_len.is_empty() {
        let count = cache.sink_len.len();
        equal("sink lengths of the slots", past_lengths, count)?;
    }
    below("slot", call.spans.iter().map(|span| span.slot).max(), count)?;
    for source in Source::ALL {
        let sizes = [count, cache.rows[source], heads.kv, heads.dim];
        product("rows of slots", &sizes)?;
    }
    for span in call.spans {
        int("rows of a segment", span.start.saturating_add(span.rows))?;
    }
    Ok(())
}

/// Addresses and sizes of the slots, against which the uploaded values of a launch are checked.
fn geometry<D: Driver>(
    gpu: &Gpu<D>,
    call: &Attention<'_, Buffer<D>>,
    sources: &Sources,
) -> Result<Vec<u64>> {
    let (heads, cache) = (call.heads, call.cache);
    let buffers = [
        &cache.k,
        &cache.v,
        &cache.prior_k,
        &cache.prior_v,
        &cache.past_k,
        &cache.past_v,
    ];
    let mut geometry = Vec::with_capacity(2 * buffers.len() + 8);
    for buffer in buffers {
        geometry.extend([gpu.range(buffer, 0, 0)?, buffer.len as u64]);
    }
    let rows = Source::ALL.map(|source| sources.layout(source).rows);
    // The rows of the spans are those of the step.
    let sizes = [call.spans.len(), heads.q, heads.kv, heads.dim];
    geometry.extend(rows.into_iter().chain(sizes).map(|size| size as u64));
    Ok(geometry)
}

/// A batch's rows of heads.
fn tensor<'a, D: Driver>(
    gpu: &Gpu<D>,
    rows: &Rows<'_, Buffer<D>>,
    batch: &'a SpanBatch<'_>,
    heads: [usize; 2],
) -> Result<Tensor<'a>> {
    let layout = batch.layout(rows.stride, heads);
    let start = batch.start(rows.start, rows.stride);
    strided(gpu, rows.buffer, start, layout)
}

/// Rows of a buffer of activations from an element on.
fn strided<'a, D: Driver>(
    gpu: &Gpu<D>,
    buffer: &Buffer<D>,
    start: usize,
    layout: Layout<'a>,
) -> Result<Tensor<'a>> {
    of_kind(buffer, Kind::Activation)?;
    let DeviceSlice { data, len } = gpu.slice(buffer, start)?;
    Ok(Tensor {
        data,
        len,
        dtype: Dtype::Bf16,
        layout,
    })
}

/// A batch's log-sum-exp.
fn log_sums<D: Driver>(
    gpu: &Gpu<D>,
    rows: &Rows<'_, Buffer<D>>,
    batch: &SpanBatch<'_>,
    heads: usize,
) -> Result<DeviceSlice> {
    let count = product("log-sum-exp", &[batch.all_rows(), heads])?;
    let start = batch.start(rows.start, rows.stride);
    Ok(DeviceSlice::new(
        gpu.exact(rows.buffer, start, count)? as u64,
        count,
    ))
}

/// The problem of a batch.
fn problem<'a, D: Driver>(
    gpu: &Gpu<D>,
    call: &Attention<'a, Buffer<D>>,
    batch: &'a SpanBatch<'_>,
    sources: &'a Sources,
) -> Result<Problem<'a, Tensor<'a>>> {
    let q = tensor(gpu, &call.q, batch, [call.heads.q, call.heads.dim])?;
    sources.problem(call, q, |buffer, layout| strided(gpu, buffer, 0, layout))
}
