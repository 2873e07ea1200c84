//! The optimizer against a plain f64 reading of its formulas, and what it must never do: depend on threads, touch
//! anything when a gradient is not usable, decay a norm, or let a gate slip to zero.

use proptest::prelude::*;
use segattn::train::TrainError;
use segattn::train::optimizer::{AdamW, Constraint, GradNorm, MIN_GATE, ParamSlice, decays};

/// One parameter with its state, owned.
#[derive(Clone, Debug, PartialEq)]
struct Param {
    values: Vec<f32>,
    grads: Vec<f32>,
    m: Vec<f32>,
    v: Vec<f32>,
}

impl Param {
    fn new(values: Vec<f32>, grads: Vec<f32>) -> Self {
        let zeros = vec![0.0; values.len()];
        Self {
            values,
            grads,
            m: zeros.clone(),
            v: zeros,
        }
    }

    fn slice(&mut self, decay: bool, lr_scale: f32, constraint: Constraint) -> ParamSlice<'_> {
        ParamSlice {
            name: "p",
            values: &mut self.values,
            grads: &self.grads,
            m: &mut self.m,
            v: &mut self.v,
            decay,
            lr_scale,
            constraint,
        }
    }

    fn step(&mut self, opt: &AdamW, lr: f64, t: u64) -> Result<(), TrainError> {
        opt.step(&mut [self.slice(true, 1.0, Constraint::None)], lr, t, 1.0)
    }

    fn bits(&self) -> Vec<u32> {
        [&self.values, &self.m, &self.v]
            .into_iter()
            .flatten()
            .map(|x| x.to_bits())
            .collect()
    }
}

fn optimizer() -> AdamW {
    AdamW::new([0.9, 0.95], 1e-8, 0.1).unwrap()
}

/// Deterministic numbers of mixed scale; `seed` picks the sequence.
fn numbers(len: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let unit = (state >> 40) as f32 / (1u64 << 24) as f32 - 0.4;
            unit * 10f32.powi((state % 9) as i32 - 5)
        })
        .collect()
}

proptest! {
    #[test]
    fn many_steps_follow_the_formulas_in_f64(
        seed in 0u64..1000,
        beta1 in 0.0f64..0.99,
        beta2 in 0.5f64..0.9999,
        decay: bool,
        weight_decay in 0.0f64..1.0,
        clip in 0.01f32..1.0,
    ) {
        let opt = AdamW::new([beta1, beta2], 1e-6, weight_decay).unwrap();
        let mut p = Param::new(numbers(37, seed), vec![0.0; 37]);
        let mut w: Vec<f64> = p.values.iter().map(|&x| x.into()).collect();
        let (mut m, mut v) = (vec![0.0f64; 37], vec![0.0f64; 37]);
        for t in 1..=20u64 {
            p.grads = numbers(37, seed * 1000 + t);
            let lr = 1e-2 / t as f64;
            opt.step(&mut [p.slice(decay, 0.5, Constraint::None)], lr, t, clip).unwrap();
            for i in 0..37 {
                let g = f64::from(p.grads[i]) * f64::from(clip);
                m[i] = beta1 * m[i] + (1.0 - beta1) * g;
                v[i] = beta2 * v[i] + (1.0 - beta2) * g * g;
                let m_hat = m[i] / (1.0 - beta1.powf(t as f64));
                let v_hat = v[i] / (1.0 - beta2.powf(t as f64));
                let decayed = if decay { weight_decay * w[i] } else { 0.0 };
                w[i] -= 0.5 * lr * (m_hat / (v_hat.sqrt() + 1e-6) + decayed);
            }
        }
        for (got, expected) in p.values.iter().zip(&w) {
            prop_assert!((f64::from(*got) - expected).abs() <= 2e-5 * (1.0 + expected.abs()), "{got} {expected}");
        }
    }

    #[test]
    fn the_norm_is_the_f64_norm_whatever_the_split(len in 0usize..30_000, seed in 0u64..100) {
        let g = numbers(len, seed);
        let exact = g.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt();
        let norm = GradNorm::of(&[&g]).value();
        prop_assert!((norm - exact).abs() <= 1e-12 * exact);
    }

    #[test]
    fn a_clipped_gradient_has_the_norm_asked_for(len in 1usize..5000, limit in 1e-3f64..1e3) {
        let g = numbers(len, 3);
        let norm = GradNorm::of(&[&g]);
        let factor = norm.clip_factor(Some(limit));
        let clipped: Vec<f32> = g.iter().map(|x| x * factor).collect();
        let after = GradNorm::of(&[&clipped]).value();
        prop_assert!((after - norm.value().min(limit)).abs() <= 1e-6 * after);
    }

    #[test]
    fn an_unusable_gradient_changes_nothing_and_is_named(
        index in 0usize..40_000,
        bad in prop::sample::select(vec![f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 2e18]),
    ) {
        let mut first = Param::new(numbers(100, 1), numbers(100, 2));
        let mut second = Param::new(numbers(40_000, 3), numbers(40_000, 4));
        second.grads[index] = bad;
        let before = (first.bits(), second.bits());
        let mut params = [first.slice(true, 1.0, Constraint::None), second.slice(true, 1.0, Constraint::None)];
        params[1].name = "layers.0.weight";
        let error = optimizer().step(&mut params, 1e-3, 1, 1.0).unwrap_err();
        let TrainError::UnusableGradient { tensor, index: at, .. } = error else { panic!("{error}") };
        prop_assert_eq!((tensor.as_str(), at), ("layers.0.weight", index));
        prop_assert_eq!(before, (first.bits(), second.bits()));
    }
}

