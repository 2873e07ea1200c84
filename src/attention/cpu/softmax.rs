//! The softmax of one tile of keys, forward and backward, for any instruction set.
//!
//! **Bits.** The sum of a row is sixteen chains, with key `j` of a tile in chain `j % 16`. The rescale factor depends
//! only on the row. Forward and backward round `scale * s + ln gate` in the same way, so that both have the same
//! probabilities.

use super::simd::{LANES, Lanes, exp};
use super::tile::KEYS;

/// Scores from dot products: `scale * dot + bias[row]`.
#[derive(Clone, Copy)]
pub(super) struct Affine<'a> {
    pub scale: f32,
    /// `[rows]`.
    pub bias: &'a [f32],
}

/// Running state of the softmax of some rows; lengths are multiples of 16.
pub(super) struct Softmax<'a> {
    /// Largest score so far.
    pub max: &'a mut [f32],
    /// Sixteen partial sums of `exp(score - max)` per row.
    pub sum: &'a mut [[f32; LANES]],
    /// Rescale factor of the accumulators, set by each tile.
    pub alpha: &'a mut [f32],
}

/// Per-row inputs of [`score_gradients`], and the sums it adds to.
pub(super) struct BackwardRows<'a> {
    pub scale: f32,
    pub bias: f32,
    /// Keys seen, a prefix.
    pub counts: &'a [usize],
    pub lse: &'a [f32],
    pub delta: &'a [f32],
    /// Sums of `p` and of `p * dp` over the keys so far; empty if they are not wanted.
    pub sums: &'a mut [[f64; 2]],
}

/// One step of the online softmax: dot products `s[row, j]` for `j < counts[row]` become
/// `exp(scale * s[row, j] + bias[row] - max[row])`, and the state is updated.
///
/// A row with count 0 keeps its state, with `alpha` 1.
///
/// # Safety
/// The instruction set of `L`.
#[inline(always)]
pub(super) unsafe fn softmax<L: Lanes>(
    s: &mut [f32],
    counts: &[usize],
    affine: Affine<'_>,
    state: Softmax<'_>,
) {
    let rows = counts.len();
    let Softmax { max, sum, alpha } = state;
    assert!(s.len() >= rows * KEYS && affine.bias.len() >= rows && sum.len() >= rows);
    assert!(max.len() >= rows && alpha.len() >= rows.next_multiple_of(LANES));
    assert!(counts.iter().all(|&count| count <= KEYS));
    // SAFETY: rows below `rows`, vectors that begin below a count <= KEYS, `alpha` in whole vectors.
    unsafe {
        for row in 0..rows {
            let before = max[row];
            if counts[row] > 0 {
                let s = s.as_ptr().add(row * KEYS);
                let score = (L::splat(affine.scale), L::splat(affine.bias[row]));
                let largest = largest::<L>(s, counts[row], score);
                max[row] = if largest > before { largest } else { before };
            }
            alpha[row] = if max[row] == before {
                0.0
            } else {
                before - max[row]
            };
        }
        for row in (0..rows).step_by(LANES) {
            let alpha = alpha.as_mut_ptr().add(row);
            exp(L::load(alpha)).store(alpha);
        }
        for row in (0..rows).filter(|&row| counts[row] > 0) {
            let s = s.as_mut_ptr().add(row * KEYS);
            // Before the first finite score the maximum is -inf, and -inf - -inf is NaN.
            let max = if max[row] == f32::NEG_INFINITY {
                0.0
            } else {
                max[row]
            };
            let score = (L::splat(affine.scale), L::splat(affine.bias[row]));
            let to = sum[row].as_mut_ptr();
            let mut total = L::load(to).mul(L::splat(alpha[row]));
            for key in (0..counts[row]).step_by(LANES) {
                let p = probabilities::<L>(s.add(key), counts[row] - key, score, L::splat(max));
                p.store(s.add(key));
                total = total.add(p);
            }
            total.store(to);
        }
    }
}

#[inline(always)]
unsafe fn largest<L: Lanes>(s: *const f32, count: usize, (scale, bias): (L, L)) -> f32 {
    // SAFETY: the pointer covers the vectors that begin below `count`, the caller's contract.
    unsafe {
        let lowest = L::splat(f32::NEG_INFINITY);
        let mut largest = lowest;
        for key in (0..count).step_by(LANES) {
            let score = L::load(s.add(key)).mul_add(scale, bias);
            largest = if count - key >= LANES {
                score.max(largest)
            } else {
                score.first(count - key, lowest).max(largest)
            };
        }
        largest.reduce_max()
    }
}

/// `exp(scale * s + bias - max)` in the first `count` lanes, 0 in the rest.
#[inline(always)]
unsafe fn probabilities<L: Lanes>(s: *const f32, count: usize, (scale, bias): (L, L), max: L) -> L {
    // SAFETY: the pointer covers a vector, the caller's contract.
    unsafe {
        let p = exp(L::load(s).mul_add(scale, bias).sub(max));
        if count >= LANES {
            p
        } else {
            p.first(count, L::splat(0.0))
        }
    }
}

/// Backward: dot products `s` become `p = exp(scale * s + bias - lse)` and `dp` becomes
/// `scale * p * (dp - delta)`, the gradient of the dot products, at the keys each row sees. Adds to
/// each row's sums.
///
/// # Safety
/// The instruction set of `L`.
#[inline(always)]
pub(super) unsafe fn score_gradients<L: Lanes>(
    s: &mut [f32],
    dp: &mut [f32],
    rows: BackwardRows<'_>,
) {
    let BackwardRows {
        scale,
        bias,
        counts,
        lse,
        delta,
        sums,
    } = rows;
    let count = counts.len();
    assert!(s.len() >= count * KEYS && dp.len() >= count * KEYS);
    assert!(lse.len() >= count && delta.len() >= count);
    assert!(counts.iter().all(|&count| count <= KEYS));
    // SAFETY: rows below `count`, vectors that begin below a count <= KEYS.
    unsafe {
        let (scale, bias, zero) = (L::splat(scale), L::splat(bias), L::splat(0.0));
        for row in 0..count {
            let (lse, delta) = (L::splat(lse[row]), L::splat(delta[row]));
            let mut row_sums = [zero; 2];
            for key in (0..counts[row]).step_by(LANES) {
                let s = s.as_mut_ptr().add(row * KEYS + key);
                let dp = dp.as_mut_ptr().add(row * KEYS + key);
                let visible = counts[row] - key;
                let p = probabilities::<L>(s, visible, (scale, bias), lse);
                p.store(s);
                let d = L::load(dp);
                p.mul(d.sub(delta)).mul(scale).store(dp);
                if !sums.is_empty() {
                    row_sums[0] = row_sums[0].add(p);
                    row_sums[1] = row_sums[1].add(p.mul(d).first(visible, zero));
                }
            }
            if let Some(sums) = sums.get_mut(row) {
                for (sum, row_sum) in sums.iter_mut().zip(row_sums) {
                    let mut lanes = [0.0; LANES];
                    row_sum.store(lanes.as_mut_ptr());
                    *sum += f64::from(pairwise_sum(lanes));
                }
            }
        }
    }
}

/// The sum of the lanes, halves first.
pub(super) fn pairwise_sum(mut lanes: [f32; LANES]) -> f32 {
    let mut len = LANES;
    while len > 1 {
        len /= 2;
        for i in 0..len {
            lanes[i] += lanes[i + len];
        }
    }
    lanes[0]
}
