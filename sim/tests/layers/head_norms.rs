//! The norms of q's and k's heads: `split_qkv_norm` of `kernels/rope.cu` is the norm and then `split_qkv`, and
//! `head_norms_grad` of `kernels/norm.cu` is `rms_norm_grad` of q and of k, both by bits.

use half::bf16;
use segattn::cuda::kernels::layer_params::{
    SegattnHeadNorms, SegattnHeadNormsParams, SegattnNormParams, SegattnQkvParams, SegattnRows,
};
use segattn_sim::{Buffer, Gpu};

use super::common::*;
use super::norm::{NO_NORM, sum_groups_of};
use super::rotation::{POSITIONS, Tables, angles};

const EPS: f32 = 1e-5;

/// Rows, query heads, KV heads, elements of a head, and elements between two rows.
#[derive(Debug, Clone, Copy)]
struct Case {
    rows: usize,
    heads: [usize; 2],
    dim: usize,
    gap: usize,
}

/// Heads of every number of lanes, of all of them or not, and rows that end within a warp and within a block.
const CASES: [Case; 7] = [
    case(1, [1, 1], 16, 0),
    case(7, [4, 2], 32, 8),
    case(33, [3, 1], 48, 0),
    case(40, [6, 2], 64, 16),
    case(5, [3, 1], 96, 0),
    case(9, [4, 2], 128, 8),
    case(3, [2, 1], 256, 0),
];

const fn case(rows: usize, heads: [usize; 2], dim: usize, gap: usize) -> Case {
    Case {
        rows,
        heads,
        dim,
        gap,
    }
}

impl Case {
    fn widths(&self) -> [usize; 2] {
        self.heads.map(|heads| heads * self.dim)
    }

    fn width(&self) -> usize {
        let [q, kv] = self.widths();
        q + 2 * kv
    }

    fn rows_of(&self, salt: u64) -> Vec<bf16> {
        bf16_values(self.rows * self.width(), salt + self.dim as u64)
    }

    /// Blocks of the kernels of heads' norms.
    fn blocks(&self) -> usize {
        let heads = self.heads[0] + 2 * self.heads[1];
        (self.rows * heads * (self.dim / 8).next_power_of_two()).div_ceil(256)
    }

    fn weights(&self) -> [Vec<f32>; 2] {
        [11, 12].map(|salt| values(self.dim, salt + self.dim as u64))
    }
}

/// Norm of a head in the order of `rms_norm`: a chain over the eight elements of a lane, then a tree over 32 lanes.
fn normed(head: &[bf16], weight: &[f32]) -> (Vec<bf16>, f32) {
    let mut sums = [0f32; 32];
    for (sum, vector) in sums.iter_mut().zip(head.chunks(8)) {
        let add = |sum: f32, x: &bf16| x.to_f32().mul_add(x.to_f32(), sum);
        *sum = vector.iter().fold(0.0, add);
    }
    for mask in [16, 8, 4, 2, 1] {
        sums = std::array::from_fn(|lane| sums[lane] + sums[lane ^ mask]);
    }
    let rstd = 1.0 / (sums[0] / head.len() as f32 + EPS).sqrt();
    let scaled = head.iter().zip(weight);
    let scaled = scaled.map(|(x, w)| bf16::from_f32(x.to_f32() * rstd * w));
    (scaled.collect(), rstd)
}

/// The rows with the heads of q and k normed, and the norms' rstd of q and of k.
fn normed_rows(case: &Case, qkv: &[bf16], weights: &[Vec<f32>; 2]) -> (Vec<bf16>, [Vec<u32>; 2]) {
    let (mut rows, mut rstd) = (qkv.to_vec(), [Vec::new(), Vec::new()]);
    let [q_heads, kv_heads] = case.heads;
    for row in rows.chunks_mut(case.width()) {
        let heads = row.chunks_mut(case.dim).take(q_heads + kv_heads);
        for (i, head) in heads.enumerate() {
            let part = usize::from(i >= q_heads);
            let (y, scale) = normed(head, &weights[part]);
            head.copy_from_slice(&y);
            rstd[part].push(scale.to_bits());
        }
    }
    (rows, rstd)
}

