//! Selection from a pool, by both rules of docs/contract.md, section 2. How many tokens are selected follows from
//! lengths, so the host waits for nothing.

use std::ops::Range;

use super::bounds::{VECTOR, int, pointer, product};
use super::memory::Block;
use super::pool::Pool;
use super::pool_tables::{Calls, PoolCall, Tables, kv_width};
use super::retrieval::Blocks;
use super::rows::Grid;
use super::{Buffer, Driver, Gpu};
use crate::cuda::kernels::Error;
use crate::cuda::kernels::layer_params::{SegattnBestToken, SegattnRetrievalParams};
use crate::device::shared::selection::{check, check_dropped};
use crate::device::{Asking, DeviceError, Probes, Result, Selection, SelectionRule};

/// Bytes of an element of a mean: three bf16, whose sum it is.
const MEAN_BYTES: usize = 6;
/// Keys that a thread block scores at a time: whole blocks of the first rule, a tile of the second.
const SCORED_KEYS: usize = 128;

/// The name of a kernel for a head size.
macro_rules! by_head_dim {
    ($name:literal, $head_dim:expr) => {
        match $head_dim {
            32 => Ok(concat!($name, "_d32")),
            64 => Ok(concat!($name, "_d64")),
            96 => Ok(concat!($name, "_d96")),
            128 => Ok(concat!($name, "_d128")),
            256 => Ok(concat!($name, "_d256")),
            head_dim => Err(Error::NoKernel {
                dtype: "bf16".into(),
                head_dim,
                supported: "bf16 with head_dim 32, 64, 96, 128, 256".into(),
            }),
        }
    };
}

/// Bytes of scores, and of what they are made of, that calls have in memory together, if there is more than one.
const TOGETHER: usize = 64 << 20;

/// What a pool is asked.
type Ask<'a, D> = Asking<'a, Pool<D>, Buffer<D>>;

/// Selects the tokens of every head, of each pool that is asked.
pub(super) fn select<D: Driver>(gpu: &Gpu<D>, asking: &[Ask<'_, D>]) -> Result<Vec<Blocks<D>>> {
    for ask in asking {
        check(
            &ask.probes,
            &ask.selection,
            [ask.pool.heads, ask.pool.tokens],
        )?;
    }
    scored(gpu, asking, Best::Highest)
}

/// The tokens that every head drops.
pub(super) fn lowest<D: Driver>(
    gpu: &Gpu<D>,
    pool: &Pool<D>,
    probes: &Probes<'_, Buffer<D>>,
    selection: &Selection<'_>,
) -> Result<Blocks<D>> {
    check_dropped(probes, selection, [pool.heads, pool.tokens])?;
    let (probes, selection) = (*probes, *selection);
    let ask = Asking {
        pool,
        probes,
        selection,
    };
    Ok(scored(gpu, &[ask], Best::Lowest)?.remove(0))
}

/// Which scores are looked for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Best {
    Highest,
    Lowest,
}

