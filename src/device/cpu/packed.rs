//! Packing of operands into the layout of the kernels: panels of B, tiles of A, and weights that stay packed
//! ([`PackedMatrix`]).

use half::{bf16, f16};
use rayon::prelude::*;

use super::buffer::{Aligned, Scratch};
use super::element::{Element, Format};
use super::kernel::{A_STRIDE, NR, Order};

/// A matrix with two strides: element (i, j) is `data[i * row + j * col]`.
#[derive(Clone, Copy, Debug)]
pub struct Strided<'a> {
    /// The elements.
    pub data: &'a [f32],
    /// Distance between rows, in elements.
    pub row: usize,
    /// Distance between columns, in elements.
    pub col: usize,
}

impl<'a> Strided<'a> {
    /// Rows of `stride` elements one after the other.
    pub fn rows(data: &'a [f32], stride: usize) -> Self {
        let (row, col) = (stride, 1);
        Strided { data, row, col }
    }

    /// The transpose of [`Self::rows`].
    pub fn columns(data: &'a [f32], stride: usize) -> Self {
        let (row, col) = (1, stride);
        Strided { data, row, col }
    }

    /// The same matrix from row `i` and column `j` on.
    pub(super) fn from(self, i: usize, j: usize) -> Self {
        let data = &self.data[i * self.row + j * self.col..];
        Strided { data, ..self }
    }

    /// Elements up to and including (rows - 1, cols - 1); `None` if that is no `usize`.
    pub(super) fn span(self, rows: usize, cols: usize) -> Option<usize> {
        span(rows, self.row, cols, self.col)
    }
}

/// Length a slice needs to hold a strided matrix.
pub(super) fn span(rows: usize, row: usize, cols: usize, col: usize) -> Option<usize> {
    if rows == 0 || cols == 0 {
        return Some(0);
    }
    let last = (rows - 1).checked_mul(row)?;
    last.checked_add((cols - 1).checked_mul(col)?)?
        .checked_add(1)
}

/// Writes one panel: `to[p * NR + j] = from(p, j)`, columns from `cols` on are 0.
pub(super) fn fill_panel(to: &mut [f32], from: Strided, cols: usize) {
    let (rows, _) = to.as_chunks_mut::<NR>();
    if from.col == 1 {
        for (p, row) in rows.iter_mut().enumerate() {
            let source = &from.data[p * from.row..];
            match source.first_chunk::<NR>() {
                Some(full) if cols == NR => *row = *full,
                _ => {
                    row[..cols].copy_from_slice(&source[..cols]);
                    row[cols..].fill(0.0);
                }
            }
        }
    } else {
        for (block, rows) in rows.chunks_mut(16).enumerate() {
            fill_transposed(rows, from.from(block * 16, 0), cols);
        }
    }
}

/// At most 16 rows of a panel from a matrix whose columns are far apart: reads along the columns.
fn fill_transposed(rows: &mut [[f32; NR]], from: Strided, cols: usize) {
    let mut block = [[0f32; NR]; 16];
    for j in 0..cols {
        let column = &from.data[j * from.col..];
        match column.first_chunk::<16>() {
            Some(column) if from.row == 1 => {
                for (row, x) in block.iter_mut().zip(column) {
                    row[j] = *x;
                }
            }
            _ => {
                let column = column.iter().step_by(from.row.max(1));
                for (row, x) in block.iter_mut().zip(column).take(rows.len()) {
                    row[j] = *x;
                }
            }
        }
    }
    rows.copy_from_slice(&block[..rows.len()]);
}

/// Writes a tile of A, `height` rows and `k` columns, in the given order.
pub(super) fn fill_tile(to: &mut [f32], from: Strided, height: usize, k: usize, order: Order) {
    match order {
        Order::Rows => {
            for (i, row) in to.chunks_mut(A_STRIDE).take(height).enumerate() {
                let source = &from.data[i * from.row..];
                if from.col == 1 {
                    row[..k].copy_from_slice(&source[..k]);
                } else {
                    for (x, y) in row[..k]
                        .iter_mut()
                        .zip(source.iter().step_by(from.col.max(1)))
                    {
                        *x = *y;
                    }
                }
            }
        }
        Order::Columns => {
            for (p, column) in to.chunks_exact_mut(height).take(k).enumerate() {
                column.copy_from_slice(&from.data[p * from.col..][..height]);
            }
        }
    }
}

