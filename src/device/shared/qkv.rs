//! [`Device::split_qkv`], [`Device::join_qkv`] and the gradients of norms of queries and keys, made of smaller device
//! calls: for devices in host memory, and for norms that a GPU has no kernel for.

use std::ops::Range;

use crate::device::{
    Accumulate, Device, Heads, KeyStore, Kind, QkNormGrad, QkNorms, Result, Rows, RowsMut, StepRows,
};

/// Writes rotated queries to `q`, and keys, values and probes to their rows in `store`.
#[allow(clippy::too_many_arguments)]
pub(in crate::device) fn split<D: Device>(
    device: &D,
    qkv: Rows<'_, D::Buffer>,
    norms: Option<QkNorms<'_, D::Buffer>>,
    heads: Heads,
    tables: (&D::Buffer, &D::Buffer),
    step: &StepRows,
    q: RowsMut<'_, D::Buffer>,
    store: Option<KeyStore<'_, D::Buffer>>,
) -> Result<()> {
    let held = norms.map(|norms| normed(device, qkv, step.tokens.len(), heads, norms));
    let held = held.transpose()?;
    let all = (heads.q + 2 * heads.kv) * heads.dim;
    let qkv = held.as_ref().map_or(qkv, |rows| Rows::packed(rows, 0, all));
    let Heads {
        q: q_heads,
        kv,
        dim,
    } = heads;
    let (q_width, width) = (q_heads * dim, kv * dim);
    let angles = &step.angles;
    device.rope(qkv, q, q_heads, dim, tables, angles, false, Accumulate::No)?;
    let Some(store) = store else {
        return Ok(());
    };
    let (cache, keys) = (store.cache, qkv.column(q_width));
    for run in consecutive(step.cache_rows.iter().copied().map(Some)) {
        let first = step.cache_rows[run.start];
        let (k, angles) = (from_row(keys, run.start), &angles[run.clone()]);
        let to = RowsMut::packed(&mut cache.k, first, width);
        device.rope(k, to, kv, dim, tables, angles, false, Accumulate::No)?;
        for (src, dst) in [(k, &mut cache.raw_k), (k.column(width), &mut cache.v)] {
            if device.len(dst) > 0 {
                let dst = RowsMut::packed(dst, first, width);
                device.copy(src, dst, run.len(), width, Accumulate::No)?;
            }
        }
    }
    let Some(probes) = store.probes else {
        return Ok(());
    };
    for run in consecutive(step.probe_rows.iter().copied()) {
        if let Some(first) = step.probe_rows[run.start] {
            let dst = RowsMut::packed(&mut *probes, first, q_width);
            device.copy(
                from_row(qkv, run.start),
                dst,
                run.len(),
                q_width,
                Accumulate::No,
            )?;
        }
    }
    Ok(())
}

/// Norms of a row of queries or of keys by their weight's length; 0 where it does not fit.
fn norms_of_row(width: usize, weight: usize) -> usize {
    width.checked_div(weight).unwrap_or(0)
}

/// The rows with queries and keys normed.
pub(in crate::device) fn normed<D: Device>(
    device: &D,
    qkv: Rows<'_, D::Buffer>,
    rows: usize,
    heads: Heads,
    norms: QkNorms<'_, D::Buffer>,
) -> Result<D::Buffer> {
    let [q, kv] = [heads.q, heads.kv].map(|heads_of| heads_of * heads.dim);
    let stride = q + 2 * kv;
    let mut all = device.empty(Kind::Activation, rows * stride)?;
    let parts = [(0, q), (q, kv)].into_iter().zip(norms.weights);
    for (((column, width), weight), rstd) in parts.zip(norms.rstd) {
        let groups = norms_of_row(width, device.len(weight));
        device.rms_norm(
            qkv.column(column),
            [rows, groups],
            weight,
            norms.eps,
            RowsMut::packed(&mut all, 0, stride).column(column),
            RowsMut::packed(rstd, 0, groups),
        )?;
    }
    let v = RowsMut::packed(&mut all, 0, stride).column(q + kv);
    device.copy(qkv.column(q + kv), v, rows, kv, Accumulate::No)?;
    Ok(all)
}

