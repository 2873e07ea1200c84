//! GEMM microkernels: one tile of C over one block of k.
//!
//! Every kernel computes an element of its tile in the same way: it starts from 0 or from C, then does one fused
//! multiply-add per k, ascending. So all kernels give the same bits. Kernels for numbers of B in 16 bits widen them in
//! registers.

#[cfg(target_arch = "x86_64")]
mod x86;

use super::element::Element;
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
pub(super) struct Tile<E = f32> {
    pub k: usize,
    /// Packed tile of A in the kernel's [`Order`].
    pub a: *const f32,
    /// Panels of B: element (p, j) of panel q at `q * b_stride + p * NR + j`.
    pub b: *const E,
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
pub(super) type Kernel<E = f32> = unsafe fn(&Tile<E>);

/// The kernels of one instruction set for one format of B, A kept by rows.
pub(super) struct Kernels<E: 'static = f32> {
    /// By tile height less one.
    rows: &'static [Kernel<E>],
    /// One row, [`WIDE`] panels.
    pub wide: Kernel<E>,
}

impl<E: Element> Kernels<E> {
    pub(super) fn of(isa: Isa) -> &'static Self {
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => Self::AVX512,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => Self::AVX2,
            _ => Self::PORTABLE,
        }
    }

    /// The tallest tile.
    pub(super) fn max_rows(&self) -> usize {
        self.rows.len()
    }

    /// The kernel for a tile of `rows` (1 to [`Self::max_rows`]) rows and one panel.
    pub(super) fn get(&self, rows: usize) -> Kernel<E> {
        self.rows[rows - 1]
    }

    const PORTABLE: &'static Self = &Self {
        rows: &[portable::<E, 1, 1, true>, portable::<E, 2, 1, true>],
        wide: portable::<E, 1, WIDE, true>,
    };
}

/// The kernels of one instruction set for B in f32 and many rows, by the order of A and by tile height less one. They
/// have as many heights as [`Kernels`].
pub(super) fn tall(isa: Isa, order: Order) -> &'static [Kernel] {
    match (order, isa) {
        (Order::Rows, _) => Kernels::<f32>::of(isa).rows,
        #[cfg(target_arch = "x86_64")]
        (Order::Columns, Isa::Avx512) => x86::COLUMNS_AVX512,
        #[cfg(target_arch = "x86_64")]
        (Order::Columns, Isa::Avx2) => x86::COLUMNS_AVX2,
        (Order::Columns, _) => &[portable::<f32, 1, 1, false>, portable::<f32, 2, 1, false>],
    }
}

/// Offset of element (i, p = 0) and the step from p to p + 1 in a packed tile of A.
const fn a_layout<const MR: usize, const BY_ROWS: bool>() -> (usize, usize) {
    if BY_ROWS { (A_STRIDE, 1) } else { (1, MR) }
}

/// # Safety
/// See [`Kernel`].
unsafe fn portable<E: Element, const MR: usize, const PANELS: usize, const BY_ROWS: bool>(
    t: &Tile<E>,
) {
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
                let b_row = b.cast::<[E; NR]>().read().map(E::wide);
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
