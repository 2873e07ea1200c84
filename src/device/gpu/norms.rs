//! RMSNorm of rows and its gradients, and sums of columns: choice of kernel, grid and parameters.

use super::bounds::{NONE, VECTOR, below, int, product};
use super::rows::{Grid, entry, launch, row_threads};
use super::{Buffer, Driver, Gpu, bytes_of};
use crate::cuda::kernels::layer_params::{SegattnNormParams, SegattnNormsParams, SegattnRows};
use crate::cuda::kernels::{File, Kernels};
use crate::device::{DeviceError, Kind, Result, Rows, RowsMut};

/// Columns that a block of `rms_norm_weight_grad` sums.
const NORM_COLUMNS: usize = 16;
/// Columns of a block of `rms_norm_chain`, and rows that lie together in the sums which it reads.
const CHAIN_TILE: [usize; 2] = [32, 4];
/// Rows from which on, and columns up to which, a warp that does nothing but add pays for the workspace that it reads:
/// 12 bytes an element instead of 4, and 2.7 ns a row (predicted) instead of 9 (measured).
const LONG_CHAIN: usize = 1024;
const NARROW_CHAIN: usize = 1024;
/// Bytes of that workspace.
const CHAIN_BYTES: usize = 8 << 20;

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
