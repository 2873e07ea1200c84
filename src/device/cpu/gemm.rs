//! GEMMs for training and decoding.
//!
//! Every element of a result is one chain of fused multiply-adds over k, ascending. It starts from 0, or from the old
//! value when accumulating. Long sums are split into blocks, whose partial result is stored to C and loaded unchanged.
//! So the bits do not depend on the number of calls, of rows, or of threads, nor on whether weights lie in memory in
//! f32 or as equal numbers of 16 bits.

use std::ops::Range;

use rayon::prelude::*;

use super::buffer::Scratch;
use super::element::Element;
use super::kernel::{A_STRIDE, KC, Kernel, Kernels, NR, Order, Tile, WIDE, tall};
pub use super::packed::{PackedMatrix, Strided};
use super::packed::{Panels, fill_panel, fill_tile, of_any_format, span};
use crate::isa::Isa;

/// Row tiles of A that a task keeps packed (14 rows of `A_STRIDE` each: 240 KiB).
const TILES_PER_TASK: usize = 16;
/// Largest number of panels of B per task. More tasks balance better; fewer tasks pack A less often.
const PANELS_PER_TASK: usize = 16;
/// Panels packed at a time when B is not packed.
const PANELS_AT_ONCE: usize = 64;
/// Length of k packed at a time when B is not packed; together with the above 8 MiB of scratch.
const K_AT_ONCE: usize = 4 * KC;
/// Multiply-adds below which parallel work costs more than it gains.
const PARALLEL_WORK: usize = 1 << 20;
/// Weights below which one thread computes a single row (512 KiB).
const PARALLEL_WEIGHTS: usize = 1 << 17;

/// y\[rows, out\] (+)= x\[rows, in\] wᵀ; rows of x and y are `x_stride` and `y_stride` apart.
///
/// # Panics
/// If a slice is too short for its shape.
pub fn linear(
    x: &[f32],
    x_stride: usize,
    rows: usize,
    w: &PackedMatrix,
    y: &mut [f32],
    y_stride: usize,
    accumulate: bool,
) {
    let shape = [rows, w.outputs(), w.inputs()];
    let c = Out::new(y, y_stride, shape, accumulate);
    linear_on(Isa::best(), Strided::rows(x, x_stride), w, &c);
}

/// [`linear`] on a given instruction set.
fn linear_on(isa: Isa, x: Strided, w: &PackedMatrix, out: &Out) {
    of_any_format!(w.panels(), panels => packed_gemm(isa, x, panels, out));
}

/// dx\[rows, in\] (+)= dy\[rows, out\] w, summed over outputs ascending.
///
/// # Panics
/// If a slice is too short for its shape.
pub fn linear_input_grad(
    dy: &[f32],
    dy_stride: usize,
    rows: usize,
    w: &PackedMatrix,
    dx: &mut [f32],
    dx_stride: usize,
    accumulate: bool,
) {
    let shape = [rows, w.inputs(), w.outputs()];
    let dy = Strided::rows(dy, dy_stride);
    let c = Out::new(dx, dx_stride, shape, accumulate);
    match w.transposed() {
        Some(panels) => packed_gemm(Isa::best(), dy, panels, &c),
        None => {
            let fill = |to: &mut [f32], p, j, cols| w.fill_transposed(to, p, j, cols);
            packing_gemm(Isa::best(), dy, fill, &c);
        }
    }
}

/// dw\[out, in\] += dyᵀ x, summed over rows ascending from the value in dw; `shape` is \[out, in\].
///
/// # Panics
/// If a slice is too short for its shape.
pub fn linear_weight_grad(
    dy: &[f32],
    dy_stride: usize,
    x: &[f32],
    x_stride: usize,
    rows: usize,
    dw: &mut [f32],
    shape: [usize; 2],
) {
    let [outputs, inputs] = shape;
    let (a, b) = (Strided::columns(dy, dy_stride), Strided::rows(x, x_stride));
    gemm([outputs, inputs, rows], a, b, dw, inputs, true);
}

