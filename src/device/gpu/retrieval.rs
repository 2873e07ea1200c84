//! What a pool's heads have selected, and its tokens gathered.

use super::bounds::{VECTOR, below, equal, int, product};
use super::memory::Block;
use super::pool::Pool;
use super::pool_tables::{Calls, PoolCall, Tables, kv_width};
use super::rows::Grid;
use super::{Buffer, Driver, Gpu};
use crate::cuda::kernels::layer_params::SegattnRetrievalParams;
use crate::device::shared::selection;
use crate::device::{DeviceError, Gathering, PastPool, Result, RowsMut, SelectedBlocks};

/// Blocks that the heads of a pool have selected.
#[derive(Debug)]
pub struct Blocks<D: Driver> {
    /// i32 `[head, most]`, ascending, and `[head]`: how many.
    blocks: Block<D>,
    counts: Block<D>,
    /// The counts on the host. They follow from lengths, so the host does not read them back.
    known: Vec<usize>,
    most: usize,
    block_len: usize,
    /// Exclusive upper bound of all tokens.
    end: usize,
}

impl<D: Driver> Blocks<D> {
    /// Memory for selected blocks of known numbers, at most `most` for a head, of tokens below `end`.
    pub(super) fn unwritten(
        gpu: &Gpu<D>,
        known: Vec<usize>,
        [most, block_len, end]: [usize; 3],
    ) -> Result<Self> {
        let bytes =
            |count: usize| product("selected blocks", &[known.len(), count, size_of::<i32>()]);
        Ok(Self {
            blocks: gpu.block(bytes(most)?)?,
            counts: gpu.block(bytes(1)?)?,
            known,
            most,
            block_len,
            end,
        })
    }

    /// Parameters for calls that write or read the blocks.
    pub(super) fn params(
        &self,
        gpu: &Gpu<D>,
        params: SegattnRetrievalParams,
    ) -> Result<SegattnRetrievalParams> {
        Ok(SegattnRetrievalParams {
            selected: gpu.at(&self.blocks)? as usize as *mut i32,
            selected_count: gpu.at(&self.counts)? as usize as *mut i32,
            block_len: int("block_len", self.block_len)?,
            max_selected: int("selected blocks", self.most)?,
            ..params
        })
    }
}

impl<D: Driver> SelectedBlocks<Gpu<D>> for Blocks<D> {
    fn new(gpu: &Gpu<D>, tokens: &[Vec<usize>], block_len: usize) -> Result<Self> {
        check_blocks(tokens, block_len)?;
        let known: Vec<usize> = tokens.iter().map(|t| t.len() / block_len).collect();
        let most = known.iter().copied().max().unwrap_or(0);
        let mut blocks = vec![0i32; product("selected blocks", &[tokens.len(), most])?];
        for (row, tokens) in blocks.chunks_mut(most.max(1)).zip(tokens) {
            let first = tokens.iter().step_by(block_len);
            for (block, token) in row.iter_mut().zip(first) {
                *block = int("selected block", token / block_len)?;
            }
        }
        let counts: Vec<i32> = known.iter().map(|n| *n as i32).collect();
        Ok(Self {
            blocks: gpu.upload(&blocks)?,
            counts: gpu.upload(&counts)?,
            known,
            most,
            block_len,
            end: tokens.iter().flatten().max().map_or(0, |token| token + 1),
        })
    }

    fn count(&self, head: usize) -> usize {
        self.known[head] * self.block_len
    }

    fn tokens(&self, gpu: &Gpu<D>) -> Result<Vec<Vec<usize>>> {
        let at = gpu.at(&self.blocks)?;
        let head = |(i, count): (usize, &usize)| {
            // Those of a dry run, which selects nothing.
            let mut blocks: Vec<i32> = (0..*count as i32).collect();
            if *count > 0 && gpu.driver().computes() {
                let at = at + (i * self.most * size_of::<i32>()) as u64;
                let bytes = bytemuck::cast_slice_mut(&mut blocks);
                // SAFETY: a head's row has `most` numbers, of which the first `count` are written.
                unsafe { gpu.driver().download(at, bytes)? };
            }
            let first = blocks.iter().map(|b| *b as usize * self.block_len);
            Ok(first.flat_map(|t| t..t + self.block_len).collect())
        };
        self.known.iter().enumerate().map(head).collect()
    }
}

/// Checks that tokens are whole blocks in ascending order.
fn check_blocks(tokens: &[Vec<usize>], block_len: usize) -> Result<()> {
    if block_len == 0 {
        return Err(DeviceError::argument("block_len", "1 or more", 0));
    }
    for tokens in tokens {
        let mut least = 0;
        for block in tokens.chunks(block_len) {
            let first = block[0];
            let consecutive = block
                .iter()
                .enumerate()
                .all(|(i, t)| t.checked_sub(i) == Some(first));
            let whole = block.len() == block_len && first.is_multiple_of(block_len);
            if !(whole && consecutive && first >= least) {
                let expected = format!("whole blocks of {block_len} tokens, ascending");
                return Err(DeviceError::argument(
                    "selected tokens",
                    expected,
                    format!("{block:?}"),
                ));
            }
            least = first.saturating_add(block_len);
        }
    }
    Ok(())
}

