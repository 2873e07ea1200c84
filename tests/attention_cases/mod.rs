//! Random attention problems for the tests: shapes, lengths, roles, gates, strides and values drawn
//! by proptest, with NaN in every element that must not be read and in every output before a run.
#![allow(dead_code)] // Each test file uses its own part.

pub mod bits;
pub mod gpu;
pub mod low;
pub mod plain;
pub mod suite;
mod tensor;
pub mod variants;

use std::ops::Range;

use proptest::prelude::*;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use segattn::attention::{
    Gradients, HostGradients, HostProblem, HostSaved, Len, Lengths, Problem, Saved,
};

pub use tensor::{Arrangement, Tensor};

/// What the random numbers look like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Values {
    /// Around zero.
    Centered,
    /// Keys and values with a mean of 3.
    Shifted,
    /// A few elements a hundred times larger than the rest.
    HeavyTails,
    /// Scores so large that each row picks one key.
    Huge,
    /// Scores so small that all keys count alike.
    Tiny,
}

/// Shapes and lengths of a problem, before the numbers.
#[derive(Debug, Clone)]
pub struct Shape {
    pub kv_heads: usize,
    pub group: usize,
    pub head_dim: usize,
    /// Rows beyond the longest length.
    pub spare_rows: usize,
    pub segment_len: Vec<i32>,
    pub prior_len: Vec<i32>,
    /// `[batch]` or `[batch, kv_heads]`.
    pub past_len: Vec<i32>,
    /// `[batch]` or `[batch, kv_heads]`; empty: no sinks are given.
    pub sink_len: Vec<i32>,
    pub past_gate: Vec<f32>,
    pub prior_heads: Vec<bool>,
    pub scale: Option<f32>,
    pub arrangement: Arrangement,
    pub values: Values,
    pub seed: u64,
}

impl Shape {
    pub fn q_heads(&self) -> usize {
        self.kv_heads * self.group
    }

    pub fn batch(&self) -> usize {
        self.segment_len.len()
    }

    /// One batch element, all heads read everything, packed: a start for hand-written cases.
    pub fn plain(kv_heads: usize, group: usize, head_dim: usize, lens: [i32; 3]) -> Self {
        Shape {
            kv_heads,
            group,
            head_dim,
            spare_rows: 0,
            segment_len: vec![lens[0]],
            prior_len: vec![lens[1]],
            past_len: vec![lens[2]],
            sink_len: Vec::new(),
            past_gate: vec![1.0; kv_heads * group],
            prior_heads: vec![true; kv_heads * group],
            scale: None,
            arrangement: Arrangement::Packed,
            values: Values::Centered,
            seed: 1,
        }
    }
}

/// A problem with its numbers, all representable in f32.
#[derive(Debug, Clone)]
pub struct Case<T> {
    pub shape: Shape,
    pub query_start: Option<Vec<i32>>,
    pub q: Tensor<T>,
    pub k: Tensor<T>,
    pub v: Tensor<T>,
    pub prior_k: Tensor<T>,
    pub prior_v: Tensor<T>,
    pub past_k: Tensor<T>,
    pub past_v: Tensor<T>,
    pub d_out: Tensor<T>,
    pub d_lse: Vec<T>,
}

/// A standard normal number (Box-Muller).
fn normal(rng: &mut ChaCha8Rng) -> f64 {
    let radius = (-2.0 * (1.0 - rng.random::<f64>()).ln()).sqrt();
    radius * (std::f64::consts::TAU * rng.random::<f64>()).cos()
}

fn draw(rng: &mut ChaCha8Rng, values: Values, key: bool) -> f64 {
    let x = normal(rng);
    let x = match values {
        Values::Centered => x,
        Values::Shifted => x + 3.0,
        Values::HeavyTails if rng.random_bool(0.01) => 100.0 * x,
        Values::HeavyTails => x,
        Values::Huge if key => 300.0 * x,
        Values::Tiny if key => 1e-6 * x,
        Values::Huge | Values::Tiny => x,
    };
    f64::from(x as f32)
}

impl Case<f64> {
    /// A case whose queries are all rows of the segment.
    pub fn new(shape: &Shape) -> Self {
        Case::starting_at(shape, None)
    }

