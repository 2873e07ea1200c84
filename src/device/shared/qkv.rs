//! [`Device::split_qkv`] and [`Device::join_qkv`] for devices in host memory, made of smaller device calls.

use std::ops::Range;

use crate::device::{Accumulate, Device, Heads, KeyStore, Result, Rows, RowsMut, StepRows};

/// Writes rotated queries to `q`, and keys, values and probes to their rows in `store`.
pub(in crate::device) fn split<D: Device>(
    device: &D,
    qkv: Rows<'_, D::Buffer>,
    heads: Heads,
    tables: (&D::Buffer, &D::Buffer),
    step: &StepRows,
    q: RowsMut<'_, D::Buffer>,
    store: KeyStore<'_, D::Buffer>,
) -> Result<()> {
    let Heads {
        q: q_heads,
        kv,
        dim,
    } = heads;
    let (q_width, width) = (q_heads * dim, kv * dim);
    let angles = &step.angles;
    device.rope(qkv, q, q_heads, dim, tables, angles, false, Accumulate::No)?;
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
