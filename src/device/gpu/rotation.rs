//! Rotary embedding, and splitting and joining of rows `[q | k | v]`: choice of kernel, grid and parameters.

use super::bounds::{NONE, VECTOR, int, pointer, product};
use super::head_norms::{NO_NORMS, are_of_heads, head_norms, head_threads};
use super::rows::{Grid, entry, launch};
use super::step::Column;
use super::{Buffer, Driver, Gpu, Step};
use crate::cuda::kernels::layer_params::{
    SegattnMove, SegattnMoveParams, SegattnQkvParams, SegattnRopeParams, SegattnRows,
};
use crate::cuda::kernels::{File, Kernels};
use crate::device::shared::qkv::normed;
use crate::device::{
    Accumulate, DeviceError, Heads, KeyStore, Move, QkNorms, Result, Rows, RowsMut,
};

/// Rotates the heads of rows by their angles.
#[allow(clippy::too_many_arguments)]
pub(super) fn rope<D: Driver>(
    gpu: &Gpu<D>,
    src: Rows<'_, Buffer<D>>,
    dst: RowsMut<'_, Buffer<D>>,
    [heads, head_dim]: [usize; 2],
    tables: (&Buffer<D>, &Buffer<D>),
    angles: &[usize],
    inverse: bool,
    accumulate: Accumulate,
) -> Result<()> {
    let rows = angles.len();
    let width = product("heads and head_dim", &[heads, head_dim])?;
    let [cos, sin] = gpu.angle_tables(tables, head_dim, angles.iter().copied().max())?;
    let Some(first) = angles.first() else {
        return Ok(());
    };
    let ascending = angles
        .iter()
        .enumerate()
        .all(|(r, angle)| *angle == first + r);
    let held = match ascending {
        true => None,
        false => Some(gpu.upload(&angles.iter().map(|a| *a as i32).collect::<Vec<_>>())?),
    };
    let params = SegattnRopeParams {
        src: gpu.input(&src, rows, width)?,
        dst: gpu.output(&dst, rows, width)?,
        cos,
        sin,
        angles: held.as_ref().map_or(std::ptr::null(), pointer),
        rows: rows as i64,
        first_angle: int("angle", *first)?,
        heads: int("heads", heads)?,
        head_dim: int("head_dim", head_dim)?,
        inverse: inverse.into(),
        add: (accumulate == Accumulate::Yes).into(),
    };
    let threads = Grid::Threads(rows * width / (2 * VECTOR));
    launch(gpu, entry(File::Rope, "rope_bf16"), threads, &params)
}

