//! The whole model on a simulated GPU, through the same model, training and generation code as on the CPU: scores and
//! gradients agree with the CPU's within what 16-bit activations cost, and section 4 of the contract holds by bits.

use crate::common::{config, gpu, model, tokens, values};
use segattn::device::Device;
use segattn::device::cpu::Cpu;
use segattn::model::decoder::Decoder;
use segattn::model::segmentation::Sequence;
use segattn::model::session::{Feed, Session, score};
use segattn::train::data::AsExample;
use segattn::train::streams::{
    Gradients, Objective, Scores, StreamConfig, Teacher, accumulate, accumulate_of,
};
use segattn_sim::Checks;

/// Log-probabilities differ from the CPU's by this at most: bf16 keeps 8 bits, and some ten roundings lie on a
/// row's way through two layers.
pub const SCORE_BOUND: f32 = 0.05;
/// Relative error (norm of the difference over norm) of each tensor's gradient.
const GRADIENT_BOUND: f64 = 0.05;

pub fn streams(tbptt: usize, segments_per_step: usize) -> StreamConfig {
    StreamConfig {
        tbptt,
        segments_per_step,
        recompute: false,
    }
}

/// Scores by reading token by token, as generation does.
pub fn decoded<'a, D: Device>(model: &Decoder<D>, sequence: impl Into<Sequence<'a>>) -> Vec<f32> {
    let sequence = sequence.into();
    let tokens = sequence.tokens;
    let mut session = Session::new(model, 1, tokens.len(), 1).expect("a session");
    let mut scores = Vec::new();
    for (i, pair) in tokens.windows(2).enumerate() {
        let feed = Feed {
            sequence: 0,
            tokens: &pair[..1],
            targets: &pair[1..],
            breaks: &sequence.breaks_within(i..i + 1),
            rereads: &[],
        };
        scores.extend(session.feed(&[feed]).expect("a step").remove(0));
    }
    scores
}

/// Log-probabilities of the training forward, and the gradient of each tensor.
pub fn gradients<D: Device, S: AsExample>(
    model: &Decoder<D>,
    sequences: &[S],
    config: StreamConfig,
) -> (Vec<Vec<f64>>, Vec<Vec<f32>>) {
    let mut gradients = Gradients::new(model).expect("memory");
    let targets = |s: &S| s.as_example().tokens.len() - 1;
    let count: usize = sequences.iter().map(targets).sum();
    let scores = accumulate(model, sequences, config, 1.0 / count as f64, &mut gradients)
        .expect("gradients");
    let device = &model.device;
    let read = |b: &D::Buffer| device.read(b, 0..device.len(b)).expect("a read");
    (
        scores,
        gradients
            .finish(device)
            .expect("gradients")
            .iter()
            .map(read)
            .collect(),
    )
}

/// Each tensor's gradient is within the bound of the expected one.
pub fn assert_close<D: Device>(model: &Decoder<D>, got: &[Vec<f32>], expected: &[Vec<f32>]) {
    let norm =
        |x: &mut dyn Iterator<Item = f32>| x.map(|x| f64::from(x).powi(2)).sum::<f64>().sqrt();
    for ((spec, expected), got) in model.specs.iter().zip(expected).zip(got) {
        let difference = norm(&mut expected.iter().zip(got).map(|(a, b)| a - b));
        let norm = norm(&mut expected.iter().copied());
        assert!(
            difference <= GRADIENT_BOUND * norm,
            "{}: {difference} of {norm}",
            spec.parts[0].0
        );
    }
}

#[test]
fn scores_agree_with_the_cpu() {
    for tied in [false, true] {
        let config = config(tied);
        let values = values(&config, 5);
        let tokens = tokens(7, 30, config.vocab_size);
        let on_cpu = score(&model(Cpu, &config, &values), &tokens, 1).expect("scores");
        let on_gpu =
            score(&model(gpu(1, Checks::All), &config, &values), &tokens, 1).expect("scores");
        let worst = on_cpu
            .iter()
            .zip(&on_gpu)
            .map(|(a, b)| (a - b).abs())
            .fold(0.0, f32::max);
        assert!(worst < SCORE_BOUND, "{worst}: {on_gpu:?} and {on_cpu:?}");
    }
}

