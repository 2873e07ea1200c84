//! AVX-512F: one register holds the sixteen lanes.

use std::arch::x86_64::*;

use super::{LANES, Lanes};

/// Sixteen lanes in one register.
#[derive(Clone, Copy)]
pub(in crate::attention::cpu) struct Avx512(__m512);

// SAFETY of all blocks below: by the trait's contract the caller guarantees AVX-512F and valid pointers.
impl Lanes for Avx512 {
    // Of 32 registers, 4 x 4 accumulators take 16, 4 columns take 4 and a broadcast value 1.
    const BLOCK: usize = 4;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        unsafe { Avx512(_mm512_set1_ps(x)) }
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        unsafe { Avx512(_mm512_loadu_ps(from)) }
    }

    #[inline(always)]
    unsafe fn prefetch(at: *const f32) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }

    #[inline(always)]
    unsafe fn load_half(from: *const f32) -> Self {
        unsafe { Avx512(_mm512_maskz_loadu_ps(0xff, from)) }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        unsafe { _mm512_storeu_ps(to, self.0) }
    }

    #[inline(always)]
    unsafe fn store_half(self, to: *mut f32) {
        unsafe { _mm512_mask_storeu_ps(to, 0xff, self.0) }
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        unsafe { Avx512(_mm512_add_ps(self.0, other.0)) }
    }

    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        unsafe { Avx512(_mm512_sub_ps(self.0, other.0)) }
    }

    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        unsafe { Avx512(_mm512_mul_ps(self.0, other.0)) }
    }

    #[inline(always)]
    unsafe fn mul_add(self, factor: Self, term: Self) -> Self {
        unsafe { Avx512(_mm512_fmadd_ps(self.0, factor.0, term.0)) }
    }

    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        unsafe { Avx512(_mm512_max_ps(self.0, other.0)) }
    }

    #[inline(always)]
    unsafe fn min(self, other: Self) -> Self {
        unsafe { Avx512(_mm512_min_ps(self.0, other.0)) }
    }

    #[inline(always)]
    unsafe fn reduce_max(self) -> f32 {
        unsafe { _mm512_reduce_max_ps(self.0) }
    }

    #[inline(always)]
    unsafe fn round(self) -> Self {
        unsafe { Avx512(_mm512_roundscale_ps::<_MM_FROUND_TO_NEAREST_INT>(self.0)) }
    }

    #[inline(always)]
    unsafe fn times_pow2(self, n: Self) -> Self {
        unsafe { Avx512(_mm512_scalef_ps(self.0, n.0)) }
    }

    #[inline(always)]
    unsafe fn zero_where_below(self, x: Self, limit: Self) -> Self {
        unsafe {
            let keep = _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(x.0, limit.0);
            Avx512(_mm512_maskz_mov_ps(keep, self.0))
        }
    }

    #[inline(always)]
    unsafe fn first(self, count: usize, fill: Self) -> Self {
        let mask = if count >= LANES {
            u16::MAX
        } else {
            (1 << count) - 1
        };
        unsafe { Avx512(_mm512_mask_blend_ps(mask, fill.0, self.0)) }
    }

    #[inline(always)]
    unsafe fn transpose(rows: &mut [Self; LANES]) {
        unsafe {
            // First, in each group of four rows, transpose the 4 x 4 block within each 128-bit quarter.
            for four in rows.chunks_exact_mut(4) {
                let (a, b, c, d) = (four[0].0, four[1].0, four[2].0, four[3].0);
                let ab = [_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)];
                let cd = [_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d)];
                for half in 0..2 {
                    let (ab, cd) = (_mm512_castps_pd(ab[half]), _mm512_castps_pd(cd[half]));
                    four[2 * half] = Avx512(_mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)));
                    four[2 * half + 1] = Avx512(_mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
                }
            }
            // Then, for each of the four columns of a quarter, transpose the 4 x 4 matrix of quarters.
            for column in 0..4 {
                let [a, b, c, d] = [0, 4, 8, 12].map(|first| rows[first + column].0);
                let even = [
                    _mm512_shuffle_f32x4::<0x88>(a, b),
                    _mm512_shuffle_f32x4::<0x88>(c, d),
                ];
                let odd = [
                    _mm512_shuffle_f32x4::<0xdd>(a, b),
                    _mm512_shuffle_f32x4::<0xdd>(c, d),
                ];
                rows[column] = Avx512(_mm512_shuffle_f32x4::<0x88>(even[0], even[1]));
                rows[column + 4] = Avx512(_mm512_shuffle_f32x4::<0x88>(odd[0], odd[1]));
                rows[column + 8] = Avx512(_mm512_shuffle_f32x4::<0xdd>(even[0], even[1]));
                rows[column + 12] = Avx512(_mm512_shuffle_f32x4::<0xdd>(odd[0], odd[1]));
            }
        }
    }
}
