//! `kernels/norm.cu` under every check, against the formula in f64.

use std::sync::{Arc, OnceLock};

use half::bf16;
use segattn::cuda::kernels::layer_params::{SegattnNormParams, SegattnNormsParams};
use segattn_sim::{Gpu, Module};

use super::common::*;

const EPS: f32 = 1e-5;

fn norm() -> &'static Arc<Module> {
    static MODULE: OnceLock<Arc<Module>> = OnceLock::new();
    MODULE.get_or_init(|| module("norm.cu"))
}

/// Threads of a row, as the kernels expect them.
fn row_threads(width: usize) -> u32 {
    (width.div_ceil(512).max(1) * 32).min(1024) as u32
}

/// A launch of nothing.
pub const NO_NORM: SegattnNormParams = SegattnNormParams {
    x: NO_ROWS,
    residual: NO_ROWS,
    x_sum: NO_ROWS,
    weight: std::ptr::null(),
    y: NO_ROWS,
    rstd: std::ptr::null_mut(),
    d_y: NO_ROWS,
    d_x: NO_ROWS,
    d_weight: std::ptr::null_mut(),
    sums: std::ptr::null_mut(),
    rows: 0,
    width: 0,
    groups: 1,
    add: 0,
    eps: EPS,
};

struct Inputs {
    rows: usize,
    width: usize,
    x: Vec<bf16>,
    residual: Vec<bf16>,
    d_y: Vec<bf16>,
    d_x: Vec<bf16>,
    weight: Vec<f32>,
    d_weight: Vec<f32>,
}

impl Inputs {
    fn new(rows: usize, width: usize) -> Inputs {
        let salt = (rows * 100_003 + width) as u64;
        let matrix = |n| bf16_values(rows * width, salt + n);
        Inputs {
            rows,
            width,
            x: matrix(1),
            residual: matrix(2),
            d_y: matrix(3),
            d_x: matrix(4),
            weight: values(width, salt + 5),
            d_weight: values(width, salt + 6),
        }
    }
}

#[derive(Debug, Clone, PartialEq)]
struct Outputs {
    x_sum: Vec<u16>,
    y: Vec<u16>,
    rstd: Vec<u32>,
    d_x: Vec<u16>,
    d_weight: Vec<u32>,
}

/// All three kernels, the gradients from the forward's results; rows `gap` elements apart.
fn run(gpu: &mut Gpu, inputs: &Inputs, with_residual: bool, gap: usize) -> Outputs {
    run_in_groups(gpu, inputs, with_residual, (gap, 1))
}

/// The same with `groups` rows of the norm in a row of memory.
fn run_in_groups(
    gpu: &mut Gpu,
    inputs: &Inputs,
    with_residual: bool,
    (gap, groups): (usize, usize),
) -> Outputs {
    let (rows, width) = (inputs.rows, inputs.width);
    let in_memory = groups * width;
    let size = [rows / groups, in_memory];
    let x = Matrix::of(gpu, "x", &inputs.x, in_memory, gap);
    let residual = Matrix::of(gpu, "residual", &inputs.residual, in_memory, gap + 8);
    let x_sum = Matrix::poisoned::<bf16>(gpu, "x_sum", size, gap + 16);
    let y = Matrix::poisoned::<bf16>(gpu, "y", size, gap);
    let d_y = Matrix::of(gpu, "d_y", &inputs.d_y, in_memory, gap);
    let d_x = Matrix::of(gpu, "d_x", &inputs.d_x, in_memory, gap);
    let rstd = gpu.alloc("rstd", rows * 4).expect("memory");
    let weight = gpu.input("weight", &inputs.weight).expect("memory");
    let d_weight = gpu.upload("d_weight", &inputs.d_weight).expect("memory");
    let mut params = SegattnNormParams {
        x: x.view(),
        residual: if with_residual {
            residual.view()
        } else {
            NO_ROWS
        },
        x_sum: x_sum.view(),
        weight: weight.ptr(),
        y: y.view(),
        rstd: rstd.ptr(),
        d_y: d_y.view(),
        d_x: d_x.view(),
        d_weight: d_weight.ptr(),
        rows: rows as i64,
        width: width as i32,
        groups: groups as i32,
        add: 1,
        ..NO_NORM
    };
    let threads = Some(row_threads(width));
    launch(gpu, norm(), "rms_norm_bf16", rows, threads, &params);
    if with_residual {
        params.x = x_sum.view();
        x_sum.assert_only_rows_written(gpu, "x_sum");
    }
    launch(gpu, norm(), "rms_norm_grad_bf16", rows, threads, &params);
    match groups {
        1 => launch(
            gpu,
            norm(),
            "rms_norm_weight_grad_bf16",
            width.div_ceil(16),
            None,
            &params,
        ),
        _ => sum_groups(gpu, params),
    }
    y.assert_only_rows_written(gpu, "y");
    d_x.assert_only_rows_written(gpu, "d_x");
    assert!(gpu.unwritten(rstd).is_empty());
    let x_sum = if with_residual { x_sum } else { x };
    Outputs {
        x_sum: bits(&x_sum.read(gpu)),
        y: bits(&y.read(gpu)),
        rstd: gpu.download(rstd),
        d_x: bits(&d_x.read(gpu)),
        d_weight: gpu.download(d_weight),
    }
}

