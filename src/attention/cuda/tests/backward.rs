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
    recorder.workspace_end = WORKSPACE + plan.workspace_bytes() as u64;
    Ok(recorder)
}

#[test]
fn backward_prepares_then_takes_keys_then_queries() {
    for (read_only_prior, key_blocks) in [(false, 2 * 2 * 3), (true, 2 * 2 * 2)] {
        let recorder = backward(&problem(), read_only_prior).expect("a plan");
        let expected = [
            ("attention_prepare_bf16_d64", 2 * 4 * 256 / 64),
            ("attention_key_grad_bf16_d64", key_blocks),
            ("attention_query_grad_bf16_d64", 2 * 4 * 2),
            ("attention_query_grad_sum_bf16_d64", 2 * 4 / 4),
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
        ("attention_key_grad_hopper_bf16_d64", 8),
        ("attention_query_grad_hopper_bf16_d64", 8),
        ("attention_query_grad_sum_hopper_bf16_d64", 2 * 4 / 4),
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

/// Two batch elements, four heads on two KV heads of 128, as many prior rows as there are rows.
fn of_128(rows: usize, gates: &'static [f32]) -> GpuProblem<'static> {
    let kv = |data, rows| tensor(data, [2, rows, 2, 128]);
    Problem::causal(
        tensor(Q, [2, rows, 4, 128]),
        kv(Q + 16, rows),
        kv(Q + 32, rows),
    )
    .prior(kv(Q + 48, rows), kv(Q + 64, rows), &[true; 4])
    .past(kv(Q + 80, 70), kv(Q + 96, 70), gates)
}

/// First group, number of groups and byte of the workspace where ds lies, of each d_q pass by five products.
fn stored(recorder: &Recorder) -> Vec<(i32, i32, u64)> {
    let is_stored = |entry: &Entry| entry.name == "attention_query_grad_stored_hopper_bf16_d128";
    let launches = recorder.launches.iter();
    let stored = launches.filter(|(launch, _)| is_stored(&launch.entry));
    stored
        .map(|(_, bytes)| {
            let params: SegattnBackwardParams = params(bytes);
            (params.first_group, params.groups, params.ds as u64)
        })
        .collect()
}

#[test]
fn ds_is_stored_for_as_many_groups_as_its_bound_allows() {
    let half: &[f32] = &[0.0, 0.0, 1.0, 0.5];
    let groups = |rows, gates| {
        let recorder = backward_with(&HopperTable, &of_128(rows, gates), false);
        let stored = stored(&recorder.expect("a plan"));
        let groups = stored.iter().map(|&(first, groups, _)| (first, groups));
        groups.collect::<Vec<_>>()
    };
    assert_eq!(groups(2048, half), [(0, 4)]);
    // 185 MB a group, of 537: as many in each launch.
    assert_eq!(groups(5500, half), [(0, 2), (2, 2)]);
    assert_eq!(groups(8192, half), [(0, 1), (1, 1), (2, 1), (3, 1)]);
    // No group fits; short segments; most gates get a gradient; other devices.
    assert_eq!(groups(16_384, half), []);
    assert_eq!(groups(511, half), []);
    assert_eq!(groups(2048, &[0.0, 0.25, 1.0, 0.5]), []);
    let other = backward_with(&Table, &of_128(2048, half), false).expect("a plan");
    assert_eq!(stored(&other), []);
}

#[test]
fn each_launch_of_groups_has_counters_of_its_own_and_ds_is_the_end_of_the_workspace() {
    let recorder = backward_with(&HopperTable, &of_128(8192, &[0.0; 4]), false).expect("a plan");
    let expected = ["prepare_bf16", "key_grad_stored_hopper_bf16"];
    let names: Vec<_> = launches(&recorder).iter().map(|(name, _)| *name).collect();
    assert_eq!(names.len(), 2 + 2 * 4);
    for (name, expected) in names.iter().zip(expected) {
        assert_eq!(*name, format!("attention_{expected}_d128"));
    }
    assert_eq!(names[9], "attention_query_grad_sum_hopper_bf16_d128");
    let counters: Vec<u64> = recorder.launches[1..9]
        .iter()
        .map(|(_, bytes)| params::<SegattnBackwardParams>(bytes).work_counter as u64)
        .collect();
    let first = counters[0];
    assert_eq!(recorder.zeroed, [(first, 8 * 4)]);
    let expected = [0, 0, 8, 8, 16, 16, 24, 24].map(|offset| first + offset);
    assert_eq!(counters, expected);
    // 128 tiles of queries with 128 tiles of prior keys, and current ones up to the diagonal.
    let blocks = 128 * 128 + 128 * 129 / 2;
    let ds = stored(&recorder)[0].2;
    assert_eq!(ds + 2 * blocks * 8192, recorder.workspace_end);
}
