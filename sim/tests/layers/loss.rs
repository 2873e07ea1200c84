//! `kernels/loss.cu` under every check, against the formula in f64.

use half::bf16;
use segattn::cuda::kernels::layer_params::{SegattnLossParams, SegattnRows};
use segattn_sim::Buffer;

use super::common::*;

/// Scales of the rows in turn.
const SCALES: [f32; 3] = [0.01, 0.0, 0.5];

struct Case {
    rows: usize,
    vocab: usize,
    /// The gradient takes the logits' place.
    in_place: bool,
    gap: usize,
}

fn logits(case: &Case) -> Vec<f32> {
    let mut logits = values(case.rows * case.vocab, case.vocab as u64);
    logits.iter_mut().for_each(|x| *x = *x * 4.0 + 30.0);
    // A token excluded, and one so likely that its probability rounds to 1.
    if case.vocab > 3 {
        logits[1] = f32::NEG_INFINITY;
        logits[(case.rows - 1) * case.vocab + 2] = 200.0;
    }
    logits
}

fn targets(case: &Case) -> Vec<u32> {
    let last = case.rows.saturating_sub(1);
    let target = |r: usize| {
        if r == last {
            2
        } else {
            (r * 29 + 3) % case.vocab
        }
    };
    (0..case.rows)
        .map(|r| target(r).min(case.vocab - 1) as u32)
        .collect()
}

fn scales(rows: usize) -> Vec<f32> {
    SCALES.into_iter().cycle().take(rows).collect()
}

fn threads(vocab: usize) -> Option<u32> {
    Some((vocab.div_ceil(512).max(1) * 32).min(1024) as u32)
}

fn run(seed: u64, case: &Case) -> (Vec<f32>, Vec<bf16>) {
    run_on(
        seed,
        case,
        &logits(case),
        &targets(case),
        &scales(case.rows),
    )
}

/// Log-probabilities, with the gradient and without.
fn run_on(
    seed: u64,
    case: &Case,
    logits: &[f32],
    targets: &[u32],
    scales: &[f32],
) -> (Vec<f32>, Vec<bf16>) {
    let gpu = &mut gpu(seed);
    let (rows, vocab) = (case.rows, case.vocab);
    let matrix = Matrix::of(gpu, "logits", logits, vocab, case.gap);
    let own = Matrix::poisoned::<bf16>(gpu, "d_logits", [rows, vocab], case.gap);
    let targets = gpu.input("targets", targets).expect("memory");
    let scales = gpu.input("scales", scales).expect("memory");
    let [scored, scored_alone]: [Buffer; 2] =
        ["scored", "scored_alone"].map(|name| gpu.alloc(name, rows * 4).expect("memory"));
    let view = matrix.view();
    let in_place = SegattnRows {
        stride: view.stride * 2,
        ..view
    };
    let mut params = SegattnLossParams {
        logits: view,
        targets: targets.ptr(),
        scales: std::ptr::null(),
        log_probability: scored_alone.ptr(),
        d_logits: NO_ROWS,
        rows: rows as i64,
        vocab: vocab as i32,
    };
    let module = module("loss.cu");
    let threads = threads(vocab);
    launch(gpu, &module, "cross_entropy_bf16", rows, threads, &params);
    params.log_probability = scored.ptr();
    params.scales = scales.ptr();
    params.d_logits = if case.in_place { in_place } else { own.view() };
    launch(gpu, &module, "cross_entropy_bf16", rows, threads, &params);
    let gradient = if case.in_place {
        let row = |r| (r * (vocab + case.gap) + case.gap) * 4;
        (0..rows)
            .flat_map(|r| gpu.download_range::<bf16>(matrix.buffer, row(r), vocab))
            .collect()
    } else {
        own.assert_only_rows_written(gpu, "d_logits");
        own.read(gpu)
    };
    let scored: Vec<f32> = gpu.download(scored);
    assert_eq!(gpu.download::<f32>(scored_alone), scored);
    (scored, gradient)
}

/// The loss of packed rows, and its gradient beside them.
pub fn run_rows(
    vocab: usize,
    logits: &[f32],
    targets: &[u32],
    scales: &[f32],
) -> (Vec<f32>, Vec<bf16>) {
    let case = Case {
        rows: targets.len(),
        vocab,
        in_place: false,
        gap: 0,
    };
    run_on(1, &case, logits, targets, scales)
}

