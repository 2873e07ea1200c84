//! Retrieval from a pool: blocks selected by scores, and their tokens gathered.

use super::bounds::{VECTOR, below, equal, int, pointer, product};
use super::memory::Block;
use super::pool::Pool;
use super::pool_tables::{Tables, kv_width};
use super::rows::{Grid, entry, launch};
use super::{Buffer, Driver, Gpu};
use crate::cuda::kernels::layer_params::SegattnRetrievalParams;
use crate::cuda::kernels::{Error, File};
use crate::device::shared::selection::check;
use crate::device::{
    DeviceError, PastHeads, PastPool, Probes, Result, RowsMut, SelectedBlocks, Selection,
    SelectionRule,
};

/// Bytes of an element of a probe: three bf16, whose sum it is.
const PROBE_BYTES: usize = 6;
/// Keys that a block of `pool_scores` takes at a time; whole blocks of the pool's.
const SCORED_KEYS: usize = 128;

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
        let mut blocks = vec![0i32; self.known.len() * self.most];
        if self.known.iter().any(|n| *n > 0) {
            let at = gpu.at(&self.blocks)?;
            let bytes = bytemuck::cast_slice_mut(&mut blocks);
            // SAFETY: the block has that size; rows are written as far as they are known.
            unsafe { gpu.driver().download(at, bytes)? };
        }
        let head = |(i, count): (usize, &usize)| {
            let row = &blocks[i * self.most..][..*count];
            let first = row.iter().map(|b| *b as usize * self.block_len);
            first.flat_map(|t| t..t + self.block_len).collect()
        };
        Ok(self.known.iter().enumerate().map(head).collect())
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

/// Selects the best blocks of every head. The host does not wait, because their number follows from lengths.
pub(super) fn select<D: Driver>(
    gpu: &Gpu<D>,
    pool: &Pool<D>,
    probes: &Probes<'_, Buffer<D>>,
    selection: &Selection<'_>,
) -> Result<Blocks<D>> {
    let (heads, dim) = (pool.heads, pool.head_dim);
    check(probes, selection, [heads, pool.tokens()])?;
    let last_q = kv_width(pool, selection.kv_heads)?;
    let SelectionRule::Blocks {
        block_len,
        probe_window,
        probe_stride,
    } = selection.rule;
    let window = probe_window.min(probes.rows);
    let windows = (probes.rows - window) / probe_stride + 1;
    let (most, eligible) = (selection.rows / block_len, selection.eligible);
    let end = eligible.iter().map(|range| range.end).max().unwrap_or(0);
    let blocks = end / block_len;
    let elements = |what, sizes: &[usize], bytes| product(what, &[sizes, &[bytes]].concat());
    let selected = Blocks {
        blocks: gpu.block(elements(
            "selected blocks",
            &[heads, most],
            size_of::<i32>(),
        )?)?,
        counts: gpu.block(elements("heads", &[heads], size_of::<i32>())?)?,
        known: (0..heads)
            .map(|head| most.min(selection.blocks(head, block_len).len()))
            .collect(),
        most,
        block_len,
        end,
    };
    let q = gpu.input(
        &probes.q,
        probes.capacity,
        product("query heads", &[last_q, probes.group])?,
    )?;
    let probe_units = product("probes", &[heads, probes.group, windows, dim])?;
    let tables = Tables::new(gpu, pool, selection.kv_heads, eligible, &vec![0; heads])?;
    let means = gpu.block(elements("probes", &[probe_units], PROBE_BYTES)?)?;
    let scores = gpu.block(elements("scores", &[heads, blocks], size_of::<f32>())?)?;
    let params = SegattnRetrievalParams {
        q,
        probes: pointer::<f32>(&means).cast_mut().cast(),
        scores: pointer::<f32>(&scores).cast_mut(),
        selected: pointer::<i32>(&selected.blocks).cast_mut(),
        selected_count: pointer::<i32>(&selected.counts).cast_mut(),
        score_pitch: blocks as i64,
        group: int("query heads of a KV head", probes.group)?,
        windows: int("probe windows", windows)?,
        window: int("queries of a probe window", window)?,
        stride: int("stride of probe windows", probe_stride)?,
        first_query: int("first query", probes.first)?,
        query_capacity: int("rows of queries", probes.capacity)?,
        block_len: int("block_len", block_len)?,
        blocks: int("blocks of a pool", blocks)?,
        max_selected: int("selected blocks", most)?,
        ..tables.params(pool)?
    };
    let kernel = |name| entry(File::Retrieval, name);
    let threads = Grid::Threads(probe_units / VECTOR);
    launch(gpu, kernel("pool_probes_bf16"), threads, &params)?;
    let tiles = blocks.div_ceil((SCORED_KEYS / block_len).max(1));
    let grid = Grid::Blocks(product("tiles of scores", &[heads, tiles])?);
    launch(gpu, kernel(scores_entry(dim)?), grid, &params)?;
    launch(gpu, kernel("pool_select_f32"), Grid::Blocks(heads), &params)?;
    Ok(selected)
}

/// Copies the selected tokens of every head to rows, keys rotated.
pub(super) fn gather<D: Driver>(
    gpu: &Gpu<D>,
    pool: &Pool<D>,
    selected: &Blocks<D>,
    past: &PastHeads<'_>,
    tables: (&Buffer<D>, &Buffer<D>),
    [k, v]: [RowsMut<'_, Buffer<D>>; 2],
) -> Result<()> {
    let (heads, dim) = (pool.heads, pool.head_dim);
    let width = kv_width(pool, past.kv_heads)?;
    equal("heads with selected blocks", heads, selected.known.len())?;
    equal("heads with an end", heads, past.ends.len())?;
    below(
        "tokens of selected blocks",
        Some(selected.end),
        pool.tokens() + 1,
    )?;
    let last = past.ends.iter().copied().max().unwrap_or(0).checked_sub(1);
    let [cos, sin] = gpu.angle_tables(tables, dim, last)?;
    let mut rows = 0;
    for (head, end) in past.ends.iter().enumerate() {
        let count = selected.count(head);
        below("tokens before the end of a head", Some(count), end + 1)?;
        rows = rows.max(count);
    }
    if rows == 0 {
        return Ok(());
    }
    let held = Tables::new(gpu, pool, past.kv_heads, &vec![0..0; heads], past.ends)?;
    let params = SegattnRetrievalParams {
        k: gpu.output(&k, rows, width)?,
        v: gpu.output(&v, rows, width)?,
        selected: gpu.at(&selected.blocks)? as usize as *mut i32,
        selected_count: gpu.at(&selected.counts)? as usize as *mut i32,
        cos,
        sin,
        block_len: int("block_len", selected.block_len)?,
        max_selected: int("selected blocks", selected.most)?,
        ..held.params(pool)?
    };
    let sizes = [heads, selected.most, selected.block_len, dim];
    let threads = Grid::Threads(product("selected elements", &sizes)? / (2 * VECTOR));
    launch(
        gpu,
        entry(File::Retrieval, "pool_gather_bf16"),
        threads,
        &params,
    )
}

fn scores_entry(head_dim: usize) -> Result<&'static str> {
    match head_dim {
        32 => Ok("pool_scores_bf16_d32"),
        64 => Ok("pool_scores_bf16_d64"),
        96 => Ok("pool_scores_bf16_d96"),
        128 => Ok("pool_scores_bf16_d128"),
        256 => Ok("pool_scores_bf16_d256"),
        head_dim => Err(Error::NoKernel {
            dtype: "bf16".into(),
            head_dim,
            supported: "bf16 with head_dim 32, 64, 96, 128, 256".into(),
        }
        .into()),
    }
}
