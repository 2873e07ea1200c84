//! Row-wise functions: choice of kernel, grid and parameters.

use super::bounds::{NONE, VECTOR, below, int, pointer, product, rows_at};
use super::step::Column;
use super::{Buffer, Driver, Gpu, Matrix, Step, bytes_of};
use crate::cuda::kernels::layer_params::{
    SegattnCopyParams, SegattnEmbedParams, SegattnNormParams, SegattnNormsParams, SegattnRows,
    SegattnSwigluParams,
};
use crate::cuda::kernels::{Entry, Error, File, Kernels, Launch};
use crate::device::{Accumulate, DeviceError, Kind, Result, Rows, RowsMut};

/// Columns that a block of `rms_norm_weight_grad` sums.
const NORM_COLUMNS: usize = 16;
/// Columns of a block of `rms_norm_chain`, and rows that lie together in the sums which it reads.
const CHAIN_TILE: [usize; 2] = [32, 4];
/// Rows from which on, and columns up to which, a warp that does nothing but add pays for the workspace that it reads:
/// 12 bytes an element instead of 4, and 2.7 ns a row instead of 9.
const LONG_CHAIN: usize = 1024;
const NARROW_CHAIN: usize = 1024;
/// Bytes of that workspace.
const CHAIN_BYTES: usize = 8 << 20;
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
    let (blocks, threads) = match grid {
        // Kernels count these threads in 32 bits.
        Grid::Threads(count) if u32::try_from(count).is_err() => {
            return Err(Error::TooLarge {
                what: "threads of a grid",
                expected: u64::from(u32::MAX),
                got: count as u64,
            }
            .into());
        }
        Grid::Threads(count) => (count.div_ceil(info.threads as usize), info.threads as usize),
        Grid::Blocks(count) => (count, info.threads as usize),
        Grid::Sized(count, threads) => (count, threads),
    };
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

/// Elements of the widest rows that the norms' kernels keep in registers.
const MOST_NORM_WIDTH: usize = 16384;

/// Checks that rows are not too wide for the norms' kernels, and that groups within a row begin where vectors do.
fn norm_width(width: usize, groups: usize) -> Result<usize> {
    below("width of a norm", Some(width), MOST_NORM_WIDTH + 1)?;
    match groups > 1 && !width.is_multiple_of(VECTOR) {
        true => Err(DeviceError::argument(
            "width of a norm",
            "a multiple of 8",
            width,
        )),
        false => Ok(width),
    }
}

const NORM: SegattnNormParams = SegattnNormParams {
    x: NONE,
    residual: NONE,
    x_sum: NONE,
    weight: std::ptr::null(),
    y: NONE,
    rstd: std::ptr::null_mut(),
    d_y: NONE,
    d_x: NONE,
    d_weight: std::ptr::null_mut(),
    sums: std::ptr::null_mut(),
    rows: 0,
    width: 0,
    groups: 1,
    add: 0,
    eps: 0.0,
};

/// `y = x / rms(x) * weight` for each group of a row, and `rstd`.
pub(super) fn rms_norm<D: Driver>(
    gpu: &Gpu<D>,
    x: Rows<'_, Buffer<D>>,
    shape: [usize; 2],
    weight: &Buffer<D>,
    eps: f64,
    y: RowsMut<'_, Buffer<D>>,
    rstd: RowsMut<'_, Buffer<D>>,
) -> Result<()> {
    let width = norm_width(weight.len, shape[1])?;
    let (rows, groups) = groups_of(shape)?;
    let row = product("groups of a row", &[shape[1], width])?;
    let params = SegattnNormParams {
        x: gpu.input(&x, shape[0], row)?,
        weight: gpu.exact(weight, 0, width)?,
        y: gpu.output(&y, shape[0], row)?,
        rstd: gpu.exact(rstd.buffer, rstd.start, rows)?,
        rows: rows as i64,
        width: int("width", width)?,
        groups,
        eps: eps as f32,
        ..NORM
    };
    let grid = Grid::Sized(rows, row_threads(width));
    launch(gpu, entry(File::Norm, "rms_norm_bf16"), grid, &params)
}

