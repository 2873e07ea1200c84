//! The second rule of retrieval in `kernels/retrieval.cu` under every check: shares against f64, windows against the
//! contract's words.

use std::ops::Range;

use half::bf16;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use segattn::cuda::kernels::layer_params::{
    SegattnBestToken, SegattnPoolHead, SegattnRetrievalParams,
};
use segattn_sim::{Buffer, Gpu};

use super::common::*;

const KV_HEADS: usize = 3;
const GROUP: usize = 2;
/// The KV heads that read the past.
const HEADS: [usize; 2] = [2, 0];
const TILE: usize = 128;

#[derive(Clone, Copy)]
struct Case {
    dim: usize,
    tokens: usize,
    chunk_tokens: usize,
    queries: usize,
    first_query: usize,
    /// Tokens at the beginning, and at the end, that each of the heads may not select.
    sinks: [usize; 2],
    tail: [usize; 2],
    max_selected: usize,
    window_len: usize,
    window_before: usize,
    /// Keys from so many tokens on repeat those before, so that scores are equal.
    period: usize,
    /// Keys of the largest size, so that products and their sums overflow.
    huge: bool,
    /// No query has a negative element.
    positive: bool,
}

const CASE: Case = Case {
    dim: 64,
    tokens: 400,
    chunk_tokens: 90,
    queries: 5,
    first_query: 4,
    sinks: [0, 7],
    tail: [0, 135],
    max_selected: 40,
    window_len: 9,
    window_before: 4,
    period: usize::MAX,
    huge: false,
    positive: false,
};

struct Inputs {
    /// `[tokens, heads of the pool, dim]`.
    k: Vec<bf16>,
    /// `[queries, q_heads, dim]`.
    q: Vec<bf16>,
}

/// What one retrieval leaves of each head: lse of the probes, scores of the eligible tokens before and after windows
/// were taken, and the selected tokens.
struct Outputs {
    lse: [Vec<f32>; 2],
    scores: [Vec<f32>; 2],
    best: Vec<[u32; 2]>,
    left: [Vec<f32>; 2],
    selected: [Vec<i32>; 2],
}

impl Case {
    fn eligible(&self, head: usize) -> Range<usize> {
        self.sinks[head]..self.tokens - self.tail[head]
    }

    /// The first token of each tile with eligible tokens.
    fn first_tokens(&self, head: usize) -> impl Iterator<Item = usize> + use<> {
        let Range { start, end } = self.eligible(head);
        (start / TILE * TILE..end)
            .step_by(TILE)
            .filter(move |_| start < end)
    }

    fn tiles(&self) -> usize {
        (0..2)
            .map(|h| self.eligible(h).end)
            .max()
            .unwrap()
            .div_ceil(TILE)
    }

    fn inputs(&self) -> Inputs {
        let width = HEADS.len() * self.dim;
        let mut k = bf16_values(self.tokens * width, 1);
        if self.huge {
            let half = |column: usize| match column < self.dim / 2 {
                true => bf16::MAX,
                false => bf16::MIN,
            };
            let signed = |x: bf16| match x.to_f32() < 0.0 {
                true => bf16::MIN,
                false => bf16::MAX,
            };
            let largest = |(i, x): (usize, &mut bf16)| match i / self.dim % 7 {
                0 => *x = bf16::MAX,
                1 => *x = bf16::MIN,
                2 => *x = signed(*x),
                3 => *x = half(i % self.dim),
                _ => {}
            };
            k.iter_mut().enumerate().for_each(largest);
        }
        for token in self.period.min(self.tokens)..self.tokens {
            let first = token % self.period * width;
            k.copy_within(first..first + width, token * width);
        }
        let mut q = bf16_values(self.queries * KV_HEADS * GROUP * self.dim, 2);
        if self.positive {
            q.iter_mut()
                .for_each(|x| *x = bf16::from_f32(x.to_f32().abs()));
        }
        Inputs { k, q }
    }

    /// scale * probe . key of every probe and eligible token of a head, in f64.
    fn logits(&self, inputs: &Inputs, head: usize) -> Vec<Vec<f64>> {
        let row = |x: &[bf16], at: usize| wide(&x[at * self.dim..][..self.dim]);
        let probe = |i: usize| {
            let q_head = HEADS[head] * GROUP + i / self.queries;
            let q = row(&inputs.q, i % self.queries * KV_HEADS * GROUP + q_head);
            let logit = |token: usize| {
                let k = row(&inputs.k, token * HEADS.len() + head);
                let sum: f64 = q.iter().zip(k).map(|(q, k)| q * k).sum();
                sum / (self.dim as f64).sqrt()
            };
            self.eligible(head).map(logit).collect()
        };
        (0..GROUP * self.queries).map(probe).collect()
    }
}

