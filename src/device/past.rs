//! The past: keys and values of completed tokens, and what retrieval selects from them.

use std::fmt::Debug;
use std::ops::Range;

use super::{Device, PastHeads, PoolShape, Probes, Result, Rows, RowsMut, Selection};

/// Keys and values of all completed tokens of one sequence and layer that have not been dropped, for the KV heads that
/// read the past, before rotation. Below, a pool's heads are these KV heads. Each holds as many tokens as the others,
/// and where some have been dropped, tokens of its own.
///
/// A call that fails leaves the pool as it was.
pub trait PastPool<D: Device>: Sized + Send + Sync + Debug {
    /// An empty pool.
    fn new(device: &D, shape: PoolShape) -> Self;

    /// Number of tokens.
    fn tokens(&self) -> usize;

    /// Appends `rows` tokens: of rows `[kv_heads * head_dim]` of keys and of values the KV heads named, one for each
    /// head of the pool. They are rounded to the bits that the pool has.
    ///
    /// # Errors
    /// Heads of another number than the pool's, or what the device says.
    fn append(
        &mut self,
        device: &D,
        heads: &[usize],
        kv: [Rows<'_, D::Buffer>; 2],
        rows: usize,
    ) -> Result<()>;

    /// Drops all tokens but the first `tokens`.
    fn truncate(&mut self, tokens: usize);

    /// Keys, then values, each `[tokens, heads, head_dim]`: for saving.
    ///
    /// # Errors
    /// Tokens that it does not have, or what the device says.
    fn read(&self, device: &D, tokens: Range<usize>) -> Result<(Vec<f32>, Vec<f32>)>;

    /// Appends tokens that [`read`](Self::read) gave, as they are.
    ///
    /// # Errors
    /// Numbers of keys and values that are no whole tokens or differ, or what the device says.
    fn write(&mut self, device: &D, k: &[f32], v: &[f32]) -> Result<()>;

    /// Retrieval (docs/contract.md, section 2): the tokens that the rule selects for every head, in order of position.
    ///
    /// # Errors
    /// Heads of another number than the pool's, tokens that it does not have, probes outside their ring, or what the
    /// device says.
    fn select(
        &self,
        device: &D,
        probes: &Probes<'_, D::Buffer>,
        selection: &Selection<'_>,
    ) -> Result<D::Blocks>;

    /// The tokens that a pool that is too long drops: of each head `selection.rows` eligible ones, in whole blocks,
    /// those that the rule scores lowest (docs/contract.md, section 2), in order of position.
    ///
    /// # Errors
    /// Those of [`select`](Self::select), and rows that are no whole blocks, or more than a head may select.
    fn lowest(
        &self,
        device: &D,
        probes: &Probes<'_, D::Buffer>,
        selection: &Selection<'_>,
    ) -> Result<D::Blocks>;

    /// A pool of the other tokens, in their order, as they are held.
    ///
    /// # Errors
    /// Blocks that the pool does not have, heads that drop different numbers of tokens, or what the device says.
    fn without(&self, device: &D, dropped: &D::Blocks) -> Result<Self>;

    /// Copies each head's selected tokens to rows of keys and of values, columns of its KV head. Keys are rotated: the
    /// last one by the row of the angle tables before `past.ends[head]`.
    ///
    /// # Errors
    /// Blocks that the pool does not have, heads of another number than the pool's, or what the device says.
    fn gather(
        &self,
        device: &D,
        blocks: &D::Blocks,
        past: &PastHeads<'_>,
        tables: (&D::Buffer, &D::Buffer),
        kv: [RowsMut<'_, D::Buffer>; 2],
    ) -> Result<()>;

    /// [`append`](Self::append) for several pools, with the bits of one call each. If it fails, pools may have some of
    /// the tokens.
    ///
    /// # Errors
    /// Those of [`append`](Self::append).
    fn append_each(
        device: &D,
        heads: &[usize],
        joining: &mut [Joining<'_, Self, D::Buffer>],
    ) -> Result<()> {
        for Joining { pool, runs } in joining {
            for ([k, v], rows) in runs {
                pool.append(device, heads, [*k, *v], *rows)?;
            }
        }
        Ok(())
    }

    /// [`select`](Self::select) for several pools, or several times for one, with the bits of one call each.
    ///
    /// # Errors
    /// Those of [`select`](Self::select).
    fn select_each(device: &D, asking: &[Asking<'_, Self, D::Buffer>]) -> Result<Vec<D::Blocks>> {
        let select = |ask: &Asking<'_, Self, D::Buffer>| {
            ask.pool.select(device, &ask.probes, &ask.selection)
        };
        asking.iter().map(select).collect()
    }

    /// [`gather`](Self::gather) for several pools, or several times for one, to different rows of `width` elements.
    ///
    /// # Errors
    /// Those of [`gather`](Self::gather).
    fn gather_each(
        device: &D,
        gathering: &[Gathering<'_, Self, D::Blocks>],
        tables: (&D::Buffer, &D::Buffer),
        [k, v]: [&mut D::Buffer; 2],
        width: usize,
    ) -> Result<()> {
        for one in gathering {
            let rows = [&mut *k, &mut *v].map(|x| RowsMut::packed(x, one.row, width));
            one.pool
                .gather(device, one.blocks, &one.past, tables, rows)?;
        }
        Ok(())
    }
}

/// Tokens that join a pool: runs of rows of keys and of values, one behind the other, and how many rows each has.
#[derive(Debug)]
pub struct Joining<'a, P, B> {
    /// The pool.
    pub pool: &'a mut P,
    /// See [`PastPool::append`].
    pub runs: Vec<([Rows<'a, B>; 2], usize)>,
}

/// What is asked of a pool: see [`PastPool::select`].
#[derive(Debug)]
pub struct Asking<'a, P, B> {
    /// The pool.
    pub pool: &'a P,
    /// The queries that ask.
    pub probes: Probes<'a, B>,
    /// How tokens are selected.
    pub selection: Selection<'a>,
}

/// Selected tokens of a pool that are copied to rows: see [`PastPool::gather`].
#[derive(Debug)]
pub struct Gathering<'a, P, S> {
    /// The pool.
    pub pool: &'a P,
    /// The selected tokens.
    pub blocks: &'a S,
    /// Where they go.
    pub past: PastHeads<'a>,
    /// The first row that is written, of buffers of rows of all KV heads.
    pub row: usize,
}

/// Blocks that the heads of a pool have selected, in order of position.
pub trait SelectedBlocks<D: Device>: Sized + Send + Sync + Debug {
    /// The blocks of these tokens of each head: whole blocks of `block_len`, ascending.
    ///
    /// # Errors
    /// Tokens that are no such blocks, or what the device says.
    fn new(device: &D, tokens: &[Vec<usize>], block_len: usize) -> Result<Self>;

    /// Number of tokens that a head has selected.
    fn count(&self, head: usize) -> usize;

    /// The tokens of every head: for saving.
    ///
    /// # Errors
    /// What the device says.
    fn tokens(&self, device: &D) -> Result<Vec<Vec<usize>>>;
}