#[test]
fn bits_do_not_depend_on_the_number_of_threads() {
    let sizes = [1, 4095, 4096, 4097, 100_000, 0, 7];
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        pool.install(|| {
            let mut params: Vec<Param> = sizes
                .iter()
                .map(|&n| Param::new(numbers(n, 7), numbers(n, n as u64)))
                .collect();
            let norm = GradNorm::of(&params.iter().map(|p| &p.grads[..]).collect::<Vec<_>>());
            for t in 1..=3 {
                let mut slices: Vec<_> = params
                    .iter_mut()
                    .map(|p| p.slice(true, 1.0, Constraint::None))
                    .collect();
                optimizer()
                    .step(&mut slices, 1e-3, t, norm.clip_factor(Some(1.0)))
                    .unwrap();
            }
            (
                norm.value().to_bits(),
                params.iter().map(Param::bits).collect::<Vec<_>>(),
            )
        })
    };
    let one = run(1);
    assert!([2, 3, 8].into_iter().all(|threads| run(threads) == one));
}

#[test]
fn the_norm_is_finite_exactly_if_every_gradient_is() {
    let mut g = vec![f32::MAX; 10_000];
    assert!(GradNorm::of(&[&g]).value().is_finite());
    for bad in [f32::NAN, f32::INFINITY] {
        g[9_999] = bad;
        assert!(!GradNorm::of(&[&[1.0], &g]).value().is_finite());
    }
}

#[test]
fn a_gate_above_zero_stays_above_the_floor_and_a_closed_gate_stays_closed() {
    let mut gates = Param::new(vec![0.0, 0.01, 1.0], vec![1.0, 1.0, -1.0]);
    for t in 1..=50 {
        let slice = gates.slice(false, 1.0, Constraint::Gate);
        optimizer().step(&mut [slice], 0.01, t, 1.0).unwrap();
    }
    assert_eq!(gates.values[..2], [0.0, MIN_GATE]);
    assert!(gates.values[2] > 1.0);
}

#[test]
fn decay_shrinks_a_weight_without_gradient_by_the_stated_factor_and_only_where_asked() {
    for (decay, expected) in [(true, 2.0 * (1.0 - 0.5 * 0.1)), (false, 2.0)] {
        let mut p = Param::new(vec![2.0], vec![0.0]);
        optimizer()
            .step(&mut [p.slice(decay, 1.0, Constraint::None)], 0.5, 1, 1.0)
            .unwrap();
        assert_eq!(p.values, [expected]);
    }
}

#[test]
fn matrices_decay_and_norms_gates_and_by_default_embeddings_do_not() {
    assert!(decays("model.layers.0.mlp.up_proj.weight", &[8, 4], false));
    assert!(!decays("model.layers.0.input_layernorm.weight", &[4], true));
    assert!(!decays("model.layers.0.self_attn.past_gate", &[4], true));
    assert!(!decays("model.embed_tokens.weight", &[8, 4], false));
    assert!(decays("model.embed_tokens.weight", &[8, 4], true));
}

#[test]
fn the_first_update_has_the_size_of_the_learning_rate() {
    let opt = AdamW::new([0.9, 0.999], 1e-12, 0.0).unwrap();
    let mut p = Param::new(vec![0.0; 3], vec![1e-4, -5.0, 1e3]);
    p.step(&opt, 0.01, 1).unwrap();
    for (w, sign) in p.values.iter().zip([-1.0, 1.0, -1.0]) {
        assert!((w - sign * 0.01).abs() < 1e-6, "{w}");
    }
}

#[test]
fn arguments_out_of_range_are_typed_errors_and_change_nothing() {
    for result in [
        AdamW::new([1.0, 0.9], 1e-8, 0.0),
        AdamW::new([0.9, 0.9], 0.0, 0.0),
        AdamW::new([0.9, 0.9], 1e-8, f64::NAN),
    ] {
        assert!(matches!(result, Err(TrainError::Config { .. })));
    }
    let mut p = Param::new(vec![1.0], vec![1.0]);
    let before = p.bits();
    for (lr, t, clip) in [
        (f64::NAN, 1, 1.0),
        (-1.0, 1, 1.0),
        (0.1, 0, 1.0),
        (0.1, 1, 1.5),
        (0.1, 1, f32::NAN),
    ] {
        let result = optimizer().step(&mut [p.slice(true, 1.0, Constraint::None)], lr, t, clip);
        assert!(matches!(result, Err(TrainError::Argument { .. })));
    }
    p.m.push(0.0);
    let error = p.step(&optimizer(), 0.1, 1).unwrap_err();
    assert_eq!(
        error.to_string(),
        "argument `m of `p``: expected 1 elements, got 2"
    );
    p.m.pop();
    assert_eq!(before, p.bits());
}
