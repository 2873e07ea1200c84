//! Selection from a pool, by both rules of docs/contract.md, section 2. How many tokens are selected follows from
//! lengths, so the host waits for nothing.

use std::ops::Range;

use super::bounds::{VECTOR, int, pointer, product};
use super::pool::Pool;
use super::pool_tables::{Tables, kv_width};
use super::retrieval::Blocks;
use super::rows::{Grid, entry, launch};
use super::{Buffer, Driver, Gpu};
use crate::cuda::kernels::layer_params::{SegattnBestToken, SegattnRetrievalParams};
use crate::cuda::kernels::{Error, File};
use crate::device::shared::selection::{check, check_dropped};
use crate::device::{Probes, Result, Selection, SelectionRule};

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

/// Selects the tokens of every head.
pub(super) fn select<D: Driver>(
    gpu: &Gpu<D>,
    pool: &Pool<D>,
    probes: &Probes<'_, Buffer<D>>,
    selection: &Selection<'_>,
) -> Result<Blocks<D>> {
    check(probes, selection, [pool.heads, pool.tokens])?;
    scored(gpu, pool, probes, selection, Best::Highest)
}

/// The tokens that every head drops.
pub(super) fn lowest<D: Driver>(
    gpu: &Gpu<D>,
    pool: &Pool<D>,
    probes: &Probes<'_, Buffer<D>>,
    selection: &Selection<'_>,
) -> Result<Blocks<D>> {
    check_dropped(probes, selection, [pool.heads, pool.tokens])?;
    scored(gpu, pool, probes, selection, Best::Lowest)
}

/// Which scores are looked for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Best {
    Highest,
    Lowest,
}

fn scored<D: Driver>(
    gpu: &Gpu<D>,
    pool: &Pool<D>,
    probes: &Probes<'_, Buffer<D>>,
    selection: &Selection<'_>,
    wanted: Best,
) -> Result<Blocks<D>> {
    let heads = pool.heads;
    let kv_width = kv_width(pool, selection.kv_heads)?;
    let q_width = product("query heads", &[kv_width, probes.group])?;
    let q = gpu.input(&probes.q, probes.capacity, q_width)?;
    let end = selection.eligible.iter().map(|range| range.end).max();
    let end = end.unwrap_or(0);
    let block_len = selection.rule.block_len();
    let most = selection.rows / block_len;
    let known = (0..heads).map(|head| most.min(selection.blocks(head, block_len).len()));
    let selected = Blocks::unwritten(gpu, known.collect(), [most, block_len, end])?;
    let tables = Tables::new(
        gpu,
        pool,
        selection.kv_heads,
        selection.eligible,
        &vec![0; heads],
    )?;
    let params = SegattnRetrievalParams {
        q,
        group: int("query heads of a KV head", probes.group)?,
        first_query: int("first query", probes.first)?,
        query_capacity: int("rows of queries", probes.capacity)?,
        ..selected.params(gpu, tables.params(pool)?)?
    };
    let call = Call {
        gpu,
        heads,
        head_dim: pool.head_dim,
        group: probes.group,
        end,
        wanted,
        params,
    };
    match selection.rule {
        SelectionRule::Blocks {
            probe_window,
            probe_stride,
            ..
        } => {
            let window = probe_window.min(probes.rows);
            let windows = (probes.rows - window) / probe_stride + 1;
            call.blocks(block_len, windows, [window, probe_stride])?;
        }
        SelectionRule::Windows {
            window_len,
            window_before,
        } => {
            let fits = |range: &Range<usize>| range.len() <= most;
            let all = wanted == Best::Highest && selection.eligible.iter().all(fits);
            let scale = selection.scale(pool.head_dim);
            call.windows(probes.rows, [window_len, window_before], scale, all)?;
        }
    }
    Ok(selected)
}

/// What both rules need.
struct Call<'a, D: Driver> {
    gpu: &'a Gpu<D>,
    heads: usize,
    head_dim: usize,
    /// Query heads of a KV head.
    group: usize,
    /// Behind the last token that any head may select.
    end: usize,
    wanted: Best,
    params: SegattnRetrievalParams,
}

