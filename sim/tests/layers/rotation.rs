//! `kernels/rope.cu` under every check, against the formulas in f64.

use half::bf16;
use segattn::cuda::kernels::layer_params::{
    SegattnMove, SegattnMoveParams, SegattnQkvParams, SegattnRopeParams,
};
use segattn_sim::{Buffer, Gpu};

use super::common::*;
use super::head_norms::NO_NORMS;

/// Cosines and sines of `positions` rows, as the model makes them.
fn tables(positions: usize, half: usize) -> [Vec<f32>; 2] {
    let angle = |i: usize| (i / half) as f64 * 10_000f64.powf(-((i % half) as f64) / half as f64);
    [f64::cos, f64::sin].map(|f| {
        let values = 0..positions * half;
        values.map(|i| f(angle(i)) as f32).collect()
    })
}

/// Heads of `src` turned by the rows `angles` of the tables, `round` after every operation.
fn turned(
    src: &[f64],
    [heads, dim]: [usize; 2],
    tables: &[Vec<f32>; 2],
    angles: &[i32],
    inverse: bool,
    round: impl Fn(f64) -> f64,
) -> Vec<f64> {
    let half = dim / 2;
    let mut dst = vec![0.0; src.len()];
    for (r, angle) in angles.iter().enumerate() {
        for (head, pair) in (0..heads * half).map(|i| (i / half, i % half)) {
            let lo = (r * heads + head) * dim + pair;
            let [c, s] = [0, 1].map(|t| round(f64::from(tables[t][*angle as usize * half + pair])));
            let s = if inverse { -s } else { s };
            dst[lo] = round(round(src[lo] * c) - round(src[lo + half] * s));
            dst[lo + half] = round(round(src[lo + half] * c) + round(src[lo] * s));
        }
    }
    dst
}

pub struct Tables {
    values: [Vec<f32>; 2],
    pub buffers: [Buffer; 2],
}

impl Tables {
    pub fn new(gpu: &mut Gpu, positions: usize, dim: usize) -> Tables {
        let values = tables(positions, dim / 2);
        let buffers = [0, 1].map(|i| gpu.input("table", &values[i]).expect("memory"));
        Tables { values, buffers }
    }
}

pub const POSITIONS: usize = 300;

pub fn angles(rows: usize) -> Vec<i32> {
    (0..rows)
        .map(|r| ((r * 37 + 11) % POSITIONS) as i32)
        .collect()
}

struct RopeCase {
    rows: usize,
    heads: usize,
    dim: usize,
    inverse: bool,
    add: bool,
    /// Angles one after the other from here on, instead of a table of them.
    first_angle: Option<i32>,
    gap: usize,
}

/// The source, what was in the destination, and what is there after.
fn run_rope(seed: u64, case: &RopeCase) -> [Vec<bf16>; 3] {
    let gpu = &mut gpu(seed);
    let width = case.heads * case.dim;
    let tables = Tables::new(gpu, POSITIONS, case.dim);
    let (src, before) = (
        bf16_values(case.rows * width, 1),
        bf16_values(case.rows * width, 2),
    );
    let src_rows = Matrix::of(gpu, "src", &src, width, case.gap);
    let size = [case.rows, width];
    let dst = match case.add {
        true => Matrix::of(gpu, "dst", &before, width, 2 * case.gap),
        false => Matrix::poisoned::<bf16>(gpu, "dst", size, 2 * case.gap),
    };
    let list = gpu.input("angles", &angles(case.rows)).expect("memory");
    let params = SegattnRopeParams {
        src: src_rows.view(),
        dst: dst.view(),
        cos: tables.buffers[0].ptr(),
        sin: tables.buffers[1].ptr(),
        angles: match case.first_angle {
            Some(_) => std::ptr::null(),
            None => list.ptr(),
        },
        rows: case.rows as i64,
        first_angle: case.first_angle.unwrap_or(-1),
        heads: case.heads as i32,
        head_dim: case.dim as i32,
        inverse: case.inverse.into(),
        add: case.add.into(),
    };
    let blocks = (case.rows * width / 16).div_ceil(256);
    launch(gpu, &module("rope.cu"), "rope_bf16", blocks, None, &params);
    dst.assert_only_rows_written(gpu, "dst");
    [src, before, dst.read(gpu)]
}

