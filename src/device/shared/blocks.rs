//! Tokens selected from a pool, as lists in host memory.

use crate::device::{Accumulate, Device, Kind, PastHeads, Result, Rows, RowsMut, SelectedBlocks};

/// The tokens selected by each head of a pool, ascending.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostBlocks(pub(in crate::device) Vec<Vec<usize>>);

impl<D: Device> SelectedBlocks<D> for HostBlocks {
    fn new(_: &D, tokens: &[Vec<usize>], _block_len: usize) -> Result<Self> {
        Ok(Self(tokens.to_vec()))
    }

    fn count(&self, head: usize) -> usize {
        self.0[head].len()
    }

    fn tokens(&self, _: &D) -> Result<Vec<Vec<usize>>> {
        Ok(self.0.clone())
    }
}

/// The tokens below `tokens` that are not in an ascending list.
pub(in crate::device) fn others(tokens: usize, dropped: &[usize]) -> impl Iterator<Item = usize> {
    let mut dropped = dropped.iter().peekable();
    (0..tokens).filter(move |token| dropped.next_if_eq(&token).is_none())
}

/// Copies the selected tokens of each head to the columns of its KV head. Keys are rotated. `kv(head, token)` gives the
/// key and value of a head of the pool, `head_dim` elements each. See
/// [`PastPool::gather`](crate::device::PastPool::gather).
pub(in crate::device) fn gather<'p, D, N>(
    device: &D,
    blocks: &HostBlocks,
    (past, head_dim): (&PastHeads<'_>, usize),
    tables: (&D::Buffer, &D::Buffer),
    [k, v]: [RowsMut<'_, D::Buffer>; 2],
    kv: impl Fn(usize, usize) -> [&'p [N]; 2],
) -> Result<()>
where
    D: Device,
    D::Buffer: AsMut<[N]>,
    N: Copy + 'p,
{
    for (i, tokens) in blocks.0.iter().enumerate() {
        let column = past.kv_heads[i] * head_dim;
        let mut keys = device.empty(Kind::Activation, tokens.len() * head_dim)?;
        let key_rows = keys.as_mut().chunks_mut(head_dim);
        for (r, (token, key)) in tokens.iter().zip(key_rows).enumerate() {
            let [from_k, from_v] = kv(i, *token);
            key.copy_from_slice(from_k);
            let at = v.start + r * v.stride + column;
            v.buffer.as_mut()[at..at + head_dim].copy_from_slice(from_v);
        }
        let angles: Vec<usize> = (past.ends[i] - tokens.len()..past.ends[i]).collect();
        let from = Rows::packed(&keys, 0, head_dim);
        let to = RowsMut {
            buffer: &mut *k.buffer,
            start: k.start + column,
            stride: k.stride,
        };
        device.rope(
            from,
            to,
            1,
            head_dim,
            tables,
            &angles,
            false,
            Accumulate::No,
        )?;
    }
    Ok(())
}
