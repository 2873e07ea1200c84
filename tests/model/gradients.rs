//! The exact gradient of L_K through the whole model, in f64, against finite differences of L_K
//! computed segment by segment as the contract defines it; and equal bits for any number of
//! segments per step.

use crate::common::{config, config_of, model, random, switched, values};
use std::ops::Range;

use segattn::device::Device;
use segattn::device::reference::Reference;
use segattn::model::config::ModelConfig;
use segattn::model::decoder::{Decoder, Step};
use segattn::model::lora::{Lora, LoraConfig};
use segattn::model::segmentation::{End, Segment, Sequence, Tokens};
use segattn::model::state::{Angles, Plan, SequenceState, Slots};
use segattn::train::streams::{
    Gradients, Objective, StreamConfig, Teacher, accumulate, accumulate_of,
};

fn copy(state: &SequenceState<Reference>) -> SequenceState<Reference> {
    SequenceState {
        layers: state.layers.clone(),
    }
}

/// What a row of logits adds to a loss: its place in the sequence, and the logits before the next token.
type RowLoss<'a> = &'a dyn Fn(usize, &[f64]) -> f64;

/// The negative log-probability of a token.
fn surprise(logits: &[f64], token: u32) -> f64 {
    -log_softmax(logits, 1.0)[token as usize]
}

fn log_softmax(logits: &[f64], temperature: f64) -> Vec<f64> {
    let tempered = logits.iter().map(|x| x / temperature);
    let log_sum = tempered.clone().map(f64::exp).sum::<f64>().ln();
    tempered.map(|x| x - log_sum).collect()
}

/// The loss of a segment, leaving the state after it.
fn segment_loss(
    model: &Decoder<Reference>,
    plan: &Plan,
    tokens: &[u32],
    segment: &Segment,
    state: &mut SequenceState<Reference>,
    of_row: RowLoss<'_>,
) -> f64 {
    let Range { start, end } = segment.tokens;
    let mut step = Step::default();
    step.push(0, 0, 0, &tokens[start..end], segment.end());
    let angles = Angles::new(&Reference, &model.config, plan, plan.segment_len).unwrap();
    let mut slots = Slots::new(&Reference, plan, &angles, 1, plan.segment_len).unwrap();
    let mut placed = step.rows(plan, plan.segment_len);
    let forward = model
        .forward(
            plan,
            &step,
            &mut placed,
            &mut [state],
            &mut slots,
            |_, _| (),
        )
        .unwrap()
        .unwrap();
    let (rows, width) = (end - start, model.config.vocab_size);
    let mut logits = vec![0.0; rows * width];
    use segattn::device::{Accumulate, Rows, RowsMut};
    let x = Rows::packed(&forward.hidden, 0, model.config.hidden_size);
    let y = RowsMut::packed(&mut logits, 0, width);
    Reference
        .linear(x, rows, model.head(), y, Accumulate::No)
        .unwrap();
    let rows = logits.chunks(width).enumerate();
    rows.map(|(i, row)| of_row(start + i, row)).sum()
}

/// Reads the beginnings of a segment that are read for their queries, which leaves what they select.
fn ask(
    model: &Decoder<Reference>,
    plan: &Plan,
    tokens: &[u32],
    (start, asks): (usize, Option<&Vec<usize>>),
    state: &mut SequenceState<Reference>,
) {
    for rows in asks.into_iter().flatten() {
        let mut step = Step::default();
        step.push(0, 0, 0, &tokens[start..start + rows], End::Again);
        let angles = Angles::new(&Reference, &model.config, plan, plan.segment_len).unwrap();
        let mut slots = Slots::new(&Reference, plan, &angles, 1, plan.segment_len).unwrap();
        let mut placed = step.rows(plan, plan.segment_len);
        let states = &mut [&mut *state];
        (model.advance(plan, &step, &mut placed, states, &mut slots)).unwrap();
    }
}

/// What the rows of each sequence add to a loss: sequence, place, and logits.
type Loss<'a> = &'a dyn Fn(usize, usize, &[f64]) -> f64;