fn lse(logits: &[f64]) -> f64 {
    let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    max + logits.iter().map(|s| (s - max).exp()).sum::<f64>().ln()
}

/// Writes the pool's keys into chunks, and returns the table of them.
fn chunks(gpu: &mut Gpu, case: &Case, inputs: &Inputs) -> Buffer {
    let len = case.chunk_tokens * HEADS.len() * case.dim;
    let mut table: Vec<u64> = Vec::new();
    for keys in inputs.k.chunks(len) {
        let chunk = gpu.alloc("keys", len * 2).expect("memory");
        gpu.write(chunk, 0, keys);
        table.extend([chunk.address() as u64, 0]);
    }
    gpu.input("chunks", &table).expect("memory")
}

/// A call's parameters, and the buffers that it writes.
struct Call<'a> {
    case: &'a Case,
    params: SegattnRetrievalParams,
    lse: Buffer,
    scores: Buffer,
    best: Buffer,
    selected: Buffer,
    count: Buffer,
}

fn call<'a>(gpu: &mut Gpu, case: &'a Case) -> Call<'a> {
    let inputs = case.inputs();
    let (tiles, probes, capacity) = (case.tiles(), GROUP * case.queries, case.queries + 2);
    let ring = Matrix::poisoned::<bf16>(gpu, "q", [capacity, KV_HEADS * GROUP * case.dim], 8);
    for (t, row) in inputs.q.chunks(ring.width).enumerate() {
        ring.write(gpu, (case.first_query + t) % capacity, row);
    }
    let chunks = chunks(gpu, case, &inputs);
    let heads: Vec<i32> = (0..HEADS.len())
        .flat_map(|h| {
            let Range { start, end } = case.eligible(h);
            [HEADS[h] as i32, start as i32, end as i32, 0]
        })
        .collect();
    assert_eq!(heads.len() * 4, HEADS.len() * size_of::<SegattnPoolHead>());
    let heads = gpu.input("heads", &heads).expect("memory");
    let pitch = case.tokens + 3;
    let mut alloc = |name: &str, count: usize| gpu.alloc(name, count * 4).expect("memory");
    let sums = alloc("sums", HEADS.len() * tiles * probes * 2);
    let lse = alloc("lse", HEADS.len() * probes);
    let scores = alloc("scores", HEADS.len() * pitch);
    let best = alloc("best", HEADS.len() * tiles * 2);
    let selected = alloc("selected", HEADS.len() * case.max_selected);
    let count = alloc("count", HEADS.len());
    assert_eq!(size_of::<SegattnBestToken>(), 8);
    let params = SegattnRetrievalParams {
        chunks: chunks.ptr(),
        head: heads.ptr(),
        q: ring.view(),
        k: NO_ROWS,
        v: NO_ROWS,
        probes: std::ptr::null_mut(),
        sums: sums.ptr(),
        lse: lse.ptr(),
        scores: scores.ptr(),
        best: best.ptr(),
        selected: selected.ptr(),
        selected_count: count.ptr(),
        unwanted: std::ptr::null_mut(),
        kept: std::ptr::null(),
        past_len: std::ptr::null_mut(),
        cos: std::ptr::null(),
        sin: std::ptr::null(),
        first_token: 0,
        chunk_tokens: case.chunk_tokens as i64,
        token: 0,
        rows: 0,
        score_pitch: pitch as i64,
        heads: HEADS.len() as i32,
        head_dim: case.dim as i32,
        group: GROUP as i32,
        windows: case.queries as i32,
        window: 0,
        stride: 0,
        first_query: (case.first_query % capacity) as i32,
        query_capacity: capacity as i32,
        block_len: 1,
        first_block: 0,
        blocks: 0,
        max_selected: case.max_selected as i32,
        tiles: tiles as i32,
        window_len: case.window_len as i32,
        window_before: case.window_before as i32,
        scale_log2: std::f32::consts::LOG2_E / (case.dim as f32).sqrt(),
        bits: 16,
        padding: 0,
    };
    Call {
        case,
        params,
        lse,
        scores,
        best,
        selected,
        count,
    }
}

impl Call<'_> {
    /// The scores of the eligible tokens.
    fn scores(&self, gpu: &mut Gpu) -> [Vec<f32>; 2] {
        let pitch = self.params.score_pitch as usize;
        [0, 1].map(|h| {
            let of = self.case.eligible(h);
            gpu.download_range(self.scores, (h * pitch + of.start) * 4, of.len())
        })
    }

    /// The best token of each tile with eligible tokens.
    fn best(&self, gpu: &mut Gpu) -> Vec<[u32; 2]> {
        let mut best = Vec::new();
        for h in 0..HEADS.len() {
            for first in self.case.first_tokens(h) {
                let at = (h * self.case.tiles() + first / TILE) * 8;
                let words = gpu.download_range::<u32>(self.best, at, 2);
                best.push([words[0], words[1]]);
            }
        }
        best
    }
}