/// Calls of one rule and head size together, as many as have room.
fn scored<D: Driver>(gpu: &Gpu<D>, asking: &[Ask<'_, D>], wanted: Best) -> Result<Vec<Blocks<D>>> {
    let kind = |ask: &Ask<'_, D>| (ask.selection.rule, ask.pool.head_dim);
    let (mut selected, mut left) = (Vec::with_capacity(asking.len()), asking);
    while let Some(first) = left.first() {
        let (mut count, mut bytes) = (1, Work::new(first, wanted)?.bytes()?);
        while let Some(next) = left.get(count).filter(|next| kind(next) == kind(first)) {
            bytes = bytes.saturating_add(Work::new(next, wanted)?.bytes()?);
            if bytes > TOGETHER {
                break;
            }
            count += 1;
        }
        let (now, later) = left.split_at(count);
        selected.extend(together(gpu, now, wanted)?);
        left = later;
    }
    Ok(selected)
}

/// Calls of one rule and head size.
fn together<D: Driver>(
    gpu: &Gpu<D>,
    asking: &[Ask<'_, D>],
    wanted: Best,
) -> Result<Vec<Blocks<D>>> {
    let of_pools = asking.iter().map(|ask| PoolCall {
        pool: ask.pool,
        kv_heads: ask.selection.kv_heads,
        eligible: ask.selection.eligible,
        ends: &[],
    });
    let tables = Tables::new(gpu, &of_pools.collect::<Vec<_>>())?;
    let ready = asking.iter().enumerate().map(|(i, ask)| {
        let params = tables.params(i, ask.pool)?;
        Ready::new(gpu, ask, wanted, params)
    });
    let ready: Vec<Ready<D>> = ready.collect::<Result<_>>()?;
    let calls: Vec<SegattnRetrievalParams> = ready.iter().map(|call| call.params).collect();
    let Some(Ready { work, .. }) = ready.first() else {
        return Ok(Vec::new());
    };
    let launches = Launches {
        calls: Calls::new(gpu, &calls)?,
        ready: &ready,
        head_dim: work.head_dim,
    };
    let select = match work.rule {
        SelectionRule::Blocks { .. } => {
            launches.blocks()?;
            "pool_select_f32"
        }
        SelectionRule::Windows { .. } => {
            launches.windows()?;
            "pool_windows_f32"
        }
    };
    match wanted {
        Best::Highest => launches.of_heads(select)?,
        Best::Lowest => {
            launches.launch("pool_unwanted_f32", Grid::Threads, Work::scores)?;
            let unwanted = |params: &SegattnRetrievalParams| SegattnRetrievalParams {
                scores: params.unwanted,
                ..*params
            };
            let calls: Vec<SegattnRetrievalParams> = calls.iter().map(unwanted).collect();
            let calls = Calls::new(gpu, &calls)?;
            Launches { calls, ..launches }.of_heads("pool_select_f32")?;
        }
    }
    Ok(ready.into_iter().map(|call| call.selected).collect())
}

/// A call whose memory is there.
struct Ready<D: Driver> {
    work: Work,
    params: SegattnRetrievalParams,
    selected: Blocks<D>,
    /// What `params` points to beside the selection.
    _memory: [Option<Block<D>>; 5],
}

impl<D: Driver> Ready<D> {
    /// `params`: what they are for any call of its pool.
    fn new(
        gpu: &Gpu<D>,
        ask: &Ask<'_, D>,
        wanted: Best,
        params: SegattnRetrievalParams,
    ) -> Result<Self> {
        let Asking {
            pool,
            probes,
            selection,
        } = ask;
        let kv_width = kv_width(pool, selection.kv_heads)?;
        let width = product("query heads", &[kv_width, probes.group])?;
        let work = Work::new(ask, wanted)?;
        let block_len = selection.rule.block_len();
        let known = (0..pool.heads).map(|head| selection.count(head) / block_len);
        let sizes = [selection.rows / block_len, block_len, work.end];
        let selected = Blocks::unwritten(gpu, known.collect(), sizes)?;
        let params = SegattnRetrievalParams {
            q: gpu.input(&probes.q, probes.capacity, width)?,
            group: int("query heads of a KV head", probes.group)?,
            first_query: int("first query", probes.first)?,
            query_capacity: int("rows of queries", probes.capacity)?,
            ..selected.params(gpu, params)?
        };
        let (params, memory) = work.params(gpu, params)?;
        Ok(Self {
            work,
            params,
            selected,
            _memory: memory,
        })
    }
}

/// Sizes of a call.
#[derive(Clone, Copy)]
struct Work {
    heads: usize,
    head_dim: usize,
    /// Query heads of a KV head.
    group: usize,
    /// Queries of a query head.
    queries: usize,
    /// Behind the last token that any head may select.
    end: usize,
    rule: SelectionRule,
    scale: f32,
    wanted: Best,
    /// Whether no head has more tokens to select from than it selects, so that none is scored. By the second rule.
    all: bool,
}

impl Work {
    fn new<D: Driver>(ask: &Ask<'_, D>, wanted: Best) -> Result<Self> {
        let Asking {
            pool,
            probes,
            selection,
        } = ask;
        let end = selection.eligible.iter().map(|range| range.end).max();
        let fits = |range: &Range<usize>| range.len() <= selection.rows;
        Ok(Self {
            heads: pool.heads,
            head_dim: pool.head_dim,
            group: probes.group,
            queries: probes.rows,
            end: end.unwrap_or(0),
            rule: selection.rule,
            scale: selection.scale(pool.head_dim),
            wanted,
            all: wanted == Best::Highest && selection.eligible.iter().all(fits),
        })
    }

    /// Probes of a query head.
    fn windows(&self) -> usize {
        match self.rule {
            SelectionRule::Blocks {
                probe_window,
                probe_stride,
                ..
            } => (self.queries - probe_window.min(self.queries)) / probe_stride + 1,
            SelectionRule::Windows { .. } => self.queries,
        }
    }

    /// Probes of a head.
    fn probes(&self) -> Result<usize> {
        product("probes", &[self.group, self.windows()])
    }

    /// Blocks of the first rule, or tokens, that are scored.
    fn scored(&self) -> usize {
        match self.rule {
            SelectionRule::Windows { .. } if self.all => 0,
            rule => self.end / rule.block_len(),
        }
    }

    /// Tiles of keys that thread blocks score.
    fn tiles(&self) -> usize {
        let tile_blocks = (SCORED_KEYS / self.rule.block_len()).max(1);
        self.scored().div_ceil(tile_blocks)
    }

    fn scores(&self) -> Result<usize> {
        product("scores", &[self.heads, self.scored()])
    }

    /// Bytes of each array that the call needs: means or sums, lse, scores, best tokens, what is unwanted.
    fn arrays(&self) -> Result<[usize; 5]> {
        let (heads, tiles, probes) = (self.heads, self.tiles(), self.probes()?);
        let scores = product("scores", &[self.scores()?, size_of::<f32>()])?;
        let unwanted = match self.wanted {
            Best::Highest => 0,
            Best::Lowest => scores,
        };
        Ok(match self.rule {
            SelectionRule::Blocks { .. } => {
                let means = product("probes", &[heads, probes, self.head_dim, MEAN_BYTES])?;
                [means, 0, scores, 0, unwanted]
            }
            SelectionRule::Windows { .. } if tiles == 0 => [0; 5],
            SelectionRule::Windows { .. } => {
                let sums = product("sums", &[heads, tiles, probes, 2 * size_of::<f32>()])?;
                let lse = product("probes", &[heads, probes, size_of::<f32>()])?;
                let best = product("tiles", &[heads, tiles, size_of::<SegattnBestToken>()])?;
                [sums, lse, scores, best, unwanted]
            }
        })
    }

    fn bytes(&self) -> Result<usize> {
        Ok(self.arrays()?.into_iter().fold(0, usize::saturating_add))
    }

    /// The parameters of the call, and memory for its arrays.
    fn params<D: Driver>(
        &self,
        gpu: &Gpu<D>,
        params: SegattnRetrievalParams,
    ) -> Result<(SegattnRetrievalParams, [Option<Block<D>>; 5])> {
        let mut memory = [const { None }; 5];
        for (block, bytes) in memory.iter_mut().zip(self.arrays()?) {
            if bytes > 0 {
                *block = Some(gpu.block(bytes)?);
            }
        }
        let at = |block: &Option<Block<D>>| match block {
            Some(block) => pointer::<u8>(block).cast_mut(),
            None => std::ptr::null_mut(),
        };
        let [made_of, lse, scores, best, unwanted] = memory.each_ref().map(at);
        let scored = self.scored();
        let params = SegattnRetrievalParams {
            lse: lse.cast(),
            scores: scores.cast(),
            best: best.cast(),
            unwanted: unwanted.cast(),
            score_pitch: scored as i64,
            windows: int("probes of a query head", self.windows())?,
            ..params
        };
        let params = match self.rule {
            SelectionRule::Blocks {
                probe_window,
                probe_stride,
                ..
            } => SegattnRetrievalParams {
                probes: made_of.cast(),
                window: int("queries of a probe window", probe_window.min(self.queries))?,
                stride: int("stride of probe windows", probe_stride)?,
                blocks: int("blocks of a pool", scored)?,
                window_len: 1,
                ..params
            },
            SelectionRule::Windows {
                window_len,
                window_before,
            } => SegattnRetrievalParams {
                sums: made_of.cast(),
                tiles: int("tiles of a pool", self.tiles())?,
                window_len: int("window_len", window_len)?,
                window_before: int("window_before", window_before)?,
                scale_log2: std::f32::consts::LOG2_E * self.scale,
                ..params
            },
        };
        Ok((params, memory))
    }
}

/// Launches for calls of one rule and head size.
struct Launches<'a, D: Driver> {
    calls: Calls<'a, D>,
    ready: &'a [Ready<D>],
    head_dim: usize,
}

impl<D: Driver> Launches<'_, D> {
    /// Launches a kernel. `size`: the threads, or blocks, that a call needs.
    fn launch(
        &self,
        name: &'static str,
        grid: impl FnOnce(usize) -> Grid,
        size: impl Fn(&Work) -> Result<usize>,
    ) -> Result<()> {
        let mut sizes = self.ready.iter().map(|call| size(&call.work));
        let most = sizes.try_fold(0, |most, size| Ok::<_, DeviceError>(size?.max(most)))?;
        self.calls.launch(name, grid(most))
    }

    /// A kernel that has a block for each head.
    fn of_heads(&self, name: &'static str) -> Result<()> {
        self.launch(name, Grid::Blocks, |work| Ok(work.heads))
    }

    /// Scores of blocks.
    fn blocks(&self) -> Result<()> {
        let threads = |work: &Work| {
            let sizes = [work.heads, work.probes()?, work.head_dim / VECTOR];
            product("probes", &sizes)
        };
        self.launch("pool_probes_bf16", Grid::Threads, threads)?;
        let scores = by_head_dim!("pool_scores_bf16", self.head_dim)?;
        self.launch(scores, Grid::Blocks, Self::tiles)
    }

    /// Scores of tokens.
    fn windows(&self) -> Result<()> {
        let sums = by_head_dim!("pool_sums_bf16", self.head_dim)?;
        self.launch(sums, Grid::Blocks, Self::tiles)?;
        let probes = |work: &Work| match work.tiles() {
            0 => Ok(0),
            _ => product("probes", &[work.heads, work.probes()?]),
        };
        self.launch("pool_lse_f32", Grid::Blocks, probes)?;
        let shares = by_head_dim!("pool_shares_bf16", self.head_dim)?;
        self.launch(shares, Grid::Blocks, Self::tiles)
    }

    fn tiles(work: &Work) -> Result<usize> {
        product("tiles of scores", &[work.heads, work.tiles()])
    }
}