/// A weight matrix w\[out, in\] in the packed layout of the GEMMs.
///
/// Panels \[ceil(out / 32)\]\[in\]\[32\]: one step along `in` is one row of 32 outputs, so y = x wᵀ
/// streams them once. Optionally also panels \[ceil(in / 32)\]\[out\]\[32\] for dx = dy w.
#[derive(Clone)]
pub struct PackedMatrix {
    outputs: usize,
    inputs: usize,
    panels: Kept,
    transposed: Option<Aligned>,
}

/// Panels in memory, whose words hold one number or two.
#[derive(Clone)]
struct Kept {
    words: Aligned,
    format: Format,
}

/// Panels of B as a GEMM reads them.
#[derive(Clone, Copy)]
pub(super) enum Panels<'a> {
    F32(&'a [f32]),
    Bf16(&'a [bf16]),
    F16(&'a [f16]),
}

/// The value of an expression over `$panels`, a slice of any format.
macro_rules! of_any_format {
    ($kept:expr, $panels:ident => $value:expr) => {
        match $kept {
            Panels::F32($panels) => $value,
            Panels::Bf16($panels) => $value,
            Panels::F16($panels) => $value,
        }
    };
}
pub(super) use of_any_format;

impl Kept {
    /// Zeros.
    fn new(format: Format, len: usize) -> Self {
        let words = if format == Format::F32 { len } else { len / 2 };
        let words = Aligned::zeroed(words);
        Self { words, format }
    }

    fn panels(&self) -> Panels<'_> {
        match self.format {
            Format::F32 => Panels::F32(&self.words),
            Format::Bf16 => Panels::Bf16(bytemuck::cast_slice(&self.words)),
            Format::F16 => Panels::F16(bytemuck::cast_slice(&self.words)),
        }
    }

    /// Packs the k x n matrix `from`, whose numbers the format holds.
    fn fill(&mut self, from: Strided, k: usize, n: usize) {
        match self.format {
            Format::F32 => fill_all(&mut self.words, from, k, n),
            Format::Bf16 => {
                fill_narrow::<bf16>(bytemuck::cast_slice_mut(&mut self.words), from, k, n);
            }
            Format::F16 => {
                fill_narrow::<f16>(bytemuck::cast_slice_mut(&mut self.words), from, k, n)
            }
        }
    }
}

impl std::fmt::Debug for PackedMatrix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PackedMatrix")
            .field("outputs", &self.outputs)
            .field("inputs", &self.inputs)
            .field("transposed", &self.transposed.is_some())
            .field("narrow", &self.is_narrow())
            .finish()
    }
}

impl PackedMatrix {
    /// Packs row-major w\[outputs, inputs\].
    ///
    /// `transposed_too` keeps a second copy for dx = dy w. Without it that GEMM packs parts of the first copy in every
    /// call.
    ///
    /// # Panics
    /// If `w` is not `outputs * inputs` long.
    pub fn pack(w: &[f32], outputs: usize, inputs: usize, transposed_too: bool) -> Self {
        assert_eq!(Some(w.len()), outputs.checked_mul(inputs), "length of w");
        Self::packed(w, outputs, inputs, Format::F32, transposed_too)
    }

    /// As [`Self::pack`] without a second copy, in 16 bits where all values are numbers of one format of 16 bits, bf16
    /// or f16. Such a matrix takes half the memory and gives the same bits.
    ///
    /// # Panics
    /// If `w` is not `outputs * inputs` long.
    pub fn pack_narrow(w: &[f32], outputs: usize, inputs: usize) -> Self {
        assert_eq!(Some(w.len()), outputs.checked_mul(inputs), "length of w");
        Self::packed(w, outputs, inputs, Format::of(w), false)
    }

    fn packed(w: &[f32], outputs: usize, inputs: usize, format: Format, twice: bool) -> Self {
        let panel_len = |n: usize, k: usize| n.div_ceil(NR) * NR * k;
        let mut packed = PackedMatrix {
            outputs,
            inputs,
            panels: Kept::new(format, panel_len(outputs, inputs)),
            transposed: twice.then(|| Aligned::zeroed(panel_len(inputs, outputs))),
        };
        packed.fill(w);
        packed
    }

