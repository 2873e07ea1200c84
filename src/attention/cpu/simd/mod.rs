//! Sixteen `f32` lanes, by instruction set.
//!
//! Every instruction set has sixteen lanes and rounds each operation alike, so that all give the same
//! bits.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;

#[cfg(target_arch = "x86_64")]
pub(super) use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
pub(super) use avx512::Avx512;
pub(super) use portable::Portable;

/// Lanes of every vector.
pub(super) const LANES: usize = 16;

/// Sixteen `f32`.
///
/// # Safety
/// Every function needs the instruction set of its implementor; pointers must be valid for the
/// elements read or written (16, in the `_half` functions 8), with no alignment.
pub(super) trait Lanes: Copy {
    /// Vectors side by side in one register block: four rows of them fill the register file.
    const BLOCK: usize;

    unsafe fn splat(x: f32) -> Self;
    unsafe fn load(from: *const f32) -> Self;
    /// Asks for the cache line at any address, valid or not.
    unsafe fn prefetch(_at: *const f32) {}
    /// Eight elements, then zeros.
    unsafe fn load_half(from: *const f32) -> Self;
    unsafe fn store(self, to: *mut f32);
    /// The first eight lanes.
    unsafe fn store_half(self, to: *mut f32);
    unsafe fn add(self, other: Self) -> Self;
    unsafe fn sub(self, other: Self) -> Self;
    unsafe fn mul(self, other: Self) -> Self;
    /// `self * factor + term`, rounded once.
    unsafe fn mul_add(self, factor: Self, term: Self) -> Self;
    /// The larger; `other` where either is NaN.
    unsafe fn max(self, other: Self) -> Self;
    /// The smaller; `other` where either is NaN.
    unsafe fn min(self, other: Self) -> Self;
    /// The largest lane.
    unsafe fn reduce_max(self) -> f32;
    /// To the nearest integer, ties to even; any value beyond +-2^22.
    unsafe fn round(self) -> Self;
    /// `self * 2^n` for integers `n` in -126..=127; any value for other `n`.
    unsafe fn times_pow2(self, n: Self) -> Self;
    /// 0 where `x < limit`, `self` elsewhere (NaN in `x` included).
    unsafe fn zero_where_below(self, x: Self, limit: Self) -> Self;
    /// The first `count` lanes of `self`, the rest of `fill`.
    unsafe fn first(self, count: usize, fill: Self) -> Self;
    /// Transposes a 16 x 16 matrix of rows.
    unsafe fn transpose(rows: &mut [Self; LANES]);
}

/// `e^x` within 1 ulp for x in [-87, 88]; 0 below, NaN for NaN.
///
/// With n = round(x / ln 2) and r = x - n ln 2 (ln 2 in two parts), 2^n e^r, where
/// e^r = 1 + r + r^2 q(r) and q interpolates at the Chebyshev points of |r| <= ln(2)/2 (relative
/// error 2^-26).
///
/// # Safety
/// See [`Lanes`].
#[inline(always)]
pub(super) unsafe fn exp<L: Lanes>(x: L) -> L {
    const Q: [f32; 5] = [0.5, 0.16666578, 0.041666556, 0.008363173, 0.0013926176];
    const LN2_HIGH: f32 = 0.69140625;
    const LN2_LOW: f32 = 0.0017409306;
    // SAFETY: the caller vouches for the instruction set; no memory is touched.
    unsafe {
        let y = L::splat(88.0).min(x);
        let n = y.mul(L::splat(std::f32::consts::LOG2_E)).round();
        let r = n.mul_add(L::splat(-LN2_HIGH), y);
        let r = n.mul_add(L::splat(-LN2_LOW), r);
        let mut q = L::splat(Q[4]);
        q = q.mul_add(r, L::splat(Q[3]));
        q = q.mul_add(r, L::splat(Q[2]));
        q = q.mul_add(r, L::splat(Q[1]));
        q = q.mul_add(r, L::splat(Q[0]));
        let e = r.mul(r).mul_add(q, r).add(L::splat(1.0));
        e.times_pow2(n).zero_where_below(x, L::splat(-87.0))
    }
}
