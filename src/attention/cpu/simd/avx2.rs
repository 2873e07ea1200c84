//! AVX2 and FMA: two registers hold the sixteen lanes.

use std::arch::x86_64::*;

use super::{LANES, Lanes};

/// Lanes 0..8 and 8..16.
#[derive(Clone, Copy)]
pub(in crate::attention::cpu) struct Avx2(__m256, __m256);

// SAFETY of all blocks below: by the trait's contract the caller guarantees AVX2, FMA and valid pointers.
impl Lanes for Avx2 {
    // Of 16 registers, 4 x 1 accumulators take 8, a column takes 2 and a broadcast value 2.
    const BLOCK: usize = 1;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        unsafe { Avx2(_mm256_set1_ps(x), _mm256_set1_ps(x)) }
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        unsafe { Avx2(_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))) }
    }

    #[inline(always)]
    unsafe fn prefetch(at: *const f32) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }

    #[inline(always)]
    unsafe fn load_half(from: *const f32) -> Self {
        unsafe { Avx2(_mm256_loadu_ps(from), _mm256_setzero_ps()) }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        unsafe {
            _mm256_storeu_ps(to, self.0);
            _mm256_storeu_ps(to.add(8), self.1);
        }
    }

    #[inline(always)]
    unsafe fn store_half(self, to: *mut f32) {
        unsafe { _mm256_storeu_ps(to, self.0) }
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        unsafe {
            Avx2(
                _mm256_add_ps(self.0, other.0),
                _mm256_add_ps(self.1, other.1),
            )
        }
    }

    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        unsafe {
            Avx2(
                _mm256_sub_ps(self.0, other.0),
                _mm256_sub_ps(self.1, other.1),
            )
        }
    }

    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        unsafe {
            Avx2(
                _mm256_mul_ps(self.0, other.0),
                _mm256_mul_ps(self.1, other.1),
            )
        }
    }

    #[inline(always)]
    unsafe fn mul_add(self, factor: Self, term: Self) -> Self {
        unsafe {
            Avx2(
                _mm256_fmadd_ps(self.0, factor.0, term.0),
                _mm256_fmadd_ps(self.1, factor.1, term.1),
            )
        }
    }

    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        unsafe {
            Avx2(
                _mm256_max_ps(self.0, other.0),
                _mm256_max_ps(self.1, other.1),
            )
        }
    }

    #[inline(always)]
    unsafe fn min(self, other: Self) -> Self {
        unsafe {
            Avx2(
                _mm256_min_ps(self.0, other.0),
                _mm256_min_ps(self.1, other.1),
            )
        }
    }

    #[inline(always)]
    unsafe fn reduce_max(self) -> f32 {
        unsafe {
            let eight = _mm256_max_ps(self.0, self.1);
            let four = _mm_max_ps(
                _mm256_castps256_ps128(eight),
                _mm256_extractf128_ps::<1>(eight),
            );
            let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)))
        }
    }

    #[inline(always)]
    unsafe fn round(self) -> Self {
        const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        unsafe {
            Avx2(
                _mm256_round_ps::<NEAREST>(self.0),
                _mm256_round_ps::<NEAREST>(self.1),
            )
        }
    }

    #[inline(always)]
    unsafe fn times_pow2(self, n: Self) -> Self {
        unsafe { Avx2(times_pow2(self.0, n.0), times_pow2(self.1, n.1)) }
    }

    #[inline(always)]
    unsafe fn zero_where_below(self, x: Self, limit: Self) -> Self {
        unsafe {
            let below = Avx2(
                _mm256_cmp_ps::<_CMP_LT_OQ>(x.0, limit.0),
                _mm256_cmp_ps::<_CMP_LT_OQ>(x.1, limit.1),
            );
            Avx2(
                _mm256_andnot_ps(below.0, self.0),
                _mm256_andnot_ps(below.1, self.1),
            )
        }
    }

    #[inline(always)]
    unsafe fn first(self, count: usize, fill: Self) -> Self {
        unsafe {
            let count = _mm256_set1_epi32(count.min(LANES) as i32);
            let low = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
            let high = _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15);
            let low = _mm256_castsi256_ps(_mm256_cmpgt_epi32(count, low));
            let high = _mm256_castsi256_ps(_mm256_cmpgt_epi32(count, high));
            Avx2(
                _mm256_blendv_ps(fill.0, self.0, low),
                _mm256_blendv_ps(fill.1, self.1, high),
            )
        }
    }

    #[inline(always)]
    unsafe fn transpose(rows: &mut [Self; LANES]) {
        unsafe {
            let mut quarters = [[_mm256_setzero_ps(); 8]; 4];
            for row in 0..8 {
                quarters[0][row] = rows[row].0;
                quarters[1][row] = rows[row].1;
                quarters[2][row] = rows[row + 8].0;
                quarters[3][row] = rows[row + 8].1;
            }
            for quarter in &mut quarters {
                transpose8(quarter);
            }
            for row in 0..8 {
                rows[row] = Avx2(quarters[0][row], quarters[2][row]);
                rows[row + 8] = Avx2(quarters[1][row], quarters[3][row]);
            }
        }
    }
}

/// # Safety
/// Needs AVX2.
#[inline(always)]
unsafe fn times_pow2(x: __m256, n: __m256) -> __m256 {
    // SAFETY: the caller vouches for AVX2.
    unsafe {
        let exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
        _mm256_mul_ps(x, _mm256_castsi256_ps(_mm256_slli_epi32::<23>(exponent)))
    }
}

/// # Safety
/// Needs AVX2.
#[inline(always)]
unsafe fn transpose8(rows: &mut [__m256; 8]) {
    // SAFETY: the caller vouches for AVX2.
    unsafe {
        for four in rows.chunks_exact_mut(4) {
            let [a, b, c, d] = [four[0], four[1], four[2], four[3]];
            let ab = [_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b)];
            let cd = [_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d)];
            for half in 0..2 {
                four[2 * half] = _mm256_shuffle_ps::<0x44>(ab[half], cd[half]);
                four[2 * half + 1] = _mm256_shuffle_ps::<0xee>(ab[half], cd[half]);
            }
        }
        for column in 0..4 {
            let (a, b) = (rows[column], rows[column + 4]);
            rows[column] = _mm256_permute2f128_ps::<0x20>(a, b);
            rows[column + 4] = _mm256_permute2f128_ps::<0x31>(a, b);
        }
    }
}
