//! GEMM microkernels: one tile of C over one block of k.
//!
//! Every kernel computes an element of its tile in the same way: it starts from 0 or from C, then does one fused
//! multiply-add per k, ascending. So all kernels give the same bits.

use crate::isa::Isa;

/// Columns of C in a panel of B, the same for every instruction set.
pub(super) const NR: usize = 32;
/// Longest block of k of a kernel call: a panel of B of this length (32 KiB) stays in the L1 cache.
pub(super) const KC: usize = 256;
/// Row stride of a packed row-major tile of A: `KC` plus one cache line, so that rows do not share a cache set.
pub(super) const A_STRIDE: usize = KC + 16;
/// Panels that a one-row kernel reads at a time.
pub(super) const WIDE: usize = 4;

/// Memory layout of a packed tile of A.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Order {
    /// Element (i, p) at `i * A_STRIDE + p`.
    Rows,
    /// Element (i, p) at `p * rows + i`, `rows` being the height of the tile.
    Columns,
}

/// The operands of one kernel call: C[rows, panels * NR] (+)= A[rows, k] B[k, panels * NR].
#[derive(Clone, Copy)]
pub(super) struct Tile {
    pub k: usize,
    /// Packed tile of A in the kernel's [`Order`].
    pub a: *const f32,
    /// Panels of B: element (p, j) of panel q at `q * b_stride + p * NR + j`.
    pub b: *const f32,
    pub b_stride: usize,
    /// First element of C; element (i, j) at `i * c_stride + j`.
    pub c: *mut f32,
    pub c_stride: usize,
    /// Start from C instead of 0.
    pub accumulate: bool,
}

/// # Safety
/// The pointers of the tile must cover its rows, k and panels, C must be writable by this thread
/// alone, and the CPU must have the instruction set of the kernel.
pub(super) type Kernel = unsafe fn(&Tile);

/// The kernels of one instruction set.
pub(super) struct Kernels {
    /// By tile height less one, A kept by rows.
    rows: &'static [Kernel],
    /// By tile height less one, A kept by columns.
    columns: &'static [Kernel],
    /// One row, [`WIDE`] panels.
    pub wide: Kernel,
}

impl Kernels {
    pub(super) fn of(isa: Isa) -> &'static Kernels {
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => &x86::AVX512,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => &x86::AVX2,
            _ => &PORTABLE,
        }
    }

    /// The tallest tile.
    pub(super) fn max_rows(&self) -> usize {
        self.rows.len()
    }

    /// The kernel for a tile of `rows` (1 to [`Self::max_rows`]) rows and one panel.
    pub(super) fn get(&self, rows: usize, order: Order) -> Kernel {
        match order {
            Order::Rows => self.rows[rows - 1],
            Order::Columns => self.columns[rows - 1],
        }
    }
}

/// Offset of element (i, p = 0) and the step from p to p + 1 in a packed tile of A.
const fn a_layout<const MR: usize, const BY_ROWS: bool>() -> (usize, usize) {
    if BY_ROWS { (A_STRIDE, 1) } else { (1, MR) }
}

static PORTABLE: Kernels = Kernels {
    rows: &[portable::<1, 1, true>, portable::<2, 1, true>],
    columns: &[portable::<1, 1, false>, portable::<2, 1, false>],
    wide: portable::<1, WIDE, true>,
};

