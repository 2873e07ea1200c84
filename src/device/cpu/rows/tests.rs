//! Row-wise functions against f64, against finite differences, and bit against bit.

use super::*;

fn values(len: usize, seed: u32) -> Vec<f32> {
    let mut s = seed.wrapping_mul(2_654_435_761) | 1;
    let mut next = || {
        s ^= s << 13;
        s ^= s >> 17;
        s ^= s << 5;
        s as f32 / u32::MAX as f32
    };
    (0..len).map(|_| (next() - 0.4) * 5.0).collect()
}

fn assert_close(got: &[f32], expected: &[f64]) {
    let diff: f64 = got
        .iter()
        .zip(expected)
        .map(|(g, e)| (*g as f64 - e).powi(2))
        .sum();
    let norm: f64 = expected.iter().map(|e| e * e).sum();
    assert_eq!(got.len(), expected.len());
    assert!(
        diff.sqrt() <= 1e-6 * norm.sqrt(),
        "{} of {}",
        diff.sqrt(),
        norm.sqrt()
    );
}

/// Gradient of the sum of d * f(x) by x, by central differences in f64.
fn differences(x: &[f32], d: &[f32], f: impl Fn(&[f64]) -> Vec<f64>) -> Vec<f64> {
    let x: Vec<f64> = x.iter().map(|&x| x as f64).collect();
    let loss = |x: &[f64]| -> f64 { f(x).iter().zip(d).map(|(y, d)| y * *d as f64).sum() };
    let step = 1e-5;
    (0..x.len())
        .map(|i| {
            let at = |by| {
                loss(
                    &x.iter()
                        .enumerate()
                        .map(|(j, x)| if i == j { x + by } else { *x })
                        .collect::<Vec<_>>(),
                )
            };
            (at(step) - at(-step)) / (2.0 * step)
        })
        .collect()
}

fn rms_norm_f64(x: &[f64], w: &[f32], eps: f64) -> Vec<f64> {
    let rows = x.chunks(w.len()).flat_map(|x| {
        let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
        let rstd = 1.0 / (mean + eps).sqrt();
        x.iter().zip(w).map(move |(x, w)| x * rstd * *w as f64)
    });
    rows.collect()
}

fn swiglu_f64(x: &[f64], inter: usize) -> Vec<f64> {
    let rows = x.chunks(2 * inter).flat_map(|row| {
        let (gate, up) = row.split_at(inter);
        gate.iter().zip(up).map(|(g, u)| g / (1.0 + (-g).exp()) * u)
    });
    rows.collect()
}

const WIDTHS: [usize; 6] = [1, 2, 15, 16, 17, 83];

#[test]
fn rms_norm_and_its_gradients_agree_with_f64() {
    for width in WIDTHS {
        let (rows, eps) = (3, 1e-5);
        let (x, w, dy) = (
            values(rows * width, 1),
            values(width, 2),
            values(rows * width, 3),
        );
        let (mut y, mut rstd) = (vec![f32::NAN; rows * width], vec![f32::NAN; rows]);
        rms_norm(&x, &w, eps, &mut y, &mut rstd);
        let wide: Vec<f64> = x.iter().map(|&x| x as f64).collect();
        assert_close(&y, &rms_norm_f64(&wide, &w, eps as f64));

        if width > 1 {
            let mut dx = vec![f32::NAN; rows * width];
            rms_norm_backward(&dy, &x, &w, &rstd, &mut dx, false);
            let expected = differences(&x, &dy, |x| rms_norm_f64(x, &w, eps as f64));
            assert_close(&dx, &expected);
            rms_norm_backward(&dy, &x, &w, &rstd, &mut dx, true);
            assert_close(&dx, &expected.iter().map(|d| 2.0 * d).collect::<Vec<_>>());
        }

        let mut dw = vec![0.0; width];
        rms_norm_weight_grad(&dy, &x, &rstd, 1, &mut dw);
        let expected = differences(&w, &dy, |w| {
            let ones = rms_norm_f64(&wide, &vec![1.0; width], eps as f64);
            ones.iter()
                .zip(w.iter().cycle())
                .map(|(y, w)| y * w)
                .collect()
        });
        assert_close(&dw, &expected);
    }
}

#[test]
fn the_weight_gradient_of_the_norm_can_be_summed_in_two_calls() {
    let (rows, width) = (40, 1000);
    let (x, dy, rstd) = (
        values(rows * width, 1),
        values(rows * width, 2),
        values(rows, 3),
    );
    let (mut whole, mut parts) = (vec![0.25; width], vec![0.25; width]);
    rms_norm_weight_grad(&dy, &x, &rstd, 1, &mut whole);
    for rows in [0..7, 7..40] {
        let at = rows.start * width..rows.end * width;
        rms_norm_weight_grad(&dy[at.clone()], &x[at], &rstd[rows], 1, &mut parts);
    }
    assert_eq!(whole, parts);
}