/// Moves pieces of rows, in one launch.
#[allow(clippy::too_many_arguments)]
pub(super) fn move_rows<D: Driver>(
    gpu: &Gpu<D>,
    moves: &[Move<'_, Buffer<D>>],
    targets: &mut [&mut Buffer<D>],
    head_dim: usize,
    tables: (&Buffer<D>, &Buffer<D>),
    inverse: bool,
    accumulate: Accumulate,
) -> Result<()> {
    let last = |at: &Move<'_, _>| Some(at.first_angle?.saturating_add(at.rows).saturating_sub(1));
    let [cos, sin] = gpu.angle_tables(tables, head_dim, moves.iter().filter_map(last).max())?;
    let entry = entry(File::Rope, "move_rows_bf16");
    let threads = gpu.driver().kernels().info(entry)?.threads as usize;
    let (mut pieces, mut blocks) = (Vec::with_capacity(moves.len()), 0usize);
    for at in moves.iter().filter(|at| at.rows > 0 && at.heads > 0) {
        let width = product("heads and head_dim", &[at.heads, head_dim])?;
        let buffer = targets.get_mut(at.target).map(|buffer| &mut **buffer);
        let buffer = buffer.ok_or_else(|| {
            DeviceError::argument("target of a move", "one of the targets", at.target)
        })?;
        let (start, stride) = (at.start, at.stride);
        let dst = RowsMut {
            buffer,
            start,
            stride,
        };
        pieces.push(Piece {
            src: at_rows(gpu.input(&at.src, at.rows, width)?),
            dst: at_rows(gpu.output(&dst, at.rows, width)?),
            numbers: [
                int("rows of a move", at.rows)?,
                int("heads", at.heads)?,
                at.first_angle.map_or(Ok(-1), |angle| int("angle", angle))?,
                int("blocks of moves", blocks)?,
            ],
        });
        let units = product("elements of a move", &[at.rows, width])? / (2 * VECTOR);
        blocks = blocks.saturating_add(units.div_ceil(threads));
    }
    if pieces.is_empty() {
        return Ok(());
    }
    let held = gpu.upload(&pieces)?;
    let params = SegattnMoveParams {
        moves: pointer(&held),
        cos,
        sin,
        count: int("moves", pieces.len())?,
        head_dim: int("head_dim", head_dim)?,
        inverse: inverse.into(),
        add: (accumulate == Accumulate::Yes).into(),
    };
    launch(gpu, entry, Grid::Blocks(blocks), &params)
}

/// A [`SegattnMove`] as numbers: address and stride of both sides, rows, heads, first angle, blocks before.
#[derive(Clone, Copy, bytemuck::NoUninit)]
#[repr(C)]
struct Piece {
    src: [u64; 2],
    dst: [u64; 2],
    numbers: [i32; 4],
}

const _: () = assert!(size_of::<Piece>() == size_of::<SegattnMove>());

fn at_rows(rows: SegattnRows) -> [u64; 2] {
    [rows.data as u64, rows.stride as u64]
}

/// Elements of a row of queries, of keys, and of `[q | k | v]`.
pub(super) fn qkv_widths(heads: Heads) -> Result<[usize; 3]> {
    let q = product("query heads and head_dim", &[heads.q, heads.dim])?;
    let kv = product("KV heads and head_dim", &[heads.kv, heads.dim])?;
    let all = kv.checked_mul(2).and_then(|kv| kv.checked_add(q));
    Ok([q, kv, all.unwrap_or(usize::MAX)])
}

/// Splits rows `[q | k | v]` into rotated queries, rows of the cache and rows of the probes, queries and keys normed
/// before where they have `norms`.
#[allow(clippy::too_many_arguments)]
pub(super) fn split_qkv<D: Driver>(
    gpu: &Gpu<D>,
    qkv: Rows<'_, Buffer<D>>,
    norms: Option<QkNorms<'_, Buffer<D>>>,
    heads: Heads,
    tables: (&Buffer<D>, &Buffer<D>),
    step: &Step<D>,
    q: RowsMut<'_, Buffer<D>>,
    store: Option<KeyStore<'_, Buffer<D>>>,
) -> Result<()> {
    let (rows, [_, _, width]) = (step.rows.tokens.len(), qkv_widths(heads)?);
    match norms {
        Some(norms) if !are_of_heads(norms.weights, heads) => {
            gpu.input(&qkv, rows, width)?;
            let all = normed(gpu, qkv, rows, heads, norms)?;
            let qkv = Rows::packed(&all, 0, width);
            split_qkv(gpu, qkv, None, heads, tables, step, q, store)
        }
        Some(norms) => {
            let params = SegattnQkvParams {
                norms: head_norms(gpu, norms, rows, heads)?,
                ..split_params(gpu, qkv, heads, tables, step, q, store)?
            };
            let split = entry(File::Rope, "split_qkv_norm_bf16");
            launch(gpu, split, head_threads(rows, heads)?, &params)
        }
        None => {
            // Where keys and values go nowhere, they are not read.
            let kv = if store.is_some() { heads.kv } else { 0 };
            let params = SegattnQkvParams {
                kv_heads: int("kv_heads", kv)?,
                ..split_params(gpu, qkv, heads, tables, step, q, store)?
            };
            let [_, _, width] = qkv_widths(Heads { kv, ..heads })?;
            let threads = Grid::Threads(rows * width / (2 * VECTOR));
            launch(gpu, entry(File::Rope, "split_qkv_bf16"), threads, &params)
        }
    }
}

/// Parameters of a split without norms.
fn split_params<D: Driver>(
    gpu: &Gpu<D>,
    qkv: Rows<'_, Buffer<D>>,
    heads: Heads,
    tables: (&Buffer<D>, &Buffer<D>),
    step: &Step<D>,
    q: RowsMut<'_, Buffer<D>>,
    store: Option<KeyStore<'_, Buffer<D>>>,
) -> Result<SegattnQkvParams> {
    let rows = step.rows.tokens.len();
    let [q_width, width, qkv_width] = qkv_widths(heads)?;
    let [cos, sin] = gpu.angle_tables(tables, heads.dim, None)?;
    let (half, len) = (heads.dim / 2, tables.0.len.min(tables.1.len));
    step.relies_on(Column::Angles, len / half)?;
    // A row of the cache for each row of the step, in `k`, `v` and, where it is there, `raw_k`.
    let place = |buffer: &mut Buffer<D>| {
        let room = buffer.len.checked_div(width).unwrap_or(0);
        step.relies_on(Column::CacheRows, room)?;
        gpu.output(&RowsMut::packed(buffer, 0, width), room, width)
    };
    let (mut kept, mut probes) = ([NONE; 3], NONE);
    if let Some(KeyStore { cache, probes: to }) = store {
        kept[0] = place(&mut cache.k)?;
        if cache.raw_k.len > 0 {
            kept[1] = place(&mut cache.raw_k)?;
        }
        kept[2] = place(&mut cache.v)?;
        if let Some(to) = to {
            let room = to.len.checked_div(q_width).unwrap_or(0);
            step.relies_on(Column::ProbeRows, room)?;
            probes = gpu.output(&RowsMut::packed(to, 0, q_width), room, q_width)?;
        }
    }
    let [k, raw_k, v] = kept;
    Ok(SegattnQkvParams {
        qkv: gpu.input(&qkv, rows, qkv_width)?,
        q: gpu.output(&q, rows, q_width)?,
        k,
        raw_k,
        v,
        probes,
        cos,
        sin,
        angles: step.angles(gpu)?,
        cache_rows: step.cache_rows(gpu)?,
        probe_rows: step.probe_rows(gpu)?,
        norms: NO_NORMS,
        rows: rows as i64,
        q_heads: int("q_heads", heads.q)?,
        kv_heads: int("kv_heads", heads.kv)?,
        head_dim: int("head_dim", heads.dim)?,
    })
}

/// Joins gradients of queries and keys, rotated back, and of values to rows `[q | k | v]`.
pub(super) fn join_qkv<D: Driver>(
    gpu: &Gpu<D>,
    [d_q, d_k, d_v]: [Rows<'_, Buffer<D>>; 3],
    heads: Heads,
    tables: (&Buffer<D>, &Buffer<D>),
    angles: &[usize],
    d_qkv: RowsMut<'_, Buffer<D>>,
) -> Result<()> {
    let rows = angles.len();
    let [q_width, width, qkv_width] = qkv_widths(heads)?;
    let [cos, sin] = gpu.angle_tables(tables, heads.dim, angles.iter().copied().max())?;
    let indices: Vec<i32> = angles.iter().map(|angle| *angle as i32).collect();
    let held = gpu.upload(&indices)?;
    let params = SegattnQkvParams {
        qkv: gpu.output(&d_qkv, rows, qkv_width)?,
        q: gpu.input(&d_q, rows, q_width)?,
        k: gpu.input(&d_k, rows, width)?,
        raw_k: NONE,
        v: gpu.input(&d_v, rows, width)?,
        probes: NONE,
        cos,
        sin,
        angles: pointer(&held),
        cache_rows: std::ptr::null(),
        probe_rows: std::ptr::null(),
        norms: NO_NORMS,
        rows: rows as i64,
        q_heads: int("q_heads", heads.q)?,
        kv_heads: int("kv_heads", heads.kv)?,
        head_dim: int("head_dim", heads.dim)?,
    };
    let threads = Grid::Threads(rows * qkv_width / (2 * VECTOR));
    launch(gpu, entry(File::Rope, "join_qkv_bf16"), threads, &params)
}
