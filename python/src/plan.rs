//! `segattn._native.SegmentPlan`: where the segments of a model end, and which past rows its heads select, for models
//! that run elsewhere.

use pyo3::prelude::*;
use segattn::device::cpu::Cpu;
use segattn::device::{Device, Kind, PastPool, PoolShape, Probes, Rows, SelectedBlocks, Selection};
use segattn::model::config::ModelConfig;
use segattn::model::segmentation::Sequence;
use segattn::model::state::Plan;

use crate::failure::Failure;
use crate::tensor::Numbers;

/// The segments of a model.
#[pyclass(frozen, get_all)]
pub struct SegmentPlan {
    /// Most tokens of a segment.
    segment_len: usize,
    /// Rows of the tail.
    prior_len: usize,
    /// First rows of the sequence that every head of later segments reads.
    sink_len: usize,
    /// Bits that are kept of an element of the rows that the past is selected from.
    pool_bits: usize,
    /// Last rows of a segment, whose queries choose the past.
    probe_rows: usize,
    /// `[layer][kv_head]`: whether it reads the tail.
    prior_heads: Vec<Vec<bool>>,
    /// `[layer]`: KV heads that read the past, ascending.
    past_heads: Vec<Vec<usize>>,
}

fn parsed(config: &str) -> Result<ModelConfig, Failure> {
    let json = serde_json::from_str(config).map_err(Failure::other)?;
    ModelConfig::from_json(json).map_err(Failure::other)
}

/// The plan of a config.json for sequences of at most so many tokens.
fn plan(config: &str, longest: usize) -> Result<Plan, Failure> {
    Ok(Plan::new(&parsed(config)?, longest))
}

/// Breaks and rereads of a prompt of so many tokens, which generation adds to those that it is given.
#[pyfunction]
pub fn prompt_marks(
    py: Python<'_>,
    config: &str,
    tokens: usize,
) -> PyResult<(Vec<usize>, Vec<usize>)> {
    let config = parsed(config).map_err(|failure| failure.raise(py))?;
    let own = config.prompt_break();
    Ok((own.of(tokens).into_iter().collect(), own.rereads_of(tokens)))
}

/// The plan of a model without its weights.
#[pyfunction]
pub fn segment_plan(py: Python<'_>, config: &str) -> PyResult<SegmentPlan> {
    let plan = plan(config, usize::MAX).map_err(|failure| failure.raise(py))?;
    Ok(SegmentPlan {
        segment_len: plan.segment_len,
        prior_len: plan.prior_len,
        sink_len: plan.sink_len,
        pool_bits: plan.pool_bits.count(),
        probe_rows: plan.probe_rows,
        prior_heads: plan.reads.iter().map(|reads| reads.prior.clone()).collect(),
        past_heads: plan.reads.into_iter().map(|reads| reads.past).collect(),
    })
}

/// First and last position (excluded) of each segment of a sequence.
#[pyfunction]
pub fn segments(
    py: Python<'_>,
    config: &str,
    tokens: Vec<u32>,
    breaks: Vec<usize>,
) -> PyResult<Vec<(usize, usize)>> {
    let sequence = Sequence {
        tokens: &tokens,
        breaks: &breaks,
        rereads: &[],
    };
    let cut = || {
        sequence.check()?;
        let segments = plan(config, tokens.len())?.segments(sequence);
        Ok(segments
            .into_iter()
            .map(|segment| (segment.tokens.start, segment.tokens.end))
            .collect())
    };
    cut().map_err(|failure: Failure| failure.raise(py))
}

/// Tokens that the past heads of a layer select, in order of position (docs/contract.md, section 2).
///
/// keys: `[tokens, past heads, head_dim]` f32 of the tokens that are held; queries: `[rows, q_heads, head_dim]` f32 of
/// the segment's last `probe_rows` tokens, both before rotation; `prior_rows`: rows of the tail.
#[pyfunction]
pub fn select(
    py: Python<'_>,
    config: &str,
    layer: usize,
    keys: Numbers,
    queries: Numbers,
    prior_rows: usize,
) -> PyResult<Vec<Vec<usize>>> {
    let selected = || {
        let (keys, queries) = numbers(&keys, &queries)?;
        let plan = plan(config, usize::MAX)?;
        chosen(&plan, layer, [keys, queries], prior_rows, Choice::Selected)
    };
    py.detach(selected).map_err(|failure| failure.raise(py))
}

