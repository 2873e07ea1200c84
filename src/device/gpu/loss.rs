//! Losses of rows of logits and their gradients: parameters of `kernels/loss.cu`.

use super::bounds::{NONE, below, equal, int, of_kind, pointer, rows_at};
use super::rows::{Grid, entry, launch, row_threads};
use super::{Buffer, Driver, Gpu};
use crate::cuda::kernels::File;
use crate::cuda::kernels::layer_params::{SegattnDivergenceParams, SegattnLossParams, SegattnRows};
use crate::device::{Kind, Lesson, Result, Rows, RowsMut};

/// Rows of logits in f32.
fn exact_rows<D: Driver>(
    gpu: &Gpu<D>,
    logits: &Rows<'_, Buffer<D>>,
    rows: usize,
    vocab: usize,
) -> Result<SegattnRows> {
    of_kind(logits.buffer, Kind::Exact)?;
    let at = gpu.rows(logits, rows, vocab)?;
    Ok(rows_at(at, logits.stride))
}

/// Where the gradient of rows of logits goes: bf16 elements are half as long, so twice as many lie between two rows.
fn in_place(logits: SegattnRows) -> SegattnRows {
    SegattnRows {
        stride: 2 * logits.stride,
        ..logits
    }
}

/// Writes log-probabilities of targets to `scores`. With `scales`, one a row, the gradient overwrites the logits.
pub(super) fn log_probabilities<D: Driver>(
    gpu: &Gpu<D>,
    logits: RowsMut<'_, Buffer<D>>,
    vocab: usize,
    targets: &[u32],
    scales: Option<&[f64]>,
    scores: RowsMut<'_, Buffer<D>>,
) -> Result<()> {
    let rows = targets.len();
    let at = exact_rows(gpu, &logits.shared(), rows, vocab)?;
    below("target", targets.iter().map(|t| *t as usize).max(), vocab)?;
    let log_probability = gpu.exact(scores.buffer, scores.start, rows)?;
    if let Some(scales) = scales {
        equal("scales", rows, scales.len())?;
    }
    let ids = gpu.upload(targets)?;
    let narrow = |scales: &[f64]| scales.iter().map(|s| *s as f32).collect::<Vec<_>>();
    let factors = scales.map(|s| gpu.upload(&narrow(s))).transpose()?;
    let params = SegattnLossParams {
        logits: at,
        targets: pointer(&ids),
        scales: factors.as_ref().map_or(std::ptr::null(), pointer),
        log_probability,
        d_logits: match scales {
            Some(_) => in_place(at),
            None => NONE,
        },
        rows: rows as i64,
        vocab: int("vocab", vocab)?,
    };
    let grid = Grid::Sized(rows, row_threads(vocab));
    launch(gpu, entry(File::Loss, "cross_entropy_bf16"), grid, &params)?;
    logits.buffer.half_rows = scales.is_some();
    Ok(())
}

/// Writes log-probabilities and divergences from the teacher's rows to `scores`. The gradient overwrites the logits.
pub(super) fn divergences<D: Driver>(
    gpu: &Gpu<D>,
    logits: RowsMut<'_, Buffer<D>>,
    vocab: usize,
    targets: &[u32],
    lesson: &Lesson<'_, Buffer<D>>,
    [scores, divergences]: [RowsMut<'_, Buffer<D>>; 2],
) -> Result<()> {
    let rows = targets.len();
    let at = exact_rows(gpu, &logits.shared(), rows, vocab)?;
    let teacher = exact_rows(gpu, &lesson.teacher, rows, vocab)?;
    below("target", targets.iter().map(|t| *t as usize).max(), vocab)?;
    equal("scales", rows, lesson.scales.len())?;
    let ids = gpu.upload(targets)?;
    let scales: Vec<f32> = lesson.scales.iter().flatten().map(|s| *s as f32).collect();
    let scales = gpu.upload(&scales)?;
    let params = SegattnDivergenceParams {
        logits: at,
        teacher,
        targets: pointer(&ids),
        scales: pointer(&scales),
        log_probability: gpu.exact(scores.buffer, scores.start, rows)?,
        divergence: gpu.exact(divergences.buffer, divergences.start, rows)?,
        d_logits: in_place(at),
        rows: rows as i64,
        vocab: int("vocab", vocab)?,
        temperature: lesson.temperature as f32,
        inverse: (1.0 / lesson.temperature) as f32,
    };
    let grid = Grid::Sized(rows, row_threads(vocab));
    launch(gpu, entry(File::Loss, "divergence_bf16"), grid, &params)?;
    logits.buffer.half_rows = true;
    Ok(())
}