/// L_K (times the number of targets) by its definition: `moved` runs the segments that the loss
/// reaches, everything else comes from `base`.
fn truncated_loss(
    base: &Decoder<Reference>,
    moved: &Decoder<Reference>,
    sequences: &[Tokens],
    k: usize,
    of_row: Loss<'_>,
) -> f64 {
    let mut total = 0.0;
    for (s, sequence) in sequences.iter().enumerate() {
        let of_row = |place: usize, logits: &[f64]| of_row(s, place, logits);
        let (inputs, tokens) = (Sequence::from(sequence).inputs(), &sequence.ids);
        let plan = Plan::new(&base.config, inputs.tokens.len());
        let (segments, asks) = (plan.segments(inputs), plan.asks(inputs));
        let mut states = vec![SequenceState::new(&Reference, &plan).unwrap()];
        for (i, segment) in segments.iter().enumerate() {
            let asked = (segment.tokens.start, asks.get(&i));
            ask(base, &plan, tokens, asked, &mut states[i]);
            let mut state = copy(&states[i]);
            segment_loss(base, &plan, tokens, segment, &mut state, &of_row);
            states.push(state);
        }
        for i in 0..segments.len() {
            let first = i.saturating_sub(k);
            let mut state = copy(&states[first]);
            for (j, constants) in states.iter().enumerate().take(i + 1).skip(first) {
                for (layer, constant) in state.layers.iter_mut().zip(&constants.layers) {
                    layer.selected = constant.selected.clone();
                    layer.pool = constant.pool.clone();
                    layer.sinks = constant.sinks.clone();
                }
                let loss = segment_loss(moved, &plan, tokens, &segments[j], &mut state, &of_row);
                total += if j == i { loss } else { 0.0 };
            }
        }
    }
    total
}

fn sequences() -> Vec<Tokens> {
    let mut next = random(5);
    let mut tokens = |n: usize| {
        let ids = (0..n).map(|_| ((next() + 0.5) * 11.0) as u32).collect();
        Tokens {
            ids,
            breaks: Vec::new(),
            rereads: Vec::new(),
        }
    };
    vec![tokens(38), tokens(14), tokens(2)]
}

/// The same with breaks: segments of one row one after another, tails over one to four segments, full segments between,
/// and breaks where segments begin or end anyway.
fn broken() -> Vec<Tokens> {
    let breaks = [
        vec![0, 3, 4, 5, 6, 7, 15, 17, 18, 26, 28, 36, 37],
        vec![1, 2, 4, 5, 14],
        vec![1],
    ];
    let broken = sequences().into_iter().zip(breaks);
    let broken = broken.map(|(sequence, breaks)| Tokens { breaks, ..sequence });
    broken.collect()
}

/// The same; some segments are read again: as a whole, to the middle, at two places, twice at one.
fn reread() -> Vec<Tokens> {
    let rereads = [vec![5, 12, 14, 17, 25, 25, 33], vec![3, 9, 14], vec![1]];
    let reread = broken().into_iter().zip(rereads);
    let reread = reread.map(|(sequence, rereads)| Tokens {
        rereads,
        ..sequence
    });
    reread.collect()
}

/// The config with sinks: more than the first segments of [`broken`] have rows, fewer than a segment.
fn with_sinks(mut config: ModelConfig) -> ModelConfig {
    config.segment.as_mut().unwrap().sink_len = 6;
    config
}

/// A config in which a token ends its segment too.
fn config_with_break(tied: bool) -> ModelConfig {
    let mut config = config(tied);
    config.segment.as_mut().unwrap().break_ids = vec![7];
    config
}

fn gradients(
    model: &Decoder<Reference>,
    sequences: &[Tokens],
    k: usize,
    n: usize,
    recompute: bool,
) -> (Vec<Vec<f64>>, Vec<Vec<f64>>) {
    let config = StreamConfig {
        tbptt: k,
        segments_per_step: n,
        recompute,
    };
    let mut gradients = Gradients::new(model).unwrap();
    let scored = accumulate(model, sequences, config, 1.0, &mut gradients).unwrap();
    (gradients.finish(&Reference).unwrap().to_vec(), scored)
}

