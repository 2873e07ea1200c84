//! The optimizer's update on every device against a plain f64 reading of its formulas, and what it must never
//! do: depend on threads, touch anything when a gradient is not finite, or let a gate slip to zero.

mod random;

use proptest::prelude::*;
use random::random_bits;
use segattn::device::cpu::Cpu;
use segattn::device::reference::Reference;
use segattn::device::{AdamW, Device, GradTensor, Kind, Update};

/// One parameter with its state, on a device.
struct Param<D: Device> {
    values: D::Buffer,
    grads: D::Buffer,
    m: D::Buffer,
    v: D::Buffer,
    len: usize,
}

/// How a parameter is updated: decay, factor on the learning rate, floor.
#[derive(Clone, Copy)]
struct How(bool, f64, Option<f64>);

const PLAIN: How = How(true, 1.0, None);

impl<D: Device> Param<D> {
    fn new(device: &D, values: &[f32], grads: &[f32]) -> Self {
        let upload = |values: &[f32]| {
            let mut buffer = device.zeros(Kind::Exact, values.len()).unwrap();
            device.write(&mut buffer, 0, values).unwrap();
            buffer
        };
        let zeros = || device.zeros(Kind::Exact, values.len()).unwrap();
        Self {
            values: upload(values),
            grads: upload(grads),
            m: zeros(),
            v: zeros(),
            len: values.len(),
        }
    }

    fn tensor(&mut self, How(decay, lr_scale, floor): How) -> GradTensor<'_, D::Buffer> {
        GradTensor {
            values: &mut self.values,
            grads: &self.grads,
            range: 0..self.len,
            m: &mut self.m,
            v: &mut self.v,
            decay,
            lr_scale,
            floor,
        }
    }

    fn step(&mut self, device: &D, how: How, update: &AdamW) -> Update {
        adamw(device, &mut [self.tensor(how)], update)
    }

    fn values(&self, device: &D) -> Vec<f64> {
        let len = device.len(&self.values);
        device.read_wide(&self.values, 0..len).unwrap()
    }

    fn bits(&self, device: &D) -> Vec<u64> {
        [&self.values, &self.m, &self.v]
            .into_iter()
            .flat_map(|b| device.read_wide(b, 0..device.len(b)).unwrap())
            .map(f64::to_bits)
            .collect()
    }
}

