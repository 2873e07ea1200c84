//! The f64 reference against finite differences, and against cases whose result is known.

mod attention_cases;

use attention_cases::*;
use proptest::prelude::*;
use segattn::attention::reference;

/// `sum d_out . out + sum d_lse . lse` over valid rows.
fn loss(case: &Case<f64>, with_d_lse: bool) -> f64 {
    let forward = reference_forward(case);
    let mut loss = 0.0;
    let [batch, rows, heads, _] = case.q.shape;
    for b in 0..batch {
        for h in 0..heads {
            for row in 0..case.shape.segment_len[b] as usize {
                let products = case
                    .d_out
                    .row(b, row, h)
                    .iter()
                    .zip(forward.out.row(b, row, h));
                loss += products.map(|(g, o)| g * o).sum::<f64>();
                let lse_idx = (b * heads + h) * rows + row;
                if with_d_lse {
                    loss += case.d_lse[lse_idx] * forward.lse[lse_idx];
                }
            }
        }
    }
    loss
}

/// Five-point central difference of `f` at 0.
fn derivative(h: f64, mut f: impl FnMut(f64) -> f64) -> f64 {
    (8.0 * (f(h) - f(-h)) - (f(2.0 * h) - f(-2.0 * h))) / (12.0 * h)
}

fn assert_close(name: &str, got: f64, expected: f64) {
    let tolerance = 1e-6 * (1.0 + expected.abs());
    assert!(
        (got - expected).abs() < tolerance,
        "{name}: {got}, finite difference {expected}"
    );
}

/// Compares a gradient tensor with finite differences over every element of every valid row.
fn check_tensor(
    case: &Case<f64>,
    with_d_lse: bool,
    (name, grad): (&str, &Tensor<f64>),
    rows: impl Fn(usize) -> i32,
    tensor: impl Fn(&mut Case<f64>) -> &mut Tensor<f64>,
) {
    let [batch, all_rows, heads, head_dim] = grad.shape;
    let mut moved = case.clone();
    for b in 0..batch {
        for g in 0..heads {
            for row in 0..all_rows {
                if row >= rows(b) as usize {
                    assert!(
                        grad.row(b, row, g).iter().all(|&x| x == 0.0),
                        "{name}: padding row {row}"
                    );
                    continue;
                }
                for d in 0..head_dim {
                    let expected = derivative(1e-3, |h| {
                        let at = tensor(&mut moved);
                        let old = at.row(b, row, g)[d];
                        at.row_mut(b, row, g)[d] = old + h;
                        let loss = loss(&moved, with_d_lse);
                        tensor(&mut moved).row_mut(b, row, g)[d] = old;
                        loss
                    });
                    assert_close(name, grad.row(b, row, g)[d], expected);
                }
            }
        }
    }
}

fn check_gate(case: &Case<f64>, with_d_lse: bool, grad: &[f64]) {
    let (batch, heads) = (case.shape.batch(), case.shape.q_heads());
    for b in 0..batch {
        // The loss of one batch element alone: the other batch elements send no gradient.
        let mut moved = case.clone();
        for other in (0..batch).filter(|&other| other != b) {
            let rows = case.q.shape[1];
            moved.d_lse[other * heads * rows..(other + 1) * heads * rows].fill(0.0);
            for row in 0..case.shape.segment_len[other] as usize {
                for h in 0..heads {
                    moved.d_out.row_mut(other, row, h).fill(0.0);
                }
            }
        }
        for h in 0..heads {
            let gate = case.shape.past_gate[h];
            if gate == 0.0 {
                assert_eq!(grad[b * heads + h], 0.0);
                continue;
            }
            // A power-of-two step, so that every moved gate is an exact f32 of the same exponent range.
            let step = f64::from(gate) / 256.0;
            let step = f64::from(2f32.powi(step.log2().floor() as i32));
            let expected = derivative(step, |h_| {
                moved.shape.past_gate[h] = (f64::from(gate) + h_) as f32;
                loss(&moved, with_d_lse)
            });
            moved.shape.past_gate[h] = gate;
            let got = grad[b * heads + h];
            let tolerance = 1e-5 * (1.0 + expected.abs());
            assert!(
                (got - expected).abs() < tolerance,
                "d_past_gate: {got}, finite difference {expected}"
            );
        }
    }
}

fn small_shapes() -> impl Strategy<Value = Shape> {
    let values = vec![Values::Centered, Values::Centered, Values::Shifted];
    shapes(1..=4i32, vec![1, 2, 3], vec![1, 3], values)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn every_gradient_is_the_finite_difference_of_the_loss(shape in small_shapes(), with_d_lse in any::<bool>()) {
        let case = Case::new(&shape);
        let forward = reference_forward(&case);
        let grads = reference_backward(&case, &forward, with_d_lse, false);
        let segment = |b: usize| shape.segment_len[b];
        let prior = |b: usize| shape.prior_len[b];
        let (d_prior_k, d_prior_v) = grads.d_prior.as_ref().expect("asked for");
        check_tensor(&case, with_d_lse, ("d_q", &grads.d_q), segment, |case| &mut case.q);
        check_tensor(&case, with_d_lse, ("d_k", &grads.d_k), segment, |case| &mut case.k);
        check_tensor(&case, with_d_lse, ("d_v", &grads.d_v), segment, |case| &mut case.v);
        check_tensor(&case, with_d_lse, ("d_prior_k", d_prior_k), prior, |case| &mut case.prior_k);
        check_tensor(&case, with_d_lse, ("d_prior_v", d_prior_v), prior, |case| &mut case.prior_v);
        check_gate(&case, with_d_lse, &grads.d_past_gate);
    }
}