fn norms(gpu: &mut Gpu, case: &Case) -> (SegattnHeadNorms, [Buffer; 2]) {
    norms_by(gpu, case, &case.weights())
}

fn norms_by(
    gpu: &mut Gpu,
    case: &Case,
    weights: &[Vec<f32>; 2],
) -> (SegattnHeadNorms, [Buffer; 2]) {
    let [q_weight, k_weight] = weights
        .each_ref()
        .map(|weight| gpu.input("weight", weight).expect("memory"));
    let rstd = case.heads.map(|heads| {
        let bytes = case.rows * heads * size_of::<f32>();
        gpu.alloc("rstd", bytes).expect("memory")
    });
    let norms = SegattnHeadNorms {
        q_weight: q_weight.ptr(),
        k_weight: k_weight.ptr(),
        q_rstd: rstd[0].ptr(),
        k_rstd: rstd[1].ptr(),
        eps: EPS,
    };
    (norms, rstd)
}

/// For kernels without norms.
pub const NO_NORMS: SegattnHeadNorms = SegattnHeadNorms {
    q_weight: std::ptr::null(),
    k_weight: std::ptr::null(),
    q_rstd: std::ptr::null_mut(),
    k_rstd: std::ptr::null_mut(),
    eps: 0.0,
};

/// Where rows go: to every second of the cache's, backwards; every third to the probes.
fn places(rows: usize) -> [Vec<i32>; 2] {
    let last = rows as i32 - 1;
    let cache = (0..=last).map(|r| 2 * (last - r)).collect();
    let probes = (0..=last).map(|r| if r % 3 == 0 { (last - r) / 3 } else { -1 });
    [cache, probes.collect()]
}

/// What a split writes: bits of q, probes, k, v and, where they are kept, keys before rotation, without the rows that
/// nothing goes to.
fn split(
    gpu: &mut Gpu,
    case: &Case,
    (kernel, keeps_raw): (&str, bool),
    qkv: &[bf16],
    norms: SegattnHeadNorms,
) -> Vec<Vec<u16>> {
    let rows = case.rows;
    let [q_width, kv_width] = case.widths();
    let tables = Tables::new(gpu, POSITIONS, case.dim);
    let qkv = Matrix::of(gpu, "qkv", qkv, case.width(), case.gap);
    let [cache_places, probe_places] = places(rows);
    let [list, cache_rows, probe_rows] = [&angles(rows), &cache_places, &probe_places]
        .map(|list| gpu.input("places", list).expect("memory"));
    let mut empty = |name: &str, size| Matrix::poisoned::<bf16>(gpu, name, size, case.gap);
    let q = empty("q", [rows, q_width]);
    let kept = ["k", "v", "raw_k"].map(|name| empty(name, [2 * rows, kv_width]));
    let probes = empty("probes", [rows.div_ceil(3), q_width]);
    let params = SegattnQkvParams {
        qkv: qkv.view(),
        q: q.view(),
        k: kept[0].view(),
        v: kept[1].view(),
        raw_k: if keeps_raw { kept[2].view() } else { NO_ROWS },
        probes: probes.view(),
        cos: tables.buffers[0].ptr(),
        sin: tables.buffers[1].ptr(),
        angles: list.ptr(),
        cache_rows: cache_rows.ptr(),
        probe_rows: probe_rows.ptr(),
        norms,
        rows: rows as i64,
        q_heads: case.heads[0] as i32,
        kv_heads: case.heads[1] as i32,
        head_dim: case.dim as i32,
    };
    let blocks = match kernel {
        "split_qkv_norm_bf16" => case.blocks(),
        _ => (rows * case.width() / 16).div_ceil(256),
    };
    let rope = module("rope.cu");
    launch(gpu, &rope, kernel, blocks, None, &params);
    q.assert_only_rows_written(gpu, "q");
    probes.assert_only_rows_written(gpu, "probes");
    let mut written = vec![bits(&q.read(gpu)), bits(&probes.read(gpu))];
    for rows_of in &kept[..if keeps_raw { 3 } else { 2 }] {
        let unwritten: usize = gpu
            .unwritten(rows_of.buffer)
            .iter()
            .map(|range| range.len())
            .sum();
        assert_eq!(
            rows_of.buffer.len() - unwritten,
            2 * rows * kv_width,
            "bytes written"
        );
        let rows = cache_places
            .iter()
            .map(|place| rows_of.row::<u16>(gpu, *place as usize));
        written.push(rows.flatten().collect());
    }
    written
}

