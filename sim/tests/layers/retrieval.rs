//! `kernels/retrieval.cu` under every check, against the contract's retrieval in f64.

use std::ops::Range;
use std::sync::Arc;

use half::bf16;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use segattn::cuda::kernels::layer_params::{
    SegattnPoolChunk, SegattnPoolHead, SegattnRetrievalParams,
};
use segattn_sim::{Buffer, Gpu, Module};

use super::common::*;
use super::rounding::rounded;

const KV_HEADS: usize = 3;
const GROUP: usize = 2;
/// The KV heads that read the past.
const HEADS: [usize; 2] = [0, 2];

#[derive(Clone, Copy)]
struct Case {
    dim: usize,
    tokens: usize,
    chunk_tokens: usize,
    block_len: usize,
    probe_rows: usize,
    window: usize,
    stride: usize,
    /// Tokens at the beginning, and at the end, that each of the heads may not select.
    sinks: [usize; 2],
    prior: [usize; 2],
    /// Row of the ring that has the first query, and rows of the ring beyond those of queries.
    first_query: usize,
    spare_rows: usize,
    max_selected: usize,
    /// Small integers, so that every score is exact and many are equal.
    whole: bool,
    /// Bits of an element of the pool.
    bits: usize,
    /// Every score below 0, which is what a row that is not there would have.
    negative: bool,
}

const CASE: Case = Case {
    dim: 64,
    tokens: 200,
    chunk_tokens: 64,
    block_len: 8,
    probe_rows: 20,
    window: 8,
    stride: 4,
    sinks: [0, 9],
    prior: [0, 24],
    first_query: 17,
    spare_rows: 2,
    max_selected: 5,
    whole: false,
    bits: 16,
    negative: false,
};

struct Inputs {
    k: Vec<bf16>,
    v: Vec<bf16>,
    q: Vec<bf16>,
}

impl Case {
    fn windows(&self) -> usize {
        (self.probe_rows - self.window) / self.stride + 1
    }

    fn inputs(&self) -> Inputs {
        let (kv, q) = (
            self.tokens * KV_HEADS * self.dim,
            self.probe_rows * KV_HEADS * GROUP * self.dim,
        );
        if !self.whole {
            let [mut k, v, mut q] =
                [(kv, 1), (kv, 2), (q, 3)].map(|(n, salt)| bf16_values(n, salt));
            if self.negative {
                let magnitude = |x: &bf16| bf16::from_f32(x.to_f32().abs() + 0.1);
                k.iter_mut().for_each(|x| *x = magnitude(x));
                q.iter_mut().for_each(|x| *x = -magnitude(x));
            }
            return Inputs { k, v, q };
        }
        let mut rng = ChaCha8Rng::seed_from_u64(self.tokens as u64);
        let mut small = |n: usize| {
            (0..n)
                .map(|_| bf16::from_f32(rng.random_range(-1i32..2) as f32))
                .collect()
        };
        let mut inputs = Inputs {
            k: small(kv),
            v: small(kv),
            q: small(q),
        };
        // Most tokens are one of two.
        let width = KV_HEADS * self.dim;
        for token in (0..self.tokens).filter(|t| t % 7 != 3) {
            inputs
                .k
                .copy_within((token % 2) * width..(token % 2 + 1) * width, token * width);
        }
        inputs
    }

    /// The inputs, with keys and values as the pool holds them.
    fn held(&self) -> Inputs {
        let mut inputs = self.inputs();
        if self.bits < 16 {
            let limit = ((1 << (self.bits - 1)) - 1) as f32;
            for head in [&mut inputs.k, &mut inputs.v]
                .map(|x| x.chunks_mut(self.dim))
                .into_iter()
                .flatten()
            {
                for group in head.chunks_mut(32) {
                    let wide: Vec<f32> = group.iter().map(|x| x.to_f32()).collect();
                    let held = rounded(&wide, limit, true);
                    group
                        .copy_from_slice(&held.into_iter().map(bf16::from_f32).collect::<Vec<_>>());
                }
            }
        }
        inputs
    }

