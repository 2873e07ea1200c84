//! `divergence_bf16` of `kernels/loss.cu` under every check, against the formula in f64.

use half::bf16;
use segattn::cuda::kernels::layer_params::{SegattnDivergenceParams, SegattnRows};

use super::common::*;

/// Factors of the two gradients of the rows in turn.
const SCALES: [[f32; 2]; 4] = [[0.01, 0.3], [0.0, 0.5], [0.2, 0.0], [0.0, 0.0]];

#[derive(Clone, Copy)]
struct Case {
    rows: usize,
    vocab: usize,
    temperature: f64,
    /// The gradient takes the logits' place.
    in_place: bool,
    gap: usize,
}

/// Rows of student and teacher, the targets, and the factors.
struct Rows {
    logits: Vec<f32>,
    teacher: Vec<f32>,
    targets: Vec<u32>,
    scales: Vec<[f32; 2]>,
}

impl Rows {
    fn new(case: &Case) -> Self {
        let Case { rows, vocab, .. } = *case;
        let row = |seed: u64, by: f32| -> Vec<f32> {
            let values = values(rows * vocab, seed + vocab as u64).into_iter();
            values.map(|x| x * by + 30.0).collect()
        };
        let (mut logits, mut teacher) = (row(1, 4.0), row(2, 3.0));
        // Tokens that both or only the teacher exclude, and one that is all but certain.
        if vocab > 7 {
            (logits[1], teacher[1], teacher[5]) =
                (f32::NEG_INFINITY, f32::NEG_INFINITY, f32::NEG_INFINITY);
            logits[(rows - 1) * vocab + 2] = 90.0;
        }
        Self {
            logits,
            teacher,
            targets: (0..rows).map(|r| ((r * 29 + 2) % vocab) as u32).collect(),
            scales: SCALES.into_iter().cycle().take(rows).collect(),
        }
    }

    /// Some of the rows.
    fn part(&self, rows: std::ops::Range<usize>, vocab: usize) -> Self {
        let elements = rows.start * vocab..rows.end * vocab;
        Self {
            logits: self.logits[elements.clone()].to_vec(),
            teacher: self.teacher[elements].to_vec(),
            targets: self.targets[rows.clone()].to_vec(),
            scales: self.scales[rows].to_vec(),
        }
    }
}

fn threads(vocab: usize) -> Option<u32> {
    Some((vocab.div_ceil(512).max(1) * 32).min(1024) as u32)
}

/// Log-probabilities, divergences and the gradient.
fn run(seed: u64, case: &Case, rows: &Rows) -> (Vec<f32>, Vec<f32>, Vec<bf16>) {
    let gpu = &mut gpu(seed);
    let Case { vocab, gap, .. } = *case;
    let count = rows.targets.len();
    let matrix = Matrix::of(gpu, "logits", &rows.logits, vocab, gap);
    let teacher = Matrix::of(gpu, "teacher", &rows.teacher, vocab, 2 * gap);
    let own = Matrix::poisoned::<bf16>(gpu, "d_logits", [count, vocab], gap);
    let targets = gpu.input("targets", &rows.targets).expect("memory");
    let scales = gpu.input("scales", rows.scales.as_flattened());
    let [scored, diverged] =
        ["scored", "diverged"].map(|name| gpu.alloc(name, count * 4).expect("memory"));
    let view = matrix.view();
    let in_place = SegattnRows {
        stride: view.stride * 2,
        ..view
    };
    let params = SegattnDivergenceParams {
        logits: view,
        teacher: teacher.view(),
        targets: targets.ptr(),
        scales: scales.expect("memory").ptr(),
        log_probability: scored.ptr(),
        divergence: diverged.ptr(),
        d_logits: if case.in_place { in_place } else { own.view() },
        rows: count as i64,
        vocab: vocab as i32,
        temperature: case.temperature as f32,
        inverse: (1.0 / case.temperature) as f32,
    };
    let (module, threads) = (module("loss.cu"), threads(vocab));
    launch(gpu, &module, "divergence_bf16", count, threads, &params);
    let gradient = if case.in_place {
        let row = |r| (r * (vocab + gap) + gap) * 4;
        (0..count)
            .flat_map(|r| gpu.download_range::<bf16>(matrix.buffer, row(r), vocab))
            .collect()
    } else {
        own.assert_only_rows_written(gpu, "d_logits");
        own.read(gpu)
    };
    (gpu.download(scored), gpu.download(diverged), gradient)
}

/// Logarithms of a row's probabilities at a temperature.
fn log_softmax(row: &[f32], temperature: f64) -> Vec<f64> {
    let row = row.iter().map(|x| f64::from(*x) / temperature);
    let max = row.clone().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = row.clone().map(|x| (x - max).exp()).sum();
    row.map(|x| x - max - sum.ln()).collect()
}