/// Rows of the norms' kernels, which are groups of rows, and how many of them are in a row.
fn groups_of([rows, groups]: [usize; 2]) -> Result<(usize, i32)> {
    if groups == 0 {
        return Err(DeviceError::argument("groups of a norm", "1 or more", 0));
    }
    let all = product("rows of a norm", &[rows, groups])?;
    Ok((all, int("groups of a norm", groups)?))
}

/// `d_x +=` the gradient by `x`; `inputs`: upstream, x, rstd.
pub(super) fn rms_norm_grad<D: Driver>(
    gpu: &Gpu<D>,
    [d_y, x, rstd]: [Rows<'_, Buffer<D>>; 3],
    shape: [usize; 2],
    weight: &Buffer<D>,
    d_x: RowsMut<'_, Buffer<D>>,
) -> Result<()> {
    let width = norm_width(weight.len, shape[1])?;
    let (rows, groups) = groups_of(shape)?;
    let row = product("groups of a row", &[shape[1], width])?;
    let params = SegattnNormParams {
        x: gpu.input(&x, shape[0], row)?,
        weight: gpu.exact(weight, 0, width)?,
        rstd: gpu.exact(rstd.buffer, rstd.start, rows)?,
        d_y: gpu.input(&d_y, shape[0], row)?,
        d_x: gpu.output(&d_x, shape[0], row)?,
        rows: rows as i64,
        width: int("width", width)?,
        groups,
        add: 1,
        ..NORM
    };
    let grid = Grid::Sized(rows, row_threads(width));
    launch(gpu, entry(File::Norm, "rms_norm_grad_bf16"), grid, &params)
}

/// `d_weight +=` the gradient by the weight. The groups of a row are summed first, into a workspace.
pub(super) fn rms_norm_weight_grad<D: Driver>(
    gpu: &Gpu<D>,
    inputs: [Rows<'_, Buffer<D>>; 3],
    shape: [usize; 2],
    d_weight: &mut Buffer<D>,
) -> Result<()> {
    let (params, width) = (
        weight_grad_params(gpu, inputs, shape, d_weight)?,
        d_weight.len,
    );
    if shape[1] == 1 {
        let narrow = width <= NARROW_CHAIN && width.is_multiple_of(VECTOR);
        return match shape[0] >= LONG_CHAIN && narrow {
            true => chain(gpu, [shape[0], width], &params),
            false => sum_columns(gpu, width, &params),
        };
    }
    let bytes = product(
        "sums of groups",
        &[sums_len(shape[0], width)?, size_of::<f32>()],
    )?;
    let sums = gpu.block(bytes)?;
    let params = SegattnNormParams {
        sums: gpu.at(&sums)? as usize as *mut f32,
        ..params
    };
    sum_groups(gpu, [shape[0], width], [params])
}

/// The gradient of a norm's weight over many rows, of one group each, in as many calls as the workspace has room for.
/// The chain goes on where the call before ended, so the bits are those of one call, and of [`sum_columns`].
fn chain<D: Driver>(
    gpu: &Gpu<D>,
    [rows, width]: [usize; 2],
    params: &SegattnNormParams,
) -> Result<()> {
    let [tile_columns, tile_rows] = CHAIN_TILE;
    let row = width.next_multiple_of(tile_columns) * size_of::<f32>();
    let at_once = (CHAIN_BYTES / row / tile_rows * tile_rows).min(rows);
    let sums = gpu.block(product(
        "sums",
        &[sums_len(at_once, width)?, size_of::<f32>()],
    )?)?;
    for first in (0..rows).step_by(at_once) {
        let from = |matrix: SegattnRows| SegattnRows {
            data: matrix
                .data
                .wrapping_byte_add(first * matrix.stride as usize * bytes_of(Kind::Activation)),
            ..matrix
        };
        let count = at_once.min(rows - first);
        let params = SegattnNormParams {
            d_y: from(params.d_y),
            x: from(params.x),
            rstd: params.rstd.wrapping_add(first),
            sums: gpu.at(&sums)? as usize as *mut f32,
            rows: count as i64,
            ..*params
        };
        sum_groups(gpu, [count, width], [params])?;
    }
    Ok(())
}

/// Parameters of the gradient of a norm's weight; `inputs`: upstream, x, rstd.
pub(super) fn weight_grad_params<D: Driver>(
    gpu: &Gpu<D>,
    [d_y, x, rstd]: [Rows<'_, Buffer<D>>; 3],
    shape: [usize; 2],
    d_weight: &Buffer<D>,
) -> Result<SegattnNormParams> {
    let width = norm_width(d_weight.len, shape[1])?;
    let (norms, groups) = groups_of(shape)?;
    let row = product("groups of a row", &[shape[1], width])?;
    Ok(SegattnNormParams {
        x: gpu.input(&x, shape[0], row)?,
        rstd: gpu.exact(rstd.buffer, rstd.start, norms)?,
        d_y: gpu.input(&d_y, shape[0], row)?,
        d_weight: gpu.exact(d_weight, 0, width)?,
        rows: shape[0] as i64,
        width: int("width", width)?,
        groups,
        ..NORM
    })
}

/// Elements of the workspace of [`sum_groups`].
pub(super) fn sums_len(rows: usize, width: usize) -> Result<usize> {
    let [tile_columns, tile_rows] = CHAIN_TILE;
    let sizes = [
        width.div_ceil(tile_columns),
        tile_columns,
        rows.next_multiple_of(tile_rows),
    ];
    product("sums of groups", &sizes)
}

/// The sums of groups for each row, then the chain over the rows, of one norm or of two of as many rows and columns.
pub(super) fn sum_groups<D: Driver, const N: usize>(
    gpu: &Gpu<D>,
    [rows, width]: [usize; 2],
    norms: [SegattnNormParams; N],
) -> Result<()> {
    let [tile_columns, tile_rows] = CHAIN_TILE;
    let [groups, chain] = ["rms_norm_group_sums_bf16", "rms_norm_chain_f32"];
    let groups = entry(File::Norm, groups);
    let vectors = product(
        "sums of groups",
        &[rows.next_multiple_of(tile_rows), width / VECTOR],
    )?;
    int("sums of groups", vectors)?;
    let block = gpu.driver().kernels().info(groups)?.threads as usize;
    let stages = [
        (groups, vectors.div_ceil(block)),
        (entry(File::Norm, chain), width.div_ceil(tile_columns)),
    ];
    for (entry, blocks) in stages {
        let params = SegattnNormsParams {
            norms: std::array::from_fn(|i| norms.get(i).copied().unwrap_or(NORM)),
            blocks: int("blocks of a norm", blocks)?,
        };
        launch(gpu, entry, Grid::Blocks(N * blocks), &params)?;
    }
    Ok(())
}

/// `sums +=` the sum of the rows.
pub(super) fn column_sums<D: Driver>(
    gpu: &Gpu<D>,
    x: Rows<'_, Buffer<D>>,
    rows: usize,
    sums: &mut Buffer<D>,
) -> Result<()> {
    let width = sums.len;
    let params = SegattnNormParams {
        d_y: gpu.input(&x, rows, width)?,
        d_weight: gpu.exact(sums, 0, width)?,
        rows: rows as i64,
        width: int("width", width)?,
        ..NORM
    };
    sum_columns(gpu, width, &params)
}

fn sum_columns<D: Driver>(gpu: &Gpu<D>, width: usize, params: &SegattnNormParams) -> Result<()> {
    let grid = Grid::Blocks(width.div_ceil(NORM_COLUMNS));
    let weight_grad = entry(File::Norm, "rms_norm_weight_grad_bf16");
    launch(gpu, weight_grad, grid, params)
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