    /// A case whose queries are the rows from `query_start` on.
    pub fn starting_at(shape: &Shape, query_start: Option<Vec<i32>>) -> Self {
        let start = |b: usize| query_start.as_ref().map_or(0, |start| start[b]);
        let query_len = |b: usize| shape.segment_len[b] - start(b);
        let mut rng = ChaCha8Rng::seed_from_u64(shape.seed);
        let (batch, spare) = (shape.batch(), shape.spare_rows);
        let (q_heads, kv_heads, head_dim) = (shape.q_heads(), shape.kv_heads, shape.head_dim);
        let past_len = |b: usize, g: usize| {
            shape.past_len[if shape.past_len.len() == batch {
                b
            } else {
                b * kv_heads + g
            }]
        };
        let mut tensor = |heads: usize, len: &dyn Fn(usize, usize) -> i32, key: bool| {
            let lens = (0..batch).flat_map(|b| (0..heads).map(move |g| len(b, g)));
            let rows = lens.max().unwrap_or(0) as usize + spare;
            let mut tensor =
                Tensor::new([batch, rows, heads, head_dim], shape.arrangement, f64::NAN);
            for b in 0..batch {
                for g in 0..heads {
                    for row in 0..len(b, g) as usize {
                        let row = tensor.row_mut(b, row, g);
                        row.fill_with(|| draw(&mut rng, shape.values, key));
                    }
                }
            }
            tensor
        };
        let q = tensor(q_heads, &|b, _| query_len(b), false);
        let k = tensor(kv_heads, &|b, _| shape.segment_len[b], true);
        let mut v = tensor(kv_heads, &|b, _| shape.segment_len[b], false);
        let prior_k = tensor(kv_heads, &|b, _| shape.prior_len[b], true);
        let mut prior_v = tensor(kv_heads, &|b, _| shape.prior_len[b], false);
        let past_k = tensor(kv_heads, &past_len, true);
        let mut past_v = tensor(kv_heads, &past_len, false);
        if shape.arrangement == Arrangement::SharedValues {
            for values in [&mut v, &mut prior_v, &mut past_v] {
                values.share_heads();
            }
        }
        let d_out = tensor(q_heads, &|b, _| query_len(b), false);
        let without = |tensor: Tensor<f64>, wanted: bool, len: &dyn Fn(usize) -> i32| match wanted {
            true => {
                let rows = (0..batch).map(|b| len(b) as usize).collect();
                tensor.without_padding(rows, f64::NAN)
            }
            false => tensor,
        };
        let keys = shape.arrangement == Arrangement::RaggedKeys;
        let queries = keys || shape.arrangement == Arrangement::Ragged;
        let [q, d_out] = [q, d_out].map(|tensor| without(tensor, queries, &query_len));
        let [k, v] = [k, v].map(|tensor| without(tensor, keys, &|b| shape.segment_len[b]));
        let mut d_lse = vec![f64::NAN; q.numbers()];
        for b in 0..batch {
            for h in 0..q_heads {
                let start = q.first_number(b, h);
                d_lse[start..start + query_len(b) as usize]
                    .fill_with(|| draw(&mut rng, Values::Centered, false));
            }
        }
        Case {
            shape: shape.clone(),
            query_start,
            q,
            k,
            v,
            prior_k,
            prior_v,
            past_k,
            past_v,
            d_out,
            d_lse,
        }
    }

    /// The same numbers as a batch of parts: a batch element, and the rows whose queries are asked for. Packed, with a
    /// row of padding in every tensor.
    pub fn excerpt(&self, parts: &[(usize, Range<usize>)]) -> Case<f64> {
        let shape = &self.shape;
        let width = |all: &[i32]| all.len() / shape.batch().max(1);
        let pick = |all: &[i32], width: usize| -> Vec<i32> {
            let of = |(batch_index, _): &(usize, _)| {
                all[batch_index * width..(batch_index + 1) * width].to_vec()
            };
            parts.iter().flat_map(of).collect()
        };
        let excerpt = Shape {
            // As when the last row asked for is the newest there is.
            segment_len: parts.iter().map(|(_, rows)| rows.end as i32).collect(),
            prior_len: pick(&shape.prior_len, 1),
            past_len: pick(&shape.past_len, width(&shape.past_len)),
            sink_len: pick(&shape.sink_len, width(&shape.sink_len)),
            arrangement: Arrangement::Packed,
            spare_rows: 1,
            ..shape.clone()
        };
        let starts: Vec<i32> = parts.iter().map(|(_, rows)| rows.start as i32).collect();
        let starts = starts.iter().any(|&start| start > 0).then_some(starts);
        let mut case = Case::starting_at(&excerpt, starts);
        for (i, &(batch_index, ref rows)) in parts.iter().enumerate() {
            let queries = rows.start;
            copy_entry(&mut case.q, i, &self.q, batch_index, queries);
            copy_entry(&mut case.d_out, i, &self.d_out, batch_index, queries);
            for (to, from) in [
                (&mut case.k, &self.k),
                (&mut case.v, &self.v),
                (&mut case.prior_k, &self.prior_k),
                (&mut case.prior_v, &self.prior_v),
                (&mut case.past_k, &self.past_k),
                (&mut case.past_v, &self.past_v),
            ] {
                copy_entry(to, i, from, batch_index, 0);
            }
        }
        case
    }