/// Compares the gradient with finite differences of L_K, both in a random direction of each tensor.
fn check_gradient(config: &ModelConfig, sequences: &[Tokens], k: usize, recompute: bool) {
    let base = model(config, &values(config, 1));
    let (gradients, _) = gradients(&base, sequences, k, 2, recompute);
    let loss =
        |s: usize, place: usize, logits: &[f64]| surprise(logits, sequences[s].ids[place + 1]);
    check_against(config, sequences, k, &gradients, &loss);
}

/// The same for gradients of any loss of the model's logits.
fn check_against(
    config: &ModelConfig,
    sequences: &[Tokens],
    k: usize,
    gradients: &[Vec<f64>],
    loss: Loss<'_>,
) {
    let base_values = values(config, 1);
    let base = model(config, &base_values);
    let mut next = random(9);
    for (i, gradient) in gradients.iter().enumerate() {
        let direction: Vec<f64> = gradient
            .iter()
            .map(|_| (64.0 * next()).round() / 64.0)
            .collect();
        let at = |step: f64| {
            let mut moved = base_values.clone();
            moved[i]
                .iter_mut()
                .zip(&direction)
                .for_each(|(v, d)| *v += step * d);
            truncated_loss(&base, &model(config, &moved), sequences, k.min(99), loss)
        };
        // Two step sizes, extrapolated: the error is of fourth order in the step.
        let step = 1.0 / 1024.0;
        let slope = |step: f64| (at(step) - at(-step)) / (2.0 * step);
        let expected = (4.0 * slope(step / 2.0) - slope(step)) / 3.0;
        let got: f64 = gradient.iter().zip(&direction).map(|(g, d)| g * d).sum();
        assert!(
            (expected - got).abs() <= 1e-6 * (1.0 + expected.abs()),
            "K {k}, tensor {i}: expected {expected}, got {got}"
        );
    }
}

#[test]
fn gradient_is_the_exact_gradient_of_the_truncated_loss() {
    for (k, tied) in [(0, false), (1, true), (2, false), (usize::MAX, true)] {
        check_gradient(&config(tied), &sequences(), k, tied);
    }
}

#[test]
fn gradient_is_exact_through_breaks_and_tails_over_several_segments() {
    for (k, tied) in [
        (0, true),
        (1, false),
        (2, true),
        (3, false),
        (usize::MAX, false),
    ] {
        check_gradient(&config_with_break(tied), &broken(), k, tied);
    }
}

#[test]
fn gradient_is_exact_where_segments_are_read_again() {
    for (k, tied) in [(0, true), (1, false), (2, true), (usize::MAX, false)] {
        let config = with_sinks(config_with_break(tied));
        let once = gradients(&model(&config, &values(&config, 1)), &broken(), k, 2, tied);
        let twice = gradients(&model(&config, &values(&config, 1)), &reread(), k, 2, tied);
        assert_ne!(once.1, twice.1, "rereads change what is read");
        check_gradient(&config, &reread(), k, tied);
    }
}

#[test]
fn gradient_is_exact_through_sinks() {
    for (k, sequences) in [(0, broken()), (1, sequences()), (2, broken())] {
        check_gradient(&with_sinks(config_with_break(true)), &sequences, k, false);
    }
}

/// Pools that drop tokens after most segments: the past has no gradient, whatever is held of it.
fn bounded(mut config: ModelConfig) -> ModelConfig {
    let segment = config.segment.as_mut().unwrap();
    segment.pool_len = segment.past_len + segment.prior_len + segment.sink_len;
    config.validate().unwrap();
    config
}

#[test]
fn gradient_is_exact_where_pools_drop_tokens() {
    for (k, sequences) in [(0, sequences()), (1, broken()), (2, sequences())] {
        check_gradient(&bounded(config_with_break(true)), &sequences, k, k == 1);
    }
}

#[test]
fn gradient_is_exact_with_every_switch() {
    for (after, k, recompute) in [(false, 1, true), (true, 2, false)] {
        let mut config = switched(after);
        config.segment.as_mut().unwrap().sink_len = 1;
        check_gradient(&config, &broken(), k, recompute);
    }
}

