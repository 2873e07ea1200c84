//! Sinks: the first rows of a sequence, which every head of every later segment reads (docs/contract.md, section 2).

use super::Plan;
use crate::device::{Accumulate, Device, Kind, Result, Rows, RowsMut, SegmentCache};

/// The first rows of a sequence in one layer. They are written once, by the segments that compute them.
#[derive(Debug)]
pub struct Sinks<D: Device> {
    /// Keys before rotation `[sink_len, kv_heads * head_dim]`.
    pub k: D::Buffer,
    /// Their values.
    pub v: D::Buffer,
}

/// For devices on host memory.
impl<D: Device> Clone for Sinks<D>
where
    D::Buffer: Clone,
{
    fn clone(&self) -> Self {
        let (k, v) = (self.k.clone(), self.v.clone());
        Self { k, v }
    }
}

impl<D: Device> Sinks<D> {
    /// Room for the sinks of a layer.
    pub(super) fn new(device: &D, plan: &Plan) -> Result<Self> {
        let empty = || device.empty(Kind::Activation, plan.sink_len * plan.kv_width());
        Ok(Self {
            k: empty()?,
            v: empty()?,
        })
    }

    /// Keeps those of the rows of a complete segment that are sinks. `before` tokens of the sequence came before it.
    pub(super) fn keep(
        &mut self,
        device: &D,
        plan: &Plan,
        [k, v]: [Rows<'_, D::Buffer>; 2],
        before: usize,
        rows: usize,
    ) -> Result<()> {
        let (new, width) = (
            plan.sink_len.saturating_sub(before).min(rows),
            plan.kv_width(),
        );
        if new == 0 {
            return Ok(());
        }
        for (src, dst) in [(k, &mut self.k), (v, &mut self.v)] {
            let dst = RowsMut::packed(dst, before, width);
            device.copy(src, dst, new, width, Accumulate::No)?;
        }
        Ok(())
    }

    /// Writes the sinks of the segment that begins in a slot: to the first past rows of KV head `h` its first
    /// `counts[h]` sinks, the keys rotated to the positions before the row `ends[h]` of the angle tables.
    pub(super) fn place(
        &self,
        device: &D,
        plan: &Plan,
        (kv, slot): (&mut SegmentCache<D::Buffer>, usize),
        (counts, ends): (&[usize], &[usize]),
        tables: (&D::Buffer, &D::Buffer),
    ) -> Result<()> {
        let (dim, width) = (plan.heads.dim, plan.kv_width());
        let first = slot * kv.rows.past * width;
        let alike = |a: usize, b: usize| (counts[a], ends[a]) == (counts[b], ends[b]);
        let mut head = 0;
        while head < plan.heads.kv {
            // Neighbouring heads that read alike go together.
            let end = (head..plan.heads.kv)
                .find(|&h| !alike(h, head))
                .unwrap_or(plan.heads.kv);
            let (heads, count, column) = (end - head, counts[head], head * dim);
            if count > 0 {
                let angles: Vec<usize> = (ends[head] - count..ends[head]).collect();
                let from = |buffer| Rows::packed(buffer, 0, width).column(column);
                let to = |buffer| RowsMut {
                    buffer,
                    start: first + column,
                    stride: width,
                };
                device.rope(
                    from(&self.k),
                    to(&mut kv.past_k),
                    heads,
                    dim,
                    tables,
                    &angles,
                    false,
                    Accumulate::No,
                )?;
                device.copy(
                    from(&self.v),
                    to(&mut kv.past_v),
                    count,
                    heads * dim,
                    Accumulate::No,
                )?;
            }
            head = end;
        }
        Ok(())
    }
}
