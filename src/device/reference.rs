//! The f64 device: every function as its formula says, on one thread.
//!
//! Tests check the model's gradients on it by finite differences, and compare the other devices with it.

use std::convert::Infallible;
use std::ops::Range;

use super::{
    Accumulate, AdamW, Attention, AttentionGrad, Device, GradTensor, HostBlocks, HostMemory,
    HostSamplers, Kind, Lesson, OutOfMemory, Result, Rows, RowsMut, SinkLogits, SinkLogitsGrad,
    StepRows, Update, shared::spans,
};

mod attention;
mod divergence;
mod pool;
mod sinks;

pub use pool::Pool;

/// The f64 device.
#[derive(Debug, Default, Clone, Copy)]
pub struct Reference;

/// A row-major weight `[out, in]`.
#[derive(Debug, Clone)]
pub struct Weight {
    values: Vec<f64>,
    out: usize,
    inner: usize,
}

type Buf = Vec<f64>;

/// Elements of a chunk of the gradients' norm.
const NORM_CHUNK: usize = 4096;

impl<'a> Rows<'a, Buf> {
    fn row(&self, r: usize, width: usize) -> &'a [f64] {
        let at = self.start + r * self.stride;
        &self.buffer[at..at + width]
    }
}

impl RowsMut<'_, Buf> {
    fn row(&mut self, r: usize, width: usize) -> &mut [f64] {
        let at = self.start + r * self.stride;
        &mut self.buffer[at..at + width]
    }
}