/// c\[m, n\] (+)= a\[m, k\] b\[k, n\] for any strides; `shape` is \[m, n, k\].
///
/// # Panics
/// If a slice is too short for its shape, or rows of c overlap.
pub fn gemm(
    shape: [usize; 3],
    a: Strided,
    b: Strided,
    c: &mut [f32],
    c_stride: usize,
    accumulate: bool,
) {
    gemm_on(Isa::best(), shape, a, b, c, c_stride, accumulate);
}

/// [`gemm`] on a given instruction set.
fn gemm_on(
    isa: Isa,
    shape: [usize; 3],
    a: Strided,
    b: Strided,
    c: &mut [f32],
    c_stride: usize,
    accumulate: bool,
) {
    let [_, n, k] = shape;
    let out = Out::new(c, c_stride, shape, accumulate);
    assert!(
        b.span(k, n).is_some_and(|len| len <= b.data.len()),
        "length of b"
    );
    let fill = |to: &mut [f32], p, j, cols| fill_panel(to, b.from(p, j), cols);
    packing_gemm(isa, a, fill, &out);
}

/// C and the shape of the GEMM that is written to it.
#[derive(Clone, Copy)]
struct Out {
    c: *mut f32,
    stride: usize,
    m: usize,
    n: usize,
    k: usize,
    accumulate: bool,
}

// SAFETY: tasks write disjoint tiles of C, and the borrow they come from outlives them.
unsafe impl Sync for Out {}

impl Out {
    fn new(c: &mut [f32], stride: usize, [m, n, k]: [usize; 3], accumulate: bool) -> Out {
        assert!(
            m <= 1 || stride >= n,
            "stride {stride} of c is less than its width {n}"
        );
        assert!(
            span(m, stride, n, 1).is_some_and(|len| len <= c.len()),
            "length of c"
        );
        if k == 0 && !accumulate && n > 0 {
            for i in 0..m {
                c[i * stride..][..n].fill(0.0);
            }
        }
        let c = c.as_mut_ptr();
        Out {
            c,
            stride,
            m,
            n,
            k,
            accumulate,
        }
    }

    fn is_empty(&self) -> bool {
        self.m == 0 || self.n == 0 || self.k == 0
    }

    fn parallel(&self) -> bool {
        let weights = self.n.saturating_mul(self.k);
        let large = weights >= PARALLEL_WEIGHTS || weights.saturating_mul(self.m) >= PARALLEL_WORK;
        large && rayon::current_num_threads() > 1
    }

    /// The part with columns `cols` and range `ks` of k. All ranges but the first accumulate.
    fn part(&self, cols: Range<usize>, ks: Range<usize>) -> Out {
        Out {
            c: self.c.wrapping_add(cols.start),
            n: cols.len(),
            k: ks.len(),
            accumulate: self.accumulate || ks.start > 0,
            ..*self
        }
    }

    /// Runs one kernel on rows from `i` and the panel `q` (or [`WIDE`] of them).
    ///
    /// # Safety
    /// As for [`Kernel`]; no other task may be writing these elements.
    unsafe fn run<E: Copy>(
        &self,
        kernel: Kernel<E>,
        rows: usize,
        i: usize,
        q: usize,
        tile: Tile<E>,
    ) {
        let c = self.c.wrapping_add(i * self.stride + q * NR);
        let cols = self.n - q * NR;
        // SAFETY: the caller's, and i, q lie within m and n.
        unsafe {
            if cols >= NR {
                return kernel(&Tile {
                    c,
                    c_stride: self.stride,
                    ..tile
                });
            }
            // The last panel is narrower: compute its tile in a full one.
            let mut full = [[0f32; NR]; 16];
            for (r, row) in full[..rows].iter_mut().enumerate() {
                c.add(r * self.stride)
                    .copy_to_nonoverlapping(row.as_mut_ptr(), cols);
            }
            kernel(&Tile {
                c: full.as_mut_ptr().cast(),
                c_stride: NR,
                ..tile
            });
            for (r, row) in full[..rows].iter().enumerate() {
                c.add(r * self.stride)
                    .copy_from_nonoverlapping(row.as_ptr(), cols);
            }
        }
    }
}