proptest! {
    #[test]
    fn read_only_prior_changes_no_other_gradient(shape in small_shapes()) {
        let case = Case::new(&shape);
        let forward = reference_forward(&case);
        let with = reference_backward(&case, &forward, true, false);
        let without = reference_backward(&case, &forward, true, true);
        for ((name, a), (_, b)) in with.parts().iter().zip(without.parts()) {
            prop_assert_eq!(a, &b, "{}", name);
        }
    }
}

#[test]
fn equal_scores_average_the_values() {
    let mut case = Case::new(&Shape::plain(1, 1, 2, [2, 1, 1]));
    case.q.data.fill(0.0);
    let forward = reference_forward(&case);
    for d in 0..2 {
        let two = [&case.past_v, &case.prior_v].map(|v| v.row(0, 0, 0)[d]);
        let mean = (two[0] + two[1] + case.v.row(0, 0, 0)[d]) / 3.0;
        assert!((forward.out.row(0, 0, 0)[d] - mean).abs() < 1e-12);
    }
    assert!((forward.lse[0] - 3f64.ln()).abs() < 1e-12);
    assert!((forward.lse[1] - 4f64.ln()).abs() < 1e-12);
}

#[test]
fn a_gate_weighs_the_past_against_the_rest() {
    let mut shape = Shape::plain(1, 1, 1, [1, 0, 1]);
    shape.past_gate = vec![3.0];
    let mut case = Case::new(&shape);
    case.q.data.fill(0.0);
    case.v.row_mut(0, 0, 0)[0] = 8.0;
    case.past_v.row_mut(0, 0, 0)[0] = 4.0;
    let forward = reference_forward(&case);
    assert!((forward.out.row(0, 0, 0)[0] - 5.0).abs() < 1e-12);
}

#[test]
fn a_query_start_selects_rows_of_the_full_result() {
    let case = Case::new(&Shape::plain(1, 3, 4, [5, 2, 3]));
    let full = reference_forward(&case);
    let mut last = case.clone();
    last.query_start = Some(vec![4]);
    last.q = Tensor::new([1, 1, 3, 4], Arrangement::Packed, f64::NAN);
    for h in 0..3 {
        last.q.row_mut(0, 0, h).copy_from_slice(case.q.row(0, 4, h));
    }
    let alone = reference_forward(&last);
    for h in 0..3 {
        assert_eq!(alone.out.row(0, 0, h), full.out.row(0, 4, h));
        assert_eq!(alone.lse[h], full.lse[h * 5 + 4]);
    }
}

#[test]
fn a_backward_pass_of_part_of_the_rows_is_refused() {
    let mut case = Case::new(&Shape::plain(1, 1, 2, [3, 0, 0]));
    case.query_start = Some(vec![1]);
    let forward = reference_forward(&case);
    let mut grads = Backward::for_case(&case, f64::NAN, false);
    let error = reference::backward(&case.problem(), &case.saved(&forward, false), grads.grads())
        .expect_err("query_start is 1");
    assert!(error.to_string().contains("query_start[0]"), "{error}");
    assert!(
        grads.d_q.data.iter().all(|x| x.is_nan()),
        "nothing may be written"
    );
}

/// Sinks are past rows that every head reads like any other key: as if they were prior rows of all heads.
#[test]
fn sinks_are_read_by_every_head_without_its_gate() {
    let gates = vec![0.0, 0.25, 1.0];
    let with_sinks = Shape {
        past_gate: gates.clone(),
        sink_len: vec![2],
        ..Shape::plain(1, 3, 4, [3, 0, 5])
    };
    let as_prior = Shape {
        past_gate: gates,
        ..Shape::plain(1, 3, 4, [3, 2, 3])
    };
    let (sinks, mut prior) = (Case::new(&with_sinks), Case::new(&as_prior));
    (prior.q, prior.k, prior.v) = (sinks.q.clone(), sinks.k.clone(), sinks.v.clone());
    (prior.d_out, prior.d_lse) = (sinks.d_out.clone(), sinks.d_lse.clone());
    for (from, past, rest) in [
        (&sinks.past_k, &mut prior.past_k, &mut prior.prior_k),
        (&sinks.past_v, &mut prior.past_v, &mut prior.prior_v),
    ] {
        for row in 0..5 {
            let (to, at) = if row < 2 {
                (&mut *rest, row)
            } else {
                (&mut *past, row - 2)
            };
            to.row_mut(0, at, 0).copy_from_slice(from.row(0, row, 0));
        }
    }
    let [of_sinks, of_prior] = [&sinks, &prior].map(|case| {
        let forward = reference_forward(case);
        let grads = reference_backward(case, &forward, true, true);
        (forward, grads)
    });
    let close = |name: &str, a: &[f64], b: &[f64]| {
        for (a, b) in a.iter().zip(b) {
            assert!((a - b).abs() < 1e-12 * (1.0 + b.abs()), "{name}: {a}, {b}");
        }
    };
    close(
        "out",
        &of_sinks.0.out.elements(),
        &of_prior.0.out.elements(),
    );
    close("lse", &of_sinks.0.lse, &of_prior.0.lse);
    for ((name, a), (_, b)) in of_sinks.1.parts().iter().zip(of_prior.1.parts()) {
        close(name, a, &b);
    }
}
