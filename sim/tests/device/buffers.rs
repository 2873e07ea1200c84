//! The GPU device on a simulated GPU: memory, copies between precisions, and GEMMs.

use crate::common::{gpu, random, upload};
use half::bf16;
use segattn::device::{Accumulate, Device, Kind, Rows, RowsMut};
use segattn_sim::Checks;

fn numbers(seed: u64, len: usize) -> Vec<f32> {
    let mut next = random(seed);
    (0..len).map(|_| next()).collect()
}

fn narrow(values: &[f32]) -> Vec<f32> {
    values.iter().map(|x| bf16::from_f32(*x).to_f32()).collect()
}

#[test]
fn numbers_come_back_as_their_kind_holds_them() {
    let gpu = gpu(1, Checks::All);
    let values = numbers(1, 100);
    let exact = upload(&gpu, Kind::Exact, &values);
    assert_eq!(gpu.read(&exact, 3..97).unwrap(), values[3..97]);
    let activations = upload(&gpu, Kind::Activation, &values);
    assert_eq!(
        gpu.read(&activations, 3..97).unwrap(),
        narrow(&values)[3..97]
    );
    let mut zeros = gpu.zeros(Kind::Activation, 10).unwrap();
    gpu.write(&mut zeros, 4, &[1.0, 2.0]).unwrap();
    let expected = [0.0, 0.0, 0.0, 0.0, 1.0, 2.0, 0.0, 0.0, 0.0, 0.0];
    assert_eq!(gpu.read(&zeros, 0..10).unwrap(), expected);
    let nothing = gpu.zeros(Kind::Exact, 0).unwrap();
    assert!(gpu.read(&nothing, 0..0).unwrap().is_empty());
}

#[test]
fn what_was_never_written_cannot_be_read() {
    let gpu = gpu(1, Checks::All);
    let buffer = gpu.empty(Kind::Exact, 8).unwrap();
    let error = gpu.read(&buffer, 0..8).unwrap_err().to_string();
    assert!(error.contains("nobody has written"), "{error}");
}

#[test]
fn memory_is_given_back() {
    let gpu = gpu(1, Checks::All);
    let held = gpu.zeros(Kind::Exact, 100).unwrap();
    for _ in 0..3 {
        drop(gpu.zeros(Kind::Activation, 1000).unwrap());
    }
    let memory = gpu.memory_use().buffers;
    assert_eq!((memory.used, memory.peak), (400, 2400));
    drop(held);
    assert_eq!(gpu.memory_use().buffers.used, 0);
}

/// Rows with gaps, between all kinds, set and added, by vectors and one by one.
#[test]
fn copies_convert_and_add() {
    let gpu = gpu(1, Checks::All);
    let kinds = [Kind::Activation, Kind::Exact];
    let hold = |kind, values: &[f32]| match kind {
        Kind::Activation => narrow(values),
        Kind::Exact => values.to_vec(),
    };
    for (i, (from, to)) in kinds
        .into_iter()
        .flat_map(|a| kinds.map(|b| (a, b)))
        .enumerate()
    {
        for (accumulate, [rows, width, gap]) in [
            (Accumulate::No, [5, 16, 8]),
            (Accumulate::Yes, [5, 16, 8]),
            (Accumulate::No, [3, 7, 2]),
            (Accumulate::Yes, [3, 7, 2]),
            (Accumulate::No, [4, 8, 0]),
        ] {
            let (stride, len) = (width + gap, rows * (width + gap));
            let (a, b) = (numbers(i as u64, len), numbers(i as u64 + 9, len));
            let (src, mut dst) = (upload(&gpu, from, &a), upload(&gpu, to, &b));
            let (a, mut expected) = (hold(from, &a), hold(to, &b));
            for r in 0..rows {
                for c in r * stride..r * stride + width {
                    expected[c] = a[c]
                        + if accumulate == Accumulate::Yes {
                            expected[c]
                        } else {
                            0.0
                        };
                }
            }
            let expected = hold(to, &expected);
            let at = Rows::packed(&src, 0, stride);
            gpu.copy(
                at,
                RowsMut::packed(&mut dst, 0, stride),
                rows,
                width,
                accumulate,
            )
            .unwrap();
            assert_eq!(
                gpu.read(&dst, 0..len).unwrap(),
                expected,
                "{from:?} to {to:?}, {accumulate:?}"
            );
        }
    }
}