#[test]
fn gradient_is_exact_through_adapters() {
    let all: &[&str] = &["all-linear"];
    for (after, targets, k) in [
        (true, all, 2),
        (false, all, 1),
        (
            false,
            &["v_proj", "1.self_attn.o_proj", "gate_proj", "down_proj"][..],
            1,
        ),
    ] {
        let mut config = switched(after);
        let settings = LoraConfig {
            rank: 3,
            alpha: 2.0,
            rslora: after,
            targets: targets.iter().map(|t| (*t).to_owned()).collect(),
        };
        config.lora = Some(Lora::new(&config, settings).unwrap());
        check_gradient(&config, &broken(), k, k == 1);
        let (gradients, _) =
            gradients(&model(&config, &values(&config, 1)), &broken(), k, 2, false);
        let adapters = config.lora.as_ref().unwrap().adapters();
        assert_eq!(adapters.len(), if targets == all { 14 } else { 7 });
        let mut of_adapters = adapters.iter().flat_map(|a| [a.down, a.up()]);
        assert!(of_adapters.all(|i| gradients[i].iter().any(|g| *g != 0.0)));
    }
}

#[test]
fn any_number_of_segments_per_step_and_recomputation_give_the_same_bits() {
    for (config, sequences) in [
        (config(true), sequences()),
        (config_with_break(false), broken()),
        (with_sinks(config(false)), broken()),
        (bounded(config(false)), broken()),
        (bounded(with_sinks(config(true))), sequences()),
        (switched(true), broken()),
    ] {
        let model = model(&config, &values(&config, 3));
        for k in [0, 1, 2, 4, usize::MAX] {
            let expected = gradients(&model, &sequences, k, 1, false);
            for n in [1, 2, 3, 5, usize::MAX] {
                for recompute in [false, true] {
                    assert!(
                        gradients(&model, &sequences, k, n, recompute) == expected,
                        "K {k}, {n} segments per step, recompute {recompute}"
                    );
                }
            }
        }
    }
}

/// Logits of all rows of sequences, by a model that reads each of them in one step.
fn all_logits(model: &Decoder<Reference>, sequences: &[Tokens]) -> Vec<Vec<Vec<f64>>> {
    let of_sequence = |sequence: &Tokens| {
        let inputs = Sequence::from(sequence).inputs();
        let plan = Plan::new(&model.config, inputs.tokens.len());
        let mut state = SequenceState::new(&Reference, &plan).unwrap();
        let logits = std::cell::RefCell::new(Vec::new());
        let keep = |_: usize, row: &[f64]| {
            logits.borrow_mut().push(row.to_vec());
            0.0
        };
        for segment in plan.segments(inputs) {
            segment_loss(model, &plan, inputs.tokens, &segment, &mut state, &keep);
        }
        logits.into_inner()
    };
    sequences.iter().map(of_sequence).collect()
}

/// Gradients of all tensors, and log-probabilities and divergences of all targets.
type Taught = (Vec<Vec<f64>>, Vec<Vec<f64>>, Vec<Vec<f64>>);

/// Gradient and scores with a teacher.
fn taught(
    model: &Decoder<Reference>,
    teacher: Teacher<'_, Reference>,
    sequences: &[Tokens],
    (k, n, recompute): (usize, usize, bool),
) -> Taught {
    let config = StreamConfig {
        tbptt: k,
        segments_per_step: n,
        recompute,
    };
    let objective = Objective {
        scale: 1.0,
        teacher: Some(teacher),
    };
    let mut gradients = Gradients::new(model).unwrap();
    let scores = accumulate_of(model, sequences, config, &objective, &mut gradients).unwrap();
    let gradients = gradients.finish(&Reference).unwrap().to_vec();
    let divergences = scores.divergences.unwrap();
    (gradients, scores.log_probabilities, divergences)
}

/// Another model with the same ids: wider, of other weights, with full attention or in segments of its own.
fn teacher_config(segmented: bool) -> ModelConfig {
    let mut config = config_of(true, 8);
    config.num_hidden_layers = 1;
    match &mut config.segment {
        Some(segment) if segmented => {
            segment.head_reads.truncate(1);
            (segment.segment_len, segment.prior_len) = (6, 2);
        }
        segment => *segment = None,
    }
    config.validate().unwrap();
    config
}

