//! The f32 attention of the CPU against the f64 reference, and against itself where bits must agree.

mod attention_cases;

use attention_cases::plain::{self, Upstream};
use attention_cases::*;
use proptest::prelude::*;
use segattn::attention::cpu;
use segattn::isa::Isa;

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
        &case.saved(forward, with_d_lse),
        backward.grads(),
    )
    .expect("a valid case");
    backward
}

fn cpu_backward(case: &Case<f32>, forward: &Forward<f32>, with_d_lse: bool) -> Backward<f32> {
    cpu_backward_on(Isa::best(), case, forward, with_d_lse, false)
}

/// Norm of the difference, and of what is expected. NaN and infinities must be at the same places.
fn error(name: &str, got: &[f32], expected: &[f64]) -> (f64, f64) {
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
    (difference.sqrt(), norm.sqrt())
}

/// Largest and summed norm of the rows that hold numbers; padding may hold anything.
fn row_norms(tensor: &Tensor<f64>) -> (f64, f64) {
    let elements = tensor.elements();
    let norm = |row: &[f64]| row.iter().map(|x| x * x).sum::<f64>().sqrt();
    let norms = elements.chunks(tensor.shape[3].max(1)).map(norm);
    let norms = norms.filter(|n| n.is_finite());
    norms.fold((0.0, 0.0), |(m, s), n| (n.max(m), s + n))
}

/// What rounding alone may cost each result where its sum cancels: a score of size S is off by S units of
/// f32, so its probability is too, and a gradient by that times the sizes of the terms it is a sum of.
struct Rounding {
    unit: f64,
    keys: f64,
    terms: f64,
    gate: f64,
}

impl Rounding {
    fn new(case: &Case<f64>, lse: &[f64], with_d_lse: bool) -> Self {
        let largest = |tensors: &[&Tensor<f64>]| {
            let norms = tensors.iter().map(|t| row_norms(t).0);
            norms.fold(0.0, f64::max)
        };
        let score = lse.iter().filter(|x| x.is_finite());
        let score = score.fold(0.0, |m: f64, x| m.max(x.abs()));
        let d_lse = case.d_lse.iter().filter(|x| with_d_lse && x.is_finite());
        let values = largest(&[&case.v, &case.prior_v, &case.past_v]);
        let gates = case.shape.past_gate.iter().filter(|g| **g > 0.0);
        let scale = case.shape.scale.map_or(1.0, f64::from).abs();
        Self {
            unit: 4.0 * f64::from(f32::EPSILON) * (8.0 + score),
            keys: scale * largest(&[&case.q, &case.k, &case.prior_k, &case.past_k]),
            terms: 2.0 * row_norms(&case.d_out).1 * values + d_lse.map(|x| x.abs()).sum::<f64>(),
            gate: gates.fold(f64::INFINITY, |m, g| m.min(f64::from(*g))),
        }
    }

    fn of(&self, name: &str, expected: &[f64]) -> f64 {
        match name {
            "d_q" | "d_k" | "d_prior_k" => self.unit * self.terms * self.keys,
            "d_past_gate" => self.unit * self.terms / self.gate,
            // Sums of probabilities; those below the smallest normal f32 may be flushed.
            _ => {
                let norm = expected.iter().map(|x| x * x).sum::<f64>().sqrt();
                self.unit * norm + self.terms * f64::from(f32::MIN_POSITIVE)
            }
        }
    }
}

/// Asserts a relative error below 1e-5, or one of at most `times` that of plain f32 where the problem
/// is so badly conditioned (sums that cancel) that plain f32 misses 1e-5 too, or one within `rounding`.
fn assert_close(
    name: &str,
    got: &[f32],
    plain: &[f32],
    expected: &[f64],
    [times, rounding]: [f64; 2],
) {
    let (difference, norm) = error(name, got, expected);
    let (plain, _) = error(name, plain, expected);
    assert!(
        difference <= 1e-5 * norm || difference <= times * plain || difference <= rounding,
        "{name}: error {difference:e}, plain f32 {plain:e}, rounding {rounding:e}, norm {norm:e}"
    );
}