/// The gradient of the weight by way of the sums of groups.
fn sum_groups(gpu: &mut Gpu, params: SegattnNormParams) {
    let rows = params.rows / i64::from(params.groups);
    sum_groups_of(gpu, &[SegattnNormParams { rows, ..params }]);
}

/// The gradients of the weights of one norm, or of two of as many rows of memory and columns, in two launches.
pub fn sum_groups_of(gpu: &mut Gpu, norms: &[SegattnNormParams]) {
    let (rows, width) = (norms[0].rows as usize, norms[0].width as usize);
    let (padded, tiles) = (rows.next_multiple_of(4), width.div_ceil(32));
    let sums = norms.iter().map(|norm| {
        let sums = gpu.alloc("sums", tiles * padded * 32 * 4).expect("memory");
        let norm = SegattnNormParams {
            sums: sums.ptr(),
            ..*norm
        };
        (sums, norm)
    });
    let (sums, mut parts): (Vec<_>, Vec<_>) = sums.unzip();
    parts.resize(2, NO_NORM);
    let mut stage = |kernel: &str, blocks: usize| {
        let params = SegattnNormsParams {
            norms: [parts[0], parts[1]],
            blocks: blocks as i32,
        };
        launch(gpu, norm(), kernel, norms.len() * blocks, None, &params);
    };
    let kernel = "rms_norm_group_sums_bf16";
    let threads = info(norm(), kernel, size_of::<SegattnNormsParams>()).threads as usize;
    stage(kernel, (padded * width / 8).div_ceil(threads));
    stage("rms_norm_chain_f32", tiles);
    for sums in sums {
        let unwritten: usize = gpu.unwritten(sums).iter().map(|range| range.len()).sum();
        let beyond = tiles * 32 - width;
        assert_eq!(unwritten, beyond * padded * 4, "columns that are none");
    }
}

/// y, d_x and d_weight by the formula, in f64; `round` after every operation.
fn formula(inputs: &Inputs, x: &[f64], round: impl Fn(f64) -> f64) -> [Vec<f64>; 3] {
    let width = inputs.width;
    let (d_y, d_x) = (wide(&inputs.d_y), wide(&inputs.d_x));
    let weight: Vec<f64> = inputs.weight.iter().map(|w| round(f64::from(*w))).collect();
    let (mut y, mut grad) = (Vec::new(), Vec::new());
    let mut d_weight: Vec<f64> = inputs.d_weight.iter().map(|w| f64::from(*w)).collect();
    for r in 0..inputs.rows {
        let (x, d_y) = (&x[r * width..][..width], &d_y[r * width..][..width]);
        let squares: f64 = x.iter().map(|x| x * x).sum();
        let rstd = round(1.0 / (squares / width as f64 + f64::from(EPS)).sqrt());
        let along: f64 = (0..width).map(|i| d_y[i] * weight[i] * x[i]).sum();
        let pull = round(along / width as f64 * rstd * rstd * rstd);
        for i in 0..width {
            y.push(round(round(x[i] * rstd) * weight[i]));
            let step = round(round(d_y[i] * weight[i]) * rstd) - round(x[i] * pull);
            grad.push(round(d_x[r * width + i] + round(step)));
            d_weight[i] += round(d_y[i] * round(x[i] * rstd));
        }
    }
    [y, grad, d_weight]
}

