//! Equal bits (docs/contract.md, section 4) in the model's own code, in f64: the log-probability of a token does not
//! depend on how the forward that computed it was cut up, on neighbours in the batch, or on whether it was
//! trained on. The same on the CPU, over random models: `random_models.rs`.

use crate::common::{config, config_of, model, model_on, random, tokens, values};
use segattn::device::Device;
use segattn::device::cpu::Cpu;
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
                breaks: &[],
                rereads: &[],
            });
        }
        for (all, more) in scored.iter_mut().zip(session.feed(&feeds).unwrap()) {
            all.extend(more);
        }
    }
    scored
}

#[test]
fn score_training_prefill_and_decoding_agree_to_the_bit() {
    for seed in 0..6 {
        let mut config = config(seed % 2 == 0);
        // Pools that drop tokens from the second or the third segment on.
        let pool_len = [0, 0, 8, 12, 14, 8][seed as usize];
        config.segment.as_mut().unwrap().pool_len = pool_len;
        config.validate().unwrap();
        let model = model(&config, &values(&config, seed));
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

/// The log-probability of each token but the first, from the logits after reading those before it one by one.
fn token_by_token<D: Device>(model: &Decoder<D>, sequence: &[u32]) -> Vec<f32> {
    let mut session = Session::new(model, 1, sequence.len(), 1).unwrap();
    let mut next = |pair: &[u32]| {
        let feed = Feed {
            sequence: 0,
            tokens: &pair[..1],
            targets: &[],
            breaks: &[],
            rereads: &[],
        };
        session.feed(&[feed]).unwrap();
        session.log_probability(0, pair[1]).unwrap()
    };
    sequence.windows(2).map(&mut next).collect()
}

#[test]
fn logits_after_a_prompt_score_the_next_token_as_the_prompt_would() {
    let config = config_of(true, 16);
    let (values, sequence) = (values(&config, 8), tokens(4, 30));
    let cpu = model_on(Cpu, &config, &values);
    let expected = score(&cpu, &sequence, 1).unwrap();
    assert_eq!(bits(&token_by_token(&cpu, &sequence)), bits(&expected));
    let wide = model(&config, &values);
    let expected = score(&wide, &sequence, 1).unwrap();
    for (got, expected) in token_by_token(&wide, &sequence).iter().zip(expected) {
        // The logits pass through f32 on the way to the host; the device is f64 here.
        assert!((got - expected).abs() <= 1e-5, "{got} for {expected}");
    }
}
