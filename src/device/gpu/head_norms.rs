//! The norms of heads of queries and of keys: choice of kernel, grid and parameters.

use super::bounds::{VECTOR, int, product};
use super::norms::{sum_groups, sums_len, weight_grad_params};
use super::rotation::qkv_widths;
use super::rows::{Grid, entry, launch};
use super::{Buffer, Driver, Gpu};
use crate::cuda::kernels::File;
use crate::cuda::kernels::layer_params::{
    SegattnHeadNorms, SegattnHeadNormsParams, SegattnNormParams,
};
use crate::device::shared::qkv::{norm_grad, norm_weight_grad};
use crate::device::{Heads, QkNormGrad, QkNorms, Result, Rows, RowsMut};

/// Most vectors of a head that the kernels of heads' norms take: a lane each.
pub(super) const MOST_LANES: usize = 32;
/// No norms.
pub(super) const NO_NORMS: SegattnHeadNorms = SegattnHeadNorms {
    q_weight: std::ptr::null(),
    k_weight: std::ptr::null(),
    q_rstd: std::ptr::null_mut(),
    k_rstd: std::ptr::null_mut(),
    eps: 0.0,
};

/// Whether norms of queries and keys have a weight for one head each, which the kernels of heads' norms can take.
pub(super) fn are_of_heads<D: Driver>(weights: [&Buffer<D>; 2], heads: Heads) -> bool {
    let fits = heads.dim.is_multiple_of(VECTOR) && heads.dim <= MOST_LANES * VECTOR;
    fits && weights.iter().all(|weight| weight.len == heads.dim)
}

/// Threads of the kernels of heads' norms: as many lanes a head as a power of two that has one for each vector.
pub(super) fn head_threads(rows: usize, heads: Heads) -> Result<Grid> {
    let lanes = (heads.dim / VECTOR).next_power_of_two();
    let all = (heads.kv.checked_mul(2)).and_then(|kv| kv.checked_add(heads.q));
    let sizes = [rows, all.unwrap_or(usize::MAX), lanes];
    Ok(Grid::Threads(product("lanes of heads", &sizes)?))
}

/// The norms of heads in a forward.
pub(super) fn head_norms<D: Driver>(
    gpu: &Gpu<D>,
    norms: QkNorms<'_, Buffer<D>>,
    rows: usize,
    heads: Heads,
) -> Result<SegattnHeadNorms> {
    let ([q_weight, k_weight], [q_rstd, k_rstd]) = (norms.weights, norms.rstd);
    let rstds = |heads: usize| product("norms of heads", &[rows, heads]);
    Ok(SegattnHeadNorms {
        q_weight: gpu.exact(q_weight, 0, heads.dim)?,
        k_weight: gpu.exact(k_weight, 0, heads.dim)?,
        q_rstd: gpu.exact(q_rstd, 0, rstds(heads.q)?)?,
        k_rstd: gpu.exact(k_rstd, 0, rstds(heads.kv)?)?,
        eps: norms.eps as f32,
    })
}

/// Backward of the norms of queries and keys.
pub(super) fn qk_norm_grad<D: Driver>(
    gpu: &Gpu<D>,
    grad: &QkNormGrad<'_, Buffer<D>>,
    weights: [&Buffer<D>; 2],
    d_x: RowsMut<'_, Buffer<D>>,
) -> Result<()> {
    let (rows, heads) = (grad.rows, grad.heads);
    let [_, _, width] = qkv_widths(heads)?;
    let [d_y, x] = [&grad.d_y, &grad.x].map(|all| gpu.input(all, rows, width));
    let (d_y, x) = (d_y?, x?);
    if !are_of_heads(weights, heads) {
        return norm_grad(gpu, grad, weights, d_x);
    }
    let rstd = |part: usize, heads: usize| {
        let Rows { buffer, start, .. } = grad.rstd[part];
        gpu.exact(buffer, start, product("norms of heads", &[rows, heads])?)
    };
    let params = SegattnHeadNormsParams {
        d_y,
        x,
        d_x: gpu.output(&d_x, rows, width)?,
        norms: SegattnHeadNorms {
            q_weight: gpu.exact(weights[0], 0, heads.dim)?,
            k_weight: gpu.exact(weights[1], 0, heads.dim)?,
            q_rstd: rstd(0, heads.q)?,
            k_rstd: rstd(1, heads.kv)?,
            ..NO_NORMS
        },
        rows: rows as i64,
        q_heads: int("q_heads", heads.q)?,
        kv_heads: int("kv_heads", heads.kv)?,
        head_dim: int("head_dim", heads.dim)?,
    };
    let entry = entry(File::Norm, "head_norms_grad_bf16");
    launch(gpu, entry, head_threads(rows, heads)?, &params)
}

/// Gradients of the weights of both norms: the heads of a row are summed first, into a workspace, then the rows.
pub(super) fn qk_norm_weight_grad<D: Driver>(
    gpu: &Gpu<D>,
    grad: &QkNormGrad<'_, Buffer<D>>,
    d_weights: [Option<&mut Buffer<D>>; 2],
) -> Result<()> {
    let (rows, heads) = (grad.rows, grad.heads);
    let [column, _, _] = qkv_widths(heads)?;
    let [Some(d_q), Some(d_k)] = d_weights else {
        return norm_weight_grad(gpu, grad, d_weights);
    };
    if !are_of_heads([d_q, d_k], heads) {
        return norm_weight_grad(gpu, grad, [Some(d_q), Some(d_k)]);
    }
    let len = sums_len(rows, heads.dim)?;
    let sums = gpu.block(product("sums of heads", &[2, len, size_of::<f32>()])?)?;
    let sums = gpu.at(&sums)? as usize as *mut f32;
    let part = |part: usize,
                heads_of: usize,
                column: usize,
                d_weight: &Buffer<D>|
     -> Result<SegattnNormParams> {
        let shape = [rows, heads_of];
        let [d_y, x] = [grad.d_y, grad.x].map(|rows| rows.column(column));
        let params = weight_grad_params(gpu, [d_y, x, grad.rstd[part]], shape, d_weight)?;
        Ok(SegattnNormParams {
            sums: sums.wrapping_add(part * len),
            ..params
        })
    };
    let norms = [part(0, heads.q, 0, d_q)?, part(1, heads.kv, column, d_k)?];
    sum_groups(gpu, [rows, heads.dim], norms)
}
