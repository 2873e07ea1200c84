//! Backward pass. A pair of a query tile and a key tile takes five GEMMs (S, dP, dV, dK, dQ), or three where keys get
//! no gradient (past, read-only prior). Nothing is computed twice.
//!
//! Gradients are summed in place, in the order of [`super::schedule`]. A cell, such a pair, processes its query heads
//! one after another, so that a key tile is transposed once for all heads of the group.

use std::cell::RefCell;

use rayon::Scope;
use rayon::prelude::*;

use super::kernels::Kernels;
use super::schedule::Walks;
use super::shared::{SharedRows, SharedSlice};
use super::softmax::BackwardRows;
use super::tile::{Accumulate, KEYS, Rows, Scores};
use super::{past_bias, scale, source_rows};
use crate::attention::problem::{Gradients, HostGradients, HostProblem, HostSaved};
use crate::attention::source::{Part, Source};

/// Query rows of a chunk, whose scores are in memory at a time.
const CHUNK: usize = 64;

/// Rows of a query tile and keys of a cell: enough arithmetic to amortize the transposition of the keys.
fn tile_rows(group: usize) -> usize {
    if group == 1 { 2 * CHUNK } else { CHUNK }
}

/// Writes all gradients of a validated problem.
pub(super) fn run(
    problem: &HostProblem<'_, f32>,
    saved: &HostSaved<'_, f32>,
    grads: HostGradients<'_, f32>,
    kernels: &Kernels,
) {
    let Gradients {
        d_q,
        d_k,
        d_v,
        d_prior,
        d_past_gate,
    } = grads;
    let d_q = SharedRows::new(d_q);
    let current = [d_k, d_v].map(SharedRows::new);
    let prior = d_prior.map(|(d_k, d_v)| [d_k, d_v].map(SharedRows::new));
    clear(&d_q);
    current.iter().chain(prior.iter().flatten()).for_each(clear);
    let q_heads = problem.q_heads();
    let any_past = (0..q_heads).any(|head| problem.reads(Source::Past, head));
    let summed = if any_past { problem.all_rows() } else { 0 };
    let mut sums = [(); 2].map(|()| vec![[0.0; 2]; q_heads * summed]);
    let [others, past] = &mut sums;
    let delta = deltas(problem, saved, kernels);
    let pass = Pass {
        problem,
        saved,
        kernels,
        delta: &delta,
        d_q: &d_q,
        current: &current,
        prior: prior.as_ref(),
        sums: [SharedSlice::new(others), SharedSlice::new(past)],
    };
    pass.run();
    for (idx, d_gate) in d_past_gate.iter_mut().enumerate() {
        let (batch_index, head) = (idx / q_heads, idx % q_heads);
        let gate = problem.gate(head);
        let rows = match any_past {
            true => problem.rows_of(batch_index),
            false => 0,
        };
        let first = problem.row_index([batch_index, 0, head]);
        let sum: f64 = (first..first + rows)
            .map(|row| {
                let d_lse = saved.d_lse.map_or(0.0, |d_lse| f64::from(d_lse[row]));
                past_gradient(sums[0][row], sums[1][row], d_lse)
            })
            .sum();
        *d_gate = if gate > 0.0 {
            (sum / f64::from(gate)) as f32
        } else {
            0.0
        };
    }
}

/// The sum of a row's score gradients over gated keys, from the sums of `p` and `p * dp` over the other keys and over
/// these. `sum of p * (dp - delta)` cancels where the past has nearly all the weight; here what cancels is left out.
fn past_gradient([p0, pd0]: [f64; 2], [p1, pd1]: [f64; 2], d_lse: f64) -> f64 {
    if p1 == 0.0 {
        return 0.0;
    }
    let all = p0 + p1;
    (pd1 * p0 - pd0 * p1) / (all * all) + p1 / all * d_lse
}

fn clear(view: &SharedRows<'_>) {
    let layout = view.layout();
    (0..layout.batch.len())
        .into_par_iter()
        .flat_map(|batch_index| {
            let rows = 0..layout.rows_of(batch_index);
            rows.into_par_iter().map(move |row| (batch_index, row))
        })
        .for_each(|(batch_index, row)| {
            for head in 0..layout.heads {
                // SAFETY: each row is one iteration's only.
                unsafe { view.row([batch_index, row, head]) }.fill(0.0);
            }
        });
}

