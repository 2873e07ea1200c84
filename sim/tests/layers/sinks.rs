//! `kernels/sink_logits.cu` under every check, against its formulas.

use half::bf16;
use segattn::cuda::kernels::layer_params::SegattnSinkParams;
use segattn_sim::Buffer;

use super::common::*;

/// Rows of each span, query heads, elements of a head, and elements between two rows.
#[derive(Debug, Clone, Copy)]
struct Case {
    spans: &'static [usize],
    heads: usize,
    dim: usize,
    gap: usize,
}

/// Heads of every number of lanes, of all of them or not, spans of one row and of more than a warp sums at once.
const CASES: [Case; 6] = [
    case(&[1], 1, 8, 0),
    case(&[3, 1, 70], 3, 16, 8),
    case(&[1, 1, 1, 1, 1], 8, 32, 0),
    case(&[40, 40], 2, 64, 16),
    case(&[5, 7], 2, 96, 0),
    case(&[2, 9, 4], 3, 256, 8),
];

const fn case(spans: &'static [usize], heads: usize, dim: usize, gap: usize) -> Case {
    Case {
        spans,
        heads,
        dim,
        gap,
    }
}

/// What the kernels read and write.
struct Run {
    logits: Vec<f32>,
    lse: Vec<f32>,
    out: Vec<bf16>,
    d_y: Vec<bf16>,
    y: Vec<bf16>,
    d_out: Vec<bf16>,
    d_lse: Vec<f32>,
    d_logits: Vec<f32>,
}

impl Run {
    /// All results by bits.
    fn bits(&self) -> (Vec<u16>, Vec<u32>) {
        let low = self.y.iter().chain(&self.d_out).map(|x| x.to_bits());
        let wide = self.d_lse.iter().chain(&self.d_logits);
        (low.collect(), wide.map(|x| x.to_bits()).collect())
    }
}

impl Case {
    fn rows(&self) -> usize {
        self.spans.iter().sum()
    }

    fn width(&self) -> usize {
        self.heads * self.dim
    }

    /// For each row and head, the span and where the log-sum-exp is.
    fn places(&self) -> Vec<(usize, usize)> {
        let (mut places, mut first) = (Vec::new(), 0);
        for (span, rows) in self.spans.iter().enumerate() {
            for row in 0..*rows {
                let at = |head: usize| first * self.heads + head * rows + row;
                places.extend((0..self.heads).map(|head| (span, at(head))));
            }
            first += rows;
        }
        places
    }

    /// Log-sum-exps around the logits, some of them so far off that a share is 0 or 1.
    fn inputs(&self) -> (Vec<f32>, Vec<f32>, Vec<bf16>) {
        let logits = values(self.heads, 3);
        let mut lse: Vec<f32> = values(self.rows() * self.heads, 4);
        lse.iter_mut().for_each(|x| *x *= 4.0);
        let mut out = bf16_values(self.rows() * self.width(), 5);
        let extremes = [1e4, -1e4, f32::NEG_INFINITY];
        for (i, (_, at)) in self.places().into_iter().step_by(7).enumerate() {
            lse[at] = extremes[i % 3];
            // A row that sees no key.
            if i % 3 == 2 {
                out[i * 7 * self.dim..][..self.dim].fill(bf16::ZERO);
            }
        }
        (logits, lse, out)
    }

    fn run(&self, seed: u64) -> Run {
        let (logits, lse, out) = self.inputs();
        self.run_with(seed, logits, lse, out)
    }

    fn run_with(&self, seed: u64, logits: Vec<f32>, lse: Vec<f32>, out: Vec<bf16>) -> Run {
        let gpu = &mut gpu(seed);
        let (rows, width) = (self.rows(), self.width());
        let d_y = bf16_values(rows * width, 6);
        let mut starts = vec![0i32];
        for rows in self.spans {
            starts.push(starts[starts.len() - 1] + *rows as i32);
        }
        let [logits_at, lse_at] = [("logits", &logits), ("lse", &lse)]
            .map(|(name, x)| gpu.input(name, x).expect("memory"));
        let starts_at = gpu.input("starts", &starts).expect("memory");
        let [out_rows, d_y_rows] = [("out", &out), ("d_y", &d_y)]
            .map(|(name, x)| Matrix::of(gpu, name, x, width, self.gap));
        let [y, d_out] =
            ["y", "d_out"].map(|name| Matrix::poisoned::<bf16>(gpu, name, [rows, width], self.gap));
        let mut numbers = |name: &str, len: usize| -> Buffer {
            gpu.alloc(name, len * size_of::<f32>()).expect("memory")
        };
        let d_lse = numbers("d_lse", rows * self.heads);
        let d_logits = numbers("d_logits", self.spans.len() * self.heads);
        let params = SegattnSinkParams {
            logits: logits_at.ptr(),
            lse: lse_at.ptr(),
            span_start: starts_at.ptr(),
            out: out_rows.view(),
            y: y.view(),
            d_y: d_y_rows.view(),
            d_out: d_out.view(),
            d_lse: d_lse.ptr(),
            d_logits: d_logits.ptr(),
            rows: rows as i64,
            spans: self.spans.len() as i32,
            q_heads: self.heads as i32,
            head_dim: self.dim as i32,
        };
        let lanes = (self.dim / 8).next_power_of_two();
        let stages = [
            ("sink_logits_bf16", rows * width / 8),
            ("sink_logits_grad_bf16", rows * self.heads * lanes),
            ("sink_logits_sums_f32", self.spans.len() * self.heads * 32),
        ];
        let module = module("sink_logits.cu");
        for (kernel, threads) in stages {
            launch(gpu, &module, kernel, threads.div_ceil(256), None, &params);
        }
        y.assert_only_rows_written(gpu, "y");
        d_out.assert_only_rows_written(gpu, "d_out");
        let [y, d_out] = [&y, &d_out].map(|rows| rows.read::<bf16>(gpu));
        let (d_lse, d_logits) = (gpu.download(d_lse), gpu.download(d_logits));
        Run {
            logits,
            lse,
            out,
            d_y,
            y,
            d_out,
            d_lse,
            d_logits,
        }
    }
}

