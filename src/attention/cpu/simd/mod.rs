//! Vectors of sixteen `f32` lanes, one implementation per instruction set.
//!
//! Every implementation has sixteen lanes and rounds each operation in the same way. So all of them give the same
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

/// Number of lanes of a vector.
pub(super) const LANES: usize = 16;

/// Sixteen `f32`.
///
/// # Safety
/// Every function needs the instruction set of its implementation. Pointers must be valid for the elements that are
/// read or written: 16, or 8 in the `_half` functions. They need no alignment.
pub(super) trait Lanes: Copy {
    /// Columns of a register block, in vectors. A block has four rows and fills the register file.
    const BLOCK: usize;

    unsafe fn splat(x: f32) -> Self;
    unsafe fn load(from: *const f32) -> Self;
    /// Prefetches the cache line at `at`. The address need not be valid.
    unsafe fn prefetch(_at: *const f32) {}
    /// Loads eight elements; the other lanes are 0.
    unsafe fn load_half(from: *const f32) -> Self;
    unsafe fn store(self, to: *mut f32);
    /// Stores the first eight lanes.
    unsafe fn store_half(self, to: *mut f32);
    unsafe fn add(self, other: Self) -> Self;
    unsafe fn sub(self, other: Self) -> Self;
    unsafe fn mul(self, other: Self) -> Self;
    /// `self * factor + term`, rounded once.
    unsafe fn mul_add(self, factor: Self, term: Self) -> Self;
    /// The larger of the two; `other` where either is NaN.
    unsafe fn max(self, other: Self) -> Self;
    /// The smaller of the two; `other` where either is NaN.
    unsafe fn min(self, other: Self) -> Self;
    /// The largest lane.
    unsafe fn reduce_max(self) -> f32;
    /// Rounds to the nearest integer, ties to even. Beyond +-2^22 the result is unspecified.
    unsafe fn round(self) -> Self;
    /// `self * 2^n` for integers `n` in -126..=127. For other `n` the result is unspecified.
    unsafe fn times_pow2(self, n: Self) -> Self;
    /// 0 where `x < limit`, `self` elsewhere, also where `x` is NaN.
    unsafe fn zero_where_below(self, x: Self, limit: Self) -> Self;
    /// The first `count` lanes of `self`, then lanes of `fill`.
    unsafe fn first(self, count: usize, fill: Self) -> Self;
    /// Transposes a 16 x 16 matrix; each vector is a row.
    unsafe fn transpose(rows: &mut [Self; LANES]);
}

/// `e^x` within 1 ulp for x in [-87, 88]. Below -87 the result is 0, and NaN gives NaN.
///
/// Computed as 2^n e^r with n = round(x / ln 2) and r = x - n ln 2, where ln 2 is subtracted in two parts. The
/// polynomial is e^r = 1 + r + r^2 q(r). q interpolates at the Chebyshev points of |r| <= ln(2)/2; its relative error
/// is 2^-26.
///
/// # Safety
/// See [`Lanes`].
#[inline(always)]
pub(super) unsafe fn exp<L: Lanes>(x: L) -> L {
    const Q: [f32; 5] = [0.5, 0.16666578, 0.041666556, 0.008363173, 0.0013926176];
    const LN2_HIGH: f32 = 0.69140625;
    const LN2_LOW: f32 = 0.0017409306;
    // SAFETY: the caller guarantees the instruction set; no memory is accessed.
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
