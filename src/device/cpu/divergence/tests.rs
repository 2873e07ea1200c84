//! The divergence and its gradient against f64, and bit against bit.

use super::*;
use crate::device::cpu::rows::cross_entropy_grad_row;

/// Rows of the student and of the teacher.
fn rows(vocab: usize) -> [Vec<f32>; 2] {
    let row = |seed: usize| -> Vec<f32> {
        let one = |i: usize| ((i * i + seed * i) as f32 * 0.7318).sin() * 4.0 + seed as f32;
        (0..vocab).map(one).collect()
    };
    [row(3), row(8)]
}

/// Probabilities of a row at a temperature.
fn softmax(row: &[f32], temperature: f64) -> Vec<f64> {
    let exps: Vec<f64> = row
        .iter()
        .map(|x| (f64::from(*x) / temperature).exp())
        .collect();
    let sum: f64 = exps.iter().sum();
    exps.iter().map(|e| e / sum).collect()
}

#[test]
fn divergence_and_gradient_agree_with_f64() {
    for (vocab, target, temperature, scales) in [
        (1, 0, 1.0, [0.5, 0.5]),
        (5, 4, 2.0, [0.0, 1.0]),
        (33, 0, 0.5, [0.25, 0.75]),
        (10_007, 10_006, 3.0, [0.1, 0.9]),
    ] {
        let [mut logits, teacher] = rows(vocab);
        let plain = softmax(&logits, 1.0);
        let (p, q) = (
            softmax(&logits, temperature),
            softmax(&teacher, temperature),
        );
        let expected: f64 = q.iter().zip(&p).map(|(q, p)| q * (q / p).ln()).sum();
        let [a, b] = scales.map(f64::from);
        let exact: Vec<f64> = (0..vocab)
            .map(|i| {
                let one = if i == target { 1.0 } else { 0.0 };
                a * (plain[i] - one) + b * temperature * (p[i] - q[i])
            })
            .collect();
        let own = cross_entropy_row(&logits, target).logprob;
        let lesson = RowLesson {
            teacher: &teacher,
            temperature,
            scales,
        };
        let [logprob, divergence] = divergence_row(&mut logits, target, lesson);
        assert_eq!(logprob.to_bits(), own.to_bits());
        assert!(
            (f64::from(divergence) - expected).abs() <= 2e-6 * (1.0 + expected),
            "{divergence}, {expected}"
        );
        let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
        let off = norm(&mut logits.iter().zip(&exact).map(|(x, e)| f64::from(*x) - e));
        assert!(
            off <= 2e-6 * norm(&mut exact.iter().copied()).max(1e-3),
            "{off}"
        );
    }
}

#[test]
fn equal_logits_have_no_divergence_and_no_gradient_of_it() {
    let [logits, _] = rows(5000);
    let mut row = logits.clone();
    let lesson = RowLesson {
        teacher: &logits,
        temperature: 1.7,
        scales: [0.0, 1.0],
    };
    assert_eq!(divergence_row(&mut row, 2, lesson)[1], 0.0);
    assert!(row.iter().all(|x| *x == 0.0));
}

#[test]
fn without_a_share_of_the_divergence_the_gradient_has_the_bits_of_the_loss() {
    let [mut row, teacher] = rows(1003);
    let mut expected = row.clone();
    let found = cross_entropy_row(&expected, 7);
    cross_entropy_grad_row(&mut expected, 7, &found, 0.3);
    let lesson = RowLesson {
        teacher: &teacher,
        temperature: 2.0,
        scales: [0.3, 0.0],
    };
    divergence_row(&mut row, 7, lesson);
    assert_eq!(row, expected);
}

#[test]
fn impossible_tokens_add_nothing_and_nan_is_passed_on() {
    let run = |mut logits: Vec<f32>, teacher: &[f32]| {
        let lesson = RowLesson {
            teacher,
            temperature: 1.0,
            scales: [0.0, 1.0],
        };
        divergence_row(&mut logits, 0, lesson)[1]
    };
    let out = f32::NEG_INFINITY;
    assert!((run(vec![0.0, 0.0, 0.0], &[1.0, 1.0, out]) - 1.5f32.ln()).abs() < 1e-6);
    assert_eq!(run(vec![0.0, 0.0, out], &[1.0, 1.0, out]), 0.0);
    assert_eq!(run(vec![0.0, out], &[0.0, 0.0]), f32::INFINITY);
    assert!(run(vec![0.0, f32::NAN], &[0.0, 0.0]).is_nan());
    assert!(run(vec![0.0, 0.0], &[0.0, f32::NAN]).is_nan());
}

#[test]
fn every_instruction_set_gives_the_same_bits() {
    for vocab in [1, 17, 64, 5000] {
        let run = |isa| {
            let [mut logits, teacher] = rows(vocab);
            let lesson = RowLesson {
                teacher: &teacher,
                temperature: 1.3,
                scales: [0.4, 0.6],
            };
            let scores = row_on(isa, &mut logits, vocab / 2, lesson);
            (scores.map(f32::to_bits), logits)
        };
        for isa in Isa::available() {
            assert!(run(isa) == run(Isa::best()), "{isa:?}");
        }
    }
}