/// Tokens that the past heads of a layer drop, in order of position: none where they do not hold too many. Arguments as
/// of [`select`].
#[pyfunction]
pub fn beyond_length(
    py: Python<'_>,
    config: &str,
    layer: usize,
    keys: Numbers,
    queries: Numbers,
    prior_rows: usize,
) -> PyResult<Vec<Vec<usize>>> {
    let dropped = || {
        let (keys, queries) = numbers(&keys, &queries)?;
        let plan = plan(config, usize::MAX)?;
        chosen(&plan, layer, [keys, queries], prior_rows, Choice::Dropped)
    };
    py.detach(dropped).map_err(|failure| failure.raise(py))
}

fn numbers<'a>(keys: &'a Numbers, queries: &'a Numbers) -> Result<(&'a [f32], &'a [f32]), Failure> {
    // SAFETY: the caller keeps the arrays.
    unsafe {
        Ok((
            keys.slice("keys").map_err(Failure::other)?,
            queries.slice("queries").map_err(Failure::other)?,
        ))
    }
}

/// Which tokens are asked for.
enum Choice {
    Selected,
    Dropped,
}

fn chosen(
    plan: &Plan,
    layer: usize,
    [keys, queries]: [&[f32]; 2],
    prior_rows: usize,
    choice: Choice,
) -> Result<Vec<Vec<usize>>, Failure> {
    let reads = plan
        .reads
        .get(layer)
        .ok_or_else(|| Failure::argument("layer", format!("below {}", plan.reads.len()), layer))?;
    let (heads, dim) = (reads.past.len(), plan.heads.dim);
    let (key_width, query_width) = (heads * dim, plan.q_width());
    let (tokens, rows) = (keys.len() / key_width.max(1), queries.len() / query_width);
    if heads == 0 || tokens * key_width != keys.len() || rows * query_width != queries.len() {
        let expected = format!("keys of {heads} heads and whole rows of queries");
        return Err(Failure::argument("keys", expected, keys.len()));
    }
    let buffer = |values: &[f32]| {
        let mut buffer = Cpu.empty(Kind::Activation, values.len())?;
        Cpu.write(&mut buffer, 0, values)?;
        Ok::<_, Failure>(buffer)
    };
    let (keys, queries) = (buffer(keys)?, buffer(queries)?);
    let shape = PoolShape {
        run: tokens.max(1),
        ..plan.pool(heads)
    };
    let mut pool = <Cpu as Device>::Pool::new(&Cpu, shape);
    let all: Vec<usize> = (0..heads).collect();
    // Only keys are looked at.
    let kv = [Rows::packed(&keys, 0, key_width); 2];
    pool.append(&Cpu, &all, kv, tokens)?;
    let eligible = |head: &usize| plan.eligible(reads, *head, [tokens, prior_rows]);
    let eligible: Vec<_> = reads.past.iter().map(eligible).collect();
    let probes = Probes {
        q: Rows::packed(&queries, 0, query_width),
        rows,
        first: 0,
        capacity: rows,
        group: plan.heads.q / plan.heads.kv,
    };
    let selection = Selection {
        kv_heads: &reads.past,
        eligible: &eligible,
        rows: match choice {
            Choice::Selected => plan.past_len,
            Choice::Dropped => tokens - plan.held(tokens),
        },
        rule: plan.rule,
        scale: plan.scale,
    };
    let blocks = match choice {
        Choice::Selected => pool.select(&Cpu, &probes, &selection)?,
        Choice::Dropped => pool.lowest(&Cpu, &probes, &selection)?,
    };
    Ok(SelectedBlocks::<Cpu>::tokens(&blocks, &Cpu)?)
}

/// Rounds rows of one head, `[rows, head_dim]` f32, in place to what the pool of a model keeps of them
/// (docs/contract.md, section 2).
#[pyfunction]
pub fn round_to_pool(py: Python<'_>, config: &str, rows: Numbers) -> PyResult<()> {
    let rounded = py.detach(|| -> Result<_, Failure> {
        let plan = plan(config, usize::MAX)?;
        // SAFETY: the caller keeps the array, and nothing else reads or writes it.
        let rows: &mut [f32] = unsafe { rows.slice_mut("rows").map_err(Failure::other)? };
        let dim = plan.heads.dim;
        if !rows.len().is_multiple_of(dim) {
            let expected = format!("whole rows of {dim} elements");
            return Err(Failure::argument("rows", expected, rows.len()));
        }
        let mut given = Cpu.empty(Kind::Activation, rows.len())?;
        Cpu.write(&mut given, 0, rows)?;
        let mut pool = <Cpu as Device>::Pool::new(&Cpu, plan.pool(1));
        let count = rows.len() / dim;
        pool.append(&Cpu, &[0], [Rows::packed(&given, 0, dim); 2], count)?;
        rows.copy_from_slice(&pool.read(&Cpu, 0..count)?.0);
        Ok(())
    });
    rounded.map_err(|failure| failure.raise(py))
}
