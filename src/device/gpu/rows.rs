//! Launches, and row-wise functions: choice of kernel, grid and parameters.

use super::bounds::{NONE, VECTOR, below, int, pointer, product, rows_at};
use super::step::Column;
use super::{Buffer, Driver, Gpu, Matrix, Step};
use crate::cuda::kernels::layer_params::{
    SegattnCopyParams, SegattnEmbedParams, SegattnRows, SegattnSwigluParams,
};
use crate::cuda::kernels::{Entry, Error, File, Kernels, Launch};
use crate::device::{Accumulate, Kind, Result, Rows, RowsMut};

/// Columns of a token that a warp of `embed_grad` sums.
const EMBED_COLUMNS: usize = 256;
const WARP: usize = 32;
/// Most threads of a block.
const MOST_THREADS: usize = 1024;

/// Size of a kernel's grid.
pub(super) enum Grid {
    /// This many threads, in blocks of the size of the kernel's constant.
    Threads(usize),
    /// This many blocks, of the size of the kernel's constant.
    Blocks(usize),
    /// This many blocks of this many threads.
    Sized(usize, usize),
}

impl Grid {
    /// Blocks, and threads of a block, of a kernel whose constant is `threads`.
    pub(super) fn size(self, threads: usize) -> Result<[usize; 2]> {
        Ok(match self {
            // Kernels count these threads in 32 bits.
            Self::Threads(count) if u32::try_from(count).is_err() => {
                return Err(Error::TooLarge {
                    what: "threads of a grid",
                    expected: u64::from(u32::MAX),
                    got: count as u64,
                }
                .into());
            }
            Self::Threads(count) => [count.div_ceil(threads), threads],
            Self::Blocks(count) => [count, threads],
            Self::Sized(count, threads) => [count, threads],
        })
    }
}

/// Launches an entry; does nothing if there is no work.
///
/// The addresses in `params` come from the caller's bounds checks of live buffers.
pub(super) fn launch<D: Driver, P: Copy>(
    gpu: &Gpu<D>,
    entry: Entry,
    grid: Grid,
    params: &P,
) -> Result<()> {
    let kernels = gpu.driver().kernels();
    let info = kernels.info(entry)?;
    if info.params_bytes as usize != size_of::<P>() {
        return Err(Error::Mismatch {
            entry: entry.name.into(),
            what: "bytes of the params struct",
            expected: size_of::<P>().to_string(),
            got: info.params_bytes.to_string(),
        }
        .into());
    }
    let [blocks, threads] = grid.size(info.threads as usize)?;
    if blocks == 0 {
        return Ok(());
    }
    let launch = Launch {
        entry,
        blocks: u32::try_from(blocks).map_err(|_| Error::TooLarge {
            what: "blocks of a grid",
            expected: u64::from(u32::MAX),
            got: blocks as u64,
        })?,
        threads: threads as u32,
        shared_bytes: info.shared_bytes as u32,
        overlaps: false,
    };
    kernels.ready(entry)?;
    // SAFETY: P is the entry's struct by its size and name, its addresses as said above.
    unsafe { gpu.driver().launch(&launch, params) }.map_err(Into::into)
}

pub(super) const fn entry(file: File, name: &'static str) -> Entry {
    Entry { file, name }
}

/// `dst (+)= factor * src`, of either kind.
pub(super) fn scale<D: Driver>(
    gpu: &Gpu<D>,
    factor: f64,
    src: Rows<'_, Buffer<D>>,
    dst: RowsMut<'_, Buffer<D>>,
    [rows, width]: [usize; 2],
    accumulate: Accumulate,
) -> Result<()> {
    let kinds = [src.buffer.kind, dst.buffer.kind];
    let (from, to) = (
        gpu.rows(&src, rows, width)?,
        gpu.rows(&dst.shared(), rows, width)?,
    );
    let rows_of = [rows_at(from, src.stride), rows_at(to, dst.stride)];
    convert(
        gpu,
        rows_of,
        kinds,
        [rows, width],
        (accumulate, factor as f32),
    )
}

/// A weight's bf16 copy, from values of either kind.
pub(super) fn narrow<D: Driver>(
    gpu: &Gpu<D>,
    values: &Buffer<D>,
    matrix: &mut Matrix<D>,
) -> Result<()> {
    let shape = [matrix.out, matrix.inner];
    let from = gpu.rows(
        &Rows::packed(values, 0, matrix.inner),
        matrix.out,
        matrix.inner,
    )?;
    let rows_of = [from, gpu.at(&matrix.block)?].map(|at| rows_at(at, matrix.inner));
    convert(
        gpu,
        rows_of,
        [values.kind, Kind::Activation],
        shape,
        (Accumulate::No, 1.0),
    )
}

fn convert<D: Driver>(
    gpu: &Gpu<D>,
    [src, dst]: [SegattnRows; 2],
    kinds: [Kind; 2],
    [rows, width]: [usize; 2],
    (accumulate, factor): (Accumulate, f32),
) -> Result<()> {
    let name = match kinds {
        [Kind::Activation, Kind::Activation] => "copy_bf16_bf16",
        [Kind::Activation, Kind::Exact] => "copy_bf16_f32",
        [Kind::Exact, Kind::Activation] => "copy_f32_bf16",
        [Kind::Exact, Kind::Exact] => "copy_f32_f32",
    };
    let wide = |x: &SegattnRows| {
        (x.data as usize).is_multiple_of(16) && (rows == 1 || x.stride % VECTOR as i64 == 0)
    };
    let vectors = width.is_multiple_of(VECTOR) && wide(&src) && wide(&dst);
    let params = SegattnCopyParams {
        src,
        dst,
        rows: rows as i64,
        width: int("width", width)?,
        vectors: vectors.into(),
        add: (accumulate == Accumulate::Yes).into(),
        factor,
    };
    let threads = product("elements of a copy", &[rows, width])? / if vectors { VECTOR } else { 1 };
    launch(
        gpu,
        entry(File::Copy, name),
        Grid::Threads(threads),
        &params,
    )
}

