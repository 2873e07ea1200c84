//! Row-wise functions: RMS norm, rotary embedding, SwiGLU, residual sum, softmax cross entropy.
//!
//! Matrices are row-major and packed unless strides are given. The result of a row depends on that row alone. Sums
//! within a row use 16 lanes, which are added in a fixed order. Sums over rows (the weight gradient of the norm) are
//! added in ascending order of rows. Rows are distributed over threads where there is enough work.

use rayon::prelude::*;

use super::math::{exp, for_each_isa, sum_lanes};
use crate::isa::Isa;

#[cfg(test)]
mod tests;

/// Least number of elements per task; for fewer a thread costs more than it gains.
const TASK: usize = 1 << 14;

/// Number of rows with which a task has at least [`TASK`] elements.
fn min_rows(width: usize) -> usize {
    TASK.div_ceil(width.max(1))
}

/// y = w x / sqrt(mean(x²) + eps) for each row (Zhang and Sennrich 2019). `rstd` receives 1 / sqrt(mean(x²) + eps).
///
/// The number of rows is the length of `rstd`; the width is the length of `w`.
///
/// # Panics
/// If the length of x or y is not rows * width.
pub fn rms_norm(x: &[f32], w: &[f32], eps: f32, y: &mut [f32], rstd: &mut [f32]) {
    let width = check_rows(rstd.len(), w.len(), [("x", x.len()), ("y", y.len())]);
    let isa = Isa::best();
    (y.par_chunks_mut(width), x.par_chunks(width), rstd)
        .into_par_iter()
        .with_min_len(min_rows(width))
        .for_each(|(y, x, rstd)| *rstd = rms_norm_row(isa, x, w, eps, y));
}

for_each_isa! {
    fn rms_norm_row(x: &[f32], w: &[f32], eps: f32, y: &mut [f32]) -> f32 {
        let squares = sum_lanes([x], |[x], sum| x.mul_add(x, sum));
        let rstd = 1.0 / (squares / x.len() as f32 + eps).sqrt();
        for ((y, x), w) in y.iter_mut().zip(x).zip(w) {
            *y = x * rstd * w;
        }
        rstd
    }
}

/// dx = rstd w dy - x rstd³ mean(w dy x) for each row, with `rstd` from [`rms_norm`]. Adds to dx where `accumulate`.
///
/// # Panics
/// If the length of dy, x or dx is not rows * width.
pub fn rms_norm_backward(
    dy: &[f32],
    x: &[f32],
    w: &[f32],
    rstd: &[f32],
    dx: &mut [f32],
    accumulate: bool,
) {
    let lens = [("dy", dy.len()), ("x", x.len()), ("dx", dx.len())];
    let width = check_rows(rstd.len(), w.len(), lens);
    let isa = Isa::best();
    (
        dx.par_chunks_mut(width),
        dy.par_chunks(width),
        x.par_chunks(width),
        rstd,
    )
        .into_par_iter()
        .with_min_len(min_rows(width))
        .for_each(|(dx, dy, x, rstd)| rms_norm_backward_row(isa, dy, x, w, *rstd, dx, accumulate));
}

for_each_isa! {
    fn rms_norm_backward_row(
        dy: &[f32], x: &[f32], w: &[f32], rstd: f32, dx: &mut [f32], accumulate: bool,
    ) {
        let dot = sum_lanes([dy, x, w], |[dy, x, w], sum| (dy * w).mul_add(x, sum));
        let along_x = -(dot / x.len() as f32) * rstd * rstd * rstd;
        for (((dx, dy), x), w) in dx.iter_mut().zip(dy).zip(x).zip(w) {
            let gradient = x.mul_add(along_x, dy * w * rstd);
            *dx = if accumulate { *dx + gradient } else { gradient };
        }
    }
}