/// What the sink leaves and takes.
fn shares(logit: f64, lse: f64) -> [f64; 2] {
    let e = (-(logit - lse).abs()).exp();
    let parts = if lse >= logit { [1.0, e] } else { [e, 1.0] };
    parts.map(|part| part / (1.0 + e))
}

#[test]
fn results_agree_with_the_formulas() {
    for case in CASES {
        let run = case.run(1);
        let (dim, places) = (case.dim, case.places());
        let formula = |round: fn(f64) -> f64| {
            let (mut y, mut d_out) = (Vec::new(), Vec::new());
            let mut d_lse = vec![0.0; places.len()];
            for (i, (_, at)) in places.iter().enumerate() {
                let logit = f64::from(run.logits[i % case.heads]);
                let [share, rest] = shares(logit, f64::from(run.lse[*at])).map(round);
                let [out, d_y] = [&run.out, &run.d_y].map(|x| wide(&x[i * dim..][..dim]));
                y.extend(out.iter().map(|x| round(share * x)));
                d_out.extend(d_y.iter().map(|x| round(share * x)));
                let along = out.iter().zip(&d_y).map(|(a, b)| a * b).sum::<f64>();
                d_lse[*at] = round(round(share * rest) * round(along));
            }
            [y, d_out, d_lse]
        };
        let (exact, plain) = (formula(|x| x), formula(low));
        let d_lse: Vec<f64> = run.d_lse.iter().map(|x| f64::from(*x)).collect();
        let got = [wide(&run.y), wide(&run.d_out), d_lse];
        for (i, name) in ["y", "d_out", "d_lse"].into_iter().enumerate() {
            let name = format!("{name}, {case:?}");
            assert_close(&name, &got[i], &plain[i], &exact[i]);
        }
    }
}

/// Lanes of every 32nd row, then a tree.
#[test]
fn logits_have_minus_the_sums_over_the_rows_of_a_span() {
    for case in CASES {
        let run = case.run(2);
        let mut first = 0;
        for (span, rows) in case.spans.iter().enumerate() {
            for head in 0..case.heads {
                let d_lse = &run.d_lse[first * case.heads + head * rows..][..*rows];
                let mut lanes: [f32; 32] = std::array::from_fn(|lane| {
                    d_lse.iter().skip(lane).step_by(32).sum::<f32>() + 0.0
                });
                for mask in [16, 8, 4, 2, 1] {
                    lanes = std::array::from_fn(|lane| lanes[lane] + lanes[lane ^ mask]);
                }
                let got = run.d_logits[span * case.heads + head];
                assert_eq!(got.to_bits(), (-lanes[0]).to_bits(), "{case:?}");
            }
            first += rows;
        }
    }
}

#[test]
fn rows_without_keys_and_far_logits_are_0_or_unchanged() {
    let case = case(&[3], 1, 16, 0);
    let out = bf16_values(3 * 16, 7);
    let lse = vec![f32::NEG_INFINITY, 1e30, -1e30];
    let run = case.run_with(3, vec![0.5], lse, out.clone());
    let zeros = vec![0u16; 16];
    let unsigned = |x: &[bf16]| x.iter().map(|x| x.to_bits() & 0x7fff).collect::<Vec<_>>();
    assert_eq!(unsigned(&run.y[..16]), zeros);
    assert_eq!(bits(&run.y[16..32]), bits(&out[16..32]));
    assert_eq!(unsigned(&run.y[32..]), zeros);
    assert!(run.d_lse.iter().all(|x| *x == 0.0), "{:?}", run.d_lse);
    assert_eq!(bits(&run.d_out[16..32]), bits(&run.d_y[16..32]));
}

/// A logit or a log-sum-exp that is NaN is not hidden.
#[test]
fn nan_goes_on() {
    for (logit, lse) in [(f32::NAN, 1.0), (1.0, f32::NAN)] {
        let case = case(&[1], 1, 16, 0);
        let run = case.run_with(4, vec![logit], vec![lse], bf16_values(16, 7));
        assert!(run.y.iter().chain(&run.d_out).all(|x| x.is_nan()));
        assert!(run.d_lse[0].is_nan() && run.d_logits[0].is_nan());
    }
}

/// Each span alone has the bits that it has beside others.
#[test]
fn spans_do_not_depend_on_each_other() {
    let both = case(&[3, 37], 2, 32, 0);
    let alone = case(&[37], 2, 32, 0);
    let (logits, lse, out) = both.inputs();
    let together = both.run_with(5, logits.clone(), lse.clone(), out.clone());
    let (at, width) = (3 * both.heads, 3 * both.width());
    let last = alone.run_with(6, logits, lse[at..].to_vec(), out[width..].to_vec());
    assert_eq!(bits(&last.y), bits(&together.y[width..]));
}

#[test]
fn bits_are_the_same_under_twenty_schedules() {
    let case = CASES[1];
    let first = case.run(0).bits();
    assert!((1..20).all(|seed| case.run(seed).bits() == first));
}