#[test]
fn split_with_norms_is_the_norms_and_then_the_split() {
    for (i, case) in CASES.iter().enumerate() {
        let gpu = &mut gpu(i as u64);
        let qkv = case.rows_of(1);
        let (rows, rstd) = normed_rows(case, &qkv, &case.weights());
        // Keys before rotation are not kept everywhere.
        let keeps_raw = i % 3 != 1;
        let expected = split(gpu, case, ("split_qkv_bf16", keeps_raw), &rows, NO_NORMS);
        let (norms, scales) = norms(gpu, case);
        let kernel = ("split_qkv_norm_bf16", keeps_raw);
        let got = split(gpu, case, kernel, &qkv, norms);
        assert_eq!(got, expected, "{case:?}");
        for (scales, rstd) in scales.into_iter().zip(rstd) {
            assert!(gpu.unwritten(scales).is_empty(), "{case:?}");
            assert_eq!(gpu.download::<u32>(scales), rstd, "{case:?}");
        }
    }
}

/// Weights between two of which the result is in the middle of two numbers of bf16, so that another order of the
/// products gives the other one.
#[test]
fn split_with_norms_multiplies_by_rstd_before_the_weight() {
    let (case, gpu) = (case(1, [1, 1], 64, 0), &mut gpu(1));
    let qkv = case.rows_of(9);
    let weights = [0, 1].map(|part| {
        let head = &qkv[part * case.dim..][..case.dim];
        let (_, rstd) = normed(head, &vec![1.0; case.dim]);
        let weight = head.iter().map(|x| {
            let x = x.to_f32();
            let middle = f32::from_bits(bf16::from_f32(x * rstd).to_f32().to_bits() | 1 << 15);
            let near = (middle / (x * rstd)).to_bits();
            let near = (near - 4..near + 4).map(f32::from_bits);
            let low = |y: f32| bf16::from_f32(y);
            let mut differ = near.filter(|w| low(x * rstd * w) != low(x * (rstd * w)));
            differ.next().unwrap_or(1.0)
        });
        weight.collect::<Vec<f32>>()
    });
    assert!(weights.iter().flatten().any(|weight| *weight != 1.0));
    let (rows, _) = normed_rows(&case, &qkv, &weights);
    let expected = split(gpu, &case, ("split_qkv_bf16", true), &rows, NO_NORMS);
    let (norms, _) = norms_by(gpu, &case, &weights);
    let got = split(gpu, &case, ("split_qkv_norm_bf16", true), &qkv, norms);
    assert_eq!(got, expected);
}

/// Launches a split that keeps queries alone, with norms or without.
fn queries(gpu: &mut Gpu, case: &Case, qkv: &[bf16], norms: Option<SegattnHeadNorms>) -> Vec<u16> {
    let tables = Tables::new(gpu, POSITIONS, case.dim);
    let qkv = Matrix::of(gpu, "qkv", qkv, case.width(), case.gap);
    let q = Matrix::poisoned::<bf16>(gpu, "q", [case.rows, case.widths()[0]], case.gap);
    let [list, cache_rows] = [angles(case.rows), places(case.rows)[0].clone()]
        .map(|list| gpu.input("places", &list).expect("memory"));
    let params = SegattnQkvParams {
        qkv: qkv.view(),
        q: q.view(),
        k: NO_ROWS,
        raw_k: NO_ROWS,
        v: NO_ROWS,
        probes: NO_ROWS,
        cos: tables.buffers[0].ptr(),
        sin: tables.buffers[1].ptr(),
        angles: list.ptr(),
        cache_rows: cache_rows.ptr(),
        probe_rows: std::ptr::null(),
        norms: norms.unwrap_or(NO_NORMS),
        rows: case.rows as i64,
        q_heads: case.heads[0] as i32,
        kv_heads: norms.map_or(0, |_| case.heads[1] as i32),
        head_dim: case.dim as i32,
    };
    let rope = module("rope.cu");
    match norms {
        Some(_) => launch(
            gpu,
            &rope,
            "split_qkv_norm_bf16",
            case.blocks(),
            None,
            &params,
        ),
        None => {
            let blocks = (case.rows * case.widths()[0] / 16).div_ceil(256);
            launch(gpu, &rope, "split_qkv_bf16", blocks, None, &params);
        }
    }
    q.assert_only_rows_written(gpu, "q");
    bits(&q.read(gpu))
}