fn check(shape: &Shape, with_d_lse: bool, read_only_prior: bool) {
    let case = Case::new(shape);
    let narrow = case.to_f32();
    let upstream = Upstream {
        d_out: narrow.d_out.view(),
        d_lse: with_d_lse.then_some(&narrow.d_lse[..]),
    };
    let plain = plain::run(&narrow.problem(), Some(upstream));
    let expected = reference_forward(&case);
    // Scores in the hundreds carry a rounding error of 1e-5 and more, a matter of luck in both.
    let times = match shape.values {
        Values::Huge | Values::HeavyTails => 6.0,
        Values::Centered | Values::Shifted | Values::Tiny => 1.5,
    };
    let forward = cpu_forward(&narrow);
    let elements = forward.out.elements();
    assert_close(
        "out",
        &elements,
        &plain.out,
        &expected.out.elements(),
        [times, 0.0],
    );
    let rounding = Rounding::new(&case, &expected.lse, with_d_lse);
    assert_close("lse", &forward.lse, &plain.lse, &expected.lse, [times, 0.0]);
    let expected = reference_backward(&case, &expected, with_d_lse, read_only_prior);
    let backward = cpu_backward_on(Isa::best(), &narrow, &forward, with_d_lse, read_only_prior);
    for (((name, got), (_, expected)), (plain_name, plain)) in backward
        .parts()
        .iter()
        .zip(expected.parts())
        .zip(&plain.grads)
    {
        assert_eq!(name, plain_name);
        let limits = [times, rounding.of(name, &expected)];
        assert_close(name, got, plain, &expected, limits);
    }
}

/// The bits of all rows of a batch element: `out` and `lse`.
fn entry_bits(forward: &Forward<f32>, batch_index: usize, rows: usize) -> Vec<u32> {
    let [_, all_rows, heads, _] = forward.out.shape;
    let mut bits = Vec::new();
    for head in 0..heads {
        for row in 0..rows {
            let out = forward.out.row(batch_index, row, head).iter();
            let lse = forward.lse[(batch_index * heads + head) * all_rows + row];
            bits.extend(out.chain([&lse]).map(|x| x.to_bits()));
        }
    }
    bits
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

fn assert_same_gradients(a: &Backward<f32>, b: &Backward<f32>, what: &str) {
    for ((name, a), (_, b)) in a.parts().iter().zip(b.parts()) {
        assert_eq!(bits(a), bits(&b), "{name} {what}");
    }
}

/// Runs `f` in a pool of its own.
fn on_threads<R: Send>(threads: usize, f: impl FnOnce() -> R + Send) -> R {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
    pool.build().expect("a thread pool").install(f)
}

/// Every role, gates between, a group of three: shapes for the tests of bits.
fn mixed(lens: [i32; 3]) -> Shape {
    let mut shape = Shape::plain(2, 3, 24, lens);
    shape.past_gate = vec![1.0, 0.0, 0.25, 0.0, 0.0, 3.5];
    shape.prior_heads = vec![true, true, false, false, false, false];
    shape
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
            check(&shape, with_d_lse, read_only_prior);
        }
    }
}

#[test]
fn the_bits_are_the_same_for_every_instruction_set() {
    let case = Case::new(&mixed([150, 70, 65])).to_f32();
    let best = cpu_forward(&case);
    let gradients = cpu_backward(&case, &best, true);
    for isa in Isa::available() {
        let forward = cpu_forward_on(isa, &case);
        let what = format!("{isa:?}");
        assert_eq!(
            entry_bits(&best, 0, 150),
            entry_bits(&forward, 0, 150),
            "{what}"
        );
        let backward = cpu_backward_on(isa, &case, &forward, true, false);
        assert_same_gradients(&gradients, &backward, &what);
    }
}

#[test]
fn the_bits_are_the_same_on_any_number_of_threads_and_every_time() {
    let case = Case::new(&mixed([450, 200, 130])).to_f32();
    let forward = cpu_forward(&case);
    let gradients = cpu_backward(&case, &forward, true);
    for threads in [1, 2, 3, 7, 7, 7] {
        let what = format!("{threads} threads");
        let (again, backward) = on_threads(threads, || {
            let forward = cpu_forward(&case);
            let backward = cpu_backward(&case, &forward, true);
            (forward, backward)
        });
        assert_eq!(
            entry_bits(&forward, 0, 450),
            entry_bits(&again, 0, 450),
            "{what}"
        );
        assert_same_gradients(&gradients, &backward, &what);
    }
}

/// The last `count` query rows of a case of one batch element up to `end` rows, as decoding asks for them.
fn last_rows(case: &Case<f32>, end: usize, count: usize) -> Case<f32> {
    let [_, _, heads, head_dim] = case.q.shape;
    let mut last = case.clone();
    last.shape.segment_len = vec![end as i32];
    last.query_start = Some(vec![(end - count) as i32]);
    last.q = Tensor::new([1, count, heads, head_dim], Arrangement::Packed, f32::NAN);
    for row in 0..count {
        for head in 0..heads {
            let from = case.q.row(0, end - count + row, head);
            last.q.row_mut(0, row, head).copy_from_slice(from);
        }
    }
    last
}

