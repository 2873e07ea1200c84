//! GEMMs of the CPU device: right against f64, and every element the same bits whatever
//! surrounds it: other rows, threads, strides, or a sum done in two calls.

mod random;

use proptest::prelude::*;
use random::random_bits;
use segattn::device::cpu::PackedMatrix;
use segattn::device::cpu::gemm::{Strided, gemm, linear, linear_input_grad, linear_weight_grad};

/// Reproducible values of mixed sign and size with a mean off zero.
fn values(len: usize, seed: u64) -> Vec<f32> {
    let mut bits = random_bits(seed);
    let mut next = || (bits() >> 40) as f32 / (1 << 24) as f32;
    (0..len)
        .map(|_| (next() - 0.4) * (1.0 + 4.0 * next()))
        .collect()
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

/// Norm of the difference over norm.
fn relative_error(got: &[f32], expected: &[f64]) -> f64 {
    let norm = |x: f64| if x == 0.0 { 1.0 } else { x };
    let diff: f64 = got
        .iter()
        .zip(expected)
        .map(|(g, e)| (*g as f64 - e).powi(2))
        .sum();
    let all: f64 = expected.iter().map(|e| e * e).sum();
    assert_eq!(got.len(), expected.len());
    (diff / norm(all)).sqrt()
}

/// c + a[m, k] b[k, n] in f64, elements through functions.
fn product(
    [m, n, k]: [usize; 3],
    a: impl Fn(usize, usize) -> f32,
    b: impl Fn(usize, usize) -> f32,
    c: &[f32],
) -> Vec<f64> {
    let mut out: Vec<f64> = c.iter().map(|&c| c as f64).collect();
    for i in 0..m {
        for p in 0..k {
            for j in 0..n {
                out[i * n + j] += a(i, p) as f64 * b(p, j) as f64;
            }
        }
    }
    out
}

fn with_threads<T: Send>(threads: usize, f: impl FnOnce() -> T + Send) -> T {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
    pool.expect("a thread pool").install(f)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn the_three_products_of_a_layer_agree_with_f64(
        rows in 1usize..70, outputs in 1usize..150, inputs in 1usize..600, seed: u64,
        kept_transposed: bool, accumulate: bool,
    ) {
        let (x, dy) = (values(rows * inputs, seed), values(rows * outputs, seed ^ 1));
        let w = values(outputs * inputs, seed ^ 2);
        let packed = PackedMatrix::pack(&w, outputs, inputs, kept_transposed);
        let start = |len, s| if accumulate { values(len, seed ^ s) } else { vec![0.0; len] };
        let fresh = |start: &[f32]| if accumulate { start.to_vec() } else { vec![f32::NAN; start.len()] };

        let y0 = start(rows * outputs, 3);
        let mut y = fresh(&y0);
        linear(&x, inputs, rows, &packed, &mut y, outputs, accumulate);
        let expected = product([rows, outputs, inputs], |i, p| x[i * inputs + p], |p, j| w[j * inputs + p], &y0);
        prop_assert!(relative_error(&y, &expected) < 1e-6);

        let dx0 = start(rows * inputs, 4);
        let mut dx = fresh(&dx0);
        linear_input_grad(&dy, outputs, rows, &packed, &mut dx, inputs, accumulate);
        let expected = product([rows, inputs, outputs], |i, p| dy[i * outputs + p], |p, j| w[p * inputs + j], &dx0);
        prop_assert!(relative_error(&dx, &expected) < 1e-6);

        let dw0 = values(outputs * inputs, seed ^ 5);
        let mut dw = dw0.clone();
        linear_weight_grad(&dy, outputs, &x, inputs, rows, &mut dw, [outputs, inputs]);
        let expected = product([outputs, inputs, rows], |i, p| dy[p * outputs + i], |p, j| x[p * inputs + j], &dw0);
        prop_assert!(relative_error(&dw, &expected) < 1e-6);
    }

    #[test]
    fn a_row_has_the_same_bits_alone_and_among_others(
        rows in 2usize..60, outputs in 1usize..300, inputs in 1usize..700, seed: u64,
    ) {
        let x = values(rows * inputs, seed);
        let packed = PackedMatrix::pack(&values(outputs * inputs, seed ^ 1), outputs, inputs, true);
        let mut y = vec![f32::NAN; rows * outputs];
        linear(&x, inputs, rows, &packed, &mut y, outputs, false);
        for count in [1, 2, 5, 13] {
            for first in (0..rows).step_by(count) {
                let count = count.min(rows - first);
                let mut part = vec![f32::NAN; count * outputs];
                linear(&x[first * inputs..], inputs, count, &packed, &mut part, outputs, false);
                prop_assert_eq!(bits(&part), bits(&y[first * outputs..][..count * outputs]));
            }
        }
    }

    #[test]
    fn a_sum_cut_in_two_calls_has_the_same_bits(
        m in 1usize..40, n in 1usize..100, k in 2usize..900, cut in 0.0f64..1.0, seed: u64,
    ) {
        let (a, b) = (values(m * k, seed), values(k * n, seed ^ 1));
        let cut = ((k as f64 * cut) as usize).clamp(1, k - 1);
        let mut whole = vec![f32::NAN; m * n];
        gemm([m, n, k], Strided::rows(&a, k), Strided::rows(&b, n), &mut whole, n, false);
        let mut parts = vec![f32::NAN; m * n];
        gemm([m, n, cut], Strided::rows(&a, k), Strided::rows(&b, n), &mut parts, n, false);
        let (a, b) = (Strided::rows(&a[cut..], k), Strided::rows(&b[cut * n..], n));
        gemm([m, n, k - cut], a, b, &mut parts, n, true);
        prop_assert_eq!(bits(&parts), bits(&whole));
    }

    #[test]
    fn strides_change_no_bit_and_gaps_stay_untouched(
        m in 1usize..40, n in 1usize..100, k in 1usize..400, gaps in any::<[u8; 3]>(), seed: u64,
        turned in any::<[bool; 2]>(),
    ) {
        let (a, b) = (values(m * k, seed), values(k * n, seed ^ 1));
        let mut expected = vec![f32::NAN; m * n];
        gemm([m, n, k], Strided::rows(&a, k), Strided::rows(&b, n), &mut expected, n, false);

        let spread = |x: &[f32], rows: usize, cols: usize, gap: u8, turned: bool| {
            let (row, col) = if turned { (1, rows + gap as usize) } else { (cols + gap as usize, 1) };
            let mut data = vec![f32::NAN; (rows - 1) * row + (cols - 1) * col + 1];
            for (at, x) in x.iter().enumerate() {
                data[at / cols * row + at % cols * col] = *x;
            }
            (data, row, col)
        };
        let (a, row, col) = spread(&a, m, k, gaps[0], turned[0]);
        let a = Strided { data: &a, row, col };
        let (b, row, col) = spread(&b, k, n, gaps[1], turned[1]);
        let b = Strided { data: &b, row, col };
        let stride = n + gaps[2] as usize;
        let mut c = vec![-7.0; m * stride];
        gemm([m, n, k], a, b, &mut c, stride, false);
        for (row, expected) in c.chunks(stride).zip(expected.chunks(n)) {
            prop_assert_eq!(bits(&row[..n]), bits(expected));
            prop_assert!(row[n..].iter().all(|&x| x == -7.0));
        }
    }

    #[test]
    fn weights_of_16_bits_in_memory_change_no_bit(
        rows in 1usize..40, outputs in 1usize..300, inputs in 1usize..700, seed: u64, brain: bool,
        accumulate: bool,
    ) {
        let round = |x: f32| match brain {
            true => half::bf16::from_f32(x).to_f32(),
            // Some of them are subnormal numbers.
            false => half::f16::from_f32(if x > 0.3 { x } else { x * 1e-5 }).to_f32(),
        };
        let w: Vec<f32> = values(outputs * inputs, seed).into_iter().map(round).collect();
        let wide = PackedMatrix::pack(&w, outputs, inputs, false);
        let narrow = PackedMatrix::pack_narrow(&w, outputs, inputs);
        prop_assert!(narrow.is_narrow() && !wide.is_narrow());
        let (x, dy) = (values(rows * inputs, seed ^ 1), values(rows * outputs, seed ^ 2));
        let (y0, dx0) = (values(rows * outputs, seed ^ 3), values(rows * inputs, seed ^ 4));
        let all = |w: &PackedMatrix| {
            let (mut y, mut dx, mut row) = (y0.clone(), dx0.clone(), vec![0.0; inputs]);
            linear(&x, inputs, rows, w, &mut y, outputs, accumulate);
            linear_input_grad(&dy, outputs, rows, w, &mut dx, inputs, accumulate);
            w.row(outputs - 1, &mut row);
            [bits(&y), bits(&dx), bits(&row)]
        };
        prop_assert_eq!(all(&narrow), all(&wide));
    }

    #[test]
    fn a_packed_row_reads_back_exactly(
        outputs in 1usize..120, inputs in 1usize..200, seed: u64, kept_transposed: bool,
    ) {
        let mut packed = PackedMatrix::pack(&values(outputs * inputs, seed), outputs, inputs, kept_transposed);
        let w = values(outputs * inputs, seed ^ 1);
        packed.repack(&w);
        let mut row = vec![f32::NAN; inputs];
        for (output, expected) in w.chunks(inputs).enumerate() {
            packed.row(output, &mut row);
            prop_assert_eq!(bits(&row), bits(expected));
        }
    }
}

/// Sizes large enough to be split over threads: bits of y, dx and dw for any number of them.
#[test]
fn the_number_of_threads_changes_no_bit() {
    for (rows, outputs, inputs) in [
        (1, 1100, 515),
        (7, 700, 600),
        (129, 333, 1290),
        (300, 97, 260),
    ] {
        let (x, dy) = (values(rows * inputs, 1), values(rows * outputs, 2));
        let w = values(outputs * inputs, 3);
        let run = |threads, kept_transposed| {
            let (x, dy, w) = (&x, &dy, &w);
            with_threads(threads, move || {
                let packed = PackedMatrix::pack(w, outputs, inputs, kept_transposed);
                let mut y = vec![f32::NAN; rows * outputs];
                linear(x, inputs, rows, &packed, &mut y, outputs, false);
                let mut dx = vec![f32::NAN; rows * inputs];
                linear_input_grad(dy, outputs, rows, &packed, &mut dx, inputs, false);
                let mut dw = vec![0.5; outputs * inputs];
                linear_weight_grad(dy, outputs, x, inputs, rows, &mut dw, [outputs, inputs]);
                [bits(&y), bits(&dx), bits(&dw)]
            })
        };
        let expected = run(1, true);
        for threads in [2, 3, 8] {
            assert!(
                run(threads, true) == expected,
                "{rows} {outputs} {inputs}, {threads} threads"
            );
            assert!(
                run(threads, false) == expected,
                "{rows} {outputs} {inputs}, packed at use"
            );
        }
    }
}

#[test]
fn an_empty_sum_is_zero_and_an_empty_result_is_left_alone() {
    let mut c = [3.0, 4.0, 5.0, 6.0];
    let empty = Strided::rows(&[], 0);
    gemm([2, 1, 0], empty, empty, &mut c, 2, true);
    assert_eq!(c, [3.0, 4.0, 5.0, 6.0]);
    gemm([2, 1, 0], empty, empty, &mut c, 2, false);
    assert_eq!(c, [0.0, 4.0, 0.0, 6.0]);
    gemm(
        [0, 1, 1],
        empty,
        Strided::rows(&[1.0], 1),
        &mut [],
        1,
        false,
    );
    linear(
        &[],
        0,
        0,
        &PackedMatrix::pack(&[1.0], 1, 1, false),
        &mut [],
        1,
        false,
    );
}

#[test]
#[should_panic(expected = "length of c")]
fn a_result_too_short_for_its_shape_is_refused() {
    let x = [1.0; 6];
    gemm(
        [2, 3, 2],
        Strided::rows(&x, 2),
        Strided::rows(&x, 3),
        &mut [0.0; 5],
        3,
        false,
    );
}