/// An update of tensors that are all there are.
fn adamw<D: Device>(
    device: &D,
    tensors: &mut [GradTensor<'_, D::Buffer>],
    update: &AdamW,
) -> Update {
    let grads: Vec<_> = tensors.iter().map(|t| (t.grads, t.range.clone())).collect();
    let squares = device.grad_squares(&grads).unwrap();
    device.adamw(tensors, &squares, update).unwrap()
}

fn update(lr: f64, step: u64) -> AdamW {
    AdamW {
        lr,
        betas: [0.9, 0.95],
        eps: 1e-8,
        weight_decay: 0.1,
        clip_norm: None,
        step,
        only_measure: false,
    }
}

/// Deterministic numbers of mixed scale; `seed` picks the sequence.
fn numbers(len: usize, seed: u64) -> Vec<f32> {
    let mut bits = random_bits(seed);
    (0..len)
        .map(|_| {
            let state = bits();
            let unit = (state >> 40) as f32 / (1u64 << 24) as f32 - 0.4;
            unit * 10f32.powi((state % 9) as i32 - 5)
        })
        .collect()
}

fn norm_of(numbers: &[f32]) -> f64 {
    let squares = numbers.iter().map(|x| f64::from(*x) * f64::from(*x));
    squares.sum::<f64>().sqrt()
}

/// Twenty updates of 37 weights on the device and by the formulas; the largest difference, relative to
/// `1 + |weight|`.
fn difference_after_many_steps<D: Device>(device: &D, seed: u64, base: &AdamW, how: How) -> f64 {
    let start = numbers(37, seed);
    let mut p = Param::new(device, &start, &[0.0; 37]);
    let mut w: Vec<f64> = start.iter().map(|x| f64::from(*x)).collect();
    let (mut m, mut v) = ([0.0; 37], [0.0; 37]);
    let ([beta1, beta2], How(decay, lr_scale, _)) = (base.betas, how);
    for t in 1..=20u64 {
        let grads = numbers(37, seed * 1000 + t);
        device.write(&mut p.grads, 0, &grads).unwrap();
        let lr = 1e-2 / t as f64;
        let done = p.step(
            device,
            how,
            &AdamW {
                lr,
                step: t,
                ..*base
            },
        );
        assert!(done.applied);
        let clip = base
            .clip_norm
            .map_or(1.0, |c| (c / norm_of(&grads)).min(1.0));
        for i in 0..37 {
            let g = f64::from(grads[i]) * clip;
            m[i] = beta1 * m[i] + (1.0 - beta1) * g;
            v[i] = beta2 * v[i] + (1.0 - beta2) * g * g;
            let m_hat = m[i] / (1.0 - beta1.powf(t as f64));
            let v_hat = v[i] / (1.0 - beta2.powf(t as f64));
            let decayed = if decay { base.weight_decay * w[i] } else { 0.0 };
            w[i] -= lr_scale * lr * (m_hat / (v_hat.sqrt() + base.eps) + decayed);
        }
    }
    let got = p.values(device).into_iter().zip(&w);
    got.map(|(got, w)| (got - w).abs() / (1.0 + w.abs()))
        .fold(0.0, f64::max)
}

proptest! {
    #[test]
    fn many_steps_follow_the_formulas(
        seed in 0u64..1000,
        beta1 in 0.0f64..0.99,
        beta2 in 0.5f64..0.9999,
        decay: bool,
        weight_decay in 0.0f64..1.0,
        clip_norm in prop::option::of(0.01f64..100.0),
    ) {
        let base = AdamW { betas: [beta1, beta2], eps: 1e-6, weight_decay, clip_norm, ..update(0.0, 1) };
        let how = How(decay, 0.5, None);
        prop_assert!(difference_after_many_steps(&Cpu, seed, &base, how) <= 2e-5);
        prop_assert!(difference_after_many_steps(&Reference, seed, &base, how) <= 1e-12);
    }

    #[test]
    fn the_norm_is_that_of_all_tensors_whatever_the_split(
        len in 0usize..30_000, cut in 0usize..30_000, seed in 0u64..100,
    ) {
        let all = numbers(len, seed);
        let (first, second) = all.split_at(cut.min(len));
        let mut parts = [first, second].map(|grads| Param::new(&Cpu, grads, grads));
        let [a, b] = &mut parts;
        let measure = AdamW { only_measure: true, ..update(1.0, 1) };
        let got = adamw(&Cpu, &mut [a.tensor(PLAIN), b.tensor(PLAIN)], &measure);
        let exact = norm_of(&all);
        prop_assert!((got.grad_norm - exact).abs() <= 1e-12 * exact);
        prop_assert!(!got.applied);
        prop_assert_eq!(a.bits(&Cpu), Param::new(&Cpu, first, first).bits(&Cpu));
    }

    #[test]
    fn a_gradient_that_is_not_finite_changes_nothing(
        index in 0usize..40_000,
        bad in prop::sample::select(vec![f32::NAN, f32::INFINITY, f32::NEG_INFINITY]),
    ) {
        let mut grads = numbers(40_000, 4);
        grads[index] = bad;
        untouched(&Cpu, &grads);
        untouched(&Reference, &grads);
    }
}

fn untouched<D: Device>(device: &D, grads: &[f32]) {
    let mut first = Param::new(device, &numbers(100, 1), &numbers(100, 2));
    let mut second = Param::new(device, &numbers(grads.len(), 3), grads);
    let before = (first.bits(device), second.bits(device));
    let mut tensors = [first.tensor(PLAIN), second.tensor(PLAIN)];
    let got = adamw(device, &mut tensors, &update(1e-3, 1));
    assert!(!got.applied && !got.grad_norm.is_finite());
    assert!(before == (first.bits(device), second.bits(device)));
}

#[test]
fn squares_of_the_largest_gradients_do_not_overflow_the_norm() {
    let mut p = Param::new(&Cpu, &[0.0; 10_000], &[f32::MAX; 10_000]);
    let norm = p.step(&Cpu, PLAIN, &update(0.0, 1)).grad_norm;
    assert!((norm / (100.0 * f64::from(f32::MAX)) - 1.0).abs() < 1e-12);
}

#[test]
fn bits_do_not_depend_on_the_number_of_threads() {
    let sizes = [1, 4095, 4096, 4097, 100_000, 0, 7];
    let three_steps = || {
        let param = |n: &usize| Param::new(&Cpu, &numbers(*n, 7), &numbers(*n, *n as u64));
        let mut params: Vec<_> = sizes.iter().map(param).collect();
        let mut norms = Vec::new();
        for t in 1..=3 {
            let mut tensors: Vec<_> = params.iter_mut().map(|p| p.tensor(PLAIN)).collect();
            let clipped = AdamW {
                clip_norm: Some(1.0),
                ..update(1e-3, t)
            };
            let done = adamw(&Cpu, &mut tensors, &clipped);
            norms.push(done.grad_norm.to_bits());
        }
        (
            norms,
            params.iter().map(|p| p.bits(&Cpu)).collect::<Vec<_>>(),
        )
    };
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
        pool.unwrap().install(three_steps)
    };
    let one = run(1);
    assert!([2, 3, 8].into_iter().all(|threads| run(threads) == one));
}