/// `d_out . out - d_lse` of every valid query row, `[batch, q_heads, rows]`.
fn deltas(
    problem: &HostProblem<'_, f32>,
    saved: &HostSaved<'_, f32>,
    kernels: &Kernels,
) -> Vec<f32> {
    let q_heads = problem.q_heads();
    let mut delta = vec![0.0; problem.all_rows() * q_heads];
    let all = SharedSlice::new(&mut delta);
    (0..problem.batch() * q_heads)
        .into_par_iter()
        .for_each(|idx| {
            let (batch_index, head) = (idx / q_heads, idx % q_heads);
            let valid = problem.query_rows(batch_index);
            if valid == 0 {
                return;
            }
            let first = problem.row_index([batch_index, 0, head]);
            // SAFETY: the rows of this head are this iteration's only.
            let delta = unsafe { all.part(first, valid) };
            let [d_out, out] =
                [saved.d_out, saved.out].map(|t| source_rows(&t, [batch_index, 0, head]));
            kernels.dots(d_out, out, problem.head_dim(), delta);
            if let Some(d_lse) = saved.d_lse {
                for (delta, d_lse) in delta.iter_mut().zip(&d_lse[first..]) {
                    *delta -= d_lse;
                }
            }
        });
    delta
}

/// State shared by all tasks of a backward pass.
struct Pass<'a> {
    problem: &'a HostProblem<'a, f32>,
    saved: &'a HostSaved<'a, f32>,
    kernels: &'a Kernels,
    /// `[batch, q_heads, rows]`.
    delta: &'a [f32],
    d_q: &'a SharedRows<'a>,
    /// Gradients of keys and values.
    current: &'a [SharedRows<'a>; 2],
    prior: Option<&'a [SharedRows<'a>; 2]>,
    /// `[batch, q_heads, rows]`, over keys that are not past, and over past keys: sums of `p` and `p * dp`.
    sums: [SharedSlice<'a, [f64; 2]>; 2],
}

/// One KV head of one batch element.
struct Head {
    batch_index: usize,
    kv_head: usize,
    walks: Walks,
    prior_tiles: usize,
}

/// Up to [`KEYS`] keys of a part of the keys.
#[derive(Clone, Copy)]
struct KeyTile {
    part: Part,
    /// In the rows of its source.
    first: usize,
    count: usize,
}

/// Up to [`CHUNK`] query rows of one query head.
#[derive(Clone, Copy)]
struct Chunk {
    q_head: usize,
    first: usize,
    rows: usize,
}

impl Pass<'_> {
    fn run(&self) {
        let problem = self.problem;
        let kv_heads = problem.kv_heads();
        let heads: Vec<Head> = (0..problem.batch() * kv_heads)
            .map(|idx| self.head(idx / kv_heads, idx % kv_heads))
            .collect();
        rayon::scope(|scope| {
            for head in &heads {
                for walk in 0..self.query_tiles(head.batch_index) {
                    scope.spawn(move |scope| self.walk(scope, head, walk));
                }
            }
        });
    }

    fn query_tiles(&self, batch_index: usize) -> usize {
        let rows = self.problem.query_rows(batch_index);
        rows.div_ceil(tile_rows(self.problem.group()))
    }

    fn head(&self, batch_index: usize, kv_head: usize) -> Head {
        let (problem, group) = (self.problem, self.problem.group());
        let read = (0..group).any(|h| problem.reads(Source::Prior, kv_head * group + h));
        let prior_tiles = match self.prior {
            Some(_) if read => problem
                .source_rows(Source::Prior, batch_index, kv_head)
                .div_ceil(tile_rows(group)),
            _ => 0,
        };
        Head {
            batch_index,
            kv_head,
            walks: Walks::new(self.query_tiles(batch_index), prior_tiles),
            prior_tiles,
        }
    }

    /// Runs the steps of a query tile until it has to wait for the tile before it.
    fn walk<'s>(&'s self, scope: &Scope<'s>, head: &'s Head, walk: usize) {
        while let Some(step) = head.walks.next(walk) {
            self.with_cell(head, walk, |cell| cell.step(step));
            if let Some(next) = head.walks.finish(walk) {
                scope.spawn(move |scope| self.walk(scope, head, next));
            }
            if step + 1 == head.walks.steps(walk) {
                self.with_cell(head, walk, |cell| cell.read_only());
                return;
            }
        }
    }

    fn with_cell(&self, head: &Head, walk: usize, f: impl FnOnce(&mut Cell<'_>)) {
        SCRATCH.with_borrow_mut(|scratch| {
            scratch.reserve(self.problem.head_dim());
            f(&mut Cell {
                pass: self,
                head,
                walk,
                scratch,
            });
        });
    }
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Scratch memory of a cell, reused by the next cell of the thread.
#[derive(Default)]
struct Scratch {
    /// Keys and values of a tile, transposed.
    keys: [Vec<f32>; 2],
    /// Scores and their gradients of a chunk.
    s: Vec<f32>,
    ds: Vec<f32>,
}

impl Scratch {
    fn reserve(&mut self, head_dim: usize) {
        for keys in &mut self.keys {
            if keys.len() < head_dim * KEYS {
                keys.resize(head_dim * KEYS, 0.0);
            }
        }
        self.s.resize(CHUNK * KEYS, 0.0);
        self.ds.resize(CHUNK * KEYS, 0.0);
    }
}

/// A query tile at one step.
struct Cell<'a> {
    pass: &'a Pass<'a>,
    head: &'a Head,
    walk: usize,
    scratch: &'a mut Scratch,
}