/// The gradient of [`normed`], and that of values.
pub(in crate::device) fn norm_grad<D: Device>(
    device: &D,
    grad: &QkNormGrad<'_, D::Buffer>,
    weights: [&D::Buffer; 2],
    mut d_x: RowsMut<'_, D::Buffer>,
) -> Result<()> {
    let (heads, rows) = (grad.heads, grad.rows);
    let [q, kv] = [heads.q, heads.kv].map(|heads_of| heads_of * heads.dim);
    let mut normed = device.zeros(Kind::Activation, rows * (q + kv))?;
    let parts = [(0, q), (q, kv)].into_iter().zip(weights);
    for (((column, width), weight), rstd) in parts.zip(grad.rstd) {
        device.rms_norm_grad(
            grad.d_y.column(column),
            grad.x.column(column),
            rstd,
            [rows, norms_of_row(width, device.len(weight))],
            weight,
            RowsMut::packed(&mut normed, 0, q + kv).column(column),
        )?;
    }
    let src = Rows::packed(&normed, 0, q + kv);
    device.copy(src, d_x.reborrow(), rows, q + kv, Accumulate::No)?;
    let v = grad.d_y.column(q + kv);
    device.copy(v, d_x.column(q + kv), rows, kv, Accumulate::No)
}

/// The gradients of the weights of [`normed`].
pub(in crate::device) fn norm_weight_grad<D: Device>(
    device: &D,
    grad: &QkNormGrad<'_, D::Buffer>,
    d_weights: [Option<&mut D::Buffer>; 2],
) -> Result<()> {
    let [q, kv] = [grad.heads.q, grad.heads.kv].map(|heads_of| heads_of * grad.heads.dim);
    let parts = [(0, q), (q, kv)].into_iter().zip(d_weights);
    for (((column, width), d_weight), rstd) in parts.zip(grad.rstd) {
        let Some(d_weight) = d_weight else { continue };
        let [d_y, x] = [grad.d_y, grad.x].map(|rows| rows.column(column));
        let shape = [grad.rows, norms_of_row(width, device.len(d_weight))];
        device.rms_norm_weight_grad(d_y, x, rstd, shape, d_weight)?;
    }
    Ok(())
}

/// Writes the gradients of queries, keys and values to rows `[q | k | v]`. Those of queries and keys are rotated back.
pub(in crate::device) fn join<D: Device>(
    device: &D,
    [d_q, d_k, d_v]: [Rows<'_, D::Buffer>; 3],
    heads: Heads,
    tables: (&D::Buffer, &D::Buffer),
    angles: &[usize],
    mut d_qkv: RowsMut<'_, D::Buffer>,
) -> Result<()> {
    let Heads { q, kv, dim } = heads;
    let mut column = 0;
    for (src, heads) in [(d_q, q), (d_k, kv)] {
        let dst = d_qkv.reborrow().column(column);
        device.rope(src, dst, heads, dim, tables, angles, true, Accumulate::No)?;
        column += heads * dim;
    }
    device.copy(
        d_v,
        d_qkv.column(column),
        angles.len(),
        kv * dim,
        Accumulate::No,
    )
}

fn from_row<B>(rows: Rows<'_, B>, row: usize) -> Rows<'_, B> {
    Rows {
        start: rows.start + row * rows.stride,
        ..rows
    }
}

/// Splits the list into ranges in which the indices are consecutive or all are `None`.
fn consecutive(indices: impl Iterator<Item = Option<usize>>) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    let mut before = None;
    for (i, index) in indices.enumerate() {
        let follows = match (before, index) {
            (Some(Some(before)), Some(index)) => index == before + 1,
            (Some(None), None) => true,
            _ => false,
        };
        match runs.last_mut() {
            Some(run) if follows => run.end = i + 1,
            _ => runs.push(i..i + 1),
        }
        before = Some(index);
    }
    runs
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_range_ends_where_indices_are_not_consecutive() {
        let indices = [Some(4), Some(5), Some(9), None, None, Some(10), Some(11)];
        let runs = super::consecutive(indices.into_iter());
        assert_eq!(runs, [0..2, 2..3, 3..5, 5..7]);
    }
}
