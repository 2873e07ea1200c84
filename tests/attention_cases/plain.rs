//! Segment attention in f32 as one would first write it: all scores of a head in memory, plain loops,
//! one task per query head. The yardstick for the error and the speed of the fast paths.
#![allow(dead_code)] // The benchmark reads no results.

use rayon::prelude::*;
use segattn::attention::{PastLen, Problem, View};

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

/// A key of a head: source (0 current, 1 prior, 2 past), row, and where it begins.
struct Key<'a> {
    source: usize,
    row: usize,
    k: &'a [f32],
    v: &'a [f32],
}

/// Results of one query head of one entry.
struct Head {
    out: Vec<f32>,
    lse: Vec<f32>,
    d_q: Vec<f32>,
    /// Gradients of keys and values by source.
    d_kv: [[Vec<f32>; 2]; 3],
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

fn lens(p: &Problem<'_, f32>, entry: usize, kv_head: usize) -> [usize; 3] {
    let past = match p.past_len {
        PastLen::PerBatch(len) => len[entry],
        PastLen::PerHead(len) => len[entry * p.kv_heads + kv_head],
    };
    [p.segment_len[entry], p.prior_len[entry], past].map(|len| len as usize)
}

fn head(p: &Problem<'_, f32>, upstream: Option<Upstream<'_>>, entry: usize, head: usize) -> Head {
    let (d, kv_head) = (p.head_dim, head / p.group());
    let lens = lens(p, entry, kv_head);
    let reads = [true, p.prior_heads[head], p.past_gate[head] > 0.0];
    let views = [(p.k, p.v), (p.prior_k, p.prior_v), (p.past_k, p.past_v)];
    let keys: Vec<Key<'_>> = [2, 1, 0]
        .into_iter()
        .filter(|&source| reads[source])
        .flat_map(|source| (0..lens[source]).map(move |row| (source, row)))
        .map(|(source, r)| Key {
            source,
            row: r,
            k: row(&views[source].0, [entry, r, kv_head], d),
            v: row(&views[source].1, [entry, r, kv_head], d),
        })
        .collect();
    let rows = p.q.layout.rows;
    let scale = p.scale.unwrap_or(1.0 / (d as f32).sqrt());
    let mut result = Head {
        out: vec![0.0; rows * d],
        lse: vec![f32::NEG_INFINITY; rows],
        d_q: vec![0.0; rows * d],
        d_kv: views.map(|(k, v)| [k, v].map(|view| vec![0.0; view.layout.rows * d])),
        d_gate: 0.0,
    };
    let mut scores = vec![0.0; rows * keys.len()];
    for i in 0..lens[0] {
        let scores = &mut scores[i * keys.len()..][..keys.len()];
        let visible = keys.len() - lens[0] + i + 1;
        let q = row(&p.q, [entry, i, head], d);
        for (s, key) in scores[..visible].iter_mut().zip(&keys) {
            *s = scale * dot(q, key.k);
            if key.source == 2 {
                *s += p.past_gate[head].ln();
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
            let d_out = row(&upstream.d_out, [entry, i, head], d);
            let at = (entry * p.q_heads + head) * rows + i;
            let d_lse = upstream.d_lse.map_or(0.0, |d_lse| d_lse[at]);
            let delta = dot(d_out, &result.out[i * d..][..d]) - d_lse;
            for (prob, key) in scores.iter().zip(&keys) {
                let ds = prob * (dot(d_out, key.v) - delta);
                add(&mut result.d_q[i * d..][..d], scale * ds, key.k);
                let [d_k, d_v] = &mut result.d_kv[key.source];
                add(&mut d_k[key.row * d..][..d], scale * ds, q);
                add(&mut d_v[key.row * d..][..d], *prob, d_out);
                if key.source == 2 {
                    result.d_gate += ds / p.past_gate[head];
                }
            }
        }
    }
    result
}

/// Forward, and backward where `upstream` is given. `query_start` is taken as 0.
pub fn run(p: &Problem<'_, f32>, upstream: Option<Upstream<'_>>) -> Plain {
    let heads: Vec<Head> = (0..p.batch * p.q_heads)
        .into_par_iter()
        .map(|idx| head(p, upstream, idx / p.q_heads, idx % p.q_heads))
        .collect();
    let merge = |heads_out: usize, rows: usize, part: &dyn Fn(&Head) -> &[f32]| {
        let (d, group) = (p.head_dim, p.q_heads / heads_out);
        let mut merged = vec![0.0; p.batch * rows * heads_out * d];
        for (idx, head) in heads.iter().enumerate() {
            let (entry, out_head) = (idx / p.q_heads, idx % p.q_heads / group);
            for (r, from) in part(head).chunks(d).enumerate() {
                let at = ((entry * rows + r) * heads_out + out_head) * d;
                add(&mut merged[at..at + d], 1.0, from);
            }
        }
        merged
    };
    let kv = |source: usize, which: usize, rows: usize| {
        merge(p.kv_heads, rows, &|head| &head.d_kv[source][which])
    };
    let rows = p.q.layout.rows;
    let mut plain = Plain {
        out: merge(p.q_heads, rows, &|head| &head.out),
        lse: heads.iter().flat_map(|head| head.lse.clone()).collect(),
        grads: Vec::new(),
    };
    if upstream.is_some() {
        plain.grads = vec![
            ("d_q", merge(p.q_heads, rows, &|head| &head.d_q)),
            ("d_k", kv(0, 0, p.k.layout.rows)),
            ("d_v", kv(0, 1, p.v.layout.rows)),
            (
                "d_past_gate",
                heads.iter().map(|head| head.d_gate).collect(),
            ),
            ("d_prior_k", kv(1, 0, p.prior_k.layout.rows)),
            ("d_prior_v", kv(1, 1, p.prior_v.layout.rows)),
        ];
    }
    plain
}