/// `y[r] = table[tokens[r]]`.
pub(super) fn embed<D: Driver>(
    gpu: &Gpu<D>,
    table: &Matrix<D>,
    step: &Step<D>,
    y: RowsMut<'_, Buffer<D>>,
) -> Result<()> {
    let (rows, width) = (step.rows.tokens.len(), table.inner);
    step.relies_on(Column::Tokens, table.out)?;
    let params = SegattnEmbedParams {
        table: rows_at(gpu.at(&table.block)?, width),
        tokens: step.tokens(gpu)?,
        y: gpu.output(&y, rows, width)?,
        d_table: NONE,
        order: std::ptr::null(),
        run_start: std::ptr::null(),
        rows: rows as i64,
        runs: 0,
        width: int("width", width)?,
    };
    let threads = Grid::Threads(rows * width / VECTOR);
    launch(gpu, entry(File::Embedding, "embed_bf16"), threads, &params)
}

/// `d_table[tokens[r]] += d_y[r]`.
pub(super) fn embed_grad<D: Driver>(
    gpu: &Gpu<D>,
    d_y: Rows<'_, Buffer<D>>,
    width: usize,
    tokens: &[u32],
    d_table: &mut Buffer<D>,
) -> Result<()> {
    let rows = tokens.len();
    let table_rows = d_table.len.checked_div(width).unwrap_or(0);
    below(
        "token",
        tokens.iter().map(|t| *t as usize).max(),
        table_rows,
    )?;
    let mut order: Vec<i32> = (0..rows as i32).collect();
    order.sort_by_key(|r| tokens[*r as usize]);
    let is_new = |i: &usize| *i == 0 || tokens[order[*i] as usize] != tokens[order[i - 1] as usize];
    let mut run_start: Vec<i32> = (0..rows).filter(is_new).map(|i| i as i32).collect();
    let runs = run_start.len();
    run_start.push(rows as i32);
    let held = [
        gpu.upload(tokens)?,
        gpu.upload(&order)?,
        gpu.upload(&run_start)?,
    ];
    let params = SegattnEmbedParams {
        table: NONE,
        tokens: pointer(&held[0]),
        y: gpu.input(&d_y, rows, width)?,
        d_table: rows_at(gpu.exact(d_table, 0, d_table.len)? as u64, width),
        order: pointer(&held[1]),
        run_start: pointer(&held[2]),
        rows: rows as i64,
        runs: runs as i32,
        width: int("width", width)?,
    };
    let threads = Grid::Threads(runs * width.div_ceil(EMBED_COLUMNS) * WARP);
    launch(
        gpu,
        entry(File::Embedding, "embed_grad_bf16"),
        threads,
        &params,
    )
}

/// Threads that sum a row. They define the order of the sum, see `kernels/norm.cu` and `kernels/loss.cu`.
pub(super) fn row_threads(width: usize) -> usize {
    let warps = width.div_ceil(2 * VECTOR * WARP).max(1);
    (warps * WARP).min(MOST_THREADS)
}

/// `y = silu(gate) * up`.
pub(super) fn swiglu<D: Driver>(
    gpu: &Gpu<D>,
    gate_up: Rows<'_, Buffer<D>>,
    rows: usize,
    inner: usize,
    y: RowsMut<'_, Buffer<D>>,
) -> Result<()> {
    let params = SegattnSwigluParams {
        gate_up: gpu.input(&gate_up, rows, product("gate and up", &[2, inner])?)?,
        y: gpu.output(&y, rows, inner)?,
        d_y: NONE,
        d_gate_up: NONE,
        rows: rows as i64,
        inner: int("inner", inner)?,
    };
    let threads = Grid::Threads(rows * inner / VECTOR);
    launch(gpu, entry(File::Swiglu, "swiglu_bf16"), threads, &params)
}

/// Gradient of [`swiglu`].
pub(super) fn swiglu_grad<D: Driver>(
    gpu: &Gpu<D>,
    d_y: Rows<'_, Buffer<D>>,
    gate_up: Rows<'_, Buffer<D>>,
    rows: usize,
    inner: usize,
    d_gate_up: RowsMut<'_, Buffer<D>>,
) -> Result<()> {
    let params = SegattnSwigluParams {
        gate_up: gpu.input(&gate_up, rows, product("gate and up", &[2, inner])?)?,
        y: NONE,
        d_y: gpu.input(&d_y, rows, inner)?,
        d_gate_up: gpu.output(&d_gate_up, rows, product("gate and up", &[2, inner])?)?,
        rows: rows as i64,
        inner: int("inner", inner)?,
    };
    let threads = Grid::Threads(rows * inner / VECTOR);
    launch(
        gpu,
        entry(File::Swiglu, "swiglu_grad_bf16"),
        threads,
        &params,
    )
}