#[test]
fn split_of_queries_alone_has_the_bits_of_the_whole() {
    for case in [CASES[1], CASES[4]] {
        let gpu = &mut gpu(1);
        let qkv = case.rows_of(2);
        let (rows, rstd) = normed_rows(&case, &qkv, &case.weights());
        let expected = split(gpu, &case, ("split_qkv_bf16", true), &rows, NO_NORMS).remove(0);
        assert_eq!(queries(gpu, &case, &rows, None), expected, "{case:?}");
        let (norms, scales) = norms(gpu, &case);
        assert_eq!(queries(gpu, &case, &qkv, Some(norms)), expected, "{case:?}");
        assert_eq!(
            scales.map(|scales| gpu.download::<u32>(scales)),
            rstd,
            "{case:?}"
        );
    }
}

/// The gradient of the rows before the norms, bits.
fn gradient(gpu: &mut Gpu, case: &Case, [d_y, x]: [&[bf16]; 2], rstd: [Buffer; 2]) -> Vec<u16> {
    let [d_y, x] = [d_y, x].map(|rows| Matrix::of(gpu, "rows", rows, case.width(), case.gap));
    let d_x = Matrix::poisoned::<bf16>(gpu, "d_x", [case.rows, case.width()], 8);
    let (norms, _) = norms(gpu, case);
    let params = SegattnHeadNormsParams {
        d_y: d_y.view(),
        x: x.view(),
        d_x: d_x.view(),
        norms: SegattnHeadNorms {
            q_rstd: rstd[0].ptr(),
            k_rstd: rstd[1].ptr(),
            ..norms
        },
        rows: case.rows as i64,
        q_heads: case.heads[0] as i32,
        kv_heads: case.heads[1] as i32,
        head_dim: case.dim as i32,
    };
    let norm = module("norm.cu");
    launch(
        gpu,
        &norm,
        "head_norms_grad_bf16",
        case.blocks(),
        None,
        &params,
    );
    d_x.assert_only_rows_written(gpu, "d_x");
    bits(&d_x.read(gpu))
}

fn from_column(rows: &Matrix, column: usize) -> SegattnRows {
    let mut view = rows.view();
    view.data = view.data.wrapping_byte_add(2 * column);
    view
}

/// The same by `rms_norm_grad` of q and of k, added to zeros.
fn gradient_in_parts(
    gpu: &mut Gpu,
    case: &Case,
    [d_y, x]: [&[bf16]; 2],
    rstd: [Buffer; 2],
) -> Vec<u16> {
    let width = case.width();
    let [d_y_rows, x] = [d_y, x].map(|rows| Matrix::of(gpu, "rows", rows, width, 0));
    let d_x = Matrix::of(gpu, "d_x", &vec![bf16::ZERO; d_y.len()], width, 0);
    let columns = [0, case.widths()[0]];
    for (part, weight) in case.weights().iter().enumerate() {
        let weight = gpu.input("weight", weight).expect("memory");
        let norms = case.rows * case.heads[part];
        let params = SegattnNormParams {
            x: from_column(&x, columns[part]),
            weight: weight.ptr(),
            rstd: rstd[part].ptr(),
            d_y: from_column(&d_y_rows, columns[part]),
            d_x: from_column(&d_x, columns[part]),
            rows: norms as i64,
            width: case.dim as i32,
            groups: case.heads[part] as i32,
            add: 1,
            ..NO_NORM
        };
        let norm = module("norm.cu");
        launch(gpu, &norm, "rms_norm_grad_bf16", norms, Some(32), &params);
    }
    let mut rows: Vec<bf16> = d_x.read(gpu);
    let v = width - case.widths()[1];
    for (row, d_y) in rows.chunks_mut(width).zip(d_y.chunks(width)) {
        row[v..].copy_from_slice(&d_y[v..]);
    }
    bits(&rows)
}