fn from_bits(bits: &[u16]) -> Vec<f64> {
    bits.iter().map(|b| bf16::from_bits(*b).to_f64()).collect()
}

#[test]
fn forward_and_gradients_agree_with_the_formula() {
    for (rows, width, with_residual, gap) in [
        (1, 8, false, 0),
        (3, 264, true, 8),
        (70, 40, true, 0),
        (129, 1032, false, 16),
        (1100, 24, false, 0),
        (2, 4096, true, 0),
        (1, 16384, false, 0),
    ] {
        let inputs = Inputs::new(rows, width);
        let outputs = run(&mut gpu(1), &inputs, with_residual, gap);
        let x: Vec<f64> = from_bits(&outputs.x_sum);
        if with_residual {
            let sums = inputs.x.iter().zip(&inputs.residual);
            let sums: Vec<u16> = sums
                .map(|(a, b)| bf16::from_f32(a.to_f32() + b.to_f32()).to_bits())
                .collect();
            assert_eq!(outputs.x_sum, sums, "the residual sum is rounded once");
        }
        let (exact, plain) = (formula(&inputs, &x, |x| x), formula(&inputs, &x, low));
        let got = [
            from_bits(&outputs.y),
            from_bits(&outputs.d_x),
            outputs
                .d_weight
                .iter()
                .map(|b| f64::from(f32::from_bits(*b)))
                .collect(),
        ];
        for (i, name) in ["y", "d_x", "d_weight"].iter().enumerate() {
            assert_close(
                &format!("{name} of {rows} x {width}"),
                &got[i],
                &plain[i],
                &exact[i],
            );
        }
    }
}

#[test]
fn a_gradient_that_is_set_does_not_read_what_was_there() {
    let inputs = Inputs::new(3, 264);
    let gpu = &mut gpu(1);
    let [x, d_y] = [&inputs.x, &inputs.d_y].map(|rows| Matrix::of(gpu, "rows", rows, 264, 0));
    let d_x = Matrix::poisoned::<bf16>(gpu, "d_x", [3, 264], 8);
    let rstd = gpu.input("rstd", &[0.5f32, 1.0, 2.0]).expect("memory");
    let weight = gpu.input("weight", &inputs.weight).expect("memory");
    let params = SegattnNormParams {
        x: x.view(),
        weight: weight.ptr(),
        rstd: rstd.ptr(),
        d_y: d_y.view(),
        d_x: d_x.view(),
        rows: 3,
        width: 264,
        ..NO_NORM
    };
    let threads = Some(row_threads(264));
    launch(gpu, norm(), "rms_norm_grad_bf16", 3, threads, &params);
    d_x.assert_only_rows_written(gpu, "d_x");
}

#[test]
fn what_is_normed_is_the_residual_sum_as_it_is_rounded() {
    let inputs = Inputs::new(5, 520);
    let summed = run(&mut gpu(1), &inputs, true, 0);
    let x = summed.x_sum.iter().map(|bits| bf16::from_bits(*bits));
    let alone = Inputs {
        x: x.collect(),
        ..Inputs::new(5, 520)
    };
    assert_eq!(run(&mut gpu(1), &alone, false, 0), summed);
}

#[test]
fn eps_counts_where_a_row_is_tiny() {
    let mut inputs = Inputs::new(2, 64);
    inputs.x.fill(bf16::from_f32(1e-3));
    let outputs = run(&mut gpu(1), &inputs, false, 0);
    let exact = 1.0 / (bf16::from_f32(1e-3).to_f64().powi(2) + f64::from(EPS)).sqrt();
    for bits in outputs.rstd {
        assert!((f64::from(f32::from_bits(bits)) / exact - 1.0).abs() < 1e-6);
    }
}

#[test]
fn no_rows_leave_the_weight_gradient_as_it_is() {
    let inputs = Inputs::new(0, 64);
    let outputs = run(&mut gpu(1), &inputs, true, 0);
    let before: Vec<u32> = inputs.d_weight.iter().map(|w| w.to_bits()).collect();
    assert_eq!(outputs.d_weight, before);
}