#[test]
fn log_probabilities_and_gradient_agree_with_the_formula() {
    for (rows, vocab, in_place, gap) in [
        (3, 1, false, 0),
        (2, 7, false, 1),
        (5, 259, true, 0),
        (2, 1024, true, 0),
        (2, 5003, true, 3),
        (2, 5003, false, 3),
        (1, 40_000, true, 0),
    ] {
        let case = Case {
            rows,
            vocab,
            in_place,
            gap,
        };
        let (scored, gradient) = run(1, &case);
        let (logits, targets, scales) = (logits(&case), targets(&case), scales(rows));
        let (mut exact, mut plain, mut exact_scored) = (Vec::new(), Vec::new(), Vec::new());
        for ((row, target), scale) in logits.chunks(vocab).zip(&targets).zip(&scales) {
            let max = f64::from(row.iter().copied().fold(f32::NEG_INFINITY, f32::max));
            let sum: f64 = row.iter().map(|x| (f64::from(*x) - max).exp()).sum();
            let scale = f64::from(*scale);
            exact_scored.push(f64::from(row[*target as usize]) - max - sum.ln());
            for (i, x) in row.iter().enumerate() {
                let (p, one) = (
                    (f64::from(*x) - max).exp() / sum,
                    f64::from(u8::from(i == *target as usize)),
                );
                // Without cancellation where the target is all but certain.
                let others = || -> f64 {
                    let others = (0..vocab).filter(|j| *j != i);
                    others.map(|j| (f64::from(row[j]) - max).exp()).sum()
                };
                exact.push(scale * if one == 1.0 { -others() / sum } else { p });
                plain.push(low(scale * low(low(p) - one)));
            }
        }
        assert_close(
            &format!("d_logits of {rows} x {vocab}"),
            &wide(&gradient),
            &plain,
            &exact,
        );
        for (got, exact) in scored.iter().zip(exact_scored) {
            assert!(
                (f64::from(*got) - exact).abs() < 4e-6 * exact.abs().max(1.0),
                "{got}, {exact}"
            );
        }
    }
}

#[test]
fn nothing_beyond_the_vocabulary_is_counted() {
    // Far below 0, where a number left over would be all there is.
    for vocab in [3, 13, 523] {
        let case = Case {
            rows: 2,
            vocab,
            in_place: false,
            gap: 1,
        };
        let logits = vec![-40.0; 2 * vocab];
        let (scored, _) = run_on(1, &case, &logits, &[0, vocab as u32 - 1], &scales(2));
        for score in scored {
            let exact = -(vocab as f64).ln();
            assert!((f64::from(score) - exact).abs() < 1e-5, "{score}, {exact}");
        }
    }
}

#[test]
fn twenty_schedules_and_any_neighbours_give_the_same_bits() {
    let case = Case {
        rows: 3,
        vocab: 1500,
        in_place: true,
        gap: 0,
    };
    let (logits, targets, scales) = (logits(&case), targets(&case), [0.01, 0.5, 0.0]);
    let first = run_on(0, &case, &logits, &targets, &scales);
    for seed in 1..20 {
        let again = run_on(seed, &case, &logits, &targets, &scales);
        assert_eq!(again.0, first.0);
        assert_eq!(bits(&again.1), bits(&first.1));
    }
    let alone = Case { rows: 1, ..case };
    let row = 1500..3000;
    let alone = run_on(
        1,
        &alone,
        &logits[row.clone()],
        &targets[1..2],
        &scales[1..2],
    );
    assert_eq!(alone.0[0], first.0[1]);
    assert_eq!(bits(&alone.1), bits(&first.1[row]));
}

#[test]
fn a_scale_of_zero_gives_zeros() {
    for in_place in [true, false] {
        let case = Case {
            rows: 3,
            vocab: 1500,
            in_place,
            gap: 0,
        };
        let (_, gradient) = run_on(1, &case, &logits(&case), &targets(&case), &[0.5, 0.0, 0.0]);
        let zero = |x: &bf16| x.to_f32() == 0.0;
        assert!(gradient[1500..].iter().all(zero));
        assert!(!gradient[..1500].iter().all(zero));
    }
}

#[test]
fn a_logit_that_is_no_number_makes_the_log_probability_none() {
    let gpu = &mut gpu(1);
    let mut logits = values(300, 1);
    logits[77] = f32::NAN;
    let matrix = Matrix::of(gpu, "logits", &logits, 300, 0);
    let targets = gpu.input("targets", &[5u32]).expect("memory");
    let scored = gpu.alloc("scored", 4).expect("memory");
    let params = SegattnLossParams {
        logits: matrix.view(),
        targets: targets.ptr(),
        scales: std::ptr::null(),
        log_probability: scored.ptr(),
        d_logits: NO_ROWS,
        rows: 1,
        vocab: 300,
    };
    launch(
        gpu,
        &module("loss.cu"),
        "cross_entropy_bf16",
        1,
        threads(300),
        &params,
    );
    assert!(gpu.download::<f32>(scored)[0].is_nan());
}
