//! Plans of the backward pass.

use super::*;

fn backward(problem: &GpuProblem<'_>, read_only_prior: bool) -> Result<Recorder, Error> {
    backward_with(&Table, problem, read_only_prior)
}

fn backward_with(
    kernels: &impl Kernels,
    problem: &GpuProblem<'_>,
    read_only_prior: bool,
) -> Result<Recorder, Error> {
    let rows = problem.rows();
    let like_q = |address| Tensor {
        data: address,
        ..problem.q
    };
    let saved = Saved {
        out: like_q(4096),
        lse: DeviceSlice::new(4096, 8 * rows),
        d_out: like_q(8192),
        d_lse: None,
    };
    let gradients = Gradients {
        d_q: like_q(4096),
        d_k: problem.k,
        d_v: problem.v,
        d_prior: problem
            .prior
            .filter(|_| !read_only_prior)
            .map(|prior| (prior.k, prior.v)),
        d_past_gate: DeviceSlice::new(2048, 8),
    };
    let plan = BackwardPlan::new(problem, &saved, &gradients, kernels)?;
    let mut recorder = Recorder::default();
    // SAFETY: a recorder touches no memory.
    unsafe { plan.run(&mut recorder, workspace(plan.workspace_bytes()))? };
    Ok(recorder)
}

#[test]
fn backward_prepares_then_takes_queries_then_keys() {
    for (read_only_prior, key_blocks) in [(false, 2 * 2 * 3), (true, 2 * 2 * 2)] {
        let recorder = backward(&problem(), read_only_prior).expect("a plan");
        let expected = [
            ("attention_prepare_bf16_d64", 2 * 4 * 256 / 64),
            ("attention_query_grad_bf16_d64", 2 * 4 * 2),
            ("attention_query_grad_sum_bf16_d64", 2 * 4 / 4),
            ("attention_key_grad_bf16_d64", key_blocks),
        ];
        assert_eq!(launches(&recorder), expected);
        let params: SegattnBackwardParams = params(&recorder.launches[0].1);
        assert_eq!(params.d_prior_k.data.is_null(), read_only_prior);
        assert!(params.d_lse.is_null() && !params.d_k.data.is_null());
        assert_eq!(
            (params.row_pitch, params.tiles, params.max_splits),
            (256, 2, 1)
        );
    }
}

#[test]
fn on_hopper_backward_takes_work_tiles_with_the_blocks_that_run_at_once() {
    let recorder = backward_with(&HopperTable, &problem(), false).expect("a plan");
    let expected = [
        ("attention_prepare_bf16_d64", 2 * 4 * 256 / 64),
        ("attention_query_grad_hopper_bf16_d64", 8),
        ("attention_query_grad_sum_hopper_bf16_d64", 2 * 4 / 4),
        ("attention_key_grad_hopper_bf16_d64", 8),
    ];
    assert_eq!(launches(&recorder), expected);
    let params: SegattnBackwardParams = params(&recorder.launches[1].1);
    assert_eq!(recorder.zeroed, [(params.work_counter as u64, 8)]);
    assert_ne!(recorder.zeroed[0].0, 0);
}

#[test]
fn backward_without_rows_still_writes_the_gradients_of_gates_and_keys() {
    let mut problem = problem();
    problem.q = tensor(Q, [2, 0, 4, 64]);
    problem.lengths = Lengths::segment(&[0, 0]).prior(&[40, 0]).past(&[0, 0]);
    let recorder = backward(&problem, false).expect("a plan");
    assert_eq!(recorder.zeroed, [(2048, 32)]);
    let names: Vec<_> = recorder
        .launches
        .iter()
        .map(|(launch, _)| launch.entry.name)
        .collect();
    assert_eq!(names, ["attention_key_grad_bf16_d64"]);
}

#[test]
fn backward_refuses_queries_that_do_not_begin_at_0() {
    let mut problem = problem();
    let growing = Lengths::segment(Len::Device(256)).query_start(Len::Device(256));
    for lengths in [
        growing,
        growing.prior(&[40, 0]).past(&[70, 0]),
        Lengths::segment(&[200, 100]).query_start(&[0, 1]),
    ] {
        problem.lengths = lengths;
        let refused = backward(&problem, false).err().expect("refused");
        let error = refused.to_string();
        assert!(error.starts_with("query_start"), "{error}");
    }
}