impl<D: Driver> Call<'_, D> {
    fn launch(
        &self,
        name: &'static str,
        grid: Grid,
        params: &SegattnRetrievalParams,
    ) -> Result<()> {
        launch(self.gpu, entry(File::Retrieval, name), grid, params)
    }

    /// The best blocks, by `windows` means of a query head over so many queries and so many apart.
    fn blocks(&self, block_len: usize, windows: usize, [window, stride]: [usize; 2]) -> Result<()> {
        let (gpu, blocks) = (self.gpu, self.end / block_len);
        let units = product("probes", &[self.heads, self.group, windows, self.head_dim])?;
        let means = gpu.block(product("probes", &[units, MEAN_BYTES])?)?;
        let scores = gpu.block(product("scores", &[self.heads, blocks, size_of::<f32>()])?)?;
        let params = SegattnRetrievalParams {
            probes: pointer::<f32>(&means).cast_mut().cast(),
            scores: pointer::<f32>(&scores).cast_mut(),
            score_pitch: blocks as i64,
            windows: int("probe windows", windows)?,
            window: int("queries of a probe window", window)?,
            stride: int("stride of probe windows", stride)?,
            blocks: int("blocks of a pool", blocks)?,
            ..self.params
        };
        self.launch("pool_probes_bf16", Grid::Threads(units / VECTOR), &params)?;
        let tiles = blocks.div_ceil((SCORED_KEYS / block_len).max(1));
        let grid = Grid::Blocks(product("tiles of scores", &[self.heads, tiles])?);
        self.launch(
            by_head_dim!("pool_scores_bf16", self.head_dim)?,
            grid,
            &params,
        )?;
        match self.wanted {
            Best::Highest => self.launch("pool_select_f32", Grid::Blocks(self.heads), &params),
            Best::Lowest => self.lowest([1, 0], &params),
        }
    }

    /// The blocks, or tokens, with the lowest scores. `window`: as below, of what is dropped one by one.
    fn lowest(&self, window: [usize; 2], params: &SegattnRetrievalParams) -> Result<()> {
        let scores = product("scores", &[self.heads, params.score_pitch as usize])?;
        let unwanted = self
            .gpu
            .block(product("scores", &[scores, size_of::<f32>()])?)?;
        let params = SegattnRetrievalParams {
            unwanted: pointer::<f32>(&unwanted).cast_mut(),
            window_len: int("window_len", window[0])?,
            window_before: int("window_before", window[1])?,
            ..*params
        };
        self.launch("pool_unwanted_f32", Grid::Threads(scores), &params)?;
        let params = SegattnRetrievalParams {
            scores: params.unwanted,
            ..params
        };
        self.launch("pool_select_f32", Grid::Blocks(self.heads), &params)
    }

    /// Windows around the best tokens, by so many queries of a query head. `window`: its length, and the tokens of a
    /// whole one before its best. `all`: no head has more tokens to select
    /// from than it selects.
    fn windows(&self, queries: usize, window: [usize; 2], scale: f32, all: bool) -> Result<()> {
        let (gpu, tiles) = (self.gpu, self.end.div_ceil(SCORED_KEYS));
        let probes = product("probes", &[self.group, queries])?;
        let block = |what, sizes: &[usize]| gpu.block(product(what, sizes)?);
        let sums = block("sums", &[self.heads, tiles, probes, 2 * size_of::<f32>()])?;
        let lse = block("probes", &[self.heads, probes, size_of::<f32>()])?;
        let scores = block("scores", &[self.heads, self.end, size_of::<f32>()])?;
        let best = block("tiles", &[self.heads, tiles, size_of::<SegattnBestToken>()])?;
        let params = SegattnRetrievalParams {
            sums: pointer::<f32>(&sums).cast_mut(),
            lse: pointer::<f32>(&lse).cast_mut(),
            scores: pointer::<f32>(&scores).cast_mut(),
            best: pointer::<SegattnBestToken>(&best).cast_mut(),
            score_pitch: self.end as i64,
            windows: int("queries", queries)?,
            tiles: int("tiles of a pool", tiles)?,
            window_len: int("window_len", window[0])?,
            window_before: int("window_before", window[1])?,
            scale_log2: std::f32::consts::LOG2_E * scale,
            ..self.params
        };
        if !all {
            let work = product("tiles of a pool", &[self.heads, tiles])?;
            let each = product("probes", &[self.heads, probes])?;
            let sums = by_head_dim!("pool_sums_bf16", self.head_dim)?;
            self.launch(sums, Grid::Blocks(work), &params)?;
            self.launch("pool_lse_f32", Grid::Blocks(each), &params)?;
            let shares = by_head_dim!("pool_shares_bf16", self.head_dim)?;
            self.launch(shares, Grid::Blocks(work), &params)?;
        }
        match self.wanted {
            Best::Highest => self.launch("pool_windows_f32", Grid::Blocks(self.heads), &params),
            Best::Lowest => self.lowest(window, &params),
        }
    }
}