#[test]
fn gradient_is_exact_with_a_teacher() {
    let cases = [
        (false, 1, 1.0, 1.0, sequences()),
        (false, 0, 0.75, 2.0, broken()),
        (true, 2, 0.5, 0.5, broken()),
        (true, usize::MAX, 0.25, 3.0, sequences()),
    ];
    for (segmented, k, weight, temperature, sequences) in cases {
        let (config, of_teacher) = (config_with_break(k == 1), teacher_config(segmented));
        let (student, known) = (
            model(&config, &values(&config, 1)),
            model(&of_teacher, &values(&of_teacher, 8)),
        );
        let teacher = Teacher {
            model: &known,
            weight,
            temperature,
        };
        let known = all_logits(&known, &sequences);
        let divergence = |s: usize, place: usize, logits: &[f64]| -> f64 {
            let q = log_softmax(&known[s][place], temperature);
            let p = log_softmax(logits, temperature);
            q.iter().zip(&p).map(|(q, p)| q.exp() * (q - p)).sum()
        };
        let loss = |s: usize, place: usize, logits: &[f64]| {
            let surprise = surprise(logits, sequences[s].ids[place + 1]);
            let squared = temperature * temperature;
            (1.0 - weight) * surprise + weight * squared * divergence(s, place, logits)
        };
        let (gradients, _, scored) = taught(&student, teacher, &sequences, (k, 2, k == 1));
        check_against(&config, &sequences, k, &gradients, &loss);
        let own = all_logits(&student, &sequences);
        for (s, scored) in scored.iter().enumerate() {
            assert_eq!(scored.len(), sequences[s].ids.len() - 1);
            for (place, got) in scored.iter().enumerate() {
                let expected = divergence(s, place, &own[s][place]);
                assert!((got - expected).abs() < 1e-12, "{got}, {expected}");
            }
        }
    }
}

#[test]
fn any_number_of_segments_per_step_gives_the_same_bits_with_a_teacher() {
    let config = config_with_break(true);
    let student = model(&config, &values(&config, 3));
    for segmented in [false, true] {
        let of_teacher = teacher_config(segmented);
        let known = model(&of_teacher, &values(&of_teacher, 8));
        let teacher = Teacher {
            model: &known,
            weight: 0.5,
            temperature: 2.0,
        };
        for k in [0, 1, usize::MAX] {
            let expected = taught(&student, teacher, &broken(), (k, 1, false));
            for n in [2, 3, usize::MAX] {
                assert!(taught(&student, teacher, &broken(), (k, n, true)) == expected);
            }
            // A sequence has the same scores beside others and alone.
            let alone = taught(&student, teacher, &broken()[1..2], (k, 2, false));
            assert_eq!([&alone.1[0], &alone.2[0]], [&expected.1[1], &expected.2[1]]);
        }
    }
}

#[test]
fn a_share_of_zero_trains_as_without_a_teacher_and_a_teacher_of_equal_bits_teaches_nothing() {
    let mut config = config_with_break(false);
    let values = values(&config, 3);
    let known = |config: &ModelConfig| model(config, &values);
    let student = known(&config);
    let teacher = |model, weight| Teacher {
        model,
        weight,
        temperature: 1.5,
    };
    let own = known(&config);
    let (gradients_of, scored, _) = taught(&student, teacher(&own, 0.0), &broken(), (1, 2, false));
    assert!((gradients_of, scored) == gradients(&student, &broken(), 1, 2, false));
    let (zeros, _, divergences) = taught(&student, teacher(&own, 1.0), &broken(), (1, 2, false));
    assert!(divergences.iter().flatten().all(|d| *d == 0.0));
    assert!(zeros.iter().flatten().all(|g| *g == 0.0));
    // With full attention the same weights say something else.
    config.segment = None;
    let full = known(&config);
    let (_, _, divergences) = taught(&student, teacher(&full, 1.0), &broken(), (1, 2, false));
    assert!(divergences[0].iter().any(|d| *d > 1e-3));
}