#[test]
fn rope_agrees_with_the_formula() {
    for (i, (rows, heads, dim, gap)) in [
        (1, 1, 16, 0),
        (5, 3, 32, 8),
        (40, 2, 96, 0),
        (9, 4, 256, 16),
        (0, 2, 64, 0),
    ]
    .into_iter()
    .enumerate()
    {
        let case = RopeCase {
            rows,
            heads,
            dim,
            inverse: i % 2 == 1,
            add: i % 3 == 1,
            first_angle: (i == 2).then_some(100),
            gap,
        };
        let [src, before, got] = run_rope(1, &case);
        let angles = match case.first_angle {
            Some(first) => (first..first + rows as i32).collect(),
            None => angles(rows),
        };
        let values = tables(POSITIONS, dim / 2);
        let formula = |round: fn(f64) -> f64| -> Vec<f64> {
            let turned = turned(
                &wide(&src),
                [heads, dim],
                &values,
                &angles,
                case.inverse,
                round,
            );
            let sums = turned.iter().zip(&before);
            sums.map(|(t, b)| if case.add { round(t + b.to_f64()) } else { *t })
                .collect()
        };
        assert_close("rope", &wide(&got), &formula(low), &formula(|x| x));
    }
}

#[test]
fn rope_gives_the_same_bits_under_twenty_schedules() {
    let case = RopeCase {
        rows: 11,
        heads: 2,
        dim: 64,
        inverse: false,
        add: true,
        first_angle: None,
        gap: 0,
    };
    let first = run_rope(0, &case)[2].clone();
    assert!((1..20).all(|seed| bits(&run_rope(seed, &case)[2]) == bits(&first)));
}

/// Pieces of rows: of several blocks, of a part of one, rotated or not.
const MOVES: [(usize, usize, Option<i32>); 6] = [
    (5, 3, Some(100)),
    (1, 1, None),
    (140, 2, Some(7)),
    (33, 2, None),
    (1, 4, Some(0)),
    (3, 1, Some(299 - 2)),
];

/// Moves [`MOVES`] in one launch, beside what each alone gives: rotated by `rope`, or the same.
fn check_moves(seed: u64, inverse: bool, add: bool) -> Vec<Vec<bf16>> {
    let gpu = &mut gpu(seed);
    let tables = Tables::new(gpu, POSITIONS, DIM);
    let (mut list, mut expected, mut blocks) = (Vec::new(), Vec::new(), 0);
    let mut targets = Vec::new();
    for (i, (rows, heads, first_angle)) in MOVES.into_iter().enumerate() {
        let width = heads * DIM;
        let [src, before] = [1, 2].map(|n| bf16_values(rows * width, (10 * i + n) as u64));
        let from = Matrix::of(gpu, "src", &src, width, 8 * (i % 2));
        let to = match add {
            true => Matrix::of(gpu, "dst", &before, width, 8),
            false => Matrix::poisoned::<bf16>(gpu, "dst", [rows, width], 8),
        };
        list.push(SegattnMove {
            src: from.view(),
            dst: to.view(),
            rows: rows as i32,
            heads: heads as i32,
            first_angle: first_angle.unwrap_or(-1),
            first_block: blocks,
        });
        blocks += (rows * width / 16).div_ceil(256) as i32;
        targets.push(to);
        let formula = |round: fn(f64) -> f64| -> Vec<f64> {
            let moved = match first_angle {
                Some(first) => {
                    let angles: Vec<i32> = (first..first + rows as i32).collect();
                    let shape = [heads, DIM];
                    turned(&wide(&src), shape, &tables.values, &angles, inverse, round)
                }
                None => wide(&src),
            };
            let sums = moved.iter().zip(&before);
            sums.map(|(x, b)| if add { round(x + b.to_f64()) } else { *x })
                .collect()
        };
        expected.push([formula(low), formula(|x| x)]);
    }
    let bytes: Vec<[u64; 6]> = list.iter().map(words).collect();
    let moves = gpu.input("moves", &bytes).expect("memory");
    let params = SegattnMoveParams {
        moves: moves.ptr(),
        cos: tables.buffers[0].ptr(),
        sin: tables.buffers[1].ptr(),
        count: list.len() as i32,
        head_dim: DIM as i32,
        inverse: inverse.into(),
        add: add.into(),
    };
    let rope = module("rope.cu");
    launch(gpu, &rope, "move_rows_bf16", blocks as usize, None, &params);
    let got: Vec<Vec<bf16>> = targets.iter().map(|to| to.read(gpu)).collect();
    for ((to, got), [low, exact]) in targets.iter().zip(&got).zip(&expected) {
        to.assert_only_rows_written(gpu, "dst");
        assert_close("moved", &wide(got), low, exact);
    }
    got
}