#[test]
fn a_row_alone_has_the_bits_it_has_among_others() {
    let case = Case::new(&mixed([200, 70, 65])).to_f32();
    let full = cpu_forward(&case);
    let heads = case.q.shape[2];
    for end in [1, 2, 16, 17, 63, 64, 65, 128, 129, 200] {
        for count in [1, 2, 5, 60].into_iter().filter(|&count| count <= end) {
            let some = cpu_forward(&last_rows(&case, end, count));
            for head in 0..heads {
                for row in 0..count {
                    let at = end - count + row;
                    let (a, b) = (full.out.row(0, at, head), some.out.row(0, row, head));
                    assert_eq!(bits(a), bits(b), "row {at} of {end}, {count} rows");
                    let lse = some.lse[head * count + row];
                    assert_eq!(full.lse[head * 200 + at].to_bits(), lse.to_bits());
                }
            }
        }
    }
}

/// Two batch elements with the same numbers in batch element 0 as a case of one batch element.
fn with_neighbour(alone: &Case<f32>, lens: [i32; 3]) -> Case<f32> {
    let mut shape = alone.shape.clone();
    shape.segment_len.push(lens[0]);
    shape.prior_len.push(lens[1]);
    shape.past_len.push(lens[2]);
    shape.seed = 99;
    let mut both = Case::new(&shape).to_f32();
    let tensors = [
        (&mut both.q, &alone.q),
        (&mut both.k, &alone.k),
        (&mut both.v, &alone.v),
        (&mut both.prior_k, &alone.prior_k),
        (&mut both.prior_v, &alone.prior_v),
        (&mut both.past_k, &alone.past_k),
        (&mut both.past_v, &alone.past_v),
        (&mut both.d_out, &alone.d_out),
    ];
    for (to, from) in tensors {
        for row in 0..from.shape[1] {
            for head in 0..from.shape[2] {
                to.row_mut(0, row, head)
                    .copy_from_slice(from.row(0, row, head));
            }
        }
    }
    let (rows, alone_rows) = (both.q.shape[1], alone.q.shape[1]);
    for head in 0..alone.shape.q_heads() {
        let from = &alone.d_lse[head * alone_rows..][..alone_rows];
        both.d_lse[head * rows..][..alone_rows].copy_from_slice(from);
    }
    both
}

#[test]
fn a_neighbour_s_lengths_do_not_change_the_bits_of_an_entry() {
    let alone = Case::new(&mixed([130, 70, 65])).to_f32();
    let forward = cpu_forward(&alone);
    let gradients = cpu_backward(&alone, &forward, true);
    for lens in [[1, 0, 0], [400, 300, 200], [0, 0, 0], [64, 64, 64]] {
        let both = with_neighbour(&alone, lens);
        let with = cpu_forward(&both);
        assert_eq!(
            entry_bits(&forward, 0, 130),
            entry_bits(&with, 0, 130),
            "{lens:?}"
        );
        let backward = cpu_backward(&both, &with, true);
        let pairs = [
            (&gradients.d_q, &backward.d_q),
            (&gradients.d_k, &backward.d_k),
            (&gradients.d_v, &backward.d_v),
        ];
        for (a, b) in pairs {
            for row in 0..a.shape[1] {
                for head in 0..a.shape[2] {
                    assert_eq!(bits(a.row(0, row, head)), bits(b.row(0, row, head)));
                }
            }
        }
        let gates = gradients.d_past_gate.len();
        let b = &backward.d_past_gate[..gates];
        assert_eq!(bits(&gradients.d_past_gate), bits(b));
    }
}

#[test]
fn equal_scores_give_the_exact_mean_of_a_power_of_two_keys() {
    // 64 past, 32 prior and up to 32 current keys with score 0: weights 1/128 in the last row.
    let mut case = Case::new(&Shape::plain(1, 1, 8, [32, 32, 64])).to_f32();
    case.q.data.fill(0.0);
    for (i, v) in [&mut case.past_v, &mut case.prior_v, &mut case.v]
        .into_iter()
        .enumerate()
    {
        v.data.fill([1.0, 4.0, -2.0][i]);
    }
    let forward = cpu_forward(&case);
    assert!(forward.out.row(0, 31, 0).iter().all(|&x| x == 1.0));
    case.d_out.data.fill(1.0);
    let backward = cpu_backward(&case, &forward, false);
    assert!(
        backward.d_k.elements().iter().all(|&x| x == 0.0),
        "queries are 0"
    );
}