/// dw += sum over rows of dy x rstd. Rows are added to the value in dw one after the other, in ascending order; where
/// `groups` neighbouring rows are a row of memory, their sum is.
///
/// # Panics
/// If the length of dy or x is not rows * width, or if the rows are no multiple of the groups.
pub fn rms_norm_weight_grad(dy: &[f32], x: &[f32], rstd: &[f32], groups: usize, dw: &mut [f32]) {
    let width = check_rows(rstd.len(), dw.len(), [("dy", dy.len()), ("x", x.len())]);
    assert!(
        groups > 0 && rstd.len().is_multiple_of(groups),
        "{} rows in groups of {groups}",
        rstd.len()
    );
    let isa = Isa::best();
    let columns = if dy.len() < 2 * TASK { width } else { 128 };
    dw.par_chunks_mut(columns).enumerate().for_each(|(at, dw)| {
        weight_grad_columns(isa, dy, x, (rstd, groups), [width, at * columns], dw);
    });
}

for_each_isa! {
    /// Computes the columns of dw from `columns[1]` on. `columns[0]` is the number of all columns.
    fn weight_grad_columns(
        dy: &[f32], x: &[f32], rstd: (&[f32], usize), columns: [usize; 2], dw: &mut [f32],
    ) {
        let ([width, from], (rstd, groups)) = (columns, rstd);
        if groups == 1 {
            for (row, rstd) in rstd.iter().enumerate() {
                let at = row * width + from;
                add_products(dw, &dy[at..], &x[at..], *rstd);
            }
            return;
        }
        for (row, rstd) in rstd.chunks(groups).enumerate() {
            for (i, dw) in dw.chunks_mut(GROUP_COLUMNS).enumerate() {
                let mut sums = [0.0; GROUP_COLUMNS];
                let sums = &mut sums[..dw.len()];
                for (group, rstd) in rstd.iter().enumerate() {
                    let at = (row * groups + group) * width + from + i * GROUP_COLUMNS;
                    add_products(sums, &dy[at..], &x[at..], *rstd);
                }
                dw.iter_mut().zip(sums).for_each(|(dw, sum)| *dw += *sum);
            }
        }
    }
}

/// Columns whose sums over groups stay in registers.
const GROUP_COLUMNS: usize = 64;

/// sums += dy x rstd, of as many columns as there are sums.
#[inline(always)]
fn add_products(sums: &mut [f32], dy: &[f32], x: &[f32], rstd: f32) {
    let (dy, x) = (&dy[..sums.len()], &x[..sums.len()]);
    for ((sum, dy), x) in sums.iter_mut().zip(dy).zip(x) {
        *sum = dy.mul_add(x * rstd, *sum);
    }
}

/// Checks that each named slice has rows * width elements. Returns the width, or 1 if it is 0, for chunking.
fn check_rows<const N: usize>(rows: usize, width: usize, slices: [(&str, usize); N]) -> usize {
    for (name, len) in slices {
        assert_eq!(
            Some(len),
            rows.checked_mul(width),
            "length of {name}, {rows} x {width}"
        );
    }
    width.max(1)
}

/// Cosines and sines of the rotary embedding, each \[table rows, head_dim / 2\].
#[derive(Clone, Copy, Debug)]
pub struct Angles<'a> {
    /// Cosines.
    pub cos: &'a [f32],
    /// Sines.
    pub sin: &'a [f32],
}