impl Cell<'_> {
    /// The keys of one step, in descending order of tiles.
    fn step(&mut self, step: usize) {
        let tile = tile_rows(self.pass.problem.group());
        if step <= self.walk {
            self.keys(Part::Current, (self.walk - step) * tile, tile, true);
        } else {
            let column = self.head.prior_tiles - (step - self.walk);
            self.keys(Part::Prior, column * tile, tile, true);
        }
    }

    /// The keys that get no gradient.
    fn read_only(&mut self) {
        if self.pass.prior.is_none() {
            self.keys(Part::Prior, 0, usize::MAX, false);
        }
        self.keys(Part::Gated, 0, usize::MAX, false);
        self.keys(Part::Sinks, 0, usize::MAX, false);
    }

    /// At most `most` keys of a part from its row `first` on.
    fn keys(&mut self, part: Part, first: usize, most: usize, key_grads: bool) {
        let (problem, group) = (self.pass.problem, self.pass.problem.group());
        let (batch_index, kv_head) = (self.head.batch_index, self.head.kv_head);
        let is_read = (0..group).any(|h| problem.reads_part(part, kv_head * group + h));
        let Some([k, v]) = problem.source(part.source()).filter(|_| is_read) else {
            return;
        };
        let rows = problem.part_rows(part, batch_index, kv_head);
        let first = rows.start + first;
        let end = first.saturating_add(most).min(rows.end);
        for first in (first..end).step_by(KEYS).rev() {
            let keys = KeyTile {
                part,
                first,
                count: KEYS.min(end - first),
            };
            let rows = [k, v].map(|view| source_rows(view, [batch_index, first, kv_head]));
            for (to, rows) in self.scratch.keys.iter_mut().zip(rows) {
                let kernels = self.pass.kernels;
                kernels.transpose(rows, keys.count, problem.head_dim(), to);
            }
            self.chunks(keys, rows[0], key_grads);
        }
    }

    fn chunks(&mut self, keys: KeyTile, k: Rows<'_>, key_grads: bool) {
        let problem = self.pass.problem;
        let tile = tile_rows(problem.group());
        let valid = problem.query_rows(self.head.batch_index);
        let tile = self.walk * tile..((self.walk + 1) * tile).min(valid);
        for h in 0..problem.group() {
            let q_head = self.head.kv_head * problem.group() + h;
            if !problem.reads_part(keys.part, q_head) {
                continue;
            }
            for first in tile.clone().step_by(CHUNK) {
                let rows = CHUNK.min(tile.end - first);
                // Rows before the first key see none of them.
                if keys.part != Part::Current || first + rows > keys.first {
                    let chunk = Chunk {
                        q_head,
                        first,
                        rows,
                    };
                    self.chunk(keys, k, chunk, key_grads);
                }
            }
        }
    }

    /// Number of keys that a row of the chunk sees.
    fn seen(keys: KeyTile, chunk: Chunk, row: usize) -> usize {
        match keys.part {
            Part::Current => (chunk.first + row + 1)
                .saturating_sub(keys.first)
                .min(keys.count),
            Part::Sinks | Part::Gated | Part::Prior => keys.count,
        }
    }

    fn chunk(&mut self, keys: KeyTile, k: Rows<'_>, chunk: Chunk, key_grads: bool) {
        let Pass {
            problem,
            saved,
            kernels,
            ..
        } = *self.pass;
        let (batch_index, head_dim) = (self.head.batch_index, problem.head_dim());
        let mut counts = [0; CHUNK];
        let mut spans = [[0; 2]; CHUNK];
        for row in 0..chunk.rows {
            counts[row] = Self::seen(keys, chunk, row);
            spans[row] = [0, counts[row]];
        }
        let counts = &counts[..chunk.rows];
        let at = [batch_index, chunk.first, chunk.q_head];
        let q = source_rows(&problem.q, at);
        let d_out = source_rows(&saved.d_out, at);
        let Scratch { keys: kv, s, ds } = &mut *self.scratch;
        for (a, keys, s) in [(q, &kv[0], &mut *s), (d_out, &kv[1], &mut *ds)] {
            kernels.scores(Scores {
                a,
                keys,
                counts,
                head_dim,
                s,
            });
        }
        let lse = problem.row_index([batch_index, chunk.first, chunk.q_head]);
        let past = keys.part == Part::Gated;
        let (first, count) = match problem.reads(Source::Past, chunk.q_head) {
            true => (lse, chunk.rows),
            false => (0, 0),
        };
        // SAFETY: these rows of this head are this walk's only.
        let sums = unsafe { self.pass.sums[usize::from(past)].part(first, count) };
        let rows = BackwardRows {
            scale: scale(problem),
            bias: past_bias(problem, keys.part, chunk.q_head),
            counts,
            lse: &saved.lse[lse..][..chunk.rows],
            delta: &self.pass.delta[lse..][..chunk.rows],
            sums,
        };
        kernels.score_gradients(s, ds, rows);
        if key_grads {
            self.key_grads(keys, chunk, q, d_out);
        }
        let accumulate = Accumulate {
            c: self.pass.d_q.pointer(at, chunk.rows),
            c_stride: self.pass.d_q.row_stride(),
            alpha: None,
            w: &self.scratch.ds,
            w_row: KEYS,
            w_step: 1,
            spans: &spans[..chunk.rows],
            b: k,
            head_dim,
        };
        // SAFETY: these rows of this head are this walk's only, and walks do not overlap themselves.
        unsafe { kernels.accumulate(accumulate) };
    }

    /// `d_k += ds^T q`, `d_v += p^T d_out`.
    fn key_grads(&mut self, keys: KeyTile, chunk: Chunk, q: Rows<'_>, d_out: Rows<'_>) {
        let pass = self.pass;
        let grads = match (keys.part, pass.prior) {
            (Part::Current, _) => pass.current,
            (Part::Prior, Some(prior)) => prior,
            (Part::Prior, None) | (Part::Sinks | Part::Gated, _) => return,
        };
        let mut spans = [[0, chunk.rows]; KEYS];
        if keys.part == Part::Current {
            for (key, span) in spans.iter_mut().enumerate() {
                span[0] = (keys.first + key)
                    .saturating_sub(chunk.first)
                    .min(chunk.rows);
            }
        }
        let at = [self.head.batch_index, keys.first, self.head.kv_head];
        let Scratch { s, ds, .. } = &*self.scratch;
        for (grads, w, b) in [(&grads[0], ds, q), (&grads[1], s, d_out)] {
            let accumulate = Accumulate {
                c: grads.pointer(at, keys.count),
                c_stride: grads.row_stride(),
                alpha: None,
                w,
                w_row: 1,
                w_step: KEYS,
                spans: &spans[..keys.count],
                b,
                head_dim: pass.problem.head_dim(),
            };
            // SAFETY: the schedule lets one walk at a time add to a column of keys.
            unsafe { pass.kernels.accumulate(accumulate) };
        }
    }
}