/// A pool of the tokens that are not dropped.
pub(super) fn without<D: Driver>(
    gpu: &Gpu<D>,
    pool: &Pool<D>,
    dropped: &Blocks<D>,
) -> Result<Pool<D>> {
    let (heads, tokens) = (pool.heads, pool.tokens);
    let counts = dropped.known.iter().map(|n| n * dropped.block_len);
    let kept = tokens - selection::dropped([heads, tokens], counts)?;
    below("dropped tokens", Some(dropped.end), tokens + 1)?;
    let mut left = Pool {
        tokens: 0,
        chunks: Vec::new(),
        ..*pool
    };
    let width = product("elements of tokens", &[heads, pool.head_dim])?;
    let of_heads: Vec<usize> = (0..heads).collect();
    left.extend(gpu, kept, |left| {
        let tables = Tables::new(gpu, &[pool.call(&of_heads), left.call(&of_heads)])?;
        let params = SegattnRetrievalParams {
            kept: tables.params(1, left)?.chunks,
            ..dropped.params(gpu, tables.params(0, pool)?)?
        };
        let pieces = left
            .pieces(0..kept)
            .map(|(chunk, rows)| SegattnRetrievalParams {
                token: (chunk * left.run) as i64,
                rows: rows.len() as i64,
                ..params
            });
        let calls: Vec<SegattnRetrievalParams> = pieces.collect();
        let units = product("elements of rows", &[left.run.min(kept), width])? / VECTOR;
        match calls.is_empty() {
            true => Ok(()),
            false => Calls::new(gpu, &calls)?.launch("pool_keep_bf16", Grid::Threads(units)),
        }
    })?;
    Ok(left)
}

/// Copies selected tokens of every head to rows, keys rotated. `at`: where row 0 of keys, and of values, begins, and
/// the stride of rows.
pub(super) fn gather<D: Driver>(
    gpu: &Gpu<D>,
    gathering: &[Gathering<'_, Pool<D>, Blocks<D>>],
    angles: (&Buffer<D>, &Buffer<D>),
    [k, v]: [&mut Buffer<D>; 2],
    (at, stride): ([usize; 2], usize),
) -> Result<()> {
    let mut filled = Vec::new();
    for one in gathering {
        let rows = checked_rows(one)?;
        if rows > 0 {
            filled.push((one, rows));
        }
    }
    let of_pools = filled.iter().map(|(one, _)| PoolCall {
        pool: one.pool,
        kv_heads: one.past.kv_heads,
        eligible: &[],
        ends: one.past.ends,
    });
    let of_pools: Vec<PoolCall<'_, D>> = of_pools.collect();
    if of_pools.is_empty() {
        return Ok(());
    }
    let tables = Tables::new(gpu, &of_pools)?;
    let (mut calls, mut most) = (Vec::with_capacity(filled.len()), 0);
    for (call, (one, rows)) in filled.iter().enumerate() {
        let Gathering {
            pool, blocks, past, ..
        } = one;
        let last = past.ends.iter().copied().max().unwrap_or(0).checked_sub(1);
        let [cos, sin] = gpu.angle_tables(angles, pool.head_dim, last)?;
        let first = product("rows", &[one.row, stride])?;
        let width = kv_width(pool, past.kv_heads)?;
        let rows_of = |buffer: &mut Buffer<D>, at: usize| {
            let start = at.saturating_add(first);
            let view = RowsMut {
                buffer,
                start,
                stride,
            };
            gpu.output(&view, *rows, width)
        };
        calls.push(SegattnRetrievalParams {
            k: rows_of(k, at[0])?,
            v: rows_of(v, at[1])?,
            cos,
            sin,
            ..blocks.params(gpu, tables.params(call, pool)?)?
        });
        let sizes = [pool.heads, blocks.most, blocks.block_len, pool.head_dim];
        most = most.max(product("selected elements", &sizes)? / (2 * VECTOR));
    }
    Calls::new(gpu, &calls)?.launch("pool_gather_bf16", Grid::Threads(most))
}

/// Rows that a call writes; checks the blocks against the pool, and the ends of heads against the blocks.
fn checked_rows<D: Driver>(one: &Gathering<'_, Pool<D>, Blocks<D>>) -> Result<usize> {
    let Gathering {
        pool, blocks, past, ..
    } = one;
    kv_width(pool, past.kv_heads)?;
    equal("heads with selected blocks", pool.heads, blocks.known.len())?;
    equal("heads with an end", pool.heads, past.ends.len())?;
    below(
        "tokens of selected blocks",
        Some(blocks.end),
        pool.tokens() + 1,
    )?;
    let mut rows = 0;
    for (head, end) in past.ends.iter().enumerate() {
        let count = blocks.count(head);
        below("tokens before the end of a head", Some(count), end + 1)?;
        rows = rows.max(count);
    }
    Ok(rows)
}
