//! Forward pass: one task per batch element, KV head and tile of query rows.
//!
//! A task holds the rows of all query heads of its group. So a key tile is read and transposed once for all of them,
//! and even one row of decoding fills the registers. The task processes the tiles of the past, the prior and the
//! current source in this order, with an online softmax and without a score matrix. The number of rows of a task does
//! not change bits (see [`super::tile`]).
//!
//! Decoding is bound by memory, where the heads of a row are adjacent. So a decoding task takes several KV heads, key
//! tile by key tile, and reads memory in order.

use std::cell::RefCell;
use std::ops::Range;

use rayon::prelude::*;

use super::kernels::Kernels;
use super::shared::{SharedRows, SharedSlice};
use super::simd::LANES;
use super::softmax::{Affine, Softmax, pairwise_sum};
use super::tile::{Accumulate, KEYS, Rows, Scores};
use super::{head_runs, past_bias, scale, source_rows};
use crate::attention::problem::HostProblem;
use crate::attention::source::Part;

/// Rows of a task over all heads of the group. Scores, queries and outputs stay in the L2 cache, and the transposition
/// of a key tile costs a thirtieth of its GEMMs.
const TASK_ROWS: usize = 128;
/// Smallest rows of a task, used when there are too few tasks for all threads.
const LEAST_TASK_ROWS: usize = 16;
/// Tasks per thread, for load balance among tasks of different lengths.
const TASKS_PER_THREAD: usize = 4;

/// Writes `out` and `lse` of a validated problem.
pub(super) fn run(
    problem: &HostProblem<'_, f32>,
    out: &SharedRows<'_>,
    lse: &SharedSlice<'_, f32>,
    kernels: &Kernels,
) {
    let tasks = Tasks::new(problem);
    (0..tasks.count())
        .into_par_iter()
        .with_max_len(1)
        .for_each(|idx| {
            let (batch_index, kv_heads, rows) = tasks.get(idx);
            let end = rows.end.min(problem.query_rows(batch_index));
            SCRATCH.with_borrow_mut(|scratch| {
                if scratch.len() < kv_heads.len() {
                    scratch.resize_with(kv_heads.len(), Scratch::default);
                }
                let head = |(kv_head, scratch): (usize, _)| Head {
                    problem,
                    kernels,
                    batch_index,
                    kv_head,
                    first: rows.start,
                    valid: end.saturating_sub(rows.start),
                    scratch,
                };
                let mut heads: Vec<Head<'_>> = kv_heads.zip(scratch).map(head).collect();
                run_task(&mut heads, rows.len(), out, lse);
            });
        });
}