/// Calls `task` for 0..count, in parallel if asked to.
fn each(parallel: bool, count: usize, task: impl Fn(usize) + Sync + Send) {
    if parallel && count > 1 {
        (0..count).into_par_iter().with_max_len(1).for_each(task);
    } else {
        (0..count).for_each(task);
    }
}

/// Part `at` of `parts` nearly equal parts of 0..len.
fn share(len: usize, parts: usize, at: usize) -> Range<usize> {
    len * at / parts..len * (at + 1) / parts
}

/// The GEMM with a B that is packed block by block: `fill(panel, p, j, cols)` writes B from (p, j).
fn packing_gemm(
    isa: Isa,
    a: Strided,
    fill: impl Fn(&mut [f32], usize, usize, usize) + Sync + Send,
    out: &Out,
) {
    if out.is_empty() {
        return;
    }
    let mut scratch =
        Scratch::take(out.n.div_ceil(NR).min(PANELS_AT_ONCE) * NR * out.k.min(K_AT_ONCE));
    for j in (0..out.n).step_by(PANELS_AT_ONCE * NR) {
        let cols = j..out.n.min(j + PANELS_AT_ONCE * NR);
        for p in (0..out.k).step_by(K_AT_ONCE) {
            let part = out.part(cols.clone(), p..out.k.min(p + K_AT_ONCE));
            let panels = &mut scratch[..part.n.div_ceil(NR) * NR * part.k];
            let pack = |(q, panel): (usize, &mut [f32])| {
                fill(panel, p, j + q * NR, NR.min(part.n - q * NR));
            };
            if out.parallel() {
                panels
                    .par_chunks_mut(part.k * NR)
                    .enumerate()
                    .for_each(pack);
            } else {
                panels.chunks_mut(part.k * NR).enumerate().for_each(pack);
            }
            packed_gemm(isa, a.from(0, p), panels, &part);
        }
    }
}

/// The GEMM with packed panels of B for all columns and all of k.
fn packed_gemm<E: Element>(isa: Isa, a: Strided, panels: &[E], out: &Out) {
    if out.is_empty() {
        return;
    }
    assert!(
        a.span(out.m, out.k).is_some_and(|len| len <= a.data.len()),
        "length of a"
    );
    assert_eq!(
        panels.len(),
        out.n.div_ceil(NR) * NR * out.k,
        "length of the panels"
    );
    let kernels = Kernels::<E>::of(isa);
    if out.m == 1 {
        one_row(kernels, a, panels, out);
    } else if out.m <= kernels.max_rows() {
        one_tile(kernels, a, panels, out);
    } else {
        many_tiles(isa, a, panels, out);
    }
}

/// One row: streams the panels once, [`WIDE`] at a time.
fn one_row<E: Element>(kernels: &Kernels<E>, a: Strided, panels: &[E], out: &Out) {
    let mut gathered;
    let x = if a.col == 1 {
        a.data
    } else {
        gathered = Scratch::take(out.k);
        for (x, y) in gathered.iter_mut().zip(a.data.iter().step_by(a.col.max(1))) {
            *x = *y;
        }
        &gathered
    };
    let (whole, count) = (out.n / NR, out.n.div_ceil(NR));
    let groups = count.div_ceil(WIDE);
    let tasks = groups.min(4 * rayon::current_num_threads());
    each(out.parallel(), tasks, |task| {
        for group in share(groups, tasks, task) {
            let mut q = group * WIDE;
            let end = count.min(q + WIDE);
            let step = if q + WIDE <= whole { WIDE } else { 1 };
            while q < end {
                let kernel = if step == WIDE {
                    kernels.wide
                } else {
                    kernels.get(1)
                };
                let tile = out.tile(x, &panels[q * NR * out.k..], out.k * NR);
                // SAFETY: x has k elements, the panels from q on are there, each task has its own.
                unsafe { out.run(kernel, 1, 0, q, tile) };
                q += step;
            }
        }
    });
}