#[test]
fn the_groups_of_a_row_are_summed_before_the_rows() {
    for (rows, groups, width) in [(7, 3, 5), (40, 16, 130), (300, 2, 200)] {
        let norms = rows * groups;
        let (x, dy) = (values(norms * width, 1), values(norms * width, 2));
        let rstd = values(norms, 3);
        let (mut got, mut expected) = (vec![0.25; width], vec![0.25; width]);
        // Two calls: it does not matter how rows are spread over them.
        for rows in [0..5, 5..rows] {
            let [norms, at] = [groups, groups * width].map(|by| rows.start * by..rows.end * by);
            rms_norm_weight_grad(&dy[at.clone()], &x[at], &rstd[norms], groups, &mut got);
        }
        for row in 0..rows {
            for (i, sum) in expected.iter_mut().enumerate() {
                let heads = (row * groups..(row + 1) * groups).fold(0.0, |sum: f32, norm| {
                    dy[norm * width + i].mul_add(x[norm * width + i] * rstd[norm], sum)
                });
                *sum += heads;
            }
        }
        assert_eq!(got, expected, "{rows} rows of {groups} groups of {width}");
    }
}

#[test]
fn rope_turns_pairs_half_a_head_apart_and_the_inverse_turns_them_back() {
    let (heads, head_dim) = (3, 10);
    let heads_of = [heads, head_dim];
    let angle: Vec<f64> = values(4 * 5, 1).iter().map(|&a| a as f64).collect();
    let cos: Vec<f32> = angle.iter().map(|a| a.cos() as f32).collect();
    let sin: Vec<f32> = angle.iter().map(|a| a.sin() as f32).collect();
    let angles = Angles {
        cos: &cos,
        sin: &sin,
    };
    let src = values(2 * 40 - 10, 2);
    let mut dst = vec![f32::NAN; 2 * 30];
    let (rows, to) = ([3, 1], (&mut dst[..], 30));
    rope(heads_of, angles, &rows, false, (&src, 40), to, false);

    for (row, table_row) in [3, 1].into_iter().enumerate() {
        for head in 0..heads {
            let x = &src[row * 40 + head * 10..][..10];
            let y = &dst[row * 30 + head * 10..][..10];
            let expected: Vec<f64> = (0..10)
                .map(|d| {
                    let angle = angle[table_row * 5 + d % 5];
                    let (a, b) = (x[d % 5] as f64, x[d % 5 + 5] as f64);
                    if d < 5 {
                        a * angle.cos() - b * angle.sin()
                    } else {
                        b * angle.cos() + a * angle.sin()
                    }
                })
                .collect();
            assert_close(y, &expected);
        }
    }
    let mut back = vec![-7.0; src.len()];
    let to = (&mut back[..], 40);
    rope(heads_of, angles, &rows, true, (&dst, 30), to, false);
    for (at, (back, src)) in back.iter().zip(&src).enumerate() {
        let expected = if at % 40 < 30 { *src } else { -7.0 };
        assert!(
            (back - expected).abs() < 1e-5,
            "element {at}: {back}, not {expected}"
        );
    }
}

#[test]
fn swiglu_and_its_gradient_agree_with_f64() {
    for inter in WIDTHS {
        let (x, dy) = (values(3 * 2 * inter, 1), values(3 * inter, 2));
        let wide: Vec<f64> = x.iter().map(|&x| x as f64).collect();
        let (mut y, mut dx) = (vec![f32::NAN; 3 * inter], vec![f32::NAN; x.len()]);
        swiglu(&x, inter, &mut y);
        assert_close(&y, &swiglu_f64(&wide, inter));
        swiglu_backward(&dy, &x, inter, &mut dx);
        assert_close(&dx, &differences(&x, &dy, |x| swiglu_f64(x, inter)));
    }
}

#[test]
fn swiglu_stays_finite_for_huge_gates() {
    let (x, mut y, mut dx) = ([-1e4, 1e4, 1.0, 1.0], [f32::NAN; 2], [f32::NAN; 4]);
    swiglu(&x, 2, &mut y);
    assert_eq!(y, [0.0, 1e4]);
    swiglu_backward(&[1.0, 1.0], &x, 2, &mut dx);
    assert_eq!(dx, [0.0, 1.0, 0.0, 1e4]);
}

