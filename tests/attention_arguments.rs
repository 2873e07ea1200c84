//! What an attention call refuses: by name, with what was expected and what came, and before anything is written.

use segattn::attention::{
    Batch, Error, Gates, Gradients, HostProblem, Layout, Len, Lengths, Problem, Saved, View,
    ViewMut, cpu, reference,
};

const Q: [usize; 4] = [2, 5, 4, 8];
const KV: [usize; 4] = [2, 5, 2, 8];
const PRIOR: [usize; 4] = [2, 3, 2, 8];

static ZEROS: [f32; 2 * 5 * 4 * 8] = [0.0; 2 * 5 * 4 * 8];

fn view(shape: [usize; 4]) -> View<'static, f32> {
    View::packed(&ZEROS[..shape.iter().product()], shape)
}

/// Two batch elements, four heads on two, with every source.
fn problem() -> HostProblem<'static, f32> {
    Problem::causal(view(Q), view(KV), view(KV))
        .prior(view(PRIOR), view(PRIOR), &[true, true, false, false])
        .past(view(PRIOR), view(PRIOR), &[0.0, 1.0, 0.5, 0.0])
}

fn causal() -> HostProblem<'static, f32> {
    Problem::causal(view(Q), view(KV), view(KV))
}

/// Runs forward; what was refused must have left the output as it was.
fn forward(problem: &HostProblem<'_, f32>) -> Result<(), Error> {
    let mut out = vec![f32::NAN; Q.iter().product()];
    let mut lse = vec![f32::NAN; 2 * 4 * 5];
    let result = cpu::forward(problem, ViewMut::packed(&mut out, Q), &mut lse);
    let untouched = out.iter().chain(&lse).all(|x| x.is_nan());
    assert_eq!(result.is_err(), untouched);
    result
}

fn refused(problem: HostProblem<'_, f32>) -> String {
    forward(&problem).expect_err("refused").to_string()
}

#[test]
fn what_is_well_formed_is_computed() {
    forward(&causal()).expect("causal");
    forward(&problem()).expect("every source");
    let lengths = Lengths::segment(&[5, 3])
        .prior(&[3, 0])
        .past_per_head(&[3, 2, 1, 0])
        .sinks_per_head(&[0, 2, 1, 0])
        .query_start(&[4, 0]);
    forward(&problem().lengths(lengths).scale(0.5)).expect("lengths");
}

#[test]
fn shapes_that_do_not_agree_are_refused() {
    let with = |q, k, v| refused(Problem::causal(view(q), view(k), view(v)));
    assert_eq!(
        with([2, 5, 3, 8], KV, KV),
        "q_heads: expected a positive multiple of kv_heads = 2, got 3"
    );
    assert_eq!(
        with([2, 5, 4, 0], [2, 5, 2, 0], [2, 5, 2, 0]),
        "head_dim: expected at least 1, got 0"
    );
    assert_eq!(
        with(Q, [2, 5, 0, 8], KV),
        "kv_heads: expected at least 1, got 0"
    );
    assert_eq!(
        with(Q, [1, 5, 2, 8], KV),
        "k: expected 2 batch elements, got 1"
    );
    assert_eq!(with(Q, KV, [2, 5, 4, 8]), "v: expected 2 heads, got 4");
    assert_eq!(
        with(Q, KV, [2, 5, 2, 4]),
        "v: expected rows of head_dim = 8, got 4"
    );
    assert_eq!(
        with(Q, KV, [2, 4, 2, 8]),
        "v: expected the 5 rows of k, got 4"
    );
    assert_eq!(
        with([2, 4, 4, 8], KV, KV),
        "segment_len[0]: expected query_start + at most 4 rows of q, got 5"
    );
}

#[test]
fn roles_and_gates_are_checked() {
    let prior = refused(causal().prior(view(PRIOR), view(PRIOR), &[true; 3]));
    assert_eq!(prior, "prior_heads: expected q_heads = 4 elements, got 3");
    let past = |gates: &'static [f32]| refused(causal().past(view(PRIOR), view(PRIOR), gates));
    assert_eq!(
        past(&[1.0; 5]),
        "past_gate: expected q_heads = 4 elements, got 5"
    );
    assert_eq!(
        past(&[1.0, -1.0, 0.0, 0.0]),
        "past_gate[1]: expected a finite number >= 0, got -1"
    );
    assert!(past(&[f32::NAN; 4]).starts_with("past_gate[0]: "));
    assert!(refused(causal().scale(f32::INFINITY)).starts_with("scale[0]: "));
}

