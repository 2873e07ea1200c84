//! Sink logits: choice of kernel, grid and parameters.

use super::bounds::{NONE, VECTOR, equal, int, pointer, product};
use super::head_norms::MOST_LANES;
use super::rows::{Grid, entry, launch};
use super::{Buffer, Driver, Gpu, Step};
use crate::cuda::kernels::File;
use crate::cuda::kernels::layer_params::SegattnSinkParams;
use crate::device::shared::spans::SpanBatch;
use crate::device::{DeviceError, Result, Rows, RowsMut, SinkLogits, SinkLogitsGrad};

const WARP: usize = 32;

/// The scaled output of the step's rows.
pub(super) fn forward<D: Driver>(
    gpu: &Gpu<D>,
    sinks: &SinkLogits<'_, Buffer<D>>,
    step: &Step<D>,
    y: &RowsMut<'_, Buffer<D>>,
) -> Result<()> {
    let batch = SpanBatch::of(&step.rows.spans);
    let (rows, width) = (batch.all_rows(), width(sinks)?);
    equal("rows of spans", step.rows.tokens.len(), rows)?;
    let params = SegattnSinkParams {
        span_start: step.span_starts(gpu)?,
        y: gpu.output(y, rows, width)?,
        ..params(gpu, sinks, &batch)?
    };
    let threads = product("elements of heads", &[rows, width])? / VECTOR;
    let entry = entry(File::SinkLogits, "sink_logits_bf16");
    launch(gpu, entry, Grid::Threads(threads), &params)
}

/// Its gradients.
pub(super) fn backward<D: Driver>(
    gpu: &Gpu<D>,
    sinks: &SinkLogits<'_, Buffer<D>>,
    grad: &SinkLogitsGrad<'_, Buffer<D>>,
) -> Result<()> {
    let batch = SpanBatch::of(grad.spans);
    let (rows, width, heads) = (batch.all_rows(), width(sinks)?, sinks.heads);
    let units = product("spans and heads", &[grad.spans.len(), heads.q])?;
    let starts = batch.offsets().iter().map(|row| int("rows", *row));
    let starts = gpu.upload(&starts.collect::<Result<Vec<_>>>()?)?;
    let params = SegattnSinkParams {
        span_start: pointer(&starts),
        d_y: gpu.input(&grad.d_y, rows, width)?,
        d_out: gpu.output(&grad.d_out, rows, width)?,
        d_lse: log_sums(gpu, &grad.d_lse.shared(), rows, heads.q)?,
        d_logits: gpu.exact(grad.d_logits, 0, units)?,
        ..params(gpu, sinks, &batch)?
    };
    let lanes = (heads.dim / VECTOR).next_power_of_two();
    let threads = product("lanes of heads", &[rows, heads.q, lanes])?;
    let [grad, sums] = ["sink_logits_grad_bf16", "sink_logits_sums_f32"];
    let stages = [(grad, threads), (sums, product("lanes", &[units, WARP])?)];
    for (name, threads) in stages {
        let entry = entry(File::SinkLogits, name);
        launch(gpu, entry, Grid::Threads(threads), &params)?;
    }
    Ok(())
}

/// Elements of a row, of heads that the kernels can take.
fn width<D: Driver>(sinks: &SinkLogits<'_, Buffer<D>>) -> Result<usize> {
    let (heads, most) = (sinks.heads, MOST_LANES * VECTOR);
    match heads.dim.is_multiple_of(VECTOR) && heads.dim <= most {
        true => product("elements of a row", &[heads.q, heads.dim]),
        false => {
            let expected = format!("a multiple of {VECTOR}, at most {most}");
            Err(DeviceError::argument("head_dim", expected, heads.dim))
        }
    }
}

/// What both passes read. The batch begins with row 0 of the buffers.
fn params<D: Driver>(
    gpu: &Gpu<D>,
    sinks: &SinkLogits<'_, Buffer<D>>,
    batch: &SpanBatch<'_>,
) -> Result<SegattnSinkParams> {
    let (rows, heads) = (batch.all_rows(), sinks.heads);
    equal("first row of spans", 0, batch.first_row())?;
    Ok(SegattnSinkParams {
        logits: gpu.exact(sinks.logits, 0, heads.q)?,
        lse: log_sums(gpu, &sinks.lse, rows, heads.q)?,
        span_start: std::ptr::null(),
        out: gpu.input(&sinks.out, rows, width(sinks)?)?,
        y: NONE,
        d_y: NONE,
        d_out: NONE,
        d_lse: std::ptr::null_mut(),
        d_logits: std::ptr::null_mut(),
        rows: rows as i64,
        spans: int("spans", batch.spans.len())?,
        q_heads: int("q_heads", heads.q)?,
        head_dim: int("head_dim", heads.dim)?,
    })
}

/// The log-sum-exp of rows, or its gradient.
fn log_sums<D: Driver>(
    gpu: &Gpu<D>,
    at: &Rows<'_, Buffer<D>>,
    rows: usize,
    heads: usize,
) -> Result<*mut f32> {
    gpu.exact(at.buffer, at.start, product("log-sum-exp", &[rows, heads])?)
}