/// A move as the kernel reads it.
fn words(at: &SegattnMove) -> [u64; 6] {
    let pair = |low: i32, high: i32| u64::from(low as u32) | u64::from(high as u32) << 32;
    [
        at.src.data as u64,
        at.src.stride as u64,
        at.dst.data as u64,
        at.dst.stride as u64,
        pair(at.rows, at.heads),
        pair(at.first_angle, at.first_block),
    ]
}

#[test]
fn many_moves_are_what_each_alone_gives() {
    for (inverse, add) in [(false, false), (true, false), (false, true), (true, true)] {
        check_moves(1, inverse, add);
    }
}

#[test]
fn moves_have_the_same_bits_under_ten_schedules() {
    let first = check_moves(0, true, true);
    for seed in 1..10 {
        let again = check_moves(seed, true, true);
        assert!(again.iter().zip(&first).all(|(a, b)| bits(a) == bits(b)));
    }
}

const Q_HEADS: usize = 4;
const KV_HEADS: usize = 2;
const DIM: usize = 32;
const WIDTHS: [usize; 2] = [Q_HEADS * DIM, KV_HEADS * DIM];
const QKV: usize = (Q_HEADS + 2 * KV_HEADS) * DIM;

/// Parameters of split and join with everything but the tensors.
fn qkv_params(gpu: &mut Gpu, tables: &Tables, rows: usize) -> SegattnQkvParams {
    let list = gpu.input("angles", &angles(rows)).expect("memory");
    SegattnQkvParams {
        qkv: NO_ROWS,
        q: NO_ROWS,
        k: NO_ROWS,
        raw_k: NO_ROWS,
        v: NO_ROWS,
        probes: NO_ROWS,
        cos: tables.buffers[0].ptr(),
        sin: tables.buffers[1].ptr(),
        angles: list.ptr(),
        cache_rows: std::ptr::null(),
        probe_rows: std::ptr::null(),
        norms: NO_NORMS,
        rows: rows as i64,
        q_heads: Q_HEADS as i32,
        kv_heads: KV_HEADS as i32,
        head_dim: DIM as i32,
    }
}

fn launch_qkv(gpu: &mut Gpu, name: &str, rows: usize, params: &SegattnQkvParams) {
    let blocks = (rows * QKV / 16).div_ceil(256);
    launch(gpu, &module("rope.cu"), name, blocks, None, params);
}

/// Columns [from, to) of every row.
fn columns<T: Copy>(rows: &[T], width: usize, from: usize, to: usize) -> Vec<T> {
    rows.chunks(width)
        .flat_map(|row| row[from..to].to_vec())
        .collect()
}