/// Against sums in f64: the relative error of bf16 inputs is none, that of the result its rounding.
#[test]
fn gemms_agree_with_the_formula() {
    let gpu = gpu(1, Checks::All);
    let [rows, out, inner] = [5, 16, 24];
    let (x, w) = (
        narrow(&numbers(1, rows * inner)),
        narrow(&numbers(2, out * inner)),
    );
    let (d_y, old) = (narrow(&numbers(3, rows * out)), numbers(4, out * inner));
    let weight = gpu
        .matrix(&upload(&gpu, Kind::Exact, &w), out, inner, true)
        .unwrap();
    let sum = |terms: &mut dyn Iterator<Item = (f32, f32)>| -> f64 {
        terms.map(|(a, b)| f64::from(a) * f64::from(b)).sum()
    };
    let close = |got: &[f32], expected: &[f64], bound: f64| {
        let error: f64 = got
            .iter()
            .zip(expected)
            .map(|(a, b)| (f64::from(*a) - b).powi(2))
            .sum();
        let norm: f64 = expected.iter().map(|b| b * b).sum();
        assert!(
            error.sqrt() <= bound * norm.sqrt(),
            "{} of {}",
            error.sqrt(),
            norm.sqrt()
        );
    };
    let (x_rows, d_rows) = (
        upload(&gpu, Kind::Activation, &x),
        upload(&gpu, Kind::Activation, &d_y),
    );

    let expected: Vec<f64> = (0..rows * out)
        .map(|i| sum(&mut (0..inner).map(|k| (x[i / out * inner + k], w[i % out * inner + k]))))
        .collect();
    for (kind, bound) in [(Kind::Exact, 1e-6), (Kind::Activation, 3e-3)] {
        let mut y = gpu.empty(kind, rows * out).unwrap();
        let to = RowsMut::packed(&mut y, 0, out);
        gpu.linear(
            Rows::packed(&x_rows, 0, inner),
            rows,
            &weight,
            to,
            Accumulate::No,
        )
        .unwrap();
        close(&gpu.read(&y, 0..rows * out).unwrap(), &expected, bound);
    }
    // The residual's rows lie apart, and it is added before the sum is rounded.
    let apart = out + 3;
    let residual = narrow(&numbers(5, rows * apart));
    let on_top: Vec<f64> = (0..rows * out)
        .map(|i| expected[i] + f64::from(residual[i / out * apart + i % out]))
        .collect();
    let mut y = gpu.empty(Kind::Activation, rows * out).unwrap();
    gpu.linear_residual(
        Rows::packed(&x_rows, 0, inner),
        rows,
        &weight,
        Rows::packed(&upload(&gpu, Kind::Activation, &residual), 0, apart),
        RowsMut::packed(&mut y, 0, out),
        out,
    )
    .unwrap();
    let exact_then_rounded: Vec<f32> = on_top.iter().map(|x| *x as f32).collect();
    assert_eq!(
        gpu.read(&y, 0..rows * out).unwrap(),
        narrow(&exact_then_rounded)
    );

    let expected: Vec<f64> = (0..rows * inner)
        .map(|i| sum(&mut (0..out).map(|o| (d_y[i / inner * out + o], w[o * inner + i % inner]))))
        .collect();
    let mut d_x = gpu.empty(Kind::Exact, rows * inner).unwrap();
    let to = RowsMut::packed(&mut d_x, 0, inner);
    gpu.linear_input_grad(
        Rows::packed(&d_rows, 0, out),
        rows,
        &weight,
        to,
        Accumulate::No,
    )
    .unwrap();
    close(&gpu.read(&d_x, 0..rows * inner).unwrap(), &expected, 1e-6);

    let expected: Vec<f64> = (0..out * inner)
        .map(|i| {
            let terms = (0..rows).map(|r| (d_y[r * out + i / inner], x[r * inner + i % inner]));
            f64::from(old[i]) + sum(&mut terms.into_iter())
        })
        .collect();
    let mut d_w = upload(&gpu, Kind::Exact, &old);
    let (d_y, x) = (
        Rows::packed(&d_rows, 0, out),
        Rows::packed(&x_rows, 0, inner),
    );
    gpu.linear_weight_grad(d_y, x, rows, [out, inner], &mut d_w)
        .unwrap();
    close(&gpu.read(&d_w, 0..out * inner).unwrap(), &expected, 1e-6);
}