    /// Replaces the values by those of row-major w\[outputs, inputs\].
    ///
    /// # Panics
    /// If `w` is not `outputs * inputs` long.
    pub fn repack(&mut self, w: &[f32]) {
        assert_eq!(w.len(), self.outputs * self.inputs, "length of w");
        match self.is_narrow() {
            true => *self = Self::pack_narrow(w, self.outputs, self.inputs),
            false => self.fill(w),
        }
    }

    fn fill(&mut self, w: &[f32]) {
        if w.is_empty() {
            return;
        }
        let by_out = Strided::columns(w, self.inputs);
        self.panels.fill(by_out, self.inputs, self.outputs);
        if let Some(transposed) = &mut self.transposed {
            let by_in = Strided::rows(w, self.inputs);
            fill_all(transposed, by_in, self.outputs, self.inputs);
        }
    }

    /// Whether it lies in memory in 16 bits.
    pub fn is_narrow(&self) -> bool {
        self.panels.format != Format::F32
    }

    /// Rows of w, the width of y.
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// Columns of w, the width of x.
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// Writes row `output` of w to `to`, exactly as it was packed.
    ///
    /// # Panics
    /// If there is no such row or `to` is not `inputs` long.
    pub fn row(&self, output: usize, to: &mut [f32]) {
        assert!(output < self.outputs, "row {output} of {}", self.outputs);
        assert_eq!(to.len(), self.inputs, "length of a row");
        let start = output / NR * NR * self.inputs;
        of_any_format!(self.panels(), panels => {
            let lines = panels[start..].as_chunks::<NR>().0;
            for (x, line) in to.iter_mut().zip(lines) {
                *x = line[output % NR].wide();
            }
        });
    }

    /// Panels for y = x wᵀ (k = inputs, columns = outputs).
    pub(super) fn panels(&self) -> Panels<'_> {
        self.panels.panels()
    }

    /// Panels for dx = dy w (k = outputs, columns = inputs), where kept.
    pub(super) fn transposed(&self) -> Option<&[f32]> {
        self.transposed.as_deref()
    }

    /// Writes rows `p0..` and columns `j0..j0 + cols` of w as one panel for dx = dy w; `p0` a multiple of `NR`.
    pub(super) fn fill_transposed(&self, to: &mut [f32], p0: usize, j0: usize, cols: usize) {
        let mut scratch = [0.0; NR * NR];
        for (block, to) in to.chunks_mut(NR * NR).enumerate() {
            let start = (p0 / NR + block) * NR * self.inputs + j0 * NR;
            of_any_format!(self.panels(), panels => {
                let panel = Element::widened(&panels[start..][..cols * NR], &mut scratch);
                fill_panel(to, Strided::columns(panel, NR), cols);
            });
        }
    }
}

/// Packs the k x n matrix `from` into panels.
fn fill_all(panels: &mut [f32], from: Strided, k: usize, n: usize) {
    each_panel(panels, k, |(q, panel)| {
        fill_panel(panel, from.from(0, q * NR), NR.min(n - q * NR));
    });
}

/// The same into panels of 16 bits.
fn fill_narrow<E: Element>(panels: &mut [E], from: Strided, k: usize, n: usize) {
    each_panel(panels, k, |(q, panel)| {
        let mut wide = Scratch::take(panel.len());
        fill_panel(&mut wide, from.from(0, q * NR), NR.min(n - q * NR));
        panel
            .iter_mut()
            .zip(&*wide)
            .for_each(|(to, x)| *to = E::narrow(*x));
    });
}

/// Calls `fill` for each panel and its number, in parallel where they are large.
fn each_panel<E: Element>(
    panels: &mut [E],
    k: usize,
    fill: impl Fn((usize, &mut [E])) + Send + Sync,
) {
    if panels.len() >= 1 << 16 {
        panels.par_chunks_mut(k * NR).enumerate().for_each(fill);
    } else {
        panels.chunks_mut(k * NR).enumerate().for_each(fill);
    }
}
