//! Segment attention in f32 as one would first write it: all scores of a head in memory, plain loops,
//! one task per query head. The yardstick for the error and the speed of the fast paths.
#![allow(dead_code)] // The benchmark reads no results.

use rayon::prelude::*;
use segattn::attention::{HostProblem, PerSource, Source, View};

/// Results in row-major order, packed.
#[derive(Debug)]
pub struct Plain {
    pub out: Vec<f32>,
    pub lse: Vec<f32>,
    /// Names and gradients, in the order of [`super::Backward::parts`].
    pub grads: Vec<(&'static str, Vec<f32>)>,
}

/// The upstream gradients.
#[derive(Clone, Copy)]
pub struct Upstream<'a> {
    pub d_out: View<'a, f32>,
    pub d_lse: Option<&'a [f32]>,
}

/// A key of a head.
struct Key<'a> {
    source: Source,
    row: usize,
    gated: bool,
    k: &'a [f32],
    v: &'a [f32],
}

/// Results of one query head of one batch element.
struct Head {
    out: Vec<f32>,
    lse: Vec<f32>,
    d_q: Vec<f32>,
    /// Gradients of keys and values by source.
    d_kv: PerSource<[Vec<f32>; 2]>,
    d_gate: f32,
}

fn row<'a>(view: &View<'a, f32>, at: [usize; 3], head_dim: usize) -> &'a [f32] {
    &view.data[view.layout.offset(at[0], at[1], at[2])..][..head_dim]
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn add(to: &mut [f32], factor: f32, from: &[f32]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to += factor * from;
    }
}

fn head(
    p: &HostProblem<'_, f32>,
    upstream: Option<Upstream<'_>>,
    batch_index: usize,
    head: usize,
) -> Head {
    let (d, kv_head) = (p.head_dim(), head / p.group());
    let own = p.source_rows(Source::Current, batch_index, kv_head);
    let mut keys = Vec::new();
    for source in Source::ALL {
        let Some([k_rows, v_rows]) = p.source(source) else {
            continue;
        };
        let sinks = match source {
            Source::Past => p.sink_rows(batch_index, kv_head),
            Source::Prior | Source::Current => 0,
        };
        let rows = match p.reads(source, head) {
            true => p.source_rows(source, batch_index, kv_head),
            false => sinks,
        };
        keys.extend((0..rows).map(|r| Key {
            source,
            row: r,
            gated: source == Source::Past && r >= sinks,
            k: row(k_rows, [batch_index, r, kv_head], d),
            v: row(v_rows, [batch_index, r, kv_head], d),
        }));
    }
    let rows = p.rows();
    let scale = p.scale.unwrap_or(1.0 / (d as f32).sqrt());
    let mut result = Head {
        out: vec![0.0; rows * d],
        lse: vec![f32::NEG_INFINITY; rows],
        d_q: vec![0.0; rows * d],
        d_kv: PerSource::from_fn(|source| {
            p.source(source).map_or_else(Default::default, |tensors| {
                tensors.map(|view| vec![0.0; view.layout.rows * d])
            })
        }),
        d_gate: 0.0,
    };
    let mut scores = vec![0.0; rows * keys.len()];
    for i in 0..own {
        let scores = &mut scores[i * keys.len()..][..keys.len()];
        let visible = keys.len() - own + i + 1;
        let q = row(&p.q, [batch_index, i, head], d);
        for (s, key) in scores[..visible].iter_mut().zip(&keys) {
            *s = scale * dot(q, key.k);
            if key.gated {
                *s += p.gate(head).ln();
            }
        }
        let scores = &mut scores[..visible];
        let max = scores.iter().fold(f32::NEG_INFINITY, |a, b| a.max(*b));
        scores.iter_mut().for_each(|s| *s = (*s - max).exp());
        let sum: f32 = scores.iter().sum();
        scores.iter_mut().for_each(|s| *s /= sum);
        result.lse[i] = max + sum.ln();
        for (p, key) in scores.iter().zip(&keys) {
            add(&mut result.out[i * d..][..d], *p, key.v);
        }
        if let Some(upstream) = upstream {
            let d_out = row(&upstream.d_out, [batch_index, i, head], d);
            let at = (batch_index * p.q_heads() + head) * rows + i;
            let d_lse = upstream.d_lse.map_or(0.0, |d_lse| d_lse[at]);
            let delta = dot(d_out, &result.out[i * d..][..d]) - d_lse;
            for (prob, key) in scores.iter().zip(&keys) {
                let ds = prob * (dot(d_out, key.v) - delta);
                add(&mut result.d_q[i * d..][..d], scale * ds, key.k);
                let [d_k, d_v] = &mut result.d_kv[key.source];
                add(&mut d_k[key.row * d..][..d], scale * ds, q);
                add(&mut d_v[key.row * d..][..d], *prob, d_out);
                if key.gated {
                    result.d_gate += ds / p.gate(head);
                }
            }
        }
    }
    result
}

/// Forward, and backward where `upstream` is given. `query_start` is taken as 0.
pub fn run(p: &HostProblem<'_, f32>, upstream: Option<Upstream<'_>>) -> Plain {
    let (batch, q_heads, kv_heads) = (p.batch(), p.q_heads(), p.kv_heads());
    let heads: Vec<Head> = (0..batch * q_heads)
        .into_par_iter()
        .map(|idx| head(p, upstream, idx / q_heads, idx % q_heads))
        .collect();
    let merge = |heads_out: usize, rows: usize, part: &dyn Fn(&Head) -> &[f32]| {
        let (d, group) = (p.head_dim(), q_heads / heads_out);
        let mut merged = vec![0.0; batch * rows * heads_out * d];
        for (idx, head) in heads.iter().enumerate() {
            let (batch_index, out_head) = (idx / q_heads, idx % q_heads / group);
            for (r, from) in part(head).chunks(d).enumerate() {
                let at = ((batch_index * rows + r) * heads_out + out_head) * d;
                add(&mut merged[at..at + d], 1.0, from);
            }
        }
        merged
    };
    let kv = |source: Source, which: usize| {
        let rows = p
            .source(source)
            .map_or(0, |tensors| tensors[which].layout.rows);
        merge(kv_heads, rows, &|head| &head.d_kv[source][which])
    };
    let mut plain = Plain {
        out: merge(q_heads, p.rows(), &|head| &head.out),
        lse: heads.iter().flat_map(|head| head.lse.clone()).collect(),
        grads: Vec::new(),
    };
    if upstream.is_some() {
        plain.grads = vec![
            ("d_q", merge(q_heads, p.rows(), &|head| &head.d_q)),
            ("d_k", kv(Source::Current, 0)),
            ("d_v", kv(Source::Current, 1)),
            (
                "d_past_gate",
                heads.iter().map(|head| head.d_gate).collect(),
            ),
            ("d_prior_k", kv(Source::Prior, 0)),
            ("d_prior_v", kv(Source::Prior, 1)),
        ];
    }
    plain
}
