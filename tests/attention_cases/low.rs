//! Segment attention as a plain implementation in 16 bits computes it, the yardstick for the kernels' error: exact
//! scores, weights rounded before each product, results rounded, everything else exact.

use rayon::prelude::*;
use segattn::attention::cuda::Dtype;
use segattn::attention::{HostProblem, PerSource, Source, View};

use super::gpu::{to_bits, to_f64};
use super::{Backward, Case, Tensor};

/// Gradients by name, in row-major order.
pub type Named = Vec<(&'static str, Vec<f64>)>;

/// Results in row-major order.
pub struct Low {
    pub out: Vec<f64>,
    /// In the order of [`super::Backward::parts`]; empty without a backward pass.
    pub grads: Named,
}

/// A visible key.
struct Key<'a> {
    source: Source,
    row: usize,
    gated: bool,
    k: &'a [f64],
    v: &'a [f64],
    score: f64,
}

/// Gradients of one KV head of one batch element: of k and v; none of the past.
type HeadGrads = PerSource<[Vec<f64>; 2]>;

struct Group {
    /// out, d_q of its query heads, `[group, rows, head_dim]`.
    out: Vec<f64>,
    d_q: Vec<f64>,
    d_kv: HeadGrads,
    d_gate: Vec<f64>,
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn add(to: &mut [f64], factor: f64, from: &[f64]) {
    to.iter_mut()
        .zip(from)
        .for_each(|(to, from)| *to += factor * from);
}

fn row<'a>(view: &View<'a, f64>, [batch_index, row, head]: [usize; 3], dim: usize) -> &'a [f64] {
    &view.data[view.layout.offset(batch_index, row, head)..][..dim]
}

fn visible<'a>(
    p: &HostProblem<'a, f64>,
    [batch_index, head, position]: [usize; 3],
    q: &[f64],
) -> Vec<Key<'a>> {
    let (kv_head, dim) = (head / p.group(), p.head_dim());
    let scale = f64::from(p.scale.unwrap_or(1.0 / (dim as f32).sqrt()));
    let mut keys = Vec::new();
    for source in Source::ALL {
        let Some([k_rows, v_rows]) = p.source(source) else {
            continue;
        };
        let sinks = match source {
            Source::Past => p.sink_rows(batch_index, kv_head),
            Source::Prior | Source::Current => 0,
        };
        let count = match source {
            Source::Current => position + 1,
            _ if p.reads(source, head) => p.source_rows(source, batch_index, kv_head),
            _ => sinks,
        };
        keys.extend((0..count).map(|r| {
            let gated = source == Source::Past && r >= sinks;
            let bias = if gated {
                f64::from(p.gate(head)).ln()
            } else {
                0.0
            };
            let k = row(k_rows, [batch_index, r, kv_head], dim);
            Key {
                source,
                row: r,
                gated,
                k,
                v: row(v_rows, [batch_index, r, kv_head], dim),
                score: scale * dot(q, k) + bias,
            }
        }));
    }
    keys
}