#[test]
fn scores_and_gradient_agree_with_the_formula() {
    for (rows, vocab, temperature, in_place, gap) in [
        (3, 1, 1.0, false, 0),
        (2, 7, 2.0, false, 1),
        (5, 259, 1.0, true, 0),
        (4, 1024, 0.5, true, 0),
        (2, 5003, 3.0, true, 3),
        (2, 5003, 1.0, false, 3),
        (1, 40_000, 1.5, true, 0),
    ] {
        let case = Case {
            rows,
            vocab,
            temperature,
            in_place,
            gap,
        };
        let of = Rows::new(&case);
        let (scored, diverged, gradient) = run(1, &case, &of);
        let (mut exact, mut plain) = (Vec::new(), Vec::new());
        let each = of.logits.chunks(vocab).zip(of.teacher.chunks(vocab));
        for (r, (row, known)) in each.enumerate() {
            let (p, own) = (log_softmax(row, 1.0), log_softmax(row, temperature));
            let known = log_softmax(known, temperature);
            let target = of.targets[r] as usize;
            let near = |got: f32, exact: f64| {
                let error = (f64::from(got) - exact).abs();
                assert!(error < 1e-5 * exact.abs().max(1.0), "{got}, {exact}");
            };
            near(scored[r], p[target]);
            let terms = known
                .iter()
                .zip(&own)
                .filter(|(known, _)| known.exp() > 0.0);
            near(diverged[r], terms.map(|(q, p)| q.exp() * (q - p)).sum());
            let [a, b] = of.scales[r].map(f64::from);
            for i in 0..vocab {
                let one = if i == target { 1.0 } else { 0.0 };
                let learned = own[i].exp() - known[i].exp();
                exact.push(a * (p[i].exp() - one) + b * temperature * learned);
                let learned = low(low(own[i].exp()) - low(known[i].exp()));
                plain.push(low(
                    low(a * low(low(p[i].exp()) - one)) + low(b * temperature * learned)
                ));
            }
        }
        let name = format!("d_logits of {rows} x {vocab}, temperature {temperature}");
        assert_close(&name, &wide(&gradient), &plain, &exact);
    }
}

#[test]
fn log_probabilities_and_a_gradient_without_the_divergence_have_the_bits_of_the_loss() {
    let case = Case {
        rows: 2,
        vocab: 1500,
        temperature: 2.0,
        in_place: false,
        gap: 0,
    };
    let mut of = Rows::new(&case);
    of.scales = vec![[0.3, 0.0], [0.7, 0.0]];
    let (scored, _, gradient) = run(1, &case, &of);
    let scales: Vec<f32> = of.scales.iter().map(|[scale, _]| *scale).collect();
    let (expected, plain) = super::loss::run_rows(1500, &of.logits, &of.targets, &scales);
    assert_eq!(scored, expected);
    assert_eq!(bits(&gradient), bits(&plain));
}

#[test]
fn equal_rows_have_no_divergence_and_learn_nothing_from_each_other() {
    for temperature in [1.0, 1.7] {
        let case = Case {
            rows: 2,
            vocab: 523,
            temperature,
            in_place: true,
            gap: 1,
        };
        let mut of = Rows::new(&case);
        of.teacher.clone_from(&of.logits);
        of.scales = vec![[0.0, 1.0]; 2];
        let (_, diverged, gradient) = run(1, &case, &of);
        assert_eq!(diverged, [0.0; 2]);
        assert!(gradient.iter().all(|x| x.to_f32() == 0.0));
    }
}

#[test]
fn twenty_schedules_and_any_neighbours_give_the_same_bits() {
    let case = Case {
        rows: 3,
        vocab: 1500,
        temperature: 2.0,
        in_place: true,
        gap: 0,
    };
    let of = Rows::new(&case);
    let first = run(0, &case, &of);
    let numbers = |(scored, diverged, gradient): &(Vec<f32>, Vec<f32>, Vec<bf16>)| {
        (scored.clone(), diverged.clone(), bits(gradient))
    };
    for seed in 1..20 {
        assert_eq!(numbers(&run(seed, &case, &of)), numbers(&first));
    }
    let alone = numbers(&run(1, &case, &of.part(1..2, 1500)));
    let (scored, diverged, gradient) = numbers(&first);
    assert_eq!(alone.0, scored[1..2]);
    assert_eq!(alone.1, diverged[1..2]);
    assert_eq!(alone.2, gradient[1500..3000]);
}

#[test]
fn a_logit_that_is_no_number_makes_the_divergence_none() {
    let case = Case {
        rows: 1,
        vocab: 300,
        temperature: 1.0,
        in_place: false,
        gap: 0,
    };
    for of_teacher in [false, true] {
        let mut of = Rows::new(&case);
        let row = if of_teacher {
            &mut of.teacher
        } else {
            &mut of.logits
        };
        row[77] = f32::NAN;
        assert!(run(1, &case, &of).1[0].is_nan());
    }
}