/// The gradient of the weight in f32, in the order of the contract: the groups of a row, then the rows.
fn chained(inputs: &Inputs, outputs: &Outputs, groups: usize) -> Vec<u32> {
    let [x, d_y] = [&outputs.x_sum, &bits(&inputs.d_y)].map(|rows| {
        rows.iter()
            .map(|b| bf16::from_bits(*b).to_f32())
            .collect::<Vec<_>>()
    });
    let rstd = |norm: usize| f32::from_bits(outputs.rstd[norm]);
    let mut d_weight = inputs.d_weight.clone();
    for row in 0..inputs.rows / groups {
        for (i, d_weight) in d_weight.iter_mut().enumerate() {
            let term = |norm: usize| {
                let at = norm * inputs.width + i;
                d_y[at] * (x[at] * rstd(norm))
            };
            let sum = (row * groups..(row + 1) * groups).fold(0.0, |sum, norm| sum + term(norm));
            *d_weight += sum;
        }
    }
    d_weight.into_iter().map(f32::to_bits).collect()
}

#[test]
fn groups_of_a_row_are_normed_as_rows_are_and_summed_before_the_rows() {
    let inputs = Inputs::new(84, 40);
    let expected = run(&mut gpu(1), &inputs, true, 0);
    for groups in [2, 3, 7, 84] {
        let got = run_in_groups(&mut gpu(2), &inputs, true, (8, groups));
        let expected = Outputs {
            d_weight: chained(&inputs, &got, groups),
            ..expected.clone()
        };
        assert_eq!(got, expected, "{groups} groups");
    }
}

/// Rows around the chain's 256 and around four, columns around its 32 and the blocks of the sums.
#[test]
fn the_chain_over_rows_of_groups_has_no_other_order_anywhere() {
    for (rows, groups, width) in [
        (1, 2, 8),
        (255, 2, 32),
        (258, 2, 136),
        (516, 3, 24),
        (770, 5, 8),
    ] {
        let inputs = Inputs::new(rows * groups, width);
        let got = run_in_groups(&mut gpu(3), &inputs, false, (0, groups));
        let name = format!("{rows} rows of {groups} groups of {width}");
        assert_eq!(got.d_weight, chained(&inputs, &got, groups), "{name}");
    }
}

#[test]
fn a_shared_weight_has_a_path_of_its_own() {
    let params = SegattnNormParams {
        groups: 2,
        ..NO_NORM
    };
    let mut gpu = gpu(1);
    let function = norm().kernel("rms_norm_weight_grad_bf16").expect("kernel");
    let shared = info(norm(), "rms_norm_weight_grad_bf16", size_of_val(&params)).shared;
    let launched = gpu.launch(&function, [1, 1, 1], [256, 1, 1], shared, &params);
    assert!(launched.is_err());
}

#[test]
fn without_x_the_rows_are_summed() {
    let (rows, width) = (300, 72);
    let inputs = Inputs::new(rows, width);
    let gpu = &mut gpu(1);
    let d_y = Matrix::of(gpu, "d_y", &inputs.d_y, width, 8);
    let d_weight = gpu.upload("sums", &inputs.d_weight).expect("memory");
    let params = SegattnNormParams {
        d_y: d_y.view(),
        d_weight: d_weight.ptr(),
        rows: rows as i64,
        width: width as i32,
        ..NO_NORM
    };
    let (kernel, blocks) = ("rms_norm_weight_grad_bf16", width.div_ceil(16));
    launch(gpu, norm(), kernel, blocks, None, &params);
    let mut expected = inputs.d_weight.clone();
    for row in inputs.d_y.chunks(width) {
        let terms = expected.iter_mut().zip(row);
        terms.for_each(|(sum, x)| *sum += x.to_f32());
    }
    assert_eq!(gpu.download::<f32>(d_weight), expected);
}

#[test]
fn twenty_schedules_give_the_same_bits() {
    let inputs = Inputs::new(67, 520);
    let first = run(&mut gpu(0), &inputs, true, 8);
    for seed in 1..20 {
        assert_eq!(run(&mut gpu(seed), &inputs, true, 8), first, "seed {seed}");
    }
}

