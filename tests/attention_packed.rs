//! Batch elements of unequal lengths without padding: on the CPU and in the reference they have, to the bit, the
//! results that they have with padding.

mod attention_cases;

use attention_cases::*;
use segattn::attention::{Batch, Layout, Lengths, Problem, View, ViewMut, cpu};

/// Lengths around a tile's and a chunk's, every role, gates between, a group of three.
fn mixed(arrangement: Arrangement) -> Shape {
    Shape {
        segment_len: vec![0, 129, 1, 63, 64, 7, 200],
        prior_len: vec![65, 0, 1, 64, 3, 9, 70],
        past_len: vec![1, 65, 63, 0, 64, 9, 130],
        sink_len: vec![0, 4, 3, 0, 64, 9, 4],
        past_gate: vec![0.25, 1.0, 0.0, 3.5, 0.0, 1.0],
        prior_heads: vec![true, false, true, true, true, false],
        arrangement,
        ..Shape::plain(2, 3, 24, [0; 3])
    }
}

/// Every result by name, the valid rows of each batch element one after another.
fn results<T: Copy>(
    case: &Case<T>,
    forward: &Forward<T>,
    backward: Option<&Backward<T>>,
) -> Vec<(&'static str, Vec<T>)> {
    let shape = &case.shape;
    let start = |b: usize| case.query_start.as_ref().map_or(0, |start| start[b]);
    let queries = |b: usize| (shape.segment_len[b] - start(b)) as usize;
    let rows = |tensor: &Tensor<T>, len: &dyn Fn(usize) -> usize| {
        let heads = tensor.shape[2];
        (0..shape.batch())
            .flat_map(|b| (0..len(b)).flat_map(move |row| (0..heads).map(move |h| (b, row, h))))
            .flat_map(|(b, row, h)| tensor.row(b, row, h).to_vec())
            .collect::<Vec<T>>()
    };
    let lse = (0..shape.batch()).flat_map(|b| (0..shape.q_heads()).map(move |h| (b, h)));
    let lse = lse.flat_map(|(b, h)| &forward.lse[case.q.first_number(b, h)..][..queries(b)]);
    let mut all = vec![
        ("lse", lse.copied().collect()),
        ("out", rows(&forward.out, &queries)),
    ];
    if let Some(backward) = backward {
        let (d_k, d_v) = backward.d_prior.as_ref().expect("asked for");
        let prior = |b: usize| shape.prior_len[b] as usize;
        all.extend([
            ("d_q", rows(&backward.d_q, &queries)),
            ("d_k", rows(&backward.d_k, &queries)),
            ("d_v", rows(&backward.d_v, &queries)),
            ("d_prior_k", rows(d_k, &prior)),
            ("d_prior_v", rows(d_v, &prior)),
            ("d_past_gate", backward.d_past_gate.clone()),
        ]);
    }
    all
}

/// Runs a case with and without padding. Bits are asked for as such; nothing is written behind the last row.
fn check<T: Copy + PartialEq + std::fmt::Debug>(
    query_start: Option<Vec<i32>>,
    run: impl Fn(&Case<T>) -> (Forward<T>, Option<Backward<T>>),
    narrow: impl Fn(Case<f64>) -> Case<T>,
    is_nan: impl Fn(T) -> bool,
) {
    let of = |arrangement| {
        let case = narrow(Case::starting_at(&mixed(arrangement), query_start.clone()));
        let (forward, backward) = run(&case);
        if case.q.is_ragged() {
            let behind = &forward.out.data[forward.out.data.len() - 24..];
            assert!(
                behind.iter().all(|x| is_nan(*x)),
                "written behind the last row"
            );
        }
        results(&case, &forward, backward.as_ref())
    };
    let padded = of(Arrangement::Packed);
    for arrangement in [Arrangement::Ragged, Arrangement::RaggedKeys] {
        for ((name, expected), (_, got)) in padded.iter().zip(of(arrangement)) {
            assert!(*expected == got, "{name}, {arrangement:?}: other bits");
            assert!(got.iter().all(|x| !is_nan(*x)), "{name}");
        }
    }
}

fn on_cpu(case: &Case<f32>) -> (Forward<f32>, Option<Backward<f32>>) {
    let mut forward = Forward::for_case(case, f32::NAN);
    let (out, lse) = (forward.out.view_mut(), &mut forward.lse);
    cpu::forward(&case.problem(), out, lse).expect("a valid case");
    if case.query_start.is_some() {
        return (forward, None);
    }
    let mut backward = Backward::for_case(case, f32::NAN, false);
    let saved = case.saved(&forward, true);
    cpu::backward(&case.problem(), &saved, backward.grads()).expect("a valid case");
    (forward, Some(backward))
}