#[test]
fn cross_entropy_and_its_gradient_agree_with_f64() {
    for (vocab, target) in [(1, 0), (5, 4), (16, 3), (33, 0), (10_007, 10_006)] {
        let mut logits = values(vocab, 7);
        let exps: Vec<f64> = logits.iter().map(|&x| (x as f64).exp()).collect();
        let sum: f64 = exps.iter().sum();
        let row = cross_entropy_row(&logits, target);
        assert!((row.logprob as f64 - (exps[target] / sum).ln()).abs() < 1e-6 * (1.0 + sum.ln()));
        cross_entropy_grad_row(&mut logits, target, &row, 0.5);
        let mut expected: Vec<f64> = exps.iter().map(|e| 0.5 * e / sum).collect();
        expected[target] -= 0.5;
        assert_close(&logits, &expected);
    }
}

#[test]
fn cross_entropy_takes_impossible_logits_and_passes_nan_on() {
    let row = cross_entropy_row(&[f32::NEG_INFINITY, 2.0, 2.0], 1);
    assert!((row.logprob + std::f32::consts::LN_2).abs() < 1e-7);
    assert_eq!(
        cross_entropy_row(&[f32::NEG_INFINITY, 2.0], 0).logprob,
        f32::NEG_INFINITY
    );
    assert!(cross_entropy_row(&[1.0, f32::NAN, 0.0], 0).logprob.is_nan());
    assert!(
        cross_entropy_row(&[f32::NEG_INFINITY; 2], 0)
            .logprob
            .is_nan()
    );
}

#[test]
fn every_instruction_set_gives_the_same_bits() {
    for width in [1, 15, 16, 17, 64, 333, 5000] {
        let (x, w, dy) = (values(2 * width, 1), values(width, 2), values(2 * width, 3));
        let run = |isa| {
            let mut out = vec![0f32; 10 * width];
            let (y, rest) = out.split_at_mut(width);
            let (dx, rest) = rest.split_at_mut(width);
            let (dw, rest) = rest.split_at_mut(width);
            let (act, rest) = rest.split_at_mut(width);
            let (d_act, rest) = rest.split_at_mut(2 * width);
            let (turned, logits) = rest.split_at_mut(2 * width);
            let rstd = rms_norm_row(isa, &x[..width], &w, 1e-6, y);
            rms_norm_backward_row(isa, &dy[..width], &x[..width], &w, rstd, dx, false);
            for groups in [1, 2] {
                weight_grad_columns(isa, &dy, &x, (&[rstd, 0.5], groups), [width, 0], dw);
            }
            swiglu_row(isa, &x, act);
            swiglu_backward_row(isa, &dy[..width], &x, d_act);
            rotate(isa, &x, Angles { cos: &w, sin: &dy }, true, turned, false);
            logits.copy_from_slice(&x);
            let row = softmax_row(isa, &x, width / 2);
            softmax_grad_row(isa, logits, width / 2, &row, 0.3);
            let bits: Vec<u32> = out.iter().map(|x| x.to_bits()).collect();
            (
                bits,
                rstd.to_bits(),
                row.logprob.to_bits(),
                row.sum.to_bits(),
            )
        };
        let expected = run(Isa::Portable);
        for isa in Isa::available() {
            assert!(run(isa) == expected, "{isa:?}, width {width}");
        }
    }
}

#[test]
fn a_row_has_the_same_bits_alone_and_among_others_on_any_number_of_threads() {
    let (rows, width) = (150, 301);
    let (x, w, dy) = (
        values(rows * width, 1),
        values(width, 2),
        values(rows * width, 3),
    );
    let run = |rows: std::ops::Range<usize>| {
        let at = rows.start * width..rows.end * width;
        let mut y = vec![f32::NAN; at.len()];
        let (mut rstd, mut dx) = (vec![f32::NAN; rows.len()], y.clone());
        rms_norm(&x[at.clone()], &w, 1e-6, &mut y, &mut rstd);
        rms_norm_backward(&dy[at.clone()], &x[at], &w, &rstd, &mut dx, false);
        let mut act = vec![f32::NAN; rows.len() * (width / 2)];
        let packed: Vec<f32> = y
            .chunks(width)
            .flat_map(|y| &y[..width / 2 * 2])
            .copied()
            .collect();
        swiglu(&packed, width / 2, &mut act);
        let act = act.chunks(width / 2);
        y.chunks(width)
            .zip(dx.chunks(width))
            .zip(act)
            .map(|((y, dx), act)| [y, dx, act].concat())
            .collect::<Vec<_>>()
    };
    let pool = |threads| {
        rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .expect("a pool")
    };
    let expected = pool(1).install(|| run(0..rows));
    assert!(pool(5).install(|| run(0..rows)) == expected);
    for (row, expected) in expected.iter().enumerate() {
        assert!(run(row..row + 1)[0] == *expected, "row {row}");
    }
}