#[test]
fn gradient_is_that_of_the_norms_of_q_and_of_k() {
    for case in &CASES {
        let gpu = &mut gpu(1);
        let (mut d_y, x) = (case.rows_of(3), case.rows_of(4));
        // Sums begin at zero, so a head without a gradient has no negative zeros.
        d_y[..case.dim].fill(bf16::NEG_ZERO);
        let (_, rstd) = normed_rows(case, &x, &case.weights());
        let rstd = rstd.map(|rstd| gpu.input("rstd", &rstd).expect("memory"));
        let expected = gradient_in_parts(gpu, case, [&d_y, &x], rstd);
        assert_eq!(gradient(gpu, case, [&d_y, &x], rstd), expected, "{case:?}");
    }
}

#[test]
fn split_has_the_same_bits_under_ten_schedules() {
    let (case, gpus) = (CASES[1], (0..10).map(gpu));
    let all = gpus.map(|mut gpu| {
        let (norms, _) = norms(&mut gpu, &case);
        let kernel = ("split_qkv_norm_bf16", true);
        split(&mut gpu, &case, kernel, &case.rows_of(5), norms)
    });
    let all: Vec<_> = all.collect();
    assert!(all.iter().all(|got| *got == all[0]));
}

#[test]
fn gradient_has_the_same_bits_under_ten_schedules() {
    let (case, gpus) = (CASES[1], (0..10).map(gpu));
    let (x, d_y) = (case.rows_of(5), case.rows_of(6));
    let (_, rstd) = normed_rows(&case, &x, &case.weights());
    let all = gpus.map(|mut gpu| {
        let rstd = [0, 1].map(|i| gpu.input("rstd", &rstd[i]).expect("memory"));
        gradient(&mut gpu, &case, [&d_y, &x], rstd)
    });
    let all: Vec<_> = all.collect();
    assert!(all.iter().all(|got| *got == all[0]));
}

/// Gradients of both weights, by launches for both norms or for one after the other.
fn weight_gradients(seed: u64, case: &Case, together: bool) -> Vec<Vec<u32>> {
    let gpu = &mut gpu(seed);
    let width = case.width();
    let (x, d_y) = (case.rows_of(7), case.rows_of(8));
    let [x, d_y] = [x, d_y].map(|rows| Matrix::of(gpu, "rows", &rows, width, case.gap));
    let columns = [0, case.widths()[0]];
    let parts = [0, 1].map(|part| {
        let rstd = values(case.rows * case.heads[part], 9 + part as u64);
        let rstd = gpu.input("rstd", &rstd).expect("memory");
        let before = &case.weights()[part];
        let d_weight = gpu.upload("d_weight", before).expect("memory");
        let norm = SegattnNormParams {
            x: from_column(&x, columns[part]),
            rstd: rstd.ptr(),
            d_y: from_column(&d_y, columns[part]),
            d_weight: d_weight.ptr(),
            rows: case.rows as i64,
            width: case.dim as i32,
            groups: case.heads[part] as i32,
            ..NO_NORM
        };
        (norm, d_weight)
    });
    let norms = parts.map(|(norm, _)| norm);
    match together {
        true => sum_groups_of(gpu, &norms),
        false => norms.iter().for_each(|norm| sum_groups_of(gpu, &[*norm])),
    }
    let gradients = parts.iter().map(|(_, d_weight)| gpu.download(*d_weight));
    gradients.collect()
}

#[test]
fn gradient_of_both_weights_is_that_of_each() {
    for case in [CASES[1], CASES[4], case(300, [5, 2], 64, 8)] {
        let expected = weight_gradients(0, &case, false);
        for seed in 1..4 {
            let got = weight_gradients(seed, &case, true);
            assert_eq!(got, expected, "{case:?}, seed {seed}");
        }
    }
}