    pub fn to_f32(&self) -> Case<f32> {
        let narrow = |tensor: &Tensor<f64>| tensor.map(|x| x as f32);
        Case {
            shape: self.shape.clone(),
            query_start: self.query_start.clone(),
            q: narrow(&self.q),
            k: narrow(&self.k),
            v: narrow(&self.v),
            prior_k: narrow(&self.prior_k),
            prior_v: narrow(&self.prior_v),
            past_k: narrow(&self.past_k),
            past_v: narrow(&self.past_v),
            d_out: narrow(&self.d_out),
            d_lse: self.d_lse.iter().map(|&x| x as f32).collect(),
        }
    }
}

/// Copies rows of a batch element, from row `first` on, over the numbers of another tensor's; its NaN stay.
fn copy_entry(
    to: &mut Tensor<f64>,
    at: usize,
    from: &Tensor<f64>,
    batch_index: usize,
    first: usize,
) {
    let [_, rows, heads, _] = to.shape;
    for (row, head) in (0..rows).flat_map(|row| (0..heads).map(move |head| (row, head))) {
        if !to.row(at, row, head)[0].is_nan() {
            let source = from.row(batch_index, first + row, head).to_vec();
            to.row_mut(at, row, head).copy_from_slice(&source);
        }
    }
}

impl<T: Copy> Case<T> {
    pub fn problem(&self) -> HostProblem<'_, T> {
        self.problem_of(|_, tensor| tensor.view())
    }

    /// The case's problem, given each tensor.
    pub fn problem_of<'a, X>(
        &'a self,
        mut tensor: impl FnMut(&'static str, &'a Tensor<T>) -> X,
    ) -> Problem<'a, X> {
        let shape = &self.shape;
        let (q, k, v) = (
            tensor("q", &self.q),
            tensor("k", &self.k),
            tensor("v", &self.v),
        );
        let (prior_k, prior_v) = (
            tensor("prior_k", &self.prior_k),
            tensor("prior_v", &self.prior_v),
        );
        let (past_k, past_v) = (
            tensor("past_k", &self.past_k),
            tensor("past_v", &self.past_v),
        );
        let lengths = Lengths::segment(&shape.segment_len).prior(&shape.prior_len);
        let lengths = match shape.past_len.len() {
            len if len == shape.batch() => lengths.past(&shape.past_len),
            _ => lengths.past_per_head(&shape.past_len),
        };
        let lengths = match shape.sink_len.len() {
            0 => lengths,
            len if len == shape.batch() => lengths.sinks(&shape.sink_len),
            _ => lengths.sinks_per_head(&shape.sink_len),
        };
        Problem::causal(q, k, v)
            .prior(prior_k, prior_v, &shape.prior_heads)
            .past(past_k, past_v, &shape.past_gate)
            .lengths(Lengths {
                query_start: self.query_start.as_ref().map(Len::from),
                ..lengths
            })
            .scale(shape.scale)
    }

    /// What the backward pass of a case reads besides its problem.
    pub fn saved<'a>(&'a self, forward: &'a Forward<T>, with_d_lse: bool) -> HostSaved<'a, T> {
        Saved {
            out: forward.out.view(),
            lse: &forward.lse,
            d_out: self.d_out.view(),
            d_lse: with_d_lse.then_some(&self.d_lse),
        }
    }
}

/// Outputs of a forward pass.
#[derive(Debug, Clone)]
pub struct Forward<T> {
    pub out: Tensor<T>,
    pub lse: Vec<T>,
}

impl<T: Copy> Forward<T> {
    /// Outputs for `case`, filled with `nan`.
    pub fn for_case(case: &Case<T>, nan: T) -> Self {
        let out = match case.q.is_ragged() {
            true => case.q.map(|_| nan),
            false => Tensor::new(case.q.shape, case.shape.arrangement, nan),
        };
        Forward {
            out,
            lse: vec![nan; case.q.numbers()],
        }
    }
}

/// Outputs of a backward pass.
#[derive(Debug, Clone)]
pub struct Backward<T> {
    pub d_q: Tensor<T>,
    pub d_k: Tensor<T>,
    pub d_v: Tensor<T>,
    pub d_prior: Option<(Tensor<T>, Tensor<T>)>,
    pub d_past_gate: Vec<T>,
}

impl<T: Copy> Backward<T> {
    /// Gradients for `case`, filled with `nan`.
    pub fn for_case(case: &Case<T>, nan: T, read_only_prior: bool) -> Self {
        let like = |tensor: &Tensor<T>| tensor.map(|_| nan);
        let of_keys = |tensor: &Tensor<T>| match case.q.is_ragged() {
            true => {
                let rows: Vec<usize> = (0..case.shape.batch()).map(|b| case.q.rows_of(b)).collect();
                Tensor::ragged(&rows, [case.shape.kv_heads, case.shape.head_dim], nan)
            }
            false => like(tensor),
        };
        Backward {
            d_q: like(&case.q),
            d_k: of_keys(&case.k),
            d_v: of_keys(&case.v),
            d_prior: (!read_only_prior).then(|| (like(&case.prior_k), like(&case.prior_v))),
            d_past_gate: vec![nan; case.shape.batch() * case.shape.q_heads()],
        }
    }

