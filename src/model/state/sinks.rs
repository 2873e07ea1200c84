//! Sinks: the first rows of a sequence, which every head of every later segment reads (docs/contract.md, section 2).

use super::Plan;
use crate::device::{Device, Kind, Move, Result, Rows};

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

    /// How many of the first rows of a complete segment are sinks. `before` tokens of the sequence came before it.
    pub(super) fn missing(&self, plan: &Plan, before: usize, rows: usize) -> usize {
        plan.sink_len.saturating_sub(before).min(rows)
    }

    /// Moves to the past rows of the slot that begin at element `first`: to the first rows of KV head `h` its first
    /// `counts[h]` sinks, the keys rotated to the positions before the row `ends[h]` of the angle tables. Their targets
    /// are 2 for keys and 3 for values.
    pub(super) fn place(
        &self,
        plan: &Plan,
        first: usize,
        (counts, ends): (&[usize], &[usize]),
    ) -> Vec<Move<'_, D::Buffer>> {
        let (dim, width) = (plan.heads.dim, plan.kv_width());
        let alike = |a: usize, b: usize| (counts[a], ends[a]) == (counts[b], ends[b]);
        let (mut head, mut moves) = (0, Vec::new());
        while head < plan.heads.kv {
            // Neighbouring heads that read alike go together.
            let end = (head..plan.heads.kv)
                .find(|&h| !alike(h, head))
                .unwrap_or(plan.heads.kv);
            let (column, rows) = (head * dim, counts[head]);
            let angle = ends[head] - rows;
            for (target, buffer, first_angle) in [(2, &self.k, Some(angle)), (3, &self.v, None)] {
                moves.push(Move {
                    src: Rows::packed(buffer, 0, width).column(column),
                    target,
                    start: first + column,
                    stride: width,
                    rows,
                    heads: end - head,
                    first_angle,
                });
            }
            head = end;
        }
        moves
    }
}