    fn q_row<'a>(&self, inputs: &'a Inputs, row: usize, head: usize) -> &'a [bf16] {
        &inputs.q[(row * KV_HEADS * GROUP + head) * self.dim..][..self.dim]
    }

    fn eligible(&self, head: usize) -> Range<usize> {
        self.sinks[head]..self.tokens - self.prior[head]
    }

    /// The blocks that lie wholly inside the eligible tokens.
    fn blocks(&self, head: usize) -> Range<usize> {
        let Range { start, end } = self.eligible(head);
        start.div_ceil(self.block_len)..end / self.block_len
    }

    fn query_capacity(&self) -> usize {
        self.probe_rows + self.spare_rows
    }

    /// The queries where the ring has them; the rows between are not to be read.
    fn ring(&self, gpu: &mut Gpu, inputs: &Inputs) -> Matrix {
        let width = KV_HEADS * GROUP * self.dim;
        let ring = Matrix::poisoned::<bf16>(gpu, "q", [self.query_capacity(), width], 8);
        for (t, row) in inputs.q.chunks(width).enumerate() {
            ring.write(gpu, (self.first_query + t) % self.query_capacity(), row);
        }
        ring
    }

    /// Scores of the eligible blocks of a head, `round` after every operation.
    fn scores(&self, inputs: &Inputs, head: usize, round: fn(f64) -> f64) -> Vec<f64> {
        let mut probes = Vec::new();
        for (g, w) in (0..GROUP * self.windows()).map(|i| (i / self.windows(), i % self.windows()))
        {
            let mean = |d: usize| {
                let rows = w * self.stride..w * self.stride + self.window;
                let sum: f64 = rows
                    .map(|r| self.q_row(inputs, r, HEADS[head] * GROUP + g)[d].to_f64())
                    .sum();
                round(sum / self.window as f64)
            };
            probes.push((0..self.dim).map(mean).collect::<Vec<f64>>());
        }
        let score = |token: usize| {
            let k = &inputs.k[(token * KV_HEADS + HEADS[head]) * self.dim..][..self.dim];
            let dots = probes
                .iter()
                .map(|p| p.iter().zip(k).map(|(p, k)| p * k.to_f64()).sum::<f64>());
            dots.fold(f64::NEG_INFINITY, f64::max)
        };
        let tokens = self
            .blocks(head)
            .map(|b| b * self.block_len..(b + 1) * self.block_len);
        tokens
            .map(|t| t.map(score).fold(f64::NEG_INFINITY, f64::max))
            .collect()
    }
}

/// What one retrieval leaves: scores of the eligible blocks, the selected ones, and the past rows.
struct Outputs {
    scores: [Vec<f32>; 2],
    selected: [Vec<i32>; 2],
    past_k: Vec<bf16>,
    past_v: Vec<bf16>,
    past_len: Vec<i32>,
}

const ORIGIN: i32 = 1500;

fn table(case: &Case) -> [Vec<f32>; 2] {
    let half = case.dim / 2;
    let angle = |i: usize| (i / half) as f64 * 100f64.powf(-((i % half) as f64) / half as f64);
    [f64::cos, f64::sin].map(|f| {
        (0..(ORIGIN as usize + 1) * half)
            .map(|i| f(angle(i)) as f32)
            .collect()
    })
}

/// Chunks of an empty pool of both heads, and the table of them.
fn pool(gpu: &mut Gpu, case: &Case) -> (Vec<[Buffer; 2]>, Buffer) {
    // Elements, and a step for each 32 of them.
    let of_head = match case.bits {
        16 => case.dim * 2,
        bits => case.dim * bits / 8 + case.dim / 16,
    };
    let bytes = case.chunk_tokens * HEADS.len() * of_head;
    let count = case.tokens.div_ceil(case.chunk_tokens);
    let chunks: Vec<[Buffer; 2]> = (0..count)
        .map(|_| ["k", "v"].map(|name| gpu.alloc(name, bytes).expect("memory")))
        .collect();
    let table: Vec<u64> = chunks
        .iter()
        .flatten()
        .map(|b| b.address() as u64)
        .collect();
    assert_eq!(
        table.len() * 8,
        chunks.len() * size_of::<SegattnPoolChunk>()
    );
    (chunks, gpu.input("chunks", &table).expect("memory"))
}