#[test]
fn scores_have_equal_bits_however_they_are_computed() {
    let config = config(true);
    let values = values(&config, 6);
    let sequence = tokens(8, 27, config.vocab_size);
    let model = model(gpu(2, Checks::None), &config, &values);
    let one = score(&model, &sequence, 1).expect("scores");
    for segments_per_step in [2, 3, 9] {
        assert_eq!(
            one,
            score(&model, &sequence, segments_per_step).expect("scores")
        );
    }
    assert_eq!(one, decoded(&model, &sequence));
    // In a batch, beside others of other lengths; and as training computes them.
    let others = [
        tokens(9, 12, config.vocab_size),
        sequence.clone(),
        tokens(10, 20, config.vocab_size),
    ];
    for (tbptt, segments_per_step) in [(0, 1), (1, 2), (1, 9)] {
        let (scores, _) = gradients(&model, &others, streams(tbptt, segments_per_step));
        let trained: Vec<f32> = scores[1].iter().map(|x| *x as f32).collect();
        assert_eq!(one, trained, "{tbptt}, {segments_per_step}");
    }
}

#[test]
fn gradients_agree_with_the_cpu_and_do_not_depend_on_segments_per_step() {
    let config = config(false);
    let values = values(&config, 11);
    let sequences = [
        tokens(12, 25, config.vocab_size),
        tokens(13, 18, config.vocab_size),
    ];
    let (on_cpu, on_gpu) = (
        model(Cpu, &config, &values),
        model(gpu(3, Checks::None), &config, &values),
    );
    for tbptt in [0, 1] {
        let (_, expected) = gradients(&on_cpu, &sequences, streams(tbptt, 1));
        let (_, got) = gradients(&on_gpu, &sequences, streams(tbptt, 1));
        assert_close(&on_cpu, &got, &expected);
        let (_, all) = gradients(&on_gpu, &sequences, streams(tbptt, 9));
        assert!(got == all, "segments per step");
    }
}

/// Scores and gradients with a teacher.
fn taught<D: Device>(
    student: &Decoder<D>,
    teacher: &Decoder<D>,
    temperature: f64,
    segments_per_step: usize,
) -> (Scores, Vec<Vec<f32>>) {
    let vocab = student.config.vocab_size;
    let sequences = [tokens(12, 25, vocab), tokens(13, 18, vocab)];
    let objective = Objective {
        scale: 1.0 / 41.0,
        teacher: Some(Teacher {
            model: teacher,
            weight: 0.75,
            temperature,
        }),
    };
    let (device, config) = (&student.device, streams(1, segments_per_step));
    let mut gradients = Gradients::new(student).expect("memory");
    let scores = accumulate_of(student, &sequences, config, &objective, &mut gradients);
    let read = |b: &D::Buffer| device.read(b, 0..device.len(b)).expect("a read");
    let gradients = gradients.finish(device).expect("gradients");
    (
        scores.expect("scores"),
        gradients.iter().map(read).collect(),
    )
}

#[test]
fn a_teacher_teaches_as_on_the_cpu_and_by_the_same_bits_for_any_segments_per_step() {
    let config = config(true);
    let mut of_teacher = crate::common::config(false);
    for (temperature, full, checks) in [(1.0, true, Checks::None), (2.0, false, Checks::All)] {
        if full {
            of_teacher.segment = None;
        } else {
            of_teacher.segment.clone_from(&config.segment);
        }
        let [own, known] = [(&config, 11), (&of_teacher, 12)].map(|(c, seed)| values(c, seed));
        let on_cpu = [(&config, &own), (&of_teacher, &known)].map(|(c, v)| model(Cpu, c, v));
        let gpu = gpu(3, checks);
        let on_gpu = [(&config, &own), (&of_teacher, &known)];
        let on_gpu = on_gpu.map(|(c, v)| model(gpu.clone(), c, v));
        let (expected, exact) = taught(&on_cpu[0], &on_cpu[1], temperature, 1);
        let (got, gradients) = taught(&on_gpu[0], &on_gpu[1], temperature, 1);
        assert_close(&on_cpu[0], &gradients, &exact);
        let divergences =
            |scores: &Scores| scores.divergences.clone().expect("divergences").concat();
        for (got, expected) in divergences(&got).iter().zip(divergences(&expected)) {
            assert!((got - expected).abs() < 0.05, "{got}, {expected}");
        }
        assert!((got, gradients) == taught(&on_gpu[0], &on_gpu[1], temperature, 9));
    }
}