fn write(dst: &mut f64, value: f64, accumulate: Accumulate) {
    match accumulate {
        Accumulate::No => *dst = value,
        Accumulate::Yes => *dst += value,
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

impl Device for Reference {
    type Buffer = Buf;
    type Matrix = Weight;
    type Pool = Pool;
    type Blocks = HostBlocks;
    type Step = StepRows;
    type Samplers = HostSamplers;
    type Recording = Infallible;

    fn description(&self) -> String {
        "reference (f64, one thread)".into()
    }

    fn zeros(&self, _: Kind, len: usize) -> Result<Buf> {
        let mut buffer = Vec::new();
        let bytes = len.saturating_mul(size_of::<f64>());
        HostMemory::check(bytes)?;
        let full = |_| OutOfMemory::device(bytes);
        buffer.try_reserve_exact(len).map_err(full)?;
        buffer.resize(len, 0.0);
        Ok(buffer)
    }

    fn write(&self, buffer: &mut Buf, start: usize, values: &[f32]) -> Result<()> {
        for (dst, src) in buffer[start..start + values.len()].iter_mut().zip(values) {
            *dst = f64::from(*src);
        }
        Ok(())
    }

    fn read(&self, buffer: &Buf, range: Range<usize>) -> Result<Vec<f32>> {
        Ok(buffer[range].iter().map(|x| *x as f32).collect())
    }

    fn len(&self, buffer: &Buf) -> usize {
        buffer.len()
    }

    fn read_wide(&self, buffer: &Buf, range: Range<usize>) -> Result<Vec<f64>> {
        Ok(buffer[range].to_vec())
    }

    fn element_bytes(&self, _: Kind) -> usize {
        8
    }

    fn clear(&self, buffer: &mut Buf) -> Result<()> {
        buffer.fill(0.0);
        Ok(())
    }

    fn copy(
        &self,
        src: Rows<'_, Buf>,
        mut dst: RowsMut<'_, Buf>,
        rows: usize,
        width: usize,
        accumulate: Accumulate,
    ) -> Result<()> {
        for r in 0..rows {
            for (d, s) in dst.row(r, width).iter_mut().zip(src.row(r, width)) {
                write(d, *s, accumulate);
            }
        }
        Ok(())
    }

    fn scale(
        &self,
        factor: f64,
        src: Rows<'_, Buf>,
        mut dst: RowsMut<'_, Buf>,
        [rows, width]: [usize; 2],
        accumulate: Accumulate,
    ) -> Result<()> {
        for r in 0..rows {
            for (d, s) in dst.row(r, width).iter_mut().zip(src.row(r, width)) {
                write(d, factor * s, accumulate);
            }
        }
        Ok(())
    }

    fn matrix(&self, values: &Buf, out: usize, inner: usize, _training: bool) -> Result<Weight> {
        Ok(Weight {
            values: values[..out * inner].to_vec(),
            out,
            inner,
        })
    }

    fn refresh(&self, matrix: &mut Weight, values: &Buf) -> Result<()> {
        matrix
            .values
            .copy_from_slice(&values[..matrix.out * matrix.inner]);
        Ok(())
    }

    fn linear(
        &self,
        x: Rows<'_, Buf>,
        rows: usize,
        weight: &Weight,
        mut y: RowsMut<'_, Buf>,
        accumulate: Accumulate,
    ) -> Result<()> {
        for r in 0..rows {
            let x = x.row(r, weight.inner);
            for (y, w) in y
                .row(r, weight.out)
                .iter_mut()
                .zip(weight.values.chunks(weight.inner))
            {
                write(y, dot(x, w), accumulate);
            }
        }
        Ok(())
    }

    fn linear_input_grad(
        &self,
        d_y: Rows<'_, Buf>,
        rows: usize,
        weight: &Weight,
        mut d_x: RowsMut<'_, Buf>,
        accumulate: Accumulate,
    ) -> Result<()> {
        for r in 0..rows {
            let d_y = d_y.row(r, weight.out);
            for (i, d_x) in d_x.row(r, weight.inner).iter_mut().enumerate() {
                let sum = (0..weight.out)
                    .map(|o| d_y[o] * weight.values[o * weight.inner + i])
                    .sum();
                write(d_x, sum, accumulate);
            }
        }
        Ok(())
    }

    fn linear_weight_grad(
        &self,
        d_y: Rows<'_, Buf>,
        x: Rows<'_, Buf>,
        rows: usize,
        [out, inner]: [usize; 2],
        d_w: &mut Buf,
    ) -> Result<()> {
        for r in 0..rows {
            let (d_y, x) = (d_y.row(r, out), x.row(r, inner));
            for (d_w, d_y) in d_w.chunks_mut(inner).zip(d_y) {
                d_w.iter_mut().zip(x).for_each(|(d_w, x)| *d_w += d_y * x);
            }
        }
        Ok(())
    }

    fn step(&self, rows: StepRows) -> Result<StepRows> {
        Ok(rows)
    }

    fn renew(&self, step: &mut StepRows, rows: StepRows) -> Result<()> {
        *step = rows;
        Ok(())
    }

    fn embed(&self, table: &Weight, step: &StepRows, mut y: RowsMut<'_, Buf>) -> Result<()> {
        let width = table.inner;
        for (r, token) in step.tokens.iter().enumerate() {
            let at = *token as usize * width;
            y.row(r, width)
                .copy_from_slice(&table.values[at..at + width]);
        }
        Ok(())
    }

    fn embed_grad(
        &self,
        d_y: Rows<'_, Buf>,
        width: usize,
        tokens: &[u32],
        d_table: &mut Buf,
    ) -> Result<()> {
        for (r, token) in tokens.iter().enumerate() {
            let row = &mut d_table[*token as usize * width..][..width];
            row.iter_mut()
                .zip(d_y.row(r, width))
                .for_each(|(d, g)| *d += g);
        }
        Ok(())
    }

    fn rms_norm(
        &self,
        x: Rows<'_, Buf>,
        [rows, groups]: [usize; 2],
        weight: &Buf,
        eps: f64,
        mut y: RowsMut<'_, Buf>,
        mut rstd: RowsMut<'_, Buf>,
    ) -> Result<()> {
        let width = weight.len();
        for r in 0..rows {
            let rows = x.row(r, groups * width).chunks(width);
            let rows = rows.zip(y.row(r, groups * width).chunks_mut(width));
            for ((x, y), rstd) in rows.zip(rstd.row(r, groups)) {
                *rstd = 1.0 / (dot(x, x) / width as f64 + eps).sqrt();
                for (y, (x, w)) in y.iter_mut().zip(x.iter().zip(weight)) {
                    *y = x * *rstd * w;
                }
            }
        }
        Ok(())
    }

    fn rms_norm_grad(
        &self,
        d_y: Rows<'_, Buf>,
        x: Rows<'_, Buf>,
        rstd: Rows<'_, Buf>,
        [rows, groups]: [usize; 2],
        weight: &Buf,
        mut d_x: RowsMut<'_, Buf>,
    ) -> Result<()> {
        let width = weight.len();
        for r in 0..rows {
            let [x, d_y] = [x, d_y].map(|all| all.row(r, groups * width).chunks(width));
            let d_x = d_x.row(r, groups * width).chunks_mut(width);
            for (((x, d_y), d_x), scale) in x.zip(d_y).zip(d_x).zip(rstd.row(r, groups)) {
                let along: f64 = (0..width).map(|i| d_y[i] * weight[i] * x[i]).sum();
                let pull = along * scale * scale * scale / width as f64;
                for (i, d_x) in d_x.iter_mut().enumerate() {
                    *d_x += d_y[i] * weight[i] * scale - x[i] * pull;
                }
            }
        }
        Ok(())
    }

    fn rms_norm_weight_grad(
        &self,
        d_y: Rows<'_, Buf>,
        x: Rows<'_, Buf>,
        rstd: Rows<'_, Buf>,
        [rows, groups]: [usize; 2],
        d_weight: &mut Buf,
    ) -> Result<()> {
        let width = d_weight.len();
        for r in 0..rows {
            let [x, d_y] = [x, d_y].map(|all| all.row(r, groups * width));
            let rstd = rstd.row(r, groups);
            for (i, d) in d_weight.iter_mut().enumerate() {
                let at = |group: usize| group * width + i;
                let terms = (0..groups).map(|group| d_y[at(group)] * x[at(group)] * rstd[group]);
                *d += terms.sum::<f64>();
            }
        }
        Ok(())
    }

    fn column_sums(&self, x: Rows<'_, Buf>, rows: usize, sums: &mut Buf) -> Result<()> {
        let width = sums.len();
        for r in 0..rows {
            let terms = sums.iter_mut().zip(x.row(r, width));
            terms.for_each(|(sum, x)| *sum += x);
        }
        Ok(())
    }

    fn rope(
        &self,
        src: Rows<'_, Buf>,
        mut dst: RowsMut<'_, Buf>,
        heads: usize,
        head_dim: usize,
        (cos, sin): (&Buf, &Buf),
        angles: &[usize],
        inverse: bool,
        accumulate: Accumulate,
    ) -> Result<()> {
        let half = head_dim / 2;
        for (r, angle) in angles.iter().enumerate() {
            let src = src.row(r, heads * head_dim);
            let dst = dst.row(r, heads * head_dim);
            for head in 0..heads {
                for i in 0..half {
                    let (lo, hi) = (head * head_dim + i, head * head_dim + half + i);
                    let c = cos[angle * half + i];
                    let s = if inverse {
                        -sin[angle * half + i]
                    } else {
                        sin[angle * half + i]
                    };
                    let (a, b) = (src[lo], src[hi]);
                    write(&mut dst[lo], a * c - b * s, accumulate);
                    write(&mut dst[hi], b * c + a * s, accumulate);
                }
            }
        }
        Ok(())
    }

    fn swiglu(
        &self,
        gate_up: Rows<'_, Buf>,
        rows: usize,
        inner: usize,
        mut y: RowsMut<'_, Buf>,
    ) -> Result<()> {
        for r in 0..rows {
            let (gate, up) = gate_up.row(r, 2 * inner).split_at(inner);
            for (i, y) in y.row(r, inner).iter_mut().enumerate() {
                *y = gate[i] * sigmoid(gate[i]) * up[i];
            }
        }
        Ok(())
    }

    fn swiglu_grad(
        &self,
        d_y: Rows<'_, Buf>,
        gate_up: Rows<'_, Buf>,
        rows: usize,
        inner: usize,
        mut d_gate_up: RowsMut<'_, Buf>,
    ) -> Result<()> {
        for r in 0..rows {
            let (gate, up) = gate_up.row(r, 2 * inner).split_at(inner);
            let d_y = d_y.row(r, inner);
            let (d_gate, d_up) = d_gate_up.row(r, 2 * inner).split_at_mut(inner);
            for i in 0..inner {
                let s = sigmoid(gate[i]);
                d_up[i] = d_y[i] * gate[i] * s;
                d_gate[i] = d_y[i] * up[i] * s * (1.0 + gate[i] * (1.0 - s));
            }
        }
        Ok(())
    }

    fn log_probabilities(
        &self,
        mut logits: RowsMut<'_, Buf>,
        vocab: usize,
        targets: &[u32],
        scales: Option<&[f64]>,
        mut scores: RowsMut<'_, Buf>,
    ) -> Result<()> {
        for (r, target) in targets.iter().enumerate() {
            let row = logits.row(r, vocab);
            let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let log_sum = max + row.iter().map(|x| (x - max).exp()).sum::<f64>().ln();
            scores.row(r, 1)[0] = row[*target as usize] - log_sum;
            if let Some(scale) = scales.map(|scales| scales[r]) {
                row.iter_mut()
                    .for_each(|x| *x = scale * (*x - log_sum).exp());
                row[*target as usize] -= scale;
            }
        }
        Ok(())
    }

    fn divergences(
        &self,
        logits: RowsMut<'_, Buf>,
        vocab: usize,
        targets: &[u32],
        lesson: &Lesson<'_, Buf>,
        scores: [RowsMut<'_, Buf>; 2],
    ) -> Result<()> {
        divergence::rows(logits, vocab, targets, lesson, scores);
        Ok(())
    }

    fn attention(
        &self,
        call: &Attention<'_, Buf>,
        _: &mut StepRows,
        _: usize,
        out: RowsMut<'_, Buf>,
        lse: RowsMut<'_, Buf>,
    ) -> Result<()> {
        Ok(spans::forward::<Self>(call, out, lse)?)
    }

    fn attention_grad(
        &self,
        call: &Attention<'_, Buf>,
        grad: AttentionGrad<'_, Buf>,
    ) -> Result<()> {
        Ok(spans::backward::<Self>(call, grad)?)
    }

    fn sink_logits(
        &self,
        sinks: &SinkLogits<'_, Buf>,
        step: &StepRows,
        y: RowsMut<'_, Buf>,
    ) -> Result<()> {
        sinks::forward(sinks, &step.spans, y);
        Ok(())
    }

    fn sink_logits_grad(
        &self,
        sinks: &SinkLogits<'_, Buf>,
        grad: SinkLogitsGrad<'_, Buf>,
    ) -> Result<()> {
        sinks::backward(sinks, grad);
        Ok(())
    }

    fn norm_chunk(&self) -> Result<usize> {
        Ok(NORM_CHUNK)
    }

    fn grad_squares(&self, grads: &[(&Buf, Range<usize>)]) -> Result<Vec<f64>> {
        let chunks = grads
            .iter()
            .flat_map(|(grads, range)| grads[range.clone()].chunks(NORM_CHUNK));
        Ok(chunks.map(|chunk| dot(chunk, chunk)).collect())
    }

    fn adamw(
        &self,
        tensors: &mut [GradTensor<'_, Buf>],
        squares: &[f64],
        update: &AdamW,
    ) -> Result<Update> {
        let grad_norm = squares.iter().sum::<f64>().sqrt();
        if !grad_norm.is_finite() || update.only_measure {
            return Ok(Update {
                grad_norm,
                applied: false,
            });
        }
        let clip = update
            .clip_norm
            .map_or(1.0, |limit| (limit / grad_norm).min(1.0));
        let [b1, b2] = update.betas;
        let correct = [b1, b2].map(|b| 1.0 - b.powf(update.step as f64));
        for t in tensors.iter_mut().filter(|t| t.lr_scale != 0.0) {
            let lr = update.lr * t.lr_scale;
            let decay = if t.decay {
                lr * update.weight_decay
            } else {
                0.0
            };
            let values = t.values[t.range.clone()].iter_mut();
            for (i, (value, grad)) in values.zip(&t.grads[t.range.clone()]).enumerate() {
                let g = grad * clip;
                t.m[i] = b1 * t.m[i] + (1.0 - b1) * g;
                t.v[i] = b2 * t.v[i] + (1.0 - b2) * g * g;
                let step = (t.m[i] / correct[0]) / ((t.v[i] / correct[1]).sqrt() + update.eps);
                let next = *value * (1.0 - decay) - lr * step;
                *value = match t.floor {
                    Some(floor) if *value > 0.0 => next.max(floor),
                    Some(_) => *value,
                    None => next,
                };
            }
        }
        Ok(Update {
            grad_norm,
            applied: true,
        })
    }
}
