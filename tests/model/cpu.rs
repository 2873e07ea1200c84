//! The CPU device against the f64 device, through the whole model: log-probabilities and gradients.

use crate::common::{config_of, model, model_on, tokens, values};
use segattn::device::cpu::Cpu;
use segattn::device::{Device, DeviceError, reference::Reference};
use segattn::model::config::ModelConfig;
use segattn::model::decoder::Decoder;
use segattn::model::session::{Feed, Session};
use segattn::train::streams::{Gradients, StreamConfig, accumulate};

/// Values that f32 holds exactly, so that both devices have the same weights.
fn rounded(config: &ModelConfig, seed: u64) -> Vec<Vec<f64>> {
    let mut values = values(config, seed);
    for x in values.iter_mut().flatten() {
        *x = f64::from(*x as f32);
    }
    values
}

/// Log-probabilities, then every tensor's gradient.
fn run<D: Device>(
    model: &Decoder<D>,
    sequences: &[Vec<u32>],
    tbptt: usize,
    segments_per_step: usize,
    recompute: bool,
) -> Vec<Vec<f32>> {
    let config = StreamConfig {
        tbptt,
        segments_per_step,
        recompute,
    };
    let mut gradients = Gradients::new(model).unwrap();
    let scored = accumulate(model, sequences, config, 0.02, &mut gradients).unwrap();
    let finished = gradients.finish(&model.device).unwrap();
    let tensors = (0..model.specs.len()).map(|i| {
        model
            .device
            .read(&finished[i], 0..model.specs[i].role.len())
            .unwrap()
    });
    let scored = scored.concat().iter().map(|x| *x as f32).collect();
    std::iter::once(scored).chain(tensors).collect()
}

fn relative_error(got: &[f32], expected: &[f32]) -> f64 {
    let square = |x: f64| x * x;
    let pairs = got.iter().zip(expected);
    let diff: f64 = pairs
        .map(|(g, e)| square(f64::from(*g) - f64::from(*e)))
        .sum();
    let norm: f64 = expected.iter().map(|e| square(f64::from(*e))).sum();
    if norm == 0.0 {
        diff.sqrt()
    } else {
        (diff / norm).sqrt()
    }
}

#[test]
fn log_probabilities_and_gradients_agree_with_the_reference() {
    let sequences = [tokens(1, 45), tokens(2, 9), tokens(3, 26)];
    for (seed, head_dim) in [(0, 8), (1, 24), (2, 40)] {
        let config = config_of(seed % 2 == 0, head_dim);
        let values = rounded(&config, seed);
        let (cpu, reference) = (model_on(Cpu, &config, &values), model(&config, &values));
        let _: &Decoder<Reference> = &reference;
        for tbptt in [0, 1, 2, 100] {
            let got = run(&cpu, &sequences, tbptt, 2, true);
            let expected = run(&reference, &sequences, tbptt, 2, false);
            for (i, (got, expected)) in got.iter().zip(&expected).enumerate() {
                let error = relative_error(got, expected);
                assert!(
                    error < 1e-5,
                    "seed {seed}, K = {tbptt}, result {i}: {error:e}"
                );
            }
        }
    }
}

#[test]
fn gradients_have_the_same_bits_for_any_segments_per_step_and_any_threads() {
    let sequences = [tokens(1, 45), tokens(2, 9), tokens(3, 26)];
    let config = config_of(false, 16);
    let model = model_on(Cpu, &config, &rounded(&config, 5));
    let expected = run(&model, &sequences, 1, 1, false);
    for n in [1, 2, 3, usize::MAX] {
        for recompute in [false, true] {
            let got = run(&model, &sequences, 1, n, recompute);
            assert!(got == expected, "n = {n}, recompute {recompute}");
        }
    }
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(1)
        .build()
        .unwrap();
    assert!(pool.install(|| run(&model, &sequences, 1, 2, false)) == expected);
}

/// Sizes that are absurd, of which the system may promise the memory.
#[test]
fn sessions_beyond_all_memory_are_errors() {
    let mut plain = config_of(true, 8);
    plain.segment = None;
    let sequence = tokens(1, 40);
    for config in [config_of(true, 8), plain] {
        let segmented = config.segment.is_some();
        let model = model_on(Cpu, &config, &values(&config, 1));
        for huge in [1 << 40, 1 << 60, usize::MAX] {
            let open = |sequences, longest| Session::new(&model, sequences, longest, 1).map(drop);
            let out = |got| assert!(matches!(got, Err(DeviceError::OutOfMemory(_))), "{got:?}");
            out(open(huge, 40));
            out(open(huge, huge));
            // With segments the length of a sequence costs nothing beforehand.
            match segmented {
                true => open(1, huge).unwrap(),
                false => out(open(1, huge)),
            }
        }
        if segmented {
            let mut session = Session::new(&model, 1, usize::MAX, usize::MAX).unwrap();
            let feed = |tokens| Feed {
                sequence: 0,
                tokens,
                targets: &[],
                breaks: &[],
                rereads: &[],
            };
            let got = session.feed(&[feed(&sequence)]);
            assert!(matches!(got, Err(DeviceError::OutOfMemory(_))), "{got:?}");
            assert_eq!(session.position(0), 0);
        }
    }
}