fn group(
    case: &Case<f64>,
    dtype: Dtype,
    backward: Option<bool>,
    batch_index: usize,
    kv_head: usize,
) -> Group {
    let p = case.problem();
    let round = |x: f64| to_f64(dtype, to_bits(dtype, x));
    let (dim, rows, heads) = (p.head_dim(), p.rows(), p.group());
    let zeros = |rows: usize| vec![0.0; rows * dim];
    let kv = |source| match source {
        Source::Past => [zeros(0), zeros(0)],
        _ => [zeros(p.capacity(source)), zeros(p.capacity(source))],
    };
    let mut result = Group {
        out: zeros(heads * rows),
        d_q: zeros(heads * rows),
        d_kv: PerSource::from_fn(kv),
        d_gate: vec![0.0; heads],
    };
    let start = p.query_start(batch_index);
    let scale = f64::from(p.scale.unwrap_or(1.0 / (dim as f32).sqrt()));
    let valid = p.query_rows(batch_index);
    for (h, i) in (0..heads).flat_map(|h| (0..valid).map(move |i| (h, i))) {
        let head = kv_head * heads + h;
        let q = row(&p.q, [batch_index, i, head], dim);
        let keys = visible(&p, [batch_index, head, start + i], q);
        let max = keys
            .iter()
            .fold(f64::NEG_INFINITY, |max, key| max.max(key.score));
        let sum: f64 = keys.iter().map(|key| (key.score - max).exp()).sum();
        let at = (h * rows + i) * dim;
        let out = &mut result.out[at..at + dim];
        keys.iter()
            .for_each(|key| add(out, round((key.score - max).exp()) / sum, key.v));
        out.iter_mut().for_each(|x| *x = round(*x));
        let Some(with_d_lse) = backward else {
            continue;
        };
        let d_out = row(&case.d_out.view(), [batch_index, i, head], dim);
        let d_lse = if with_d_lse {
            case.d_lse[case.q.first_number(batch_index, head) + i]
        } else {
            0.0
        };
        let delta = dot(d_out, out) - d_lse;
        for key in &keys {
            let weight = (key.score - max).exp() / sum;
            let ds = weight * (dot(d_out, key.v) - delta);
            add(&mut result.d_q[at..at + dim], scale * round(ds), key.k);
            if key.gated {
                result.d_gate[h] += ds / f64::from(p.gate(head));
            }
            if key.source == Source::Past {
                continue;
            }
            let [d_k, d_v] = &mut result.d_kv[key.source];
            let to = key.row * dim..(key.row + 1) * dim;
            add(&mut d_k[to.clone()], scale * round(ds), q);
            add(&mut d_v[to], round(weight), d_out);
        }
    }
    result
}

/// Forward, and backward where `backward` says whether d_lse is there.
pub fn run(case: &Case<f64>, dtype: Dtype, backward: Option<bool>) -> Low {
    let p = case.problem();
    let kv_heads = p.kv_heads();
    let groups: Vec<Group> = (0..p.batch() * kv_heads)
        .into_par_iter()
        .map(|i| group(case, dtype, backward, i / kv_heads, i % kv_heads))
        .collect();
    // From [batch element, kv_head][inner head, rows, dim] to [batch element, rows, heads, dim], rounded.
    let merge = |like: &Tensor<f64>, inner: usize, part: &dyn Fn(&Group) -> &[f64]| {
        let [batch, _, heads, dim] = like.shape;
        let before = |b: usize| (0..b).map(|b| like.rows_of(b)).sum::<usize>();
        let mut merged = vec![0.0; before(batch) * heads * dim];
        for (g, from) in groups.iter().enumerate() {
            let (b, from) = (g / kv_heads, part(from));
            let rows = (from.len() / (inner * dim).max(1)).max(1);
            for (i, row) in from.chunks(dim.max(1)).enumerate() {
                if i % rows < like.rows_of(b) {
                    let head = g % kv_heads * inner + i / rows;
                    let to = ((before(b) + i % rows) * heads + head) * dim;
                    merged[to..to + dim].copy_from_slice(row);
                }
            }
        }
        merged
            .iter()
            .map(|&x| to_f64(dtype, to_bits(dtype, x)))
            .collect::<Vec<f64>>()
    };
    let mut low = Low {
        out: merge(&case.q, p.group(), &|g| &g.out),
        grads: Vec::new(),
    };
    if backward.is_some() {
        let written = Backward::for_case(case, 0.0, true);
        low.grads = vec![
            ("d_q", merge(&case.q, p.group(), &|g| &g.d_q)),
            ("d_k", merge(&written.d_k, 1, &|g| &g.d_kv.current[0])),
            ("d_v", merge(&written.d_v, 1, &|g| &g.d_kv.current[1])),
            (
                "d_past_gate",
                groups.iter().flat_map(|g| g.d_gate.clone()).collect(),
            ),
            ("d_prior_k", merge(&case.prior_k, 1, &|g| &g.d_kv.prior[0])),
            ("d_prior_v", merge(&case.prior_v, 1, &|g| &g.d_kv.prior[1])),
        ];
    }
    low
}