#[test]
fn split_puts_every_head_where_attention_reads_it() {
    let rows = 7;
    let gpu = &mut gpu(1);
    let tables = Tables::new(gpu, POSITIONS, DIM);
    let qkv = bf16_values(rows * QKV, 5);
    let qkv_rows = Matrix::of(gpu, "qkv", &qkv, QKV, 8);
    let [q_width, kv_width] = WIDTHS;
    let mut empty = |name: &str, size| Matrix::poisoned::<bf16>(gpu, name, size, 8);
    let q = empty("q", [rows, q_width]);
    let [k, raw_k, v] = ["k", "raw_k", "v"].map(|name| empty(name, [20, kv_width]));
    let probes = empty("probes", [3, q_width]);
    let places: Vec<i32> = (0..rows as i32).map(|r| 19 - 2 * r).collect();
    let probe_places: [i32; 7] = [-1, -1, 2, -1, 0, 1, -1];
    let cache_rows = gpu.input("cache_rows", &places).expect("memory");
    let probe_rows = gpu.input("probe_rows", &probe_places).expect("memory");
    let params = SegattnQkvParams {
        qkv: qkv_rows.view(),
        q: q.view(),
        k: k.view(),
        raw_k: raw_k.view(),
        v: v.view(),
        probes: probes.view(),
        cache_rows: cache_rows.ptr(),
        probe_rows: probe_rows.ptr(),
        ..qkv_params(gpu, &tables, rows)
    };
    launch_qkv(gpu, "split_qkv_bf16", rows, &params);
    q.assert_only_rows_written(gpu, "q");
    probes.assert_only_rows_written(gpu, "probes");
    // Where nobody will read keys as they are, the rest is the same.
    let sparse = ["k", "v"].map(|name| Matrix::poisoned::<bf16>(gpu, name, [20, kv_width], 0));
    let without = SegattnQkvParams {
        k: sparse[0].view(),
        raw_k: NO_ROWS,
        v: sparse[1].view(),
        ..params
    };
    launch_qkv(gpu, "split_qkv_bf16", rows, &without);
    for (dense, sparse) in [&k, &v].into_iter().zip(&sparse) {
        for place in places.iter().map(|place| *place as usize) {
            assert_eq!(sparse.row::<u16>(gpu, place), dense.row::<u16>(gpu, place));
        }
    }
    let [raw_q, raw_keys] = [(0, q_width), (q_width, q_width + kv_width)]
        .map(|(from, to)| columns(&qkv, QKV, from, to));
    let check = |name: &str, got: &[bf16], src: &[bf16], heads: usize| {
        let formula = |round: fn(f64) -> f64| {
            turned(
                &wide(src),
                [heads, DIM],
                &tables.values,
                &angles(rows),
                false,
                round,
            )
        };
        assert_close(name, &wide(got), &formula(low), &formula(|x| x));
    };
    check("q", &q.read(gpu), &raw_q, Q_HEADS);
    let mut placed = |rows_of: &Matrix| -> Vec<bf16> {
        let all: Vec<bf16> = rows_of.read(gpu);
        places
            .iter()
            .flat_map(|p| all[*p as usize * kv_width..][..kv_width].to_vec())
            .collect()
    };
    check("k", &placed(&k), &raw_keys, KV_HEADS);
    assert_eq!(bits(&placed(&raw_k)), bits(&raw_keys));
    assert_eq!(
        bits(&placed(&v)),
        bits(&columns(&qkv, QKV, q_width + kv_width, QKV))
    );
    for cache in [&k, &raw_k, &v] {
        let unwritten: usize = gpu
            .unwritten(cache.buffer)
            .iter()
            .map(|range| range.len())
            .sum();
        assert_eq!(
            cache.buffer.len() - unwritten,
            rows * kv_width * 2,
            "rows written"
        );
    }
    let got = probes.read::<bf16>(gpu);
    for (row, place) in probe_places
        .iter()
        .enumerate()
        .filter(|(_, place)| **place >= 0)
    {
        let expected = &raw_q[row * q_width..][..q_width];
        assert_eq!(
            bits(&got[*place as usize * q_width..][..q_width]),
            bits(expected)
        );
    }
}

#[test]
fn join_undoes_split() {
    let rows = 9;
    let gpu = &mut gpu(1);
    let tables = Tables::new(gpu, POSITIONS, DIM);
    let [q_width, kv_width] = WIDTHS;
    let gradients = [(q_width, 1), (kv_width, 2), (kv_width, 3)]
        .map(|(width, salt)| bf16_values(rows * width, salt));
    let [d_q, d_k, d_v] =
        [0, 1, 2].map(|i| Matrix::of(gpu, "gradient", &gradients[i], WIDTHS[i.min(1)], 8 * i));
    let d_qkv = Matrix::poisoned::<bf16>(gpu, "d_qkv", [rows, QKV], 8);
    let params = SegattnQkvParams {
        qkv: d_qkv.view(),
        q: d_q.view(),
        k: d_k.view(),
        v: d_v.view(),
        ..qkv_params(gpu, &tables, rows)
    };
    launch_qkv(gpu, "join_qkv_bf16", rows, &params);
    d_qkv.assert_only_rows_written(gpu, "d_qkv");
    let got = d_qkv.read::<bf16>(gpu);
    let ends = [0, q_width, q_width + kv_width];
    for (i, heads) in [Q_HEADS, KV_HEADS].into_iter().enumerate() {
        let got = columns(&got, QKV, ends[i], ends[i + 1]);
        let formula = |round: fn(f64) -> f64| {
            turned(
                &wide(&gradients[i]),
                [heads, DIM],
                &tables.values,
                &angles(rows),
                true,
                round,
            )
        };
        assert_close("turned back", &wide(&got), &formula(low), &formula(|x| x));
    }
    assert_eq!(bits(&columns(&got, QKV, ends[2], QKV)), bits(&gradients[2]));
}
