//! The steps of [`super::tile`] and [`super::softmax`], compiled once for each instruction set, and the
//! choice among them.

use super::simd::Portable;
use super::softmax::{self, Affine, BackwardRows, Softmax};
use super::tile::{self, Accumulate, Rows, Scores};
use crate::isa::Isa;

/// One instruction set's steps.
///
/// A table exists only if the machine has its instruction set, so its methods are safe to call.
pub(super) struct Kernels {
    transpose: unsafe fn(Rows<'_>, usize, usize, &mut [f32]),
    scores: unsafe fn(Scores<'_>),
    dots: unsafe fn(Rows<'_>, Rows<'_>, usize, &mut [f32]),
    softmax: unsafe fn(&mut [f32], &[usize], Affine<'_>, Softmax<'_>),
    score_gradients: unsafe fn(&mut [f32], &mut [f32], BackwardRows<'_>),
    accumulate: unsafe fn(Accumulate<'_>),
}

macro_rules! kernels {
    ($table:ident, $lanes:ty $(, $features:literal)?) => {
        static $table: Kernels = {
            $(#[target_feature(enable = $features)])?
            unsafe fn transpose(from: Rows<'_>, count: usize, head_dim: usize, to: &mut [f32]) {
                // SAFETY: the function's own features are those of its lanes; also below.
                unsafe { tile::transpose::<$lanes>(from, count, head_dim, to) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn scores(args: Scores<'_>) {
                // SAFETY: as above.
                unsafe { tile::scores::<$lanes>(args) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn dots(a: Rows<'_>, b: Rows<'_>, head_dim: usize, to: &mut [f32]) {
                // SAFETY: as above.
                unsafe { tile::dots(a, b, head_dim, to) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn softmax(
                s: &mut [f32],
                counts: &[usize],
                affine: Affine<'_>,
                state: Softmax<'_>,
            ) {
                // SAFETY: as above.
                unsafe { softmax::softmax::<$lanes>(s, counts, affine, state) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn score_gradients(
                s: &mut [f32],
                dp: &mut [f32],
                rows: BackwardRows<'_>,
            ) {
                // SAFETY: as above.
                unsafe { softmax::score_gradients::<$lanes>(s, dp, rows) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn accumulate(args: Accumulate<'_>) {
                // SAFETY: as above; the rows are the caller's.
                unsafe { tile::accumulate::<$lanes>(args) }
            }
            Kernels { transpose, scores, dots, softmax, score_gradients, accumulate }
        };
    };
}

#[cfg(target_arch = "x86_64")]
kernels!(AVX512, super::simd::Avx512, "avx512f,avx2,fma");
#[cfg(target_arch = "x86_64")]
kernels!(AVX2, super::simd::Avx2, "avx2,fma");
kernels!(PORTABLE, Portable);

impl Kernels {
    /// The table of an instruction set, or the portable one where this machine lacks it.
    pub(super) fn of(isa: Isa) -> &'static Kernels {
        if !Isa::available().contains(&isa) {
            return &PORTABLE;
        }
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => &AVX512,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => &AVX2,
            _ => &PORTABLE,
        }
    }

    /// See [`tile::transpose`].
    pub(super) fn transpose(&self, from: Rows<'_>, count: usize, head_dim: usize, to: &mut [f32]) {
        // SAFETY: `of` found the instruction set; also below.
        unsafe { (self.transpose)(from, count, head_dim, to) }
    }

    /// See [`tile::scores`].
    pub(super) fn scores(&self, args: Scores<'_>) {
        // SAFETY: as above.
        unsafe { (self.scores)(args) }
    }

    /// See [`tile::dots`].
    pub(super) fn dots(&self, a: Rows<'_>, b: Rows<'_>, head_dim: usize, to: &mut [f32]) {
        // SAFETY: as above.
        unsafe { (self.dots)(a, b, head_dim, to) }
    }

    /// See [`softmax::softmax`].
    pub(super) fn softmax(
        &self,
        s: &mut [f32],
        counts: &[usize],
        affine: Affine<'_>,
        state: Softmax<'_>,
    ) {
        // SAFETY: as above.
        unsafe { (self.softmax)(s, counts, affine, state) }
    }

    /// See [`softmax::score_gradients`].
    pub(super) fn score_gradients(&self, s: &mut [f32], dp: &mut [f32], rows: BackwardRows<'_>) {
        // SAFETY: as above.
        unsafe { (self.score_gradients)(s, dp, rows) }
    }

    /// See [`Accumulate`].
    ///
    /// # Safety
    /// The rows of `c` are valid, and no other thread uses them during the call.
    pub(super) unsafe fn accumulate(&self, args: Accumulate<'_>) {
        // SAFETY: as above; the rows are the caller's promise.
        unsafe { (self.accumulate)(args) }
    }
}