    pub fn grads(&mut self) -> HostGradients<'_, T> {
        Gradients {
            d_q: self.d_q.view_mut(),
            d_k: self.d_k.view_mut(),
            d_v: self.d_v.view_mut(),
            d_prior: self
                .d_prior
                .as_mut()
                .map(|(k, v)| (k.view_mut(), v.view_mut())),
            d_past_gate: &mut self.d_past_gate,
        }
    }

    /// Names and elements of all gradients.
    pub fn parts(&self) -> Vec<(&'static str, Vec<T>)> {
        let mut parts = vec![
            ("d_q", self.d_q.elements()),
            ("d_k", self.d_k.elements()),
            ("d_v", self.d_v.elements()),
            ("d_past_gate", self.d_past_gate.clone()),
        ];
        if let Some((d_k, d_v)) = &self.d_prior {
            parts.extend([("d_prior_k", d_k.elements()), ("d_prior_v", d_v.elements())]);
        }
        parts
    }
}

/// Reference forward of a case.
pub fn reference_forward(case: &Case<f64>) -> Forward<f64> {
    let mut forward = Forward::for_case(case, f64::NAN);
    segattn::attention::reference::forward(
        &case.problem(),
        forward.out.view_mut(),
        &mut forward.lse,
    )
    .expect("a valid case");
    forward
}

/// Reference backward of a case.
pub fn reference_backward(
    case: &Case<f64>,
    forward: &Forward<f64>,
    with_d_lse: bool,
    read_only_prior: bool,
) -> Backward<f64> {
    let mut backward = Backward::for_case(case, f64::NAN, read_only_prior);
    segattn::attention::reference::backward(
        &case.problem(),
        &case.saved(forward, with_d_lse),
        backward.grads(),
    )
    .expect("a valid case");
    backward
}

/// Shapes with lengths drawn from `lengths` (each source also 0), and everything else at random.
pub fn shapes(
    lengths: impl Strategy<Value = i32> + Clone + 'static,
    head_dims: Vec<usize>,
    groups: Vec<usize>,
    values: Vec<Values>,
) -> impl Strategy<Value = Shape> {
    let sizes = (
        1..=3usize,
        1..=2usize,
        proptest::sample::select(groups),
        proptest::sample::select(head_dims),
        0..=2usize,
        any::<bool>(),
    );
    sizes.prop_flat_map(
        move |(batch, kv_heads, group, head_dim, spare_rows, per_head)| {
            use proptest::collection::vec;
            use proptest::sample::select;
            let q_heads = kv_heads * group;
            let source = prop_oneof![1 => Just(0), 3 => lengths.clone()];
            let past = if per_head { batch * kv_heads } else { batch };
            // Of each past length: none of it, all of it, or as many rows as there are up to a few.
            let sinks = prop_oneof![1 => Just(0), 1 => Just(i32::MAX), 3 => 1..=5i32];
            let sinks = proptest::option::of(vec(sinks, past));
            (
                vec(prop_oneof![1 => Just(0), 9 => lengths.clone()], batch),
                vec(source.clone(), batch),
                vec(source, past),
                vec(select(vec![0.0, 1.0, 0.25, 3.5, 1e-3]), q_heads),
                vec(any::<bool>(), q_heads),
                (select(vec![None, None, Some(0.25)]), sinks),
                select(vec![
                    Arrangement::Packed,
                    Arrangement::HeadsOutside,
                    Arrangement::BatchInside,
                    Arrangement::Offsets,
                ]),
                select(values.clone()),
                any::<u64>(),
            )
                .prop_map(move |drawn| {
                    let (segment_len, prior_len, past_len, past_gate, prior_heads, ..) =
                        drawn.clone();
                    let (.., (scale, sinks), arrangement, values, seed) = drawn;
                    let sink_len = sinks.map_or_else(Vec::new, |sinks| {
                        let least = |(sinks, rows): (&i32, &i32)| *sinks.min(rows);
                        sinks.iter().zip(&past_len).map(least).collect()
                    });
                    Shape {
                        kv_heads,
                        group,
                        head_dim,
                        spare_rows,
                        segment_len,
                        prior_len,
                        past_len,
                        sink_len,
                        past_gate,
                        prior_heads,
                        scale,
                        arrangement,
                        values,
                        seed,
                    }
                })
        },
    )
}