/// Rotates the heads of each row by row `table_rows[row]` of `angles` (Su et al. 2021).
///
/// Rows are `stride` elements apart; the heads of a row follow one another. Elements d and d + head_dim / 2 of a head
/// are a pair ("rotate half"). `inverse` rotates back, which is also the gradient. Adds to `dst` where `accumulate`.
///
/// # Panics
/// If head_dim is odd, rows overlap, a slice is too short, or a table row does not exist.
pub fn rope(
    [heads, head_dim]: [usize; 2],
    angles: Angles,
    table_rows: &[usize],
    inverse: bool,
    (src, src_stride): (&[f32], usize),
    (dst, dst_stride): (&mut [f32], usize),
    accumulate: bool,
) {
    let (rows, half, width) = (table_rows.len(), head_dim / 2, heads * head_dim);
    assert!(head_dim.is_multiple_of(2), "head_dim is odd: {head_dim}");
    for (name, stride, len) in [
        ("src", src_stride, src.len()),
        ("dst", dst_stride, dst.len()),
    ] {
        assert!(stride >= width || rows <= 1, "rows of {name} overlap");
        let needed = rows.checked_sub(1).map_or(0, |last| last * stride + width);
        assert!(len >= needed, "length of {name}: {len} instead of {needed}");
    }
    if rows == 0 || width == 0 {
        return;
    }
    let isa = Isa::best();
    let stride = if rows == 1 { width } else { dst_stride };
    dst.par_chunks_mut(stride)
        .zip(table_rows)
        .enumerate()
        .with_min_len(min_rows(width))
        .for_each(|(row, (dst, &table_row))| {
            let at = table_row * half;
            let angles = Angles {
                cos: &angles.cos[at..at + half],
                sin: &angles.sin[at..at + half],
            };
            let src = &src[row * src_stride..][..width];
            let heads = src.chunks(head_dim).zip(dst[..width].chunks_mut(head_dim));
            heads.for_each(|(src, dst)| rotate(isa, src, angles, inverse, dst, accumulate));
        });
}

for_each_isa! {
    /// Rotates one head by one row of angles.
    fn rotate(src: &[f32], angles: Angles, inverse: bool, dst: &mut [f32], accumulate: bool) {
        let half = src.len() / 2;
        let ((a, b), (to_a, to_b)) = (src.split_at(half), dst.split_at_mut(half));
        let (cos, sin) = (&angles.cos[..half], &angles.sin[..half]);
        for d in 0..half {
            let sin = if inverse { -sin[d] } else { sin[d] };
            let rotated_a = a[d].mul_add(cos[d], -(b[d] * sin));
            let rotated_b = b[d].mul_add(cos[d], a[d] * sin);
            to_a[d] = if accumulate { to_a[d] + rotated_a } else { rotated_a };
            to_b[d] = if accumulate { to_b[d] + rotated_b } else { rotated_b };
        }
    }
}

/// y\[rows, inter\] = silu(gate) up (Shazeer 2020). A row of `gate_up`\[rows, 2 inter\] is gate, then up.
///
/// # Panics
/// If the lengths do not fit `inter`.
pub fn swiglu(gate_up: &[f32], inter: usize, y: &mut [f32]) {
    let rows = y.len() / inter.max(1);
    let width = check_rows(
        rows,
        inter,
        [("y", y.len()), ("gate_up", gate_up.len() / 2)],
    );
    let isa = Isa::best();
    (y.par_chunks_mut(width), gate_up.par_chunks(2 * width))
        .into_par_iter()
        .with_min_len(min_rows(width))
        .for_each(|(y, gate_up)| swiglu_row(isa, gate_up, y));
}

for_each_isa! {
    fn swiglu_row(gate_up: &[f32], y: &mut [f32]) {
        let (gate, up) = gate_up.split_at(y.len());
        for ((y, &gate), up) in y.iter_mut().zip(gate).zip(up) {
            *y = gate / (1.0 + exp(-gate)) * up;
        }
    }
}

/// Gradients of [`swiglu`] with respect to gate and up, written to `d_gate_up`\[rows, 2 inter\].
///
/// # Panics
/// If the lengths do not fit `inter`.
pub fn swiglu_backward(dy: &[f32], gate_up: &[f32], inter: usize, d_gate_up: &mut [f32]) {
    let rows = dy.len() / inter.max(1);
    let lens = [
        ("gate_up", gate_up.len() / 2),
        ("d_gate_up", d_gate_up.len() / 2),
    ];
    let width = check_rows(rows, inter, lens);
    let isa = Isa::best();
    (
        d_gate_up.par_chunks_mut(2 * width),
        dy.par_chunks(width),
        gate_up.par_chunks(2 * width),
    )
        .into_par_iter()
        .with_min_len(min_rows(width))
        .for_each(|(d, dy, gate_up)| swiglu_backward_row(isa, dy, gate_up, d));
}