#[test]
fn lengths_are_checked_against_their_tensors() {
    let with = |lengths| refused(problem().lengths(lengths));
    assert_eq!(
        with(Lengths::segment(&[5])),
        "segment_len: expected batch = 2 elements, got 1"
    );
    assert_eq!(
        with(Lengths::segment(&[5, 6])),
        "segment_len[1]: expected 0 to 5 rows, got 6"
    );
    assert_eq!(
        with(Lengths::default().prior(&[-1, 0])),
        "prior_len[0]: expected 0 to 3 rows, got -1"
    );
    assert_eq!(
        with(Lengths::default().past_per_head(&[0, 0])),
        "past_len: expected batch * kv_heads = 4 elements, got 2"
    );
    assert_eq!(
        with(Lengths::default().past(&[3, 1]).sinks(&[3, 2])),
        "sink_len[1]: expected 0 to past_len = 1, got 2"
    );
    assert_eq!(
        with(
            Lengths::default()
                .past_per_head(&[3, 1, 2, 0])
                .sinks_per_head(&[3, 1, 2, 1])
        ),
        "sink_len[3]: expected 0 to past_len = 0, got 1"
    );
    assert_eq!(
        with(Lengths::default().sinks(&[-1, 0])),
        "sink_len[0]: expected 0 to past_len = 3, got -1"
    );
    assert_eq!(
        with(Lengths::default().sinks(&[0; 4])),
        "sink_len: expected batch = 2 elements, got 4"
    );
    assert_eq!(
        refused(causal().lengths(Lengths::default().sinks(&[0, 0]))),
        "sink_len: expected none, as the source is not there, got lengths"
    );
    assert_eq!(
        with(Lengths::segment(&[5, 3]).query_start(&[0, 4])),
        "query_start[1]: expected 0 to segment_len = 3, got 4"
    );
    assert!(with(Lengths::default().query_start(&[-1, 0])).starts_with("query_start[0]: "));
    let absent = refused(causal().lengths(Lengths::default().prior(&[0, 0])));
    assert_eq!(
        absent,
        "prior_len: expected none, as the source is not there, got lengths"
    );
}

#[test]
fn what_lies_on_a_device_is_refused_on_the_host() {
    let lengths = Lengths::segment(Len::Device(256));
    let gates = Gates::Device {
        past_gate: 256,
        reads_past: &[true; 4],
    };
    for (problem, argument) in [
        (causal().lengths(lengths), "segment_len"),
        (causal().past(view(PRIOR), view(PRIOR), gates), "past_gate"),
    ] {
        let said =
            format!("{argument}: supported are host values on the CPU, got a device address");
        assert_eq!(refused(problem), said);
    }
}

#[test]
fn rows_beyond_the_data_are_refused_unless_they_are_padding() {
    let k = View {
        data: &ZEROS[..2 * 5 * 2 * 8 - 1],
        layout: Layout::packed(KV),
    };
    assert_eq!(
        refused(Problem { k, ..causal() }),
        "k: batch element 1: expected at least 160 elements, got 159"
    );
    let padded = Problem { k, ..causal() }.lengths(Lengths::segment(&[5, 4]));
    forward(&padded).expect("the last row is padding");
    let far = Layout {
        row_stride: usize::MAX,
        ..Layout::packed(KV)
    };
    let k = View {
        layout: far,
        ..view(KV)
    };
    assert_eq!(
        refused(Problem { k, ..causal() }),
        "k: batch element 0: expected at least 2^64 elements, got 160"
    );
}

/// A backward pass of the f64 reference, whose checks are the CPU's and the GPU's.
fn backward(
    problem: &HostProblem<'_, f64>,
    prior: bool,
    change: impl FnOnce(&mut Layout<'_>),
) -> Result<(), Error> {
    let zeros = vec![0.0; Q.iter().product()];
    let saved = Saved::new(
        View::packed(&zeros, Q),
        &zeros[..40],
        View::packed(&zeros, Q),
    );
    let mut written = [0; 5].map(|_| vec![f64::NAN; Q.iter().product()]);
    let [d_q, d_k, d_v, d_prior_k, d_prior_v] = &mut written;
    let mut d_past_gate = [f64::NAN; 8];
    let mut d_q = ViewMut::packed(d_q, Q);
    change(&mut d_q.layout);
    let (d_k, d_v) = (ViewMut::packed(d_k, KV), ViewMut::packed(d_v, KV));
    let gradients = Gradients::new(d_q, d_k, d_v, &mut d_past_gate[..]);
    let gradients = match prior {
        true => gradients.prior(
            ViewMut::packed(d_prior_k, PRIOR),
            ViewMut::packed(d_prior_v, PRIOR),
        ),
        false => gradients,
    };
    let result = reference::backward(problem, &saved, gradients);
    let mut numbers = written.iter().flatten().chain(&d_past_gate);
    assert_eq!(result.is_err(), numbers.all(|x| x.is_nan()));
    result
}

#[test]
fn a_backward_pass_refuses_what_it_cannot_write() {
    let zeros = vec![0.0; Q.iter().product()];
    let view = |shape| View::packed(&zeros, shape);
    let causal = Problem::causal(view(Q), view(KV), view(KV));
    backward(&causal, false, |_| {}).expect("a backward pass");
    let said = |result: Result<(), Error>| result.expect_err("refused").to_string();
    assert!(said(backward(&causal, true, |_| {})).starts_with("d_prior: "));
    let overlapping = |layout: &mut Layout<'_>| layout.row_stride = 8;
    assert!(said(backward(&causal, false, overlapping)).starts_with("d_q: expected rows that do"));
    let fewer = |layout: &mut Layout<'_>| layout.rows = 4;
    assert_eq!(
        said(backward(&causal, false, fewer)),
        "d_q: expected the 5 rows of q, got 4"
    );
    let lonely = |layout: &mut Layout<'_>| layout.batch = Batch::Offsets(&[0]);
    assert_eq!(
        said(backward(&causal, false, lonely)),
        "d_q: expected 2 batch elements, got 1"
    );
    let later = causal.lengths(Lengths::default().query_start(&[0, 1]));
    assert_eq!(
        said(backward(&later, false, |_| {})),
        "query_start[1]: expected 0 in a backward pass, got 1"
    );
}