impl Out {
    /// The operands of a kernel over all of k; C comes with [`Self::run`].
    fn tile<E>(&self, a: &[f32], b: &[E], b_stride: usize) -> Tile<E> {
        Tile {
            k: self.k,
            a: a.as_ptr(),
            b: b.as_ptr(),
            b_stride,
            c: std::ptr::null_mut(),
            c_stride: 0,
            accumulate: self.accumulate,
        }
    }
}

/// Few rows: packs A once for all threads and streams the panels once.
fn one_tile<E: Element>(kernels: &Kernels<E>, a: Strided, panels: &[E], out: &Out) {
    let block = out.m * A_STRIDE;
    let blocks = out.k.div_ceil(KC);
    let mut packed = Scratch::take(blocks * block);
    let kernel = kernels.get(out.m);
    for (b, to) in packed.chunks_mut(block).enumerate() {
        let k = KC.min(out.k - b * KC);
        fill_tile(to, a.from(0, b * KC), out.m, k, Order::Rows);
    }
    let packed = &packed[..];
    let count = out.n.div_ceil(NR);
    let tasks = count.min(4 * rayon::current_num_threads());
    each(out.parallel(), tasks, |task| {
        for q in share(count, tasks, task) {
            let panel = &panels[q * NR * out.k..];
            for (b, a) in packed.chunks(block).enumerate() {
                let p = b * KC;
                let part = out.part(0..out.n, p..out.k.min(p + KC));
                let tile = part.tile(a, &panel[p * NR..], 0);
                // SAFETY: the packed tile and the panel have k rows, each task has its own panels.
                unsafe { part.run(kernel, out.m, 0, q, tile) };
            }
        }
    });
}

/// Many rows: a grid of tasks, each of several tiles by several panels.
fn many_tiles<E: Element>(isa: Isa, a: Strided, panels: &[E], out: &Out) {
    let order = if a.row == 1 && a.col != 1 {
        Order::Columns
    } else {
        Order::Rows
    };
    let kernels = tall(isa, order);
    let tiles = out.m.div_ceil(kernels.len());
    let count = out.n.div_ceil(NR);
    let parallel = out.parallel();
    let [down, across] = grid(tiles, count, parallel);
    // Consecutive tasks read the same panels.
    each(parallel, down * across, |task| {
        let (row_tiles, cols) = (
            share(tiles, down, task % down),
            share(count, across, task / down),
        );
        task_tiles((kernels, order), a, panels, out, row_tiles, cols);
    });
}

/// Number of tasks along rows and along panels.
fn grid(tiles: usize, panels: usize, parallel: bool) -> [usize; 2] {
    let mut grid = [
        tiles.div_ceil(TILES_PER_TASK),
        panels.div_ceil(PANELS_PER_TASK),
    ];
    let wanted = if parallel {
        4 * rayon::current_num_threads()
    } else {
        1
    };
    // Fewer panels per task repeat packing of A, fewer rows repeat reading of B. Both are cheap down to these sizes.
    while grid[0] * grid[1] < wanted {
        if panels / grid[1] >= 8 {
            grid[1] *= 2;
        } else if tiles / grid[0] >= 4 {
            grid[0] *= 2;
        } else {
            break;
        }
    }
    grid
}

