//! The f32 attention of the CPU against the f64 reference, and against itself where bits must agree.

mod attention_cases;

use attention_cases::*;
use segattn::attention::cpu;
use segattn::device::cpu::Isa;

fn cpu_forward_on(isa: Isa, case: &Case<f32>) -> Forward<f32> {
    let mut forward = Forward::for_case(case, f32::NAN);
    let (out, lse) = (forward.out.view_mut(), &mut forward.lse);
    cpu::forward_on(isa, &case.problem(), out, lse).expect("a valid case");
    forward
}

fn cpu_forward(case: &Case<f32>) -> Forward<f32> {
    cpu_forward_on(Isa::best(), case)
}

fn cpu_backward_on(
    isa: Isa,
    case: &Case<f32>,
    forward: &Forward<f32>,
    with_d_lse: bool,
    read_only_prior: bool,
) -> Backward<f32> {
    let mut backward = Backward::for_case(case, f32::NAN, read_only_prior);
    cpu::backward_on(
        isa,
        &case.problem(),
        forward.out.view(),
        &forward.lse,
        case.d_out.view(),
        with_d_lse.then_some(&case.d_lse[..]),
        backward.grads(),
    )
    .expect("a valid case");
    backward
}

fn cpu_backward(case: &Case<f32>, forward: &Forward<f32>, with_d_lse: bool) -> Backward<f32> {
    cpu_backward_on(Isa::best(), case, forward, with_d_lse, false)
}

/// Asserts that NaN and infinities are at the same places and that the rest differs by at most
/// `tolerance` of its norm.
fn assert_close(name: &str, got: &[f32], expected: &[f64], tolerance: f64) {
    assert_eq!(got.len(), expected.len(), "{name}");
    let (mut difference, mut norm) = (0.0, 0.0);
    for (i, (&got, &expected)) in got.iter().zip(expected).enumerate() {
        let got = f64::from(got);
        if !got.is_finite() || !expected.is_finite() {
            let same = got == expected || (got.is_nan() && expected.is_nan());
            assert!(same, "{name}[{i}]: {got}, expected {expected}");
            continue;
        }
        difference += (got - expected).powi(2);
        norm += expected.powi(2);
    }
    let (difference, norm) = (difference.sqrt(), norm.sqrt());
    assert!(
        difference <= tolerance * norm,
        "{name}: relative error {:e}",
        difference / norm
    );
}

fn check(shape: &Shape, with_d_lse: bool, read_only_prior: bool, tolerance: f64) {
    let case = Case::new(shape);
    let expected = reference_forward(&case);
    let narrow = case.to_f32();
    let forward = cpu_forward(&narrow);
    let elements = forward.out.elements();
    assert_close("out", &elements, &expected.out.elements(), tolerance);
    assert_close("lse", &forward.lse, &expected.lse, tolerance);
    let expected = reference_backward(&case, &expected, with_d_lse, read_only_prior);
    let backward = cpu_backward_on(Isa::best(), &narrow, &forward, with_d_lse, read_only_prior);
    for ((name, got), (_, expected)) in backward.parts().iter().zip(expected.parts()) {
        assert_close(name, got, &expected, tolerance);
    }
}

#[test]
fn forward_and_every_gradient_agree_with_the_reference_in_many_tiles() {
    for (kv_heads, group, head_dim, lens) in [
        (2, 1, 64, [300, 130, 70]),
        (1, 3, 24, [129, 0, 200]),
        (1, 8, 128, [65, 64, 0]),
        (3, 2, 8, [200, 63, 5]),
    ] {
        let mut shape = Shape::plain(kv_heads, group, head_dim, lens);
        for (head, gate) in shape.past_gate.iter_mut().enumerate() {
            *gate = [1.0, 0.0, 0.25][head % 3];
        }
        for (head, prior) in shape.prior_heads.iter_mut().enumerate() {
            *prior = head % 2 == 0;
        }
        for (with_d_lse, read_only_prior) in [(false, false), (true, true)] {
            check(&shape, with_d_lse, read_only_prior, 1e-5);
        }
    }
}

#[test]
fn the_bits_are_the_same_for_every_instruction_set() {
    let case = Case::new(&Shape::plain(1, 3, 24, [150, 70, 65])).to_f32();
    let best = cpu_forward(&case);
    let gradients = cpu_backward(&case, &best, true);
    for isa in Isa::available() {
        let forward = cpu_forward_on(isa, &case);
        assert_eq!(
            bits(&best.out.elements()),
            bits(&forward.out.elements()),
            "{isa:?}"
        );
        assert_eq!(bits(&best.lse), bits(&forward.lse), "{isa:?}");
        let backward = cpu_backward_on(isa, &case, &forward, true, false);
        for ((name, a), (_, b)) in gradients.parts().iter().zip(backward.parts()) {
            assert_eq!(bits(a), bits(&b), "{name} {isa:?}");
        }
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}
