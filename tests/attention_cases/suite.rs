//! What the kernels must do, on a simulated GPU in small and on a real one at size.

use segattn::attention::cuda::Dtype;

use super::gpu::{self, Gpu, Grads, Options, Outcome, to_f64};
use super::{Case, Shape, low, reference_backward, reference_forward};

/// The most that the kernels' error may be, in that of a plain 16-bit implementation.
const TIMES: f64 = 1.5;
/// Units of f32 that sums in another order may differ by, relative to the size of their terms.
const ORDER: f64 = 64.0 * f32::EPSILON as f64;

/// Norm of the difference over numbers; NaN and infinities must be at the same places.
fn distance(name: &str, got: &[f64], expected: &[f64]) -> f64 {
    assert_eq!(got.len(), expected.len(), "{name}");
    let mut sum = 0.0;
    for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
        if got.is_finite() && expected.is_finite() {
            sum += (got - expected).powi(2);
        } else {
            let same = got == expected || (got.is_nan() && expected.is_nan());
            assert!(same, "{name}[{i}]: {got}, expected {expected}");
        }
    }
    f64::sqrt(sum)
}

fn norm(x: &[f64]) -> f64 {
    x.iter()
        .filter(|x| x.is_finite())
        .map(|x| x * x)
        .sum::<f64>()
        .sqrt()
}

/// What f32 sums may cost a gradient that cancels: every ds is p times a difference of two numbers of this size.
fn terms(case: &Case<f64>) -> f64 {
    let largest = |tensors: &[&super::Tensor<f64>]| {
        let of = |tensor: &super::Tensor<f64>| {
            let finite = tensor.data.iter().filter(|x| x.is_finite());
            finite.fold(0.0, |m: f64, x| m.max(x.abs())) * (tensor.shape[3] as f64).sqrt()
        };
        tensors.iter().map(|tensor| of(tensor)).fold(0.0, f64::max)
    };
    let d_out = norm(&case.d_out.data);
    let keys = largest(&[&case.q, &case.k, &case.prior_k, &case.past_k]);
    let scale = case
        .shape
        .scale
        .map_or(1.0 / (case.shape.head_dim as f64).sqrt(), f64::from);
    d_out * largest(&[&case.v, &case.prior_v, &case.past_v]) * keys * scale.abs()
}

fn assert_close(what: &str, got: &[f64], plain: &[f64], expected: &[f64], slack: f64) {
    let error = distance(what, got, expected);
    let limit = TIMES * distance(what, plain, expected) + ORDER * (norm(expected) + slack);
    assert!(
        error <= limit,
        "{what}: error {error:e}, at most {limit:e}, norm {:e}",
        norm(expected)
    );
}

fn widen(dtype: Dtype, bits: &[u16]) -> Vec<f64> {
    bits.iter().map(|&x| to_f64(dtype, x)).collect()
}

fn widen_f32(bits: &[u32]) -> Vec<f64> {
    bits.iter().map(|&x| f64::from(f32::from_bits(x))).collect()
}

/// Runs a case and compares out and lse, and the gradients where `options` are given for them.
pub fn check(
    gpu: &mut impl Gpu,
    shape: &Shape,
    query_start: Option<Vec<i32>>,
    options: Options,
) -> (Outcome, Option<Grads>) {
    let with_backward = query_start.is_none();
    let case = Case::starting_at(shape, query_start).rounded(options.dtype);
    let loaded = gpu::load(gpu, &case, options.dtype);
    let written = gpu::forward(gpu, &loaded.problem, options.phase)
        .unwrap_or_else(|e| panic!("{e}: {shape:?}"));
    let outcome = gpu::outcome(gpu, &case, &written);
    let expected = reference_forward(&case);
    let plain = low::run(
        &case,
        options.dtype,
        with_backward.then_some(options.with_d_lse),
    );
    let what = |name: &str| format!("{name} of {options:?} {:?} {shape:?}", case.query_start);
    let out = widen(options.dtype, &outcome.rows);
    assert_close(
        &what("out"),
        &out,
        &plain.out,
        &expected.out.elements(),
        0.0,
    );
    assert_lse(&what("lse"), &widen_f32(&outcome.lse), &expected.lse);
    if !with_backward {
        return (outcome, None);
    }
    let grads = gpu::backward(gpu, &case, &loaded, &written, options)
        .unwrap_or_else(|e| panic!("{e}: {shape:?}"));
    let expected = reference_backward(
        &case,
        &expected,
        options.with_d_lse,
        options.read_only_prior,
    );
    let slack = terms(&case);
    for (name, expected) in expected.parts() {
        let got = match grads.tensors.iter().find(|(n, _)| *n == name) {
            Some((_, bits)) => widen(options.dtype, bits),
            None => widen_f32(&grads.d_past_gate),
        };
        let plain = plain
            .grads
            .iter()
            .find(|(n, _)| *n == name)
            .map_or(&[][..], |(_, x)| x);
        let slack = if name == "d_past_gate" {
            slack + gate_slack(&case, &expected)
        } else {
            slack
        };
        assert_close(&what(name), &got, plain, &expected, slack);
    }
    (outcome, Some(grads))
}

/// The gate's gradient sums unrounded ds, which cancel; its plain error comes from delta alone.
fn gate_slack(case: &Case<f64>, expected: &[f64]) -> f64 {
    let gates = case.shape.past_gate.iter().filter(|gate| **gate > 0.0);
    let least = gates.fold(1.0, |m: f64, gate| m.min(f64::from(*gate)));
    (norm(expected) + terms(case)) / least
}

/// lse is in f32: the error of its sum, and of scores in units of their size.
fn assert_lse(what: &str, got: &[f64], expected: &[f64]) {
    let largest = expected
        .iter()
        .filter(|x| x.is_finite())
        .fold(1.0, |m: f64, x| m.max(x.abs()));
    for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
        let close = got == expected || (got - expected).abs() <= 2e-5 * largest;
        assert!(close, "{what}[{i}]: {got}, expected {expected}");
    }
}

/// Gradients of gates against f64, in groups of 8 with scores of a standard deviation of 4. In the second case the past
/// has nearly all the weight. The error of `out`, which is rounded to 16 bits, must not reach them.
pub fn gates_keep_their_bound(gpu: &mut impl Gpu, dtype: Dtype, head_dim: usize) {
    for (seed, lens) in [[70, 64, 300], [16, 0, 1024]].into_iter().enumerate() {
        let shape = Shape {
            scale: Some(4.0 / (head_dim as f32).sqrt()),
            sink_len: vec![4],
            seed: 1 + seed as u64,
            ..Shape::plain(1, 8, head_dim, lens)
        };
        let case = Case::new(&shape).rounded(dtype);
        let options = Options {
            with_d_lse: seed == 0,
            ..Options::new(dtype)
        };
        let (_, grads) = super::bits::both(gpu, &case, options);
        let forward = reference_forward(&case);
        let expected = reference_backward(&case, &forward, options.with_d_lse, false).d_past_gate;
        let got = widen_f32(&grads.d_past_gate);
        let (error, norm) = (distance("d_past_gate", &got, &expected), norm(&expected));
        println!("{dtype} D {head_dim}, {lens:?}: {:e}", error / norm);
        assert!(
            error <= 1e-5 * norm,
            "{dtype} D {head_dim}, {lens:?}: error {error:e} of {norm:e}"
        );
    }
}