#[test]
fn twenty_schedules_of_groups_give_the_same_bits() {
    let inputs = Inputs::new(3 * 517, 40);
    let run = |seed| run_in_groups(&mut gpu(seed), &inputs, false, (8, 3)).d_weight;
    let first = run(0);
    for seed in 1..20 {
        assert_eq!(run(seed), first, "seed {seed}");
    }
}

#[test]
fn a_row_alone_has_the_bits_it_has_among_others() {
    let all = Inputs::new(9, 520);
    let together = run(&mut gpu(1), &all, true, 0);
    let row = 5 * 520..6 * 520;
    let alone = Inputs {
        rows: 1,
        width: 520,
        x: all.x[row.clone()].to_vec(),
        residual: all.residual[row.clone()].to_vec(),
        d_y: all.d_y[row.clone()].to_vec(),
        d_x: all.d_x[row.clone()].to_vec(),
        weight: all.weight.clone(),
        d_weight: all.d_weight.clone(),
    };
    let alone = run(&mut gpu(2), &alone, true, 24);
    assert_eq!(alone.y, together.y[row.clone()]);
    assert_eq!(alone.d_x, together.d_x[row]);
    assert_eq!(alone.rstd[0], together.rstd[5]);
}

#[test]
fn the_weight_gradient_does_not_depend_on_how_rows_are_spread_over_calls() {
    for groups in [1, 3] {
        let all = Inputs::new(90 * groups, 64);
        let together = run_in_groups(&mut gpu(1), &all, false, (0, groups));
        let mut d_weight = all.d_weight.clone();
        for rows in [0..7, 7..75, 75..90] {
            let at = rows.start * groups * 64..rows.end * groups * 64;
            let part = Inputs {
                rows: rows.len() * groups,
                width: 64,
                x: all.x[at.clone()].to_vec(),
                residual: Vec::new(),
                d_y: all.d_y[at.clone()].to_vec(),
                d_x: all.d_x[at].to_vec(),
                weight: all.weight.clone(),
                d_weight,
            };
            let bits = run_in_groups(&mut gpu(3), &part, false, (0, groups)).d_weight;
            d_weight = bits.into_iter().map(f32::from_bits).collect();
        }
        let bits: Vec<u32> = d_weight.iter().map(|w| w.to_bits()).collect();
        assert_eq!(bits, together.d_weight, "{groups} groups");
    }
}

#[test]
fn offsets_beyond_32_bits_are_kept() {
    let (rows, width, stride) = (3usize, 64, 1usize << 32);
    let inputs = Inputs::new(rows, width);
    let mut gpu = gpu(1);
    let rstd = gpu.alloc("rstd", rows * 4).expect("memory");
    let weight = gpu.input("weight", &inputs.weight).expect("memory");
    let mut far = |name: &str| {
        gpu.alloc(name, ((rows - 1) * stride + width) * 2)
            .expect("memory")
    };
    let (x, y) = (far("x"), far("y"));
    for r in 0..rows {
        gpu.write(x, r * stride * 2, &inputs.x[r * width..(r + 1) * width]);
    }
    let view = |buffer: segattn_sim::Buffer| segattn::cuda::kernels::layer_params::SegattnRows {
        data: buffer.ptr(),
        stride: stride as i64,
    };
    let params = SegattnNormParams {
        x: view(x),
        weight: weight.ptr(),
        y: view(y),
        rstd: rstd.ptr(),
        rows: rows as i64,
        width: width as i32,
        ..NO_NORM
    };
    launch(&mut gpu, norm(), "rms_norm_bf16", rows, Some(32), &params);
    let near = run(&mut super::common::gpu(1), &inputs, false, 0);
    for r in 0..rows {
        let got: Vec<bf16> = gpu.download_range(y, r * stride * 2, width);
        assert_eq!(bits(&got), near.y[r * width..(r + 1) * width]);
    }
}

#[test]
fn another_number_of_threads_is_refused() {
    let inputs = Inputs::new(1, 64);
    let mut gpu = gpu(1);
    let x = Matrix::of(&mut gpu, "x", &inputs.x, 64, 0);
    let function = norm().kernel("rms_norm_bf16").expect("kernel");
    let params = SegattnNormParams {
        x: x.view(),
        rows: 1,
        width: 64,
        ..NO_NORM
    };
    assert!(
        gpu.launch(&function, [1, 1, 1], [64, 1, 1], 1024, &params)
            .is_err()
    );
}