/// All keys of the task's heads, tile by tile.
fn run_task(heads: &mut [Head<'_>], rows: usize, out: &SharedRows<'_>, lse: &SharedSlice<'_, f32>) {
    heads.iter_mut().for_each(|head| head.load(rows));
    for part in Part::ALL {
        let lens = heads.iter_mut().map(|head| head.open(part));
        let longest = lens.max().unwrap_or(0);
        for first_key in (0..longest).step_by(KEYS) {
            for head in &mut *heads {
                head.read(part, first_key);
            }
        }
    }
    heads.iter().for_each(|head| head.write(rows, out, lse));
}

/// Division of a problem's query rows into tasks: batch element, KV heads, range of rows.
struct Tasks {
    /// Rows of each batch element.
    rows: Vec<usize>,
    tile: usize,
    /// Tiles of rows of the batch elements before each, and at last of all.
    tiles: Vec<usize>,
    kv_heads: usize,
    /// Number of groups of KV heads.
    parts: usize,
}

impl Tasks {
    fn new(problem: &HostProblem<'_, f32>) -> Self {
        let rows: Vec<usize> = (0..problem.batch()).map(|b| problem.rows_of(b)).collect();
        let tiles_of = |tile: usize| rows.iter().map(|rows| rows.div_ceil(tile)).sum::<usize>();
        let wanted = TASKS_PER_THREAD * rayon::current_num_threads();
        let mut task_rows = TASK_ROWS;
        let tile = |task_rows: usize| (task_rows / problem.group()).max(1);
        while task_rows > LEAST_TASK_ROWS && problem.kv_heads() * tiles_of(tile(task_rows)) < wanted
        {
            task_rows /= 2;
        }
        let tile = tile(task_rows);
        let parts = if problem.rows() * problem.group() <= LEAST_TASK_ROWS {
            let threads = rayon::current_num_threads();
            threads
                .div_ceil(problem.batch().max(1))
                .min(problem.kv_heads())
        } else {
            problem.kv_heads()
        };
        let mut tiles = vec![0];
        for rows in &rows {
            tiles.push(tiles[tiles.len() - 1] + rows.div_ceil(tile));
        }
        Tasks {
            rows,
            tile,
            tiles,
            kv_heads: problem.kv_heads(),
            parts,
        }
    }

    fn count(&self) -> usize {
        self.parts * self.tiles[self.rows.len()]
    }

    /// The last rows of a head come first, because they see the most keys.
    fn get(&self, idx: usize) -> (usize, Range<usize>, Range<usize>) {
        let before = |batch_index: usize| self.tiles[batch_index] * self.parts;
        let batch_index = (1..self.rows.len())
            .find(|&next| idx < before(next))
            .unwrap_or(self.rows.len())
            - 1;
        let idx = idx - before(batch_index);
        let tiles = self.tiles[batch_index + 1] - self.tiles[batch_index];
        let (first, part) = ((tiles - 1 - idx % tiles) * self.tile, idx / tiles);
        let kv_heads = self.kv_heads * part / self.parts..self.kv_heads * (part + 1) / self.parts;
        (
            batch_index,
            kv_heads,
            first..self.rows[batch_index].min(first + self.tile),
        )
    }
}

thread_local! {
    static SCRATCH: RefCell<Vec<Scratch>> = RefCell::default();
}

/// Scratch memory of one KV head of a task, reused by the next task of the thread.
#[derive(Default)]
struct Scratch {
    q: Vec<f32>,
    out: Vec<f32>,
    scores: Vec<f32>,
    keys: Vec<f32>,
    max: Vec<f32>,
    sum: Vec<[f32; LANES]>,
    alpha: Vec<f32>,
    bias: Vec<f32>,
    counts: Vec<usize>,
    spans: Vec<[usize; 2]>,
    /// For the current part of the keys: its first row in its source, its rows, and the heads of the group that read
    /// it.
    first: usize,
    len: usize,
    runs: Vec<Range<usize>>,
}

impl Scratch {
    fn reserve(&mut self, rows: usize, head_dim: usize) {
        grow(&mut self.q, rows * head_dim, 0.0);
        grow(&mut self.out, rows * head_dim, 0.0);
        grow(&mut self.scores, rows * KEYS, 0.0);
        grow(&mut self.keys, head_dim * KEYS, 0.0);
        grow(&mut self.max, rows, 0.0);
        grow(&mut self.sum, rows, [0.0; LANES]);
        grow(&mut self.alpha, rows.next_multiple_of(LANES), 0.0);
        grow(&mut self.bias, rows, 0.0);
        grow(&mut self.counts, rows, 0);
        grow(&mut self.spans, rows, [0; 2]);
    }
}

fn grow<T: Clone>(vec: &mut Vec<T>, len: usize, value: T) {
    if vec.len() < len {
        vec.resize(len, value);
    }
}

/// `valid` query rows from row `first` of one batch element, for each query head of one KV head. In the
/// scratch, row `r` of the group's head `h` is at `h * valid + r`.
struct Head<'a> {
    problem: &'a HostProblem<'a, f32>,
    kernels: &'a Kernels,
    batch_index: usize,
    kv_head: usize,
    first: usize,
    valid: usize,
    scratch: &'a mut Scratch,
}