#[test]
fn one_hot_weights_return_the_chosen_value_exactly() {
    let mut case = Case::new(&Shape::plain(1, 2, 16, [100, 0, 0])).to_f32();
    case.q.data.fill(1.0);
    for row in 0..100 {
        let score = if row == 77 { 1000.0 } else { -1000.0 };
        case.k.row_mut(0, row, 0).fill(score);
    }
    let forward = cpu_forward(&case);
    for row in 77..100 {
        assert_eq!(forward.out.row(0, row, 1), case.v.row(0, 77, 0));
    }
    let backward = cpu_backward(&case, &forward, false);
    assert!(backward.d_q.elements().iter().all(|x| x.is_finite()));
}

#[test]
fn a_single_row_and_very_unequal_lengths_have_finite_gradients() {
    let mut shape = Shape::plain(1, 1, 64, [1, 0, 0]);
    check(&shape, true, false);
    shape.segment_len = vec![1, 700];
    shape.prior_len = vec![300, 0];
    shape.past_len = vec![0, 1];
    check(&shape, true, false);
}

#[test]
fn entries_and_batches_without_rows_are_written_and_do_not_hang() {
    let mut shape = mixed([0, 70, 65]);
    check(&shape, true, false);
    shape.spare_rows = 2;
    check(&shape, false, true);
    shape.segment_len = Vec::new();
    shape.prior_len = Vec::new();
    shape.past_len = Vec::new();
    check(&shape, true, false);
}

#[test]
fn gradients_of_gates_keep_their_bound_in_groups_of_eight_with_scores_far_apart() {
    // In the second case the past has nearly all the weight.
    let lens = [[128, 64, 512], [16, 0, 1024]];
    for (seed, lens) in (1..=5).flat_map(|seed| lens.map(|lens| (seed, lens))) {
        // Scores with a standard deviation of 4.
        let mut shape = Shape::plain(1, 8, 64, lens);
        (shape.scale, shape.seed) = (Some(0.5), seed);
        let case = Case::new(&shape);
        let expected = reference_backward(&case, &reference_forward(&case), false, false);
        let case = case.to_f32();
        let got = cpu_backward(&case, &cpu_forward(&case), false).d_past_gate;
        let (difference, norm) = error("d_past_gate", &got, &expected.d_past_gate);
        assert!(difference <= 1e-5 * norm, "{difference:e} of {norm:e}");
    }
}

#[test]
fn unusual_head_dims_have_the_right_gradients() {
    for head_dim in [8, 40, 80, 88, 96, 112, 136, 192, 256] {
        check(&Shape::plain(1, 2, head_dim, [70, 65, 66]), true, false);
    }
}

#[test]
fn a_head_dim_that_is_not_supported_is_refused_and_nothing_written() {
    for head_dim in [4, 12, 264] {
        let case = Case::new(&Shape::plain(1, 1, head_dim, [3, 0, 0])).to_f32();
        let mut forward = Forward::for_case(&case, f32::NAN);
        let (out, lse) = (forward.out.view_mut(), &mut forward.lse);
        let error = cpu::forward(&case.problem(), out, lse).expect_err("not supported");
        assert!(error.to_string().contains("head_dim"), "{error}");
        assert!(forward.out.data.iter().all(|x| x.is_nan()));
    }
}

#[test]
fn a_nan_query_reaches_only_keys_that_it_sees() {
    let mut case = Case::new(&Shape::plain(1, 1, 16, [20, 0, 0])).to_f32();
    case.q.row_mut(0, 5, 0)[3] = f32::NAN;
    let forward = cpu_forward(&case);
    let backward = cpu_backward(&case, &forward, false);
    for row in 0..20 {
        let out = forward.out.row(0, row, 0).iter().any(|x| x.is_nan());
        assert_eq!(out, row == 5, "out {row}");
        let d_k = backward.d_k.row(0, row, 0).iter().any(|x| x.is_nan());
        assert_eq!(d_k, row <= 5, "d_k {row}");
    }
}

/// Lengths around the tiles of 64 keys and of 64 and 128 query rows.
fn lengths() -> impl Strategy<Value = i32> + Clone {
    prop_oneof![
        3 => proptest::sample::select(vec![1, 2, 63, 64, 65, 127, 128, 129, 192, 193]),
        2 => 1..=140i32,
    ]
}

fn all_values() -> Vec<Values> {
    vec![
        Values::Centered,
        Values::Shifted,
        Values::HeavyTails,
        Values::Huge,
        Values::Tiny,
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(60) })]

    #[test]
    fn forward_and_every_gradient_agree_with_the_reference(
        shape in shapes(lengths(), vec![8, 16, 24, 64, 72], vec![1, 3, 8], all_values()),
        with_d_lse in any::<bool>(),
        read_only_prior in any::<bool>(),
    ) {
        check(&shape, with_d_lse, read_only_prior);
    }
}
