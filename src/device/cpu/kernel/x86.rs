//! The kernels for AVX2 and AVX-512.
#![expect(
    clippy::needless_range_loop,
    reason = "constant trip counts over a block of registers: indices say which"
)]

use std::arch::x86_64::*;

use super::{Kernel, Kernels, NR, Tile, WIDE, a_layout};
use crate::device::cpu::element::Element;

macro_rules! heights {
    ($kernel:ident, $element:ty, $by_rows:literal, $($mr:literal)*) => {
        &[$($kernel::<$element, $mr, 1, $by_rows>),*]
    };
}

impl<E: Element> Kernels<E> {
    pub(super) const AVX512: &'static Self = &Self {
        rows: heights!(avx512, E, true, 1 2 3 4 5 6 7 8 9 10 11 12 13 14),
        wide: avx512::<E, 1, WIDE, true>,
    };

    pub(super) const AVX2: &'static Self = &Self {
        rows: heights!(avx2, E, true, 1 2 3 4 5 6),
        wide: avx2::<E, 1, WIDE, true>,
    };
}

pub(super) static COLUMNS_AVX512: &[Kernel] =
    heights!(avx512, f32, false, 1 2 3 4 5 6 7 8 9 10 11 12 13 14);
pub(super) static COLUMNS_AVX2: &[Kernel] = heights!(avx2, f32, false, 1 2 3 4 5 6);

/// Tiles of at most this many rows are bound by memory: their panels are read once.
const FEW_ROWS: usize = 8;
/// Prefetch distance in a panel, in bytes: the hardware prefetcher stops at the end of a page.
const AHEAD: usize = 2048;

/// Prefetches one row of a panel, [`AHEAD`] of this one. The address may be invalid.
#[inline(always)]
fn ask_ahead<E>(row: *const E) {
    let ahead = row.cast::<i8>().wrapping_add(AHEAD);
    for line in 0..(NR * size_of::<E>()).div_ceil(64) {
        // SAFETY: a prefetch reads nothing that the program can see.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(ahead.wrapping_add(64 * line)) };
    }
}

/// 14 rows of 32 columns fill 28 of the 32 registers; two hold B and one the element of A.
///
/// # Safety
/// See [`super::Kernel`].
#[target_feature(enable = "avx512f")]
unsafe fn avx512<E: Element, const MR: usize, const PANELS: usize, const BY_ROWS: bool>(
    t: &Tile<E>,
) {
    let (a_row, a_step) = const { a_layout::<MR, BY_ROWS>() };
    let mut acc = [[[_mm512_setzero_ps(); 2]; PANELS]; MR];
    // SAFETY: the caller vouches for MR rows and PANELS panels of C, A and B over k.
    unsafe {
        if t.accumulate {
            for i in 0..MR {
                for q in 0..PANELS {
                    let c = t.c.add(i * t.c_stride + q * NR);
                    acc[i][q] = [_mm512_loadu_ps(c), _mm512_loadu_ps(c.add(16))];
                }
            }
        }
        let (mut a, mut b) = (t.a, t.b);
        for _ in 0..t.k {
            for q in 0..PANELS {
                let b_row = b.add(q * t.b_stride);
                if MR <= FEW_ROWS {
                    ask_ahead(b_row);
                }
                let b_row = [E::load16(b_row), E::load16(b_row.add(16))];
                for i in 0..MR {
                    let x = _mm512_set1_ps(a.add(i * a_row).read());
                    for h in 0..2 {
                        acc[i][q][h] = _mm512_fmadd_ps(x, b_row[h], acc[i][q][h]);
                    }
                }
            }
            a = a.wrapping_add(a_step);
            b = b.wrapping_add(NR);
        }
        for i in 0..MR {
            for q in 0..PANELS {
                let c = t.c.add(i * t.c_stride + q * NR);
                _mm512_storeu_ps(c, acc[i][q][0]);
                _mm512_storeu_ps(c.add(16), acc[i][q][1]);
            }
        }
    }
}

/// Up to 3 rows take a panel's 32 columns at once (12 of 16 registers), 4 to 6 rows take 16
/// columns twice.
///
/// # Safety
/// See [`super::Kernel`].
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn avx2<E: Element, const MR: usize, const PANELS: usize, const BY_ROWS: bool>(t: &Tile<E>) {
    for q in 0..PANELS {
        // SAFETY: the caller vouches for every panel of the tile.
        unsafe {
            let (b, c) = (t.b.add(q * t.b_stride), t.c.add(q * NR));
            if MR <= 3 {
                avx2_columns::<E, MR, 4, BY_ROWS>(&Tile { b, c, ..*t });
            } else {
                avx2_columns::<E, MR, 2, BY_ROWS>(&Tile { b, c, ..*t });
                let (b, c) = (b.add(16), c.add(16));
                avx2_columns::<E, MR, 2, BY_ROWS>(&Tile { b, c, ..*t });
            }
        }
    }
}

/// `VECTORS` times 8 columns of one panel.
///
/// # Safety
/// See [`super::Kernel`].
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn avx2_columns<E: Element, const MR: usize, const VECTORS: usize, const BY_ROWS: bool>(
    t: &Tile<E>,
) {
    let (a_row, a_step) = const { a_layout::<MR, BY_ROWS>() };
    let mut acc = [[_mm256_setzero_ps(); VECTORS]; MR];
    // SAFETY: the caller vouches for MR rows and these columns of C, A and B over k.
    unsafe {
        if t.accumulate {
            for i in 0..MR {
                for v in 0..VECTORS {
                    acc[i][v] = _mm256_loadu_ps(t.c.add(i * t.c_stride + v * 8));
                }
            }
        }
        let (mut a, mut b) = (t.a, t.b);
        for _ in 0..t.k {
            if MR <= 3 {
                ask_ahead(b);
            }
            for v in 0..VECTORS {
                let b_row = E::load8(b.add(v * 8));
                for i in 0..MR {
                    let x = _mm256_set1_ps(a.add(i * a_row).read());
                    acc[i][v] = _mm256_fmadd_ps(x, b_row, acc[i][v]);
                }
            }
            a = a.wrapping_add(a_step);
            b = b.wrapping_add(NR);
        }
        for i in 0..MR {
            for v in 0..VECTORS {
                _mm256_storeu_ps(t.c.add(i * t.c_stride + v * 8), acc[i][v]);
            }
        }
    }
}