impl Head<'_> {
    /// Packs the queries, and initializes the state of the softmax.
    fn load(&mut self, rows: usize) {
        let (group, head_dim) = (self.problem.group(), self.problem.head_dim());
        self.scratch.reserve(rows * group, head_dim);
        let slots = group * self.valid;
        for slot in 0..slots {
            let (head, row) = (slot / self.valid, slot % self.valid);
            let at = [
                self.batch_index,
                self.first + row,
                self.kv_head * group + head,
            ];
            let to = &mut self.scratch.q[slot * head_dim..][..head_dim];
            to.copy_from_slice(self.problem.q.row(at));
        }
        self.scratch.out[..slots * head_dim].fill(0.0);
        self.scratch.max[..slots].fill(f32::NEG_INFINITY);
        self.scratch.sum[..slots].fill([0.0; LANES]);
    }

    /// Begins a part of the keys. Returns the number of its keys that any row sees.
    fn open(&mut self, part: Part) -> usize {
        let problem = self.problem;
        let runs = head_runs(problem, part, self.kv_head);
        let rows = problem.part_rows(part, self.batch_index, self.kv_head);
        let mut len = rows.len();
        if part == Part::Current {
            len = len.min(self.position() + self.valid);
        }
        if self.valid == 0 || runs.is_empty() {
            len = 0;
        }
        for head in runs.iter().cloned().flatten() {
            let bias = past_bias(problem, part, self.kv_head * problem.group() + head);
            self.scratch.bias[head * self.valid..][..self.valid].fill(bias);
        }
        self.scratch.runs = runs;
        self.scratch.first = rows.start;
        self.scratch.len = len;
        len
    }

    /// Position of the first row in its segment.
    fn position(&self) -> usize {
        self.problem.query_start(self.batch_index) + self.first
    }

    /// Processes one tile of keys of the current part, from its `first_key` on.
    fn read(&mut self, part: Part, first_key: usize) {
        let (problem, position) = (self.problem, self.position());
        let count = KEYS.min(self.scratch.len.saturating_sub(first_key));
        let Some([k, v]) = problem.source(part.source()).filter(|_| count > 0) else {
            return;
        };
        let at = [
            self.batch_index,
            self.scratch.first + first_key,
            self.kv_head,
        ];
        let k = source_rows(k, at);
        self.kernels
            .transpose(k, count, problem.head_dim(), &mut self.scratch.keys);
        let v = source_rows(v, at);
        for run in 0..self.scratch.runs.len() {
            let run = self.scratch.runs[run].clone();
            let slots = run.start * self.valid..run.end * self.valid;
            for slot in slots.clone() {
                let seen = match part {
                    Part::Current => (position + slot % self.valid + 1)
                        .saturating_sub(first_key)
                        .min(count),
                    Part::Sinks | Part::Gated | Part::Prior => count,
                };
                self.scratch.counts[slot] = seen;
                self.scratch.spans[slot] = [0, seen];
            }
            self.tile(slots, v);
        }
    }

    /// Processes one tile of keys, transposed in the scratch memory, for some rows of the head.
    fn tile(&mut self, slots: Range<usize>, v: Rows<'_>) {
        let head_dim = self.problem.head_dim();
        let Scratch {
            q,
            out,
            scores,
            keys,
            max,
            sum,
            alpha,
            bias,
            counts,
            spans,
            ..
        } = &mut *self.scratch;
        let counts = &counts[slots.clone()];
        let elements = slots.start * head_dim..slots.end * head_dim;
        self.kernels.scores(Scores {
            a: Rows {
                data: &q[elements.clone()],
                stride: head_dim,
            },
            keys,
            counts,
            head_dim,
            s: scores,
        });
        let affine = Affine {
            scale: scale(self.problem),
            bias: &bias[slots.clone()],
        };
        let state = Softmax {
            max: &mut max[slots.clone()],
            sum: &mut sum[slots.clone()],
            alpha,
        };
        self.kernels.softmax(scores, counts, affine, state);
        let accumulate = Accumulate {
            c: out[elements].as_mut_ptr(),
            c_stride: head_dim,
            alpha: Some(alpha),
            w: scores,
            w_row: KEYS,
            w_step: 1,
            spans: &spans[slots],
            b: v,
            head_dim,
        };
        // SAFETY: one row of the scratch for each slot.
        unsafe { self.kernels.accumulate(accumulate) };
    }

    fn write(&self, rows: usize, out: &SharedRows<'_>, lse: &SharedSlice<'_, f32>) {
        let (group, head_dim) = (self.problem.group(), self.problem.head_dim());
        for head in 0..group {
            let q_head = self.kv_head * group + head;
            let lse_start = self
                .problem
                .row_index([self.batch_index, self.first, q_head]);
            // SAFETY: these rows of this head are this task's only, and taken once.
            let lse = unsafe { lse.part(lse_start, rows) };
            for (row, lse) in lse.iter_mut().enumerate() {
                // SAFETY: as above.
                let out = unsafe { out.row([self.batch_index, self.first + row, q_head]) };
                if row >= self.valid {
                    out.fill(0.0);
                    *lse = f32::NEG_INFINITY;
                    continue;
                }
                let slot = head * self.valid + row;
                let sum = pairwise_sum(self.scratch.sum[slot]);
                let inverse = 1.0 / sum;
                let from = &self.scratch.out[slot * head_dim..][..head_dim];
                for (to, from) in out.iter_mut().zip(from) {
                    *to = from * inverse;
                }
                *lse = self.scratch.max[slot] + sum.ln();
            }
        }
    }
}
