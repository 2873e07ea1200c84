//! [`Device`] for the CPU. Each call goes to a function of a sibling module.

use std::convert::Infallible;
use std::ops::Range;

use rayon::prelude::*;

use super::divergence::{RowLesson, divergence_row};
use super::rows::{self, Angles};
use super::{Buffer, Cpu, PackedMatrix, Pool, adamw, gemm, sinks};
use crate::device::{
    Accumulate, AdamW, Attention, AttentionGrad, Device, GradTensor, HostBlocks, HostSamplers,
    Kind, Lesson, Result, Rows, RowsMut, SinkLogits, SinkLogitsGrad, StepRows, Update,
    shared::spans,
};
use crate::isa::Isa;

/// Elements copied by one task.
const COPY_TASK: usize = 1 << 16;

impl<'a> Rows<'a, Buffer> {
    /// The elements from row 0 on.
    fn data(&self) -> &'a [f32] {
        &self.buffer[self.start..]
    }

    /// The first `width` elements of row `r`.
    fn row(&self, r: usize, width: usize) -> &'a [f32] {
        &self.buffer[self.start + r * self.stride..][..width]
    }

    /// `rows` packed rows of `width` elements.
    fn block(&self, rows: usize, width: usize) -> &'a [f32] {
        assert!(rows <= 1 || self.stride == width, "rows are packed");
        &self.buffer[self.start..self.start + rows * width]
    }
}

impl RowsMut<'_, Buffer> {
    fn data(&mut self) -> &mut [f32] {
        &mut self.buffer[self.start..]
    }

    /// The first `width` elements of each of `rows` rows.
    fn each(
        &mut self,
        rows: usize,
        width: usize,
    ) -> impl IndexedParallelIterator<Item = &mut [f32]> {
        let stride = if rows == 1 { width } else { self.stride };
        let rows = self.data().par_chunks_mut(stride).take(rows);
        rows.map(move |row| &mut row[..width])
    }

    fn block(&mut self, rows: usize, width: usize) -> &mut [f32] {
        assert!(rows <= 1 || self.stride == width, "rows are packed");
        &mut self.buffer[self.start..self.start + rows * width]
    }
}

/// The sink logits of rows from row `first` of the buffers on.
fn sinks_of<'a>(
    call: &'a SinkLogits<'_, Buffer>,
    places: &'a [[usize; 2]],
    first: usize,
) -> sinks::Sinks<'a> {
    sinks::Sinks {
        logits: &call.logits[..call.heads.q],
        dim: call.heads.dim,
        places,
        lse: call.lse.data(),
        out: &call.out.data()[first * call.out.stride..],
        stride: call.out.stride,
    }
}

impl Device for Cpu {
    type Buffer = Buffer;
    type Matrix = PackedMatrix;
    type Pool = Pool;
    type Blocks = HostBlocks;
    type Step = StepRows;
    type Samplers = HostSamplers;
    type Recording = Infallible;

    fn description(&self) -> String {
        let isa = match Isa::best() {
            Isa::Portable => "portable",
            Isa::Avx2 => "AVX2",
            Isa::Avx512 => "AVX-512",
        };
        let threads = rayon::current_num_threads();
        format!("cpu (f32, {isa}, {threads} threads)")
    }