/// Appends in two calls, then retrieves; block scores in launches of `at_once` blocks.
fn run(seed: u64, case: &Case, at_once: usize) -> Outputs {
    let inputs = case.inputs();
    let gpu = &mut gpu(seed);
    let module = module("retrieval.cu");
    let width = KV_HEADS * case.dim;
    let [k, v] = [&inputs.k, &inputs.v].map(|x| Matrix::of(gpu, "rows", x, width, 8));
    let q = case.ring(gpu, &inputs);
    let (_chunks, chunk_table) = pool(gpu, case);
    let blocks = case.tokens / case.block_len;
    let probe_count = HEADS.len() * GROUP * case.windows();
    let mut alloc = |name: &str, count: usize| gpu.alloc(name, count * 4).expect("memory");
    let probes = alloc("probes", probe_count * case.dim * 3 / 2);
    let scores = alloc("scores", HEADS.len() * (blocks + 3));
    let selected = alloc("selected", HEADS.len() * case.max_selected);
    let (selected_count, past_len) = (
        alloc("selected_count", HEADS.len()),
        alloc("past_len", KV_HEADS),
    );
    let past_rows = case.max_selected * case.block_len;
    let [past_k, past_v] =
        ["past_k", "past_v"].map(|name| Matrix::poisoned::<bf16>(gpu, name, [past_rows, width], 8));
    let [cos, sin] = table(case).map(|x| gpu.input("table", &x).expect("memory"));
    let heads: Vec<i32> = (0..HEADS.len())
        .flat_map(|h| {
            [
                HEADS[h] as i32,
                case.eligible(h).start as i32,
                case.eligible(h).end as i32,
                ORIGIN - case.prior[h] as i32,
            ]
        })
        .collect();
    assert_eq!(heads.len() * 4, HEADS.len() * size_of::<SegattnPoolHead>());
    let heads = gpu.input("heads", &heads).expect("memory");
    let params = SegattnRetrievalParams {
        chunks: chunk_table.ptr(),
        head: heads.ptr(),
        q: q.view(),
        k: k.view(),
        v: v.view(),
        probes: probes.ptr(),
        sums: std::ptr::null_mut(),
        lse: std::ptr::null_mut(),
        scores: scores.ptr(),
        best: std::ptr::null_mut(),
        selected: selected.ptr(),
        selected_count: selected_count.ptr(),
        unwanted: std::ptr::null_mut(),
        kept: std::ptr::null(),
        past_len: past_len.ptr(),
        cos: cos.ptr(),
        sin: sin.ptr(),
        first_token: 0,
        chunk_tokens: case.chunk_tokens as i64,
        token: 0,
        rows: 0,
        score_pitch: (blocks + 3) as i64,
        heads: HEADS.len() as i32,
        head_dim: case.dim as i32,
        group: GROUP as i32,
        windows: case.windows() as i32,
        window: case.window as i32,
        stride: case.stride as i32,
        first_query: (case.first_query % case.query_capacity()) as i32,
        query_capacity: case.query_capacity() as i32,
        block_len: case.block_len as i32,
        first_block: 0,
        blocks: blocks as i32,
        max_selected: case.max_selected as i32,
        tiles: 0,
        window_len: 0,
        window_before: 0,
        scale_log2: 0.0,
        bits: case.bits as i32,
        padding: 0,
    };
    for range in [0..case.tokens / 3, case.tokens / 3..case.tokens] {
        let mut append = params;
        append.token = range.start as i64;
        append.rows = range.len() as i64;
        for (rows, matrix) in [(&mut append.k, &k), (&mut append.v, &v)] {
            rows.data = rows
                .data
                .wrapping_byte_add(range.start * matrix.view().stride as usize * 2);
        }
        let threads = range.len() * HEADS.len() * case.dim / 8;
        retrieve(
            gpu,
            &module,
            "pool_append_bf16",
            threads.div_ceil(256),
            &[append],
        );
    }
    check_what_is_held(gpu, case, &module, params);
    retrieve(
        gpu,
        &module,
        "pool_probes_bf16",
        (probe_count * case.dim / 8).div_ceil(256),
        &[params],
    );
    let kernel = format!("pool_scores_bf16_d{}", case.dim);
    let per_item = (128 / case.block_len).max(1);
    for first in (0..blocks).step_by(at_once) {
        let mut some = params;
        some.first_block = first as i32;
        some.blocks = at_once.min(blocks - first) as i32;
        let items = (some.blocks as usize).div_ceil(per_item);
        retrieve(gpu, &module, &kernel, HEADS.len() * items, &[some]);
    }
    retrieve(gpu, &module, "pool_select_f32", HEADS.len(), &[params]);
    let mut gather = params;
    (gather.k, gather.v) = (past_k.view(), past_v.view());
    let threads = HEADS.len() * past_rows * case.dim / 16;
    retrieve(
        gpu,
        &module,
        "pool_gather_bf16",
        threads.div_ceil(256),
        &[gather],
    );
    let counts: Vec<i32> = gpu.download(selected_count);
    Outputs {
        scores: [0, 1].map(|h| {
            let of = case.blocks(h);
            gpu.download_range(scores, (h * (blocks + 3) + of.start) * 4, of.len())
        }),
        selected: [0, 1]
            .map(|h| gpu.download_range(selected, h * case.max_selected * 4, counts[h] as usize)),
        past_k: past_k.read(gpu),
        past_v: past_v.read(gpu),
        past_len: gpu.download(past_len),
    }
}