fn run(seed: u64, case: &Case) -> Outputs {
    run_together(seed, &[*case]).remove(0)
}

/// Calls of one head size in the same launches.
fn run_together(seed: u64, cases: &[Case]) -> Vec<Outputs> {
    let (gpu, module) = (&mut gpu(seed), module("retrieval.cu"));
    let calls: Vec<Call<'_>> = cases.iter().map(|case| call(gpu, case)).collect();
    let params: Vec<SegattnRetrievalParams> = calls.iter().map(|call| call.params).collect();
    let most = |size: fn(&Case) -> usize| HEADS.len() * cases.iter().map(size).max().unwrap();
    let launch = |gpu: &mut Gpu, name: &str, blocks| retrieve(gpu, &module, name, blocks, &params);
    let by_dim = |name| format!("pool_{name}_bf16_d{}", cases[0].dim);
    launch(gpu, &by_dim("sums"), most(Case::tiles));
    launch(gpu, "pool_lse_f32", most(|case| GROUP * case.queries));
    launch(gpu, &by_dim("shares"), most(Case::tiles));
    let before: Vec<_> = calls
        .iter()
        .map(|call| (call.scores(gpu), call.best(gpu)))
        .collect();
    launch(gpu, "pool_windows_f32", HEADS.len());
    let outputs = calls.iter().zip(before).map(|(call, (scores, best))| {
        let (counts, most): (Vec<i32>, _) = (gpu.download(call.count), call.case.max_selected);
        let probes = GROUP * call.case.queries;
        Outputs {
            lse: [0, 1].map(|h| gpu.download_range(call.lse, h * probes * 4, probes)),
            scores,
            best,
            left: call.scores(gpu),
            selected: [0, 1]
                .map(|h| gpu.download_range(call.selected, h * most * 4, counts[h] as usize)),
        }
    });
    outputs.collect()
}

/// The contract's windows over given scores: which tokens they have.
fn windows(scores: &[f32], rows: usize, case: &Case) -> Vec<bool> {
    let (len, mut taken) = (scores.len(), vec![false; scores.len()]);
    let mut left = rows.min(len);
    while left > 0 {
        let open = (0..len).filter(|t| !taken[*t]).rev();
        let best = open
            .max_by(|a, b| scores[*a].total_cmp(&scores[*b]))
            .expect("a token");
        let width = case.window_len.min(left);
        let before = width * case.window_before / case.window_len;
        let mut begin = best.saturating_sub(before).min(len - width);
        let mut end = begin + width;
        while taken[begin..best].contains(&true) {
            begin += 1;
        }
        while taken[best..end].contains(&true) {
            end -= 1;
        }
        taken[begin..end].fill(true);
        left -= end - begin;
    }
    taken
}

fn check(case: &Case) {
    let (inputs, outputs) = (case.inputs(), run(1, case));
    let mut tile = outputs.best.iter();
    for h in 0..HEADS.len() {
        let (logits, eligible) = (case.logits(&inputs, h), case.eligible(h));
        let largest = logits
            .iter()
            .flatten()
            .fold(1.0, |m: f64, s| m.max(s.abs()));
        let close = |got: f32, exact: f64| {
            let got = f64::from(got) * std::f64::consts::LN_2;
            assert!(
                (got - exact).abs() < 1e-6 * largest,
                "{got}, {exact}, {largest}"
            );
        };
        if !eligible.is_empty() {
            let exact = logits.iter().map(|logits| lse(logits));
            outputs.lse[h]
                .iter()
                .zip(exact)
                .for_each(|(got, exact)| close(*got, exact));
        }
        for (i, got) in outputs.scores[h].iter().enumerate() {
            let shares = logits.iter().map(|logits| logits[i] - lse(logits));
            close(*got, shares.fold(f64::NEG_INFINITY, f64::max));
        }
        // The best token of each tile, the earlier of equal ones.
        for first in case.first_tokens(h) {
            let tokens = first.max(eligible.start)..eligible.end.min(first + TILE);
            let score = |token: &usize| outputs.scores[h][token - eligible.start];
            let best = tokens.rev().max_by(|a, b| score(a).total_cmp(&score(b)));
            let [_, got] = tile.next().expect("a tile");
            assert_eq!(Some(*got as usize), best);
        }
        let expected = windows(&outputs.scores[h], case.max_selected, case);
        let tokens = eligible.clone().zip(&expected).filter(|(_, taken)| **taken);
        let tokens: Vec<i32> = tokens.map(|(token, _)| token as i32).collect();
        assert_eq!(outputs.selected[h], tokens);
        // Only the scores of tokens in windows have changed, where not all were selected.
        for ((before, left), taken) in outputs.scores[h]
            .iter()
            .zip(&outputs.left[h])
            .zip(&expected)
        {
            let taken = *taken && tokens.len() < eligible.len();
            assert_eq!(*left, if taken { f32::NEG_INFINITY } else { *before });
        }
    }
}