for_each_isa! {
    fn swiglu_backward_row(dy: &[f32], gate_up: &[f32], d_gate_up: &mut [f32]) {
        let (gate, up) = gate_up.split_at(dy.len());
        let (d_gate, d_up) = d_gate_up.split_at_mut(dy.len());
        for ((((d_gate, d_up), &gate), up), dy) in d_gate.iter_mut().zip(d_up).zip(gate).zip(up).zip(dy) {
            let sigmoid = 1.0 / (1.0 + exp(-gate));
            *d_up = dy * (gate * sigmoid);
            *d_gate = dy * up * sigmoid * gate.mul_add(1.0 - sigmoid, 1.0);
        }
    }
}

/// The softmax of one row of logits, summarised.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RowSoftmax {
    /// ln softmax(logits)\[target\], in nats.
    pub logprob: f32,
    /// The largest logit.
    pub max: f32,
    /// Sum over j of e^(logit_j - max).
    pub sum: f64,
}

/// The log-probability of `target` under softmax(logits). It is NaN if a logit is NaN or all logits are -inf.
///
/// # Panics
/// If there is no logit `target`.
pub fn cross_entropy_row(logits: &[f32], target: usize) -> RowSoftmax {
    softmax_row(Isa::best(), logits, target)
}

/// Elements that are summed in f32 before their sum is added in f64. This keeps the sum over a large vocabulary exact
/// enough.
pub(super) const SUM_BLOCK: usize = 4096;

/// The largest element, in lanes; NaN is passed over.
#[inline(always)]
pub(super) fn max_lanes(row: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; 16];
    let (whole, rest) = row.as_chunks::<16>();
    for chunk in whole {
        for (lane, &x) in lanes.iter_mut().zip(chunk) {
            *lane = if x > *lane { x } else { *lane };
        }
    }
    let all = lanes.iter().chain(rest);
    all.fold(f32::NEG_INFINITY, |m, &x| if x > m { x } else { m })
}

for_each_isa! {
    fn softmax_row(logits: &[f32], target: usize) -> RowSoftmax {
        let max = max_lanes(logits);
        let mut sum = 0f64;
        for block in logits.chunks(SUM_BLOCK) {
            sum += sum_lanes([block], |[x], sum| sum + exp(x - max)) as f64;
        }
        let logprob = ((logits[target] - max) as f64 - sum.ln()) as f32;
        RowSoftmax { logprob, max, sum }
    }
}

/// Replaces logits by factor (softmax(logits) - onehot(target)), which is the gradient of -factor logprob.
///
/// `row` is the result of [`cross_entropy_row`] for the same logits.
///
/// # Panics
/// If there is no logit `target`.
pub fn cross_entropy_grad_row(logits: &mut [f32], target: usize, row: &RowSoftmax, factor: f32) {
    assert!(
        target < logits.len(),
        "target {target} of {} logits",
        logits.len()
    );
    softmax_grad_row(Isa::best(), logits, target, row, factor);
}

for_each_isa! {
    fn softmax_grad_row(logits: &mut [f32], target: usize, row: &RowSoftmax, factor: f32) {
        let (max, scale) = (row.max, (1.0 / row.sum) as f32);
        // p - 1 cancels where p is near 1. There it is computed as minus the sum of the other probabilities.
        let of_target = (row.logprob as f64).exp_m1() as f32;
        for x in logits.iter_mut() {
            *x = exp(*x - max) * scale * factor;
        }
        logits[target] = of_target * factor;
    }
}