fn in_f64(case: &Case<f64>) -> (Forward<f64>, Option<Backward<f64>>) {
    let forward = reference_forward(case);
    let backward =
        (case.query_start.is_none()).then(|| reference_backward(case, &forward, true, false));
    (forward, backward)
}

const DECODED: [i32; 7] = [0, 128, 0, 60, 64, 5, 137];

#[test]
fn the_cpu_needs_no_padding() {
    for query_start in [None, Some(DECODED.to_vec())] {
        check(query_start, on_cpu, |case| case.to_f32(), f32::is_nan);
    }
}

#[test]
fn the_reference_needs_no_padding() {
    for query_start in [None, Some(DECODED.to_vec())] {
        check(query_start, in_f64, |case| case, f64::is_nan);
    }
}

/// Runs two batch elements of 3 and 1 rows, whose offsets are these.
fn refused(offsets: &[usize], lengths: Lengths<'_>, change: impl Fn(&mut Layout<'_>)) -> String {
    let zeros = [0.0f32; 4 * 2 * 8];
    let mut layout = Layout::ragged(offsets, [2, 8]);
    change(&mut layout);
    let q = View {
        data: &zeros[..],
        layout,
    };
    let kv = View::packed(&zeros[..2 * 3 * 8], [2, 3, 1, 8]);
    let (mut out, mut lse) = ([f32::NAN; 4 * 2 * 8], [f32::NAN; 4 * 2]);
    let out_view = ViewMut {
        data: &mut out[..],
        layout,
    };
    let problem = Problem::causal(q, kv, kv).lengths(lengths);
    let error = cpu::forward(&problem, out_view, &mut lse).expect_err("refused");
    assert!(out.iter().chain(&lse).all(|x| x.is_nan()));
    error.to_string()
}

#[test]
fn offsets_and_lengths_that_do_not_agree_are_refused() {
    let lengths = Lengths::segment(&[3, 1]);
    let same = |_: &mut Layout<'_>| {};
    assert_eq!(
        refused(&[0, 3, 2], lengths, same),
        "q: expected row offsets that ascend from 0 on, got [0, 3, 2]"
    );
    assert_eq!(
        refused(&[1, 3, 4], lengths, same),
        "q: expected row offsets that ascend from 0 on, got [1, 3, 4]"
    );
    assert_eq!(
        refused(&[0, 3, 4], Lengths::segment(&[2, 1]), same),
        "segment_len[0]: expected query_start + the 3 rows of q, which is packed, got 2"
    );
    assert_eq!(
        refused(&[0, 3, 4], lengths, |layout| layout.rows = 4),
        "q: expected the most rows of a packed batch element, 3, got 4"
    );
    assert_eq!(
        refused(&[0, 3, 9], lengths, same),
        "segment_len[1]: expected query_start + the 6 rows of q, which is packed, got 1"
    );
}

#[test]
fn an_output_with_padding_is_refused_where_queries_have_none() {
    let zeros = [0.0f32; 6 * 8];
    let q = View {
        data: &zeros[..],
        layout: Layout::ragged(&[0, 3, 4], [1, 8]),
    };
    let kv = View::packed(&zeros[..], [2, 3, 1, 8]);
    let problem = Problem::causal(q, kv, kv).lengths(Lengths::segment(&[3, 1]));
    let (mut out, mut lse) = ([0.0; 6 * 8], [0.0; 4]);
    let padded = ViewMut::packed(&mut out, [2, 3, 1, 8]);
    let error = cpu::forward(&problem, padded, &mut lse).expect_err("refused");
    let expected =
        "out: expected rows like those of q, Packed([0, 3, 4]), got Stride { len: 2, stride: 24 }";
    assert_eq!(error.to_string(), expected);
}

#[test]
fn the_extent_of_packed_batch_elements_ends_with_their_last_row() {
    let layout = Layout::ragged(&[0, 3, 3, 4], [2, 8]);
    assert_eq!(layout.rows, 3);
    assert!(matches!(layout.batch, Batch::Packed(_)));
    assert_eq!([0, 1, 2].map(|b| layout.rows_of(b)), [3, 0, 1]);
    assert_eq!(layout.extent(), Some(4 * 2 * 8));
    assert_eq!(layout.offset(2, 0, 1), 3 * 16 + 8);
}
