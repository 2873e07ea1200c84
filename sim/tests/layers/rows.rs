//! `kernels/copy.cu`, `kernels/swiglu.cu` and `kernels/embedding.cu` under every check, against their formulas.

use half::bf16;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use segattn::cuda::kernels::layer_params::{
    SegattnCopyParams, SegattnEmbedParams, SegattnSwigluParams,
};

use super::common::*;

fn run_swiglu(seed: u64, rows: usize, inner: usize, gap: usize) -> [Vec<bf16>; 4] {
    let gpu = &mut gpu(seed);
    let mut gate_up = bf16_values(rows * 2 * inner, 1);
    // Gates so far off that the exponential overflows or vanishes.
    for (x, extreme) in gate_up.iter_mut().zip([-1e4, -100.0, 100.0, 1e4, 0.0]) {
        *x = bf16::from_f32(extreme);
    }
    let d_y = bf16_values(rows * inner, 2);
    let size = [rows, inner];
    let (gate_up_rows, d_y_rows) = (
        Matrix::of(gpu, "gate_up", &gate_up, 2 * inner, gap),
        Matrix::of(gpu, "d_y", &d_y, inner, gap),
    );
    let [y, again] = ["y", "again"].map(|name| Matrix::poisoned::<bf16>(gpu, name, size, gap));
    let d_gate_up = Matrix::poisoned::<bf16>(gpu, "d_gate_up", [rows, 2 * inner], gap);
    let mut params = SegattnSwigluParams {
        gate_up: gate_up_rows.view(),
        y: y.view(),
        d_y: d_y_rows.view(),
        d_gate_up: d_gate_up.view(),
        rows: rows as i64,
        inner: inner as i32,
    };
    let (blocks, module) = ((rows * inner / 8).div_ceil(256), module("swiglu.cu"));
    launch(gpu, &module, "swiglu_bf16", blocks, None, &params);
    params.y = NO_ROWS;
    launch(gpu, &module, "swiglu_grad_bf16", blocks, None, &params);
    let alone = d_gate_up.read::<u16>(gpu);
    params.y = again.view();
    launch(gpu, &module, "swiglu_grad_bf16", blocks, None, &params);
    assert_eq!(d_gate_up.read::<u16>(gpu), alone, "with y and without");
    for result in [&y, &again, &d_gate_up] {
        result.assert_only_rows_written(gpu, "result");
    }
    let [y, again, d_gate_up] = [&y, &again, &d_gate_up].map(|m| m.read::<bf16>(gpu));
    assert_eq!(bits(&y), bits(&again), "the gradient's y is the forward's");
    [gate_up, d_y, y, d_gate_up]
}

#[test]
fn swiglu_and_its_gradient_agree_with_the_formula() {
    for (rows, inner, gap) in [(1, 8, 0), (7, 344, 8), (3, 2048, 0), (0, 64, 0)] {
        let [gate_up, d_y, y, d_gate_up] = run_swiglu(1, rows, inner, gap).map(|x| wide(&x));
        let formula = |round: fn(f64) -> f64| {
            let (mut y, mut d) = (Vec::new(), Vec::new());
            for (row, d_y) in gate_up.chunks(2 * inner).zip(d_y.chunks(inner)) {
                let sigmoid = |i: usize| round(1.0 / (1.0 + (-row[i]).exp()));
                let up = |i: usize| row[inner + i];
                y.extend((0..inner).map(|i| round(round(row[i] * sigmoid(i)) * up(i))));
                d.extend((0..inner).map(|i| {
                    let slope = round(1.0 + round(row[i] * round(1.0 - sigmoid(i))));
                    round(round(round(d_y[i] * up(i)) * sigmoid(i)) * slope)
                }));
                d.extend((0..inner).map(|i| round(d_y[i] * round(row[i] * sigmoid(i)))));
            }
            [y, d]
        };
        let (exact, plain) = (formula(|x| x), formula(low));
        assert_close("y", &y, &plain[0], &exact[0]);
        assert_close("d_gate_up", &d_gate_up, &plain[1], &exact[1]);
    }
}

#[test]
fn swiglu_gives_the_same_bits_under_twenty_schedules() {
    let first = run_swiglu(0, 5, 520, 0).map(|x| bits(&x));
    assert!((1..20).all(|seed| run_swiglu(seed, 5, 520, 0).map(|x| bits(&x)) == first));
}

/// Tokens, few of them distinct, rows sorted by token, and where each token's begin.
fn sorted(rows: usize, vocab: u32) -> (Vec<u32>, Vec<i32>, Vec<i32>) {
    let mut rng = ChaCha8Rng::seed_from_u64(rows as u64);
    let tokens: Vec<u32> = (0..rows).map(|_| rng.random_range(0..vocab)).collect();
    let mut order: Vec<i32> = (0..rows as i32).collect();
    order.sort_by_key(|r| tokens[*r as usize]);
    let starts = (0..rows)
        .filter(|i| *i == 0 || tokens[order[*i] as usize] != tokens[order[*i - 1] as usize]);
    let starts = starts.map(|i| i as i32).chain([rows as i32]).collect();
    (tokens, order, starts)
}