#[test]
fn a_gate_above_zero_stays_above_the_floor_and_a_closed_gate_stays_closed() {
    gates(&Cpu);
    gates(&Reference);
}

fn gates<D: Device>(device: &D) {
    let floor = f64::from(1e-4f32);
    let mut gates = Param::new(device, &[0.0, 0.01, 1.0], &[1.0, 1.0, -1.0]);
    for t in 1..=50 {
        gates.step(device, How(false, 1.0, Some(floor)), &update(0.01, t));
    }
    let values = gates.values(device);
    assert_eq!(values[..2], [0.0, floor]);
    assert!(values[2] > 1.0);
}

#[test]
fn decay_shrinks_a_weight_without_gradient_by_the_stated_factor_and_only_where_asked() {
    for (decay, expected) in [(true, 2.0 * (1.0 - 0.5 * 0.1)), (false, 2.0)] {
        let how = How(decay, 1.0, None);
        let mut p = Param::new(&Cpu, &[2.0], &[0.0]);
        p.step(&Cpu, how, &update(0.5, 1));
        assert!((p.values(&Cpu)[0] - expected).abs() <= 1e-7);
        let mut p = Param::new(&Reference, &[2.0], &[0.0]);
        p.step(&Reference, how, &update(0.5, 1));
        assert_eq!(p.values(&Reference), [expected]);
    }
}

#[test]
fn the_first_update_has_the_size_of_the_learning_rate_and_a_factor_of_zero_leaves_a_tensor() {
    let first = AdamW {
        eps: 1e-12,
        weight_decay: 0.0,
        ..update(0.01, 1)
    };
    let mut p = Param::new(&Cpu, &[0.0; 3], &[1e-4, -5.0, 1e3]);
    p.step(&Cpu, PLAIN, &first);
    for (w, sign) in p.values(&Cpu).into_iter().zip([-1.0, 1.0, -1.0]) {
        assert!((w - sign * 0.01).abs() < 1e-6, "{w}");
    }
    let mut p = Param::new(&Cpu, &[1.0], &[1.0]);
    let before = p.bits(&Cpu);
    assert!(p.step(&Cpu, How(true, 0.0, None), &first).applied);
    assert_eq!(p.bits(&Cpu), before);
}

#[test]
fn parts_of_a_tensor_updated_apart_have_the_bits_of_the_whole() {
    fn check<D: Device>(device: &D) {
        let chunk = device.norm_chunk().unwrap();
        let len = 3 * chunk + 17;
        let (values, grads) = (numbers(len, 5), numbers(len, 6));
        let clipped = AdamW {
            clip_norm: Some(0.5),
            ..update(1e-2, 1)
        };
        let mut whole = Param::new(device, &values, &grads);
        let expected = whole.step(device, PLAIN, &clipped);
        let mut parts = Param::new(device, &values, &grads);
        let cuts = [0..chunk, chunk..3 * chunk, 3 * chunk..len];
        let squares = cuts
            .clone()
            .map(|range| device.grad_squares(&[(&parts.grads, range)]));
        let squares: Vec<f64> = squares.into_iter().flat_map(Result::unwrap).collect();
        assert_eq!(squares.len(), 4);
        let mut moments: [Vec<u64>; 2] = [Vec::new(), Vec::new()];
        for range in cuts {
            let zeros = || device.zeros(Kind::Exact, range.len()).unwrap();
            let (mut m, mut v) = (zeros(), zeros());
            let tensor = GradTensor {
                range: range.clone(),
                m: &mut m,
                v: &mut v,
                ..parts.tensor(PLAIN)
            };
            let got = device.adamw(&mut [tensor], &squares, &clipped).unwrap();
            assert_eq!(got, expected);
            for (all, part) in moments.iter_mut().zip([&m, &v]) {
                let part = device.read_wide(part, 0..range.len()).unwrap();
                all.extend(part.into_iter().map(f64::to_bits));
            }
        }
        let values: Vec<u64> = parts.values(device).into_iter().map(f64::to_bits).collect();
        let [m, v] = moments;
        assert!([values, m, v].concat() == whole.bits(device));
    }
    check(&Cpu);
    check(&Reference);
}
