//! Equal bits (contract section 4): the log-probability of a token does not depend on how the
//! forward that computed it was cut up, on neighbours in the batch, or on whether it was trained on.

#[allow(dead_code, reason = "each test uses a part")]
mod common;

use common::{config, config_of, model, model_on, random, tokens, values};
use segattn::device::Device;
use segattn::device::cpu::Cpu;
use segattn::device::reference::Reference;
use segattn::model::decoder::Decoder;
use segattn::model::session::{Feed, Session, score};
use segattn::train::streams::{Gradients, StreamConfig, accumulate};

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

/// Feeds the sequences side by side in pieces of random length; the log-probabilities.
fn in_pieces<D: Device>(model: &Decoder<D>, sequences: &[Vec<u32>], seed: u64) -> Vec<Vec<f32>> {
    let mut next = random(seed);
    let longest = sequences.iter().map(Vec::len).max().unwrap();
    let mut session = Session::new(model, sequences.len(), longest, 2).unwrap();
    let mut scored = vec![Vec::new(); sequences.len()];
    while (0..sequences.len()).any(|b| session.position(b) + 1 < sequences[b].len()) {
        let mut feeds = Vec::new();
        for (b, sequence) in sequences.iter().enumerate() {
            let (at, end) = (session.position(b), sequence.len() - 1);
            let until = end.min(at + ((next() + 0.5) * 7.0) as usize);
            let (tokens, targets) = (&sequence[at..until], &sequence[at + 1..until + 1]);
            feeds.push(Feed {
                sequence: b,
                tokens,
                targets,
            });
        }
        for (all, more) in scored.iter_mut().zip(session.feed(&feeds).unwrap()) {
            all.extend(more);
        }
    }
    scored
}

#[test]
fn score_training_prefill_and_decoding_agree_to_the_bit_on_the_reference() {
    agree_to_the_bit(Reference, 4);
}

#[test]
fn score_training_prefill_and_decoding_agree_to_the_bit_on_the_cpu() {
    agree_to_the_bit(Cpu, 8);
    agree_to_the_bit(Cpu, 24);
}

fn agree_to_the_bit<D: Device + Copy>(device: D, head_dim: usize) {
    for seed in 0..4 {
        let config = config_of(seed % 2 == 0, head_dim);
        let model = model_on(device, &config, &values(&config, seed));
        let sequences = [
            tokens(seed + 1, 45),
            tokens(seed + 2, 9),
            tokens(seed + 3, 26),
        ];
        let expected: Vec<Vec<f32>> = sequences
            .iter()
            .map(|s| score(&model, s, 1).unwrap())
            .collect();
        for n in [2, 3, usize::MAX] {
            for (sequence, expected) in sequences.iter().zip(&expected) {
                assert_eq!(
                    bits(&score(&model, sequence, n).unwrap()),
                    bits(expected),
                    "n = {n}"
                );
            }
        }
        for pieces in 0..3 {
            let got = in_pieces(&model, &sequences, 100 * seed + pieces);
            for (got, expected) in got.iter().zip(&expected) {
                assert_eq!(bits(got), bits(expected), "seed {seed}, pieces {pieces}");
            }
        }
        let trained = accumulate(
            &model,
            &sequences,
            StreamConfig {
                tbptt: 1,
                segments_per_step: 2,
                recompute: false,
            },
            1.0,
            &mut Gradients::new(&model).unwrap(),
        )
        .unwrap();
        for (got, expected) in trained.iter().zip(&expected) {
            let got: Vec<f32> = got.iter().map(|x| *x as f32).collect();
            assert_eq!(bits(&got), bits(expected), "training, seed {seed}");
        }
    }
}

#[test]
fn logits_after_a_prompt_score_the_next_token_as_the_prompt_would() {
    let config = config(true);
    let model = model(&config, &values(&config, 8));
    let sequence = tokens(4, 30);
    let expected = score(&model, &sequence, 1).unwrap();
    let mut session = Session::new(&model, 1, 30, 1).unwrap();
    for (i, token) in sequence[..29].iter().enumerate() {
        session
            .feed(&[Feed {
                sequence: 0,
                tokens: &[*token],
                targets: &[],
            }])
            .unwrap();
        let got = session.log_probability(0, sequence[i + 1]).unwrap();
        // The logits pass through f32 on the way to the host; the device is f64 here.
        assert!(
            (got - expected[i]).abs() <= 1e-5,
            "token {i}: {got} against {}",
            expected[i]
        );
    }
}

#[test]
fn a_prompt_read_token_by_token_leaves_the_logits_of_one_read_at_once_on_the_cpu() {
    let config = config_of(true, 16);
    let model = model_on(Cpu, &config, &values(&config, 8));
    let sequence = tokens(4, 30);
    let expected = score(&model, &sequence, 1).unwrap();
    let mut session = Session::new(&model, 1, 30, 1).unwrap();
    for (i, token) in sequence[..29].iter().enumerate() {
        session
            .feed(&[Feed {
                sequence: 0,
                tokens: &[*token],
                targets: &[],
            }])
            .unwrap();
        let got = session.log_probability(0, sequence[i + 1]).unwrap();
        assert_eq!(got.to_bits(), expected[i].to_bits(), "token {i}");
    }
}