/// Reads tokens from the middle of the pool on: they are as they are held, and no row more is written.
fn check_what_is_held(
    gpu: &mut Gpu,
    case: &Case,
    module: &Arc<Module>,
    mut params: SegattnRetrievalParams,
) {
    let (inputs, width) = (case.held(), KV_HEADS * case.dim);
    let tokens = case.tokens / 3..case.tokens - 1;
    let size = [tokens.len(), width];
    let [k, v] = ["k", "v"].map(|name| Matrix::poisoned::<bf16>(gpu, name, size, 8));
    (params.k, params.v) = (k.view(), v.view());
    (params.token, params.rows) = (tokens.start as i64, tokens.len() as i64);
    let blocks = (tokens.len() * HEADS.len() * case.dim / 8).div_ceil(256);
    retrieve(gpu, module, "pool_read_bf16", blocks, &[params]);
    for (rows, held) in [(k, &inputs.k), (v, &inputs.v)] {
        let got: Vec<bf16> = rows.read(gpu);
        let held = &held[tokens.start * width..];
        for (got, held) in got.chunks(width).zip(held.chunks(width)) {
            for head in HEADS {
                let columns = head * case.dim..(head + 1) * case.dim;
                assert_eq!(bits(&got[columns.clone()]), bits(&held[columns]));
            }
        }
    }
}

/// The contract: the best blocks from `first` on, ties to the earlier, in order of position.
fn best(scores: &[f64], first: usize, count: usize) -> Vec<i32> {
    let mut order: Vec<i32> = (0..scores.len() as i32).collect();
    order.sort_by(|a, b| {
        scores[*b as usize]
            .total_cmp(&scores[*a as usize])
            .then(a.cmp(b))
    });
    order.truncate(count);
    order.sort_unstable();
    order
        .into_iter()
        .map(|block| block + first as i32)
        .collect()
}

fn check(case: &Case) {
    let (inputs, outputs) = (case.held(), run(1, case, usize::MAX));
    for h in 0..HEADS.len() {
        let exact = case.scores(&inputs, h, |x| x);
        let plain = case.scores(&inputs, h, |x| bf16::from_f64(x).to_f64());
        let got: Vec<f64> = outputs.scores[h].iter().map(|x| f64::from(*x)).collect();
        if case.whole {
            assert_eq!(got, exact);
        } else if !exact.is_empty() {
            assert_close("scores", &got, &plain, &exact);
            assert!(error(&got, &exact) < 1e-6, "f32: {}", error(&got, &exact));
        }
        assert_eq!(
            outputs.selected[h],
            best(&got, case.blocks(h).start, case.max_selected)
        );
        check_rows(case, &inputs, &outputs, h);
    }
}