/// Sum of the rows of each token onto the table, in f32, as the contract's order has it; and the kernels' results.
fn run_embed(seed: u64, rows: usize, width: usize, vocab: u32) -> [Vec<u32>; 2] {
    let gpu = &mut gpu(seed);
    let (tokens, order, starts) = sorted(rows, vocab);
    let table = bf16_values(vocab as usize * width, 1);
    let d_y = bf16_values(rows * width, 2);
    let mut sums = values(vocab as usize * width, 3);
    let table_rows = Matrix::of(gpu, "table", &table, width, 0);
    let y = Matrix::poisoned::<bf16>(gpu, "y", [rows, width], 8);
    let d_y_rows = Matrix::of(gpu, "d_y", &d_y, width, 16);
    let d_table = Matrix::of(gpu, "d_table", &sums, width, 0);
    let tokens_at = gpu.input("tokens", &tokens).expect("memory");
    let [order, starts_at] = [("order", &order), ("starts", &starts)]
        .map(|(name, x)| gpu.input(name, x).expect("memory"));
    let mut params = SegattnEmbedParams {
        table: table_rows.view(),
        tokens: tokens_at.ptr(),
        y: y.view(),
        d_table: d_table.view(),
        order: order.ptr(),
        run_start: starts_at.ptr(),
        rows: rows as i64,
        runs: starts.len() as i32 - 1,
        width: width as i32,
    };
    let module = module("embedding.cu");
    launch(
        gpu,
        &module,
        "embed_bf16",
        (rows * width / 8).div_ceil(256),
        None,
        &params,
    );
    y.assert_only_rows_written(gpu, "y");
    for (r, token) in tokens.iter().enumerate() {
        let at = *token as usize * width;
        assert_eq!(
            bits(&y.read::<bf16>(gpu)[r * width..][..width]),
            bits(&table[at..at + width])
        );
        for i in 0..width {
            sums[at + i] += d_y[r * width + i].to_f32();
        }
    }
    params.y = d_y_rows.view();
    let warps = (starts.len() - 1) * width.div_ceil(256);
    launch(
        gpu,
        &module,
        "embed_grad_bf16",
        warps.div_ceil(4),
        None,
        &params,
    );
    let got = d_table.read::<f32>(gpu);
    [got, sums].map(|x| x.iter().map(|x| x.to_bits()).collect())
}

#[test]
fn embedding_copies_rows_and_its_gradient_adds_them_in_order() {
    for (rows, width, vocab) in [(1, 8, 1), (60, 264, 2), (33, 512, 40), (0, 64, 3)] {
        let [got, expected] = run_embed(1, rows, width, vocab);
        assert!(got == expected, "{rows} rows of {width}");
    }
    for seed in 2..22 {
        let [got, expected] = run_embed(seed, 30, 40, 4);
        assert!(got == expected, "seed {seed}");
    }
}

/// An element of either precision.
trait Element: bytemuck::Pod {
    const NAME: &'static str;
    fn of(x: f32) -> Self;
    fn wide(self) -> f32;
}

impl Element for bf16 {
    const NAME: &'static str = "bf16";
    fn of(x: f32) -> Self {
        bf16::from_f32(x)
    }
    fn wide(self) -> f32 {
        self.to_f32()
    }
}

impl Element for f32 {
    const NAME: &'static str = "f32";
    fn of(x: f32) -> Self {
        x
    }
    fn wide(self) -> f32 {
        self
    }
}

/// Copies rows, and compares every bit with the formula, rounded once.
fn check_copy<Src: Element, Dst: Element>([rows, width]: [usize; 2], gap: usize, add: bool) {
    let gpu = &mut gpu(1);
    let of = |salt| values(rows * width, salt);
    let from: Vec<Src> = of(1).into_iter().map(Src::of).collect();
    let before: Vec<Dst> = of(2).into_iter().map(Dst::of).collect();
    let src = Matrix::of(gpu, "src", &from, width, gap);
    let dst = match add {
        true => Matrix::of(gpu, "dst", &before, width, gap),
        false => Matrix::poisoned::<Dst>(gpu, "dst", [rows, width], gap),
    };
    let vectors = width.is_multiple_of(8) && gap.is_multiple_of(8);
    let factor = 1.7;
    let params = SegattnCopyParams {
        src: src.view(),
        dst: dst.view(),
        rows: rows as i64,
        width: width as i32,
        vectors: vectors.into(),
        add: add.into(),
        factor,
    };
    let threads = rows * width / if vectors { 8 } else { 1 };
    let name = format!("copy_{}_{}", Src::NAME, Dst::NAME);
    let blocks = threads.div_ceil(256);
    launch(gpu, &module("copy.cu"), &name, blocks, None, &params);
    dst.assert_only_rows_written(gpu, "dst");
    let got = dst.read::<Dst>(gpu);
    for (i, (src, dst)) in from.iter().zip(&before).enumerate() {
        let term = factor * src.wide();
        let sum = if add { dst.wide() + term } else { term };
        let (got, expected) = (got[i].wide(), Dst::of(sum).wide());
        assert_eq!(got.to_bits(), expected.to_bits(), "{name}, element {i}");
    }
}

#[test]
fn copies_of_either_precision_are_rounded_once() {
    // Vectors and single elements, more than a block of threads of each.
    for (size, gap) in [([9, 264], 8), ([3, 100], 3), ([1, 8], 1), ([0, 8], 0)] {
        for add in [false, true] {
            check_copy::<bf16, bf16>(size, gap, add);
            check_copy::<bf16, f32>(size, gap, add);
            check_copy::<f32, bf16>(size, gap, add);
            check_copy::<f32, f32>(size, gap, add);
        }
    }
}