/// # Safety
/// See [`Kernel`].
unsafe fn portable<const MR: usize, const PANELS: usize, const BY_ROWS: bool>(t: &Tile) {
    let (a_row, a_step) = const { a_layout::<MR, BY_ROWS>() };
    for q in 0..PANELS {
        let mut acc = [[0f32; NR]; MR];
        // SAFETY: the caller vouches for MR rows and PANELS panels of C, A and B over k.
        unsafe {
            let c = t.c.add(q * NR);
            if t.accumulate {
                for (i, row) in acc.iter_mut().enumerate() {
                    *row = c.add(i * t.c_stride).cast::<[f32; NR]>().read();
                }
            }
            let (mut a, mut b) = (t.a, t.b.add(q * t.b_stride));
            for _ in 0..t.k {
                let b_row = b.cast::<[f32; NR]>().read();
                for (i, row) in acc.iter_mut().enumerate() {
                    let x = a.add(i * a_row).read();
                    for (sum, y) in row.iter_mut().zip(b_row) {
                        *sum = x.mul_add(y, *sum);
                    }
                }
                a = a.wrapping_add(a_step);
                b = b.wrapping_add(NR);
            }
            for (i, row) in acc.iter().enumerate() {
                c.add(i * t.c_stride).cast::<[f32; NR]>().write(*row);
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[expect(
    clippy::needless_range_loop,
    reason = "constant trip counts over a block of registers: indices say which"
)]
mod x86 {
    use std::arch::x86_64::*;

    use super::{Kernels, NR, Tile, WIDE, a_layout};

    macro_rules! heights {
        ($kernel:ident, $by_rows:literal, $($mr:literal)*) => { &[$($kernel::<$mr, 1, $by_rows>),*] };
    }

    pub(super) static AVX512: Kernels = Kernels {
        rows: heights!(avx512, true, 1 2 3 4 5 6 7 8 9 10 11 12 13 14),
        columns: heights!(avx512, false, 1 2 3 4 5 6 7 8 9 10 11 12 13 14),
        wide: avx512::<1, WIDE, true>,
    };

    pub(super) static AVX2: Kernels = Kernels {
        rows: heights!(avx2, true, 1 2 3 4 5 6),
        columns: heights!(avx2, false, 1 2 3 4 5 6),
        wide: avx2::<1, WIDE, true>,
    };

    /// Tiles of at most this many rows are bound by memory: their panels are read once.
    const FEW_ROWS: usize = 8;
    /// Prefetch distance in a panel, 2 KiB: the hardware prefetcher stops at the end of a page.
    const AHEAD: usize = 16 * NR;

    /// Prefetches one row of a panel, two cache lines. The address may be invalid.
    #[inline(always)]
    fn ask_for(row: *const f32) {
        // SAFETY: a prefetch reads nothing that the program can see.
        unsafe {
            _mm_prefetch::<_MM_HINT_T0>(row.cast());
            _mm_prefetch::<_MM_HINT_T0>(row.wrapping_add(16).cast());
        }
    }

    /// 14 rows of 32 columns fill 28 of the 32 registers; two hold B and one the element of A.
    ///
    /// # Safety
    /// See [`super::Kernel`].
    #[target_feature(enable = "avx512f")]
    unsafe fn avx512<const MR: usize, const PANELS: usize, const BY_ROWS: bool>(t: &Tile) {
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
                        ask_for(b_row.wrapping_add(AHEAD));
                    }
                    let b_row = [_mm512_loadu_ps(b_row), _mm512_loadu_ps(b_row.add(16))];
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
    #[target_feature(enable = "avx2,fma")]
    unsafe fn avx2<const MR: usize, const PANELS: usize, const BY_ROWS: bool>(t: &Tile) {
        for q in 0..PANELS {
            // SAFETY: the caller vouches for every panel of the tile.
            unsafe {
                let (b, c) = (t.b.add(q * t.b_stride), t.c.add(q * NR));
                if MR <= 3 {
                    avx2_columns::<MR, 4, BY_ROWS>(&Tile { b, c, ..*t });
                } else {
                    avx2_columns::<MR, 2, BY_ROWS>(&Tile { b, c, ..*t });
                    let (b, c) = (b.add(16), c.add(16));
                    avx2_columns::<MR, 2, BY_ROWS>(&Tile { b, c, ..*t });
                }
            }
        }
    }

    /// `VECTORS` times 8 columns of one panel.
    ///
    /// # Safety
    /// See [`super::Kernel`].
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn avx2_columns<const MR: usize, const VECTORS: usize, const BY_ROWS: bool>(t: &Tile) {
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
                    ask_for(b.wrapping_add(AHEAD));
                }
                for v in 0..VECTORS {
                    let b_row = _mm256_loadu_ps(b.add(v * 8));
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
}