    fn together<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        // Run on a thread of the pool: parallel work started from outside costs a wake-up and a wait each time.
        rayon::scope(|_| work())
    }

    fn zeros(&self, _: Kind, len: usize) -> Result<Buffer> {
        Buffer::zeros(len)
    }

    fn empty(&self, _: Kind, len: usize) -> Result<Buffer> {
        Buffer::empty(len)
    }

    fn write(&self, buffer: &mut Buffer, start: usize, values: &[f32]) -> Result<()> {
        buffer[start..start + values.len()].copy_from_slice(values);
        Ok(())
    }

    fn read(&self, buffer: &Buffer, range: Range<usize>) -> Result<Vec<f32>> {
        Ok(buffer[range].to_vec())
    }

    fn len(&self, buffer: &Buffer) -> usize {
        buffer.len()
    }

    fn element_bytes(&self, _: Kind) -> usize {
        4
    }

    fn clear(&self, buffer: &mut Buffer) -> Result<()> {
        buffer.par_chunks_mut(COPY_TASK).for_each(|c| c.fill(0.0));
        Ok(())
    }

    fn copy(
        &self,
        src: Rows<'_, Buffer>,
        mut dst: RowsMut<'_, Buffer>,
        rows: usize,
        width: usize,
        accumulate: Accumulate,
    ) -> Result<()> {
        if rows == 0 || width == 0 {
            return Ok(());
        }
        dst.each(rows, width)
            .enumerate()
            .with_min_len(COPY_TASK.div_ceil(width))
            .for_each(|(r, dst)| match (src.row(r, width), accumulate) {
                (src, Accumulate::No) => dst.copy_from_slice(src),
                (src, Accumulate::Yes) => dst.iter_mut().zip(src).for_each(|(d, s)| *d += s),
            });
        Ok(())
    }

    fn scale(
        &self,
        factor: f64,
        src: Rows<'_, Buffer>,
        mut dst: RowsMut<'_, Buffer>,
        [rows, width]: [usize; 2],
        accumulate: Accumulate,
    ) -> Result<()> {
        if rows == 0 || width == 0 {
            return Ok(());
        }
        let factor = factor as f32;
        dst.each(rows, width)
            .enumerate()
            .with_min_len(COPY_TASK.div_ceil(width))
            .for_each(|(r, dst)| {
                let pairs = dst.iter_mut().zip(src.row(r, width));
                match accumulate {
                    Accumulate::No => pairs.for_each(|(d, s)| *d = factor * s),
                    Accumulate::Yes => pairs.for_each(|(d, s)| *d = s.mul_add(factor, *d)),
                }
            });
        Ok(())
    }

    fn matrix(
        &self,
        values: &Buffer,
        out: usize,
        inner: usize,
        training: bool,
    ) -> Result<PackedMatrix> {
        let values = &values[..out * inner];
        Ok(match training {
            true => PackedMatrix::pack(values, out, inner, true),
            false => PackedMatrix::pack_narrow(values, out, inner),
        })
    }

    fn refresh(&self, matrix: &mut PackedMatrix, values: &Buffer) -> Result<()> {
        matrix.repack(&values[..matrix.outputs() * matrix.inputs()]);
        Ok(())
    }

    fn linear(
        &self,
        x: Rows<'_, Buffer>,
        rows: usize,
        weight: &PackedMatrix,
        mut y: RowsMut<'_, Buffer>,
        accumulate: Accumulate,
    ) -> Result<()> {
        let (stride, add) = (y.stride, accumulate == Accumulate::Yes);
        gemm::linear(x.data(), x.stride, rows, weight, y.data(), stride, add);
        Ok(())
    }

    fn linear_input_grad(
        &self,
        d_y: Rows<'_, Buffer>,
        rows: usize,
        weight: &PackedMatrix,
        mut d_x: RowsMut<'_, Buffer>,
        accumulate: Accumulate,
    ) -> Result<()> {
        let (stride, add) = (d_x.stride, accumulate == Accumulate::Yes);
        gemm::linear_input_grad(
            d_y.data(),
            d_y.stride,
            rows,
            weight,
            d_x.data(),
            stride,
            add,
        );
        Ok(())
    }

    fn linear_weight_grad(
        &self,
        d_y: Rows<'_, Buffer>,
        x: Rows<'_, Buffer>,
        rows: usize,
        shape: [usize; 2],
        d_w: &mut Buffer,
    ) -> Result<()> {
        gemm::linear_weight_grad(d_y.data(), d_y.stride, x.data(), x.stride, rows, d_w, shape);
        Ok(())
    }

    fn step(&self, rows: StepRows) -> Result<StepRows> {
        Ok(rows)
    }

    fn renew(&self, step: &mut StepRows, rows: StepRows) -> Result<()> {
        *step = rows;
        Ok(())
    }

    fn embed(
        &self,
        table: &PackedMatrix,
        step: &StepRows,
        mut y: RowsMut<'_, Buffer>,
    ) -> Result<()> {
        let (stride, width) = (y.stride, table.inputs());
        for (row, token) in y.data().chunks_mut(stride).zip(&step.tokens) {
            table.row(*token as usize, &mut row[..width]);
        }
        Ok(())
    }

    fn embed_grad(
        &self,
        d_y: Rows<'_, Buffer>,
        width: usize,
        tokens: &[u32],
        d_table: &mut Buffer,
    ) -> Result<()> {
        for (d_y, token) in d_y.data().chunks(d_y.stride).zip(tokens) {
            let row = &mut d_table[*token as usize * width..][..width];
            row.iter_mut().zip(d_y).for_each(|(d, g)| *d += g);
        }
        Ok(())
    }

    fn rms_norm(
        &self,
        x: Rows<'_, Buffer>,
        [rows, groups]: [usize; 2],
        weight: &Buffer,
        eps: f64,
        mut y: RowsMut<'_, Buffer>,
        mut rstd: RowsMut<'_, Buffer>,
    ) -> Result<()> {
        let width = groups * weight.len();
        (
            y.each(rows, width),
            rstd.block(rows, groups).par_chunks_mut(groups),
        )
            .into_par_iter()
            .with_min_len(COPY_TASK.div_ceil(width))
            .enumerate()
            .for_each(|(r, (y, rstd))| {
                rows::rms_norm(x.row(r, width), weight, eps as f32, y, rstd);
            });
        Ok(())
    }

    fn rms_norm_grad(
        &self,
        d_y: Rows<'_, Buffer>,
        x: Rows<'_, Buffer>,
        rstd: Rows<'_, Buffer>,
        [rows, groups]: [usize; 2],
        weight: &Buffer,
        mut d_x: RowsMut<'_, Buffer>,
    ) -> Result<()> {
        let width = groups * weight.len();
        (
            d_x.each(rows, width),
            rstd.block(rows, groups).par_chunks(groups),
        )
            .into_par_iter()
            .with_min_len(COPY_TASK.div_ceil(width))
            .enumerate()
            .for_each(|(r, (d_x, rstd))| {
                let (d_y, x) = (d_y.row(r, width), x.row(r, width));
                rows::rms_norm_backward(d_y, x, weight, rstd, d_x, true);
            });
        Ok(())
    }

    fn rms_norm_weight_grad(
        &self,
        d_y: Rows<'_, Buffer>,
        x: Rows<'_, Buffer>,
        rstd: Rows<'_, Buffer>,
        [rows, groups]: [usize; 2],
        d_weight: &mut Buffer,
    ) -> Result<()> {
        let width = groups * d_weight.len();
        let rstd = rstd.block(rows, groups);
        if [d_y.stride, x.stride] == [width; 2] {
            let [d_y, x] = [d_y, x].map(|all| all.block(rows, width));
            rows::rms_norm_weight_grad(d_y, x, rstd, groups, d_weight);
            return Ok(());
        }
        for (r, rstd) in rstd.chunks(groups).enumerate() {
            let (d_y, x) = (d_y.row(r, width), x.row(r, width));
            rows::rms_norm_weight_grad(d_y, x, rstd, groups, d_weight);
        }
        Ok(())
    }

    fn column_sums(&self, x: Rows<'_, Buffer>, rows: usize, sums: &mut Buffer) -> Result<()> {
        let width = sums.len();
        let columns = width.min(COPY_TASK.div_ceil(rows.max(1)).max(64));
        sums.par_chunks_mut(columns)
            .enumerate()
            .for_each(|(i, sums)| {
                for r in 0..rows {
                    let x = &x.row(r, width)[i * columns..][..sums.len()];
                    sums.iter_mut().zip(x).for_each(|(sum, x)| *sum += x);
                }
            });
        Ok(())
    }

    fn rope(
        &self,
        src: Rows<'_, Buffer>,
        mut dst: RowsMut<'_, Buffer>,
        heads: usize,
        head_dim: usize,
        (cos, sin): (&Buffer, &Buffer),
        angles: &[usize],
        inverse: bool,
        accumulate: Accumulate,
    ) -> Result<()> {
        let stride = dst.stride;
        rows::rope(
            [heads, head_dim],
            Angles { cos, sin },
            angles,
            inverse,
            (src.data(), src.stride),
            (dst.data(), stride),
            accumulate == Accumulate::Yes,
        );
        Ok(())
    }

    fn swiglu(
        &self,
        gate_up: Rows<'_, Buffer>,
        rows: usize,
        inner: usize,
        mut y: RowsMut<'_, Buffer>,
    ) -> Result<()> {
        rows::swiglu(gate_up.block(rows, 2 * inner), inner, y.block(rows, inner));
        Ok(())
    }

    fn swiglu_grad(
        &self,
        d_y: Rows<'_, Buffer>,
        gate_up: Rows<'_, Buffer>,
        rows: usize,
        inner: usize,
        mut d_gate_up: RowsMut<'_, Buffer>,
    ) -> Result<()> {
        let gate_up = gate_up.block(rows, 2 * inner);
        let d_gate_up = d_gate_up.block(rows, 2 * inner);
        rows::swiglu_backward(d_y.block(rows, inner), gate_up, inner, d_gate_up);
        Ok(())
    }

    fn log_probabilities(
        &self,
        mut logits: RowsMut<'_, Buffer>,
        vocab: usize,
        targets: &[u32],
        scales: Option<&[f64]>,
        mut scores: RowsMut<'_, Buffer>,
    ) -> Result<()> {
        let score = |(r, ((row, target), score)): (usize, ((&mut [f32], &u32), &mut f32))| {
            let found = rows::cross_entropy_row(row, *target as usize);
            if let Some(scales) = scales {
                rows::cross_entropy_grad_row(row, *target as usize, &found, scales[r] as f32);
            }
            *score = found.logprob;
        };
        let rows = logits.block(targets.len(), vocab).par_chunks_mut(vocab);
        let scores = scores.block(targets.len(), 1);
        rows.zip(targets).zip(scores).enumerate().for_each(score);
        Ok(())
    }

    fn divergences(
        &self,
        mut logits: RowsMut<'_, Buffer>,
        vocab: usize,
        targets: &[u32],
        lesson: &Lesson<'_, Buffer>,
        [mut scores, mut divergences]: [RowsMut<'_, Buffer>; 2],
    ) -> Result<()> {
        let (rows, temperature) = (targets.len(), lesson.temperature);
        let teacher = lesson.teacher.block(rows, vocab).par_chunks(vocab);
        let lessons = teacher
            .zip(lesson.scales)
            .map(|(teacher, scales)| RowLesson {
                teacher,
                temperature,
                scales: scales.map(|scale| scale as f32),
            });
        let of_rows = (scores.block(rows, 1), divergences.block(rows, 1));
        let logits = logits.block(rows, vocab).par_chunks_mut(vocab);
        (logits.zip(targets), lessons, of_rows)
            .into_par_iter()
            .for_each(|((row, target), lesson, (score, divergence))| {
                [*score, *divergence] = divergence_row(row, *target as usize, lesson);
            });
        Ok(())
    }

    fn attention(
        &self,
        call: &Attention<'_, Buffer>,
        _: &mut StepRows,
        _: usize,
        out: RowsMut<'_, Buffer>,
        lse: RowsMut<'_, Buffer>,
    ) -> Result<()> {
        Ok(spans::forward::<Self>(call, out, lse)?)
    }

    fn attention_grad(
        &self,
        call: &Attention<'_, Buffer>,
        grad: AttentionGrad<'_, Buffer>,
    ) -> Result<()> {
        Ok(spans::backward::<Self>(call, grad)?)
    }

    fn sink_logits(
        &self,
        call: &SinkLogits<'_, Buffer>,
        step: &StepRows,
        mut y: RowsMut<'_, Buffer>,
    ) -> Result<()> {
        let batch = spans::SpanBatch::of(&step.spans);
        let places: Vec<_> = batch.lse_places(call.heads.q).collect();
        let (first, stride) = (batch.first_row(), y.stride);
        let y = &mut y.data()[first * stride..];
        sinks::forward(sinks_of(call, &places, first), y, stride);
        Ok(())
    }

    fn sink_logits_grad(
        &self,
        call: &SinkLogits<'_, Buffer>,
        mut grad: SinkLogitsGrad<'_, Buffer>,
    ) -> Result<()> {
        let batch = spans::SpanBatch::of(grad.spans);
        let places: Vec<_> = batch.lse_places(call.heads.q).collect();
        let (first, heads) = (batch.first_row(), call.heads.q);
        let sinks = sinks_of(call, &places, first);
        let [d_y_stride, stride] = [grad.d_y.stride, grad.d_out.stride];
        let d_y = (&grad.d_y.data()[first * d_y_stride..], d_y_stride);
        let d_out = (&mut grad.d_out.data()[first * stride..], stride);
        let d_lse = sinks::backward(sinks, d_y, d_out);
        let d_logits = grad.d_logits.chunks_mut(heads);
        for ((span, before), d_logits) in grad.spans.iter().zip(batch.offsets()).zip(d_logits) {
            let to = &mut grad.d_lse.data()[(first + before) * heads..];
            sinks::place(&d_lse[before * heads..], span.rows, to, d_logits);
        }
        Ok(())
    }

    fn norm_chunk(&self) -> Result<usize> {
        Ok(adamw::NORM_CHUNK)
    }

    fn grad_squares(&self, grads: &[(&Buffer, Range<usize>)]) -> Result<Vec<f64>> {
        Ok(adamw::chunk_squares(grads))
    }

    fn adamw(
        &self,
        tensors: &mut [GradTensor<'_, Buffer>],
        squares: &[f64],
        update: &AdamW,
    ) -> Result<Update> {
        Ok(adamw::step(tensors, squares, update))
    }
}