/// The past rows of a head: values as they are, keys turned to the positions before its end.
fn check_rows(case: &Case, inputs: &Inputs, outputs: &Outputs, h: usize) {
    let (dim, half, [cos, sin]) = (case.dim, case.dim / 2, table(case));
    let tokens: Vec<usize> = outputs.selected[h]
        .iter()
        .flat_map(|b| *b as usize * case.block_len..(*b as usize + 1) * case.block_len)
        .collect();
    assert_eq!(outputs.past_len[HEADS[h]] as usize, tokens.len());
    for (row, token) in tokens.iter().enumerate() {
        let [src, dst] = [token, &row].map(|r| (r * KV_HEADS + HEADS[h]) * dim);
        assert_eq!(
            bits(&outputs.past_v[dst..dst + dim]),
            bits(&inputs.v[src..src + dim])
        );
        let angle = (ORIGIN as usize - case.prior[h] - tokens.len() + row) * half;
        for pair in 0..half {
            let [lo, hi] = [0, half].map(|o| inputs.k[src + o + pair].to_f32());
            let (c, s) = (cos[angle + pair], sin[angle + pair]);
            for (at, exact) in [
                (dst + pair, lo * c - hi * s),
                (dst + half + pair, hi * c + lo * s),
            ] {
                let got = outputs.past_k[at].to_f32();
                assert!(
                    (got - exact).abs() <= 0.005 * (lo.abs() + hi.abs()),
                    "{got}, {exact}"
                );
            }
        }
    }
}

#[test]
fn selections_follow_the_contract() {
    check(&CASE);
    // Pools of 8 and of 4 bits.
    for (bits, dim) in [(8, 64), (4, 96)] {
        check(&Case {
            bits,
            dim,
            tokens: 80,
            ..CASE
        });
    }
    // Ties everywhere; more probes than a tile; selections of all blocks; blocks that do not divide a tile, or exceed
    // one.
    check(&Case {
        whole: true,
        ..CASE
    });
    check(&Case {
        probe_rows: 60,
        window: 4,
        stride: 2,
        dim: 32,
        ..CASE
    });
    check(&Case {
        max_selected: 40,
        ..CASE
    });
    check(&Case {
        block_len: 12,
        chunk_tokens: 48,
        dim: 128,
        whole: true,
        ..CASE
    });
    check(&Case {
        block_len: 150,
        negative: true,
        tokens: 470,
        sinks: [0, 0],
        prior: [0, 150],
        max_selected: 2,
        chunk_tokens: 300,
        dim: 96,
        ..CASE
    });
    check(&Case {
        tokens: 32,
        dim: 256,
        max_selected: 1,
        ..CASE
    });
    check(&Case {
        tokens: 24,
        sinks: [0, 0],
        ..CASE
    });
    // Every eligible token is a sink's neighbour: no whole block is left to the second head.
    check(&Case {
        tokens: 40,
        sinks: [1, 9],
        ..CASE
    });
}

#[test]
fn many_blocks_with_equal_scores_go_to_the_earliest() {
    let case = Case {
        tokens: 2200,
        block_len: 2,
        chunk_tokens: 2200,
        dim: 32,
        max_selected: 650,
        whole: true,
        ..CASE
    };
    check(&case);
}

#[test]
fn twenty_schedules_and_any_split_of_the_blocks_give_the_same_bits() {
    let case = Case {
        tokens: 90,
        dim: 32,
        probe_rows: 12,
        ..CASE
    };
    let first = run(0, &case, usize::MAX);
    for seed in 1..20 {
        let again = run(seed, &case, 1 + seed as usize * 3);
        for h in 0..2 {
            assert!(
                again.scores[h]
                    .iter()
                    .zip(&first.scores[h])
                    .all(|(a, b)| a.to_bits() == b.to_bits())
            );
            assert_eq!(again.selected[h], first.selected[h]);
        }
    }
}