#[test]
fn windows_follow_the_contract() {
    check(&CASE);
    // Equal scores; windows of one token; a window as long as all rows; heads that select all or have nothing.
    check(&Case {
        period: 13,
        window_len: 4,
        window_before: 1,
        ..CASE
    });
    check(&Case {
        window_len: 1,
        window_before: 0,
        dim: 32,
        ..CASE
    });
    check(&Case {
        window_len: 500,
        window_before: 499,
        dim: 96,
        max_selected: 61,
        ..CASE
    });
    check(&Case {
        max_selected: 300,
        tail: [0, 100],
        ..CASE
    });
    check(&Case {
        sinks: [130, 50],
        tail: [0, 350],
        ..CASE
    });
    // More probes than a tile of them; a single query; keys in one chunk, and in chunks of a few.
    check(&Case {
        queries: 13,
        dim: 128,
        chunk_tokens: 400,
        ..CASE
    });
    check(&Case {
        queries: 1,
        chunk_tokens: 3,
        dim: 256,
        tokens: 150,
        tail: [0, 20],
        ..CASE
    });
}

#[test]
fn scores_of_keys_of_any_size_are_finite() {
    let case = Case { huge: true, ..CASE };
    let outputs = run(1, &case);
    for h in 0..HEADS.len() {
        assert!(outputs.scores[h].iter().all(|score| score.is_finite()));
        let taken = windows(&outputs.scores[h], case.max_selected, &case);
        let tokens = case.eligible(h).zip(taken).filter(|(_, taken)| *taken);
        assert!(
            outputs.selected[h]
                .iter()
                .map(|t| *t as usize)
                .eq(tokens.map(|(t, _)| t))
        );
    }
}

#[test]
fn products_beyond_the_largest_number_are_equal_and_highest() {
    let case = Case {
        huge: true,
        positive: true,
        ..CASE
    };
    let outputs = run(1, &case);
    for h in 0..HEADS.len() {
        for (token, score) in case.eligible(h).zip(&outputs.scores[h]) {
            // Keys whose elements are all of the largest size, which every probe overflows with.
            match (token * HEADS.len() + h) % 7 {
                // Every product overflows upwards.
                0 => assert_eq!(*score, 0.0, "token {token}"),
                // Every product is a sum of infinities of both signs.
                3 => assert_eq!(*score, -f32::MAX, "token {token}"),
                2 => assert!(*score <= 0.0 && score.is_finite(), "token {token}: {score}"),
                _ => assert!(*score < 0.0 && score.is_finite(), "token {token}: {score}"),
            }
        }
    }
}

#[test]
fn windows_longer_than_a_block_of_threads() {
    check(&Case {
        tokens: 4500,
        dim: 32,
        queries: 1,
        max_selected: 2500,
        window_len: 1700,
        window_before: 300,
        chunk_tokens: 4500,
        period: 900,
        ..CASE
    });
}

#[test]
fn calls_of_a_launch_have_the_bits_of_one_call_each() {
    let short = Case {
        tokens: 150,
        queries: 2,
        max_selected: 17,
        ..CASE
    };
    let all = Case {
        max_selected: 400,
        tokens: 160,
        ..CASE
    };
    let cases = [short, CASE, all];
    for (together, case) in run_together(2, &cases).iter().zip(&cases) {
        let alone = run(1, case);
        assert_eq!(together.lse, alone.lse);
        assert_eq!(together.scores, alone.scores);
        assert_eq!(together.best, alone.best);
        assert_eq!(together.selected, alone.selected);
    }
}

#[test]
fn twenty_schedules_and_any_chunks_give_the_same_bits() {
    let case = Case {
        tokens: 290,
        dim: 32,
        ..CASE
    };
    let bits = |x: &[Vec<f32>; 2]| x.concat().iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    let first = run(0, &case);
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    for seed in 1..20 {
        let again = run(
            seed,
            &Case {
                chunk_tokens: rng.random_range(1..290),
                first_query: rng.random_range(0..7),
                ..case
            },
        );
        assert_eq!(bits(&again.lse), bits(&first.lse));
        assert_eq!(bits(&again.scores), bits(&first.scores));
        assert_eq!(again.best, first.best);
        assert_eq!(again.selected, first.selected);
    }
}