/// One task of [`many_tiles`]: all of k for its tiles and panels. A block of a panel is widened once for all tiles.
fn task_tiles<E: Element>(
    (kernels, order): (&[Kernel], Order),
    a: Strided,
    panels: &[E],
    out: &Out,
    tiles: Range<usize>,
    cols: Range<usize>,
) {
    let count = out.m.div_ceil(kernels.len());
    let first = share(out.m, count, tiles.start).start;
    let height = share(out.m, count, tiles.end - 1).end - first;
    let mut packed = Scratch::take(height * A_STRIDE);
    let mut wide = Scratch::take(KC * NR);
    for p in (0..out.k).step_by(KC) {
        let part = out.part(0..out.n, p..out.k.min(p + KC));
        for rows in tiles.clone().map(|t| share(out.m, count, t)) {
            let to = &mut packed[(rows.start - first) * A_STRIDE..];
            fill_tile(to, a.from(rows.start, p), rows.len(), part.k, order);
        }
        for q in cols.clone() {
            let b = E::widened(&panels[(q * out.k + p) * NR..][..part.k * NR], &mut wide);
            for rows in tiles.clone().map(|t| share(out.m, count, t)) {
                let tile = part.tile(&packed[(rows.start - first) * A_STRIDE..], b, 0);
                let kernel = kernels[rows.len() - 1];
                // SAFETY: the packed tile and the panel have k rows; tiles and panels are this task's.
                unsafe { part.run(kernel, rows.len(), rows.start, q, tile) };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(len: usize, seed: u32) -> Vec<f32> {
        let mut s = seed.wrapping_mul(2_654_435_761) | 1;
        let mut next = || {
            s ^= s << 13;
            s ^= s >> 17;
            s ^= s << 5;
            s as f32 / u32::MAX as f32 - 0.4
        };
        (0..len).map(|_| next()).collect()
    }

    #[test]
    fn every_instruction_set_gives_the_bits_of_the_plain_chain() {
        for [m, n, k] in [
            [1, 1, 1],
            [1, 130, 300],
            [3, 33, 513],
            [6, 31, 77],
            [15, 65, 40],
            [43, 161, 259],
        ] {
            let (a, b, c0) = (values(m * k, 1), values(k * n, 2), values(m * n, 3));
            let mut expected = c0.clone();
            for (at, c) in expected.iter_mut().enumerate() {
                for p in 0..k {
                    *c = a[at / n * k + p].mul_add(b[p * n + at % n], *c);
                }
            }
            let turned: Vec<f32> = (0..m * k).map(|i| a[i % m * k + i / m]).collect();
            for isa in Isa::available() {
                for a in [Strided::rows(&a, k), Strided::columns(&turned, m)] {
                    let mut c = c0.clone();
                    gemm_on(isa, [m, n, k], a, Strided::rows(&b, n), &mut c, n, true);
                    assert_eq!(c, expected, "{isa:?} {m} {n} {k}");
                }
            }
        }
    }

    #[test]
    fn every_instruction_set_gives_the_bits_of_f32_for_weights_of_16_bits() {
        use half::{bf16, f16};
        for [m, n, k] in [[1, 130, 300], [3, 33, 513], [6, 31, 77], [43, 161, 259]] {
            for round in [
                |x: &f32| bf16::from_f32(*x).to_f32(),
                |x: &f32| f16::from_f32(*x).to_f32(),
            ] {
                let w: Vec<f32> = values(k * n, 2).iter().map(round).collect();
                let narrow = PackedMatrix::pack_narrow(&w, n, k);
                assert!(narrow.is_narrow());
                let (x, y0) = (values(m * k, 1), values(m * n, 3));
                let product = |isa, w: &PackedMatrix| {
                    let mut y = y0.clone();
                    let out = Out::new(&mut y, n, [m, n, k], true);
                    linear_on(isa, Strided::rows(&x, k), w, &out);
                    y
                };
                let expected = product(Isa::Portable, &PackedMatrix::pack(&w, n, k, false));
                for isa in Isa::available() {
                    assert_eq!(product(isa, &narrow), expected, "{isa:?} {m} {n} {k}");
                }
            }
        }
    }
}
