//! Segments that breaks end early (docs/contract.md, section 2): what a sequence carries on does not depend on where
//! the segments before ended, but for what the contract says.
//!
//! In the first layer, keys before rotation, values and queries are functions of their token. So after the same tokens
//! the tail, the pool and the selection have the same bits, wherever earlier segments ended, as long as the last one is
//! at least as long as the probes.

use crate::common::{self, config, model, model_on, tokens, values};
use segattn::device::cpu::Cpu;
use segattn::device::reference::Reference;
use segattn::device::sampler::SamplerConfig;
use segattn::device::{PastPool, SelectedBlocks};
use segattn::generate::{Generator, GeneratorConfig, Prompt};
use segattn::model::config::{HeadReads, ModelConfig, RetrievalConfig};
use segattn::model::decoder::{Decoder, Step};
use segattn::model::segmentation::{Sequence, Tokens};
use segattn::model::session::{Feed, Session, score};
use segattn::model::state::{Angles, Carry, Plan, SequenceState, Slots};
use std::ops::ControlFlow;

/// The state of the first layer after `sequence`, segment by segment.
fn first_layer(config: &ModelConfig, sequence: Sequence<'_>) -> Carry<Reference> {
    let model = model(config, &values(config, 3));
    let plan = Plan::new(config, sequence.tokens.len());
    let mut state = SequenceState::new(&Reference, &plan).unwrap();
    let angles = Angles::new(&Reference, config, &plan, plan.segment_len).unwrap();
    for segment in plan.segments(sequence) {
        let mut slots = Slots::new(&Reference, &plan, &angles, 1, plan.segment_len).unwrap();
        let mut step = Step::default();
        step.push(
            0,
            0,
            0,
            &sequence.tokens[segment.tokens.clone()],
            segment.end(),
        );
        let mut placed = step.rows(&plan, slots.room);
        model
            .advance(&plan, &step, &mut placed, &mut [&mut state], &mut slots)
            .unwrap();
    }
    state.layers.swap_remove(0)
}

/// The rows of the tail that are valid.
fn tail(config: &ModelConfig, carry: &Carry<Reference>) -> [Vec<u64>; 2] {
    let len = carry.prior_rows * config.num_key_value_heads * config.head_dim;
    [&carry.prior_k, &carry.prior_v].map(|rows| rows[..len].iter().map(|x| x.to_bits()).collect())
}

fn pool(carry: &Carry<Reference>) -> (Vec<f32>, Vec<f32>) {
    let pool = carry.pool.as_ref().unwrap();
    pool.read(&Reference, 0..pool.tokens()).unwrap()
}

fn selected(carry: &Carry<Reference>) -> Vec<Vec<usize>> {
    carry.selected.tokens(&Reference).unwrap()
}

/// docs/contract.md, section 2, "Reach of the tail": two layers, segments of 8 tokens, a tail of 4.
#[test]
fn tails_reach_back_as_many_segments_as_there_are_layers() {
    let mut config = config(true);
    let segment = config.segment.as_mut().unwrap();
    segment
        .head_reads
        .iter_mut()
        .for_each(|layer| layer.fill(HeadReads::PRIOR));
    let model = model(&config, &values(&config, 3));
    let ids = tokens(7, 41);
    let before = score(&model, &ids, 1).unwrap();
    // The last segment that a change of token `at` of the second segment, tokens 8 to 15, is seen in.
    let last = |at: usize| {
        let mut ids = ids.clone();
        ids[at] = (ids[at] + 1) % 11;
        let after = score(&model, &ids, 1).unwrap();
        // Number `i` is what is predicted after token `i`.
        let differs = |i: &usize| before[*i].to_bits() != after[*i].to_bits();
        (0..before.len()).rev().find(differs).unwrap() / 8
    };
    assert_eq!([8, 11, 12, 15].map(last), [2, 2, 3, 3]);
}

/// Segments of at most 8 tokens, a tail of 4 rows, probes of the last 6 queries.
#[test]
fn the_state_after_breaks_is_that_of_the_same_tokens() {
    let config = config(true);
    for (seed, breaks) in [
        &[8, 16, 18, 26][..],
        &[1, 2, 3, 4, 5, 10, 18, 19, 26],
        &[8, 16, 17, 18, 19, 20, 26],
        &[3, 11, 18, 26],
    ]
    .into_iter()
    .enumerate()
    {
        let tokens = tokens(seed as u64, 26);
        let [expected, got] = [&[2, 10, 18, 26][..], breaks].map(|breaks| {
            let tokens = &tokens;
            first_layer(
                &config,
                Sequence {
                    tokens,
                    breaks,
                    rereads: &[],
                },
            )
        });
        assert_eq!(got.prior_rows, 4);
        assert_eq!(tail(&config, &got), tail(&config, &expected), "{breaks:?}");
        assert_eq!(pool(&got), pool(&expected), "{breaks:?}");
        assert_eq!(selected(&got), selected(&expected), "{breaks:?}");
        assert!(selected(&got).iter().all(|tokens| tokens.len() == 4));
    }
}

/// After so many tokens a bounded pool holds as many, wherever segments ended; the first of them are the sinks, and the
/// last of a head that reads the tail are the tail.
#[test]
fn a_bounded_pool_holds_as_many_tokens_wherever_segments_ended() {
    let mut config = config(true);
    let segment = config.segment.as_mut().unwrap();
    (segment.sink_len, segment.pool_len) = (3, 12);
    let both = HeadReads {
        prior: true,
        past: true,
    };
    segment.head_reads[0] = vec![both; 4];
    config.validate().unwrap();
    let mut whole = config.clone();
    whole.segment.as_mut().unwrap().pool_len = 0;
    let all = tokens(7, 40);
    for (len, held) in [(9, 9), (12, 12), (13, 11), (14, 12), (27, 11), (40, 12)] {
        for every in [1, 3, 5, 7, 8] {
            let tokens = &all[..len];
            let breaks: Vec<usize> = (1..=len).filter(|i| i % every == 0 || *i == len).collect();
            let breaks = &breaks[..];
            let [carry, unbounded] = [&config, &whole].map(|config| {
                first_layer(
                    config,
                    Sequence {
                        tokens,
                        breaks,
                        rereads: &[],
                    },
                )
            });
            assert_eq!(
                carry.pool.as_ref().unwrap().tokens(),
                held,
                "{len}, {every}"
            );
            let ((k, v), (all_k, all_v)) = (pool(&carry), pool(&unbounded));
            let width = k.len() / held;
            for (got, all) in [(&k, &all_k), (&v, &all_v)] {
                assert_eq!(got[..3 * width], all[..3 * width]);
                let tail = carry.prior_rows * width;
                assert_eq!(got[got.len() - tail..], all[all.len() - tail..]);
            }
            assert!(
                selected(&carry)
                    .iter()
                    .flatten()
                    .all(|token| *token < held - 4)
            );
        }
    }
}

#[test]
fn a_tail_holds_no_more_than_the_tokens_so_far() {
    let config = config(true);
    let all = tokens(5, 9);
    for (len, breaks) in [(1, &[1][..]), (2, &[1, 2]), (3, &[2, 3]), (3, &[1, 2, 3])] {
        let tokens = &all[..len];
        let [expected, got] = [&[len][..], breaks].map(|breaks| {
            let sequence = Sequence {
                tokens,
                breaks,
                rereads: &[],
            };
            first_layer(&config, sequence)
        });
        assert_eq!(got.prior_rows, len);
        assert_eq!(tail(&config, &got), tail(&config, &expected), "{breaks:?}");
    }
}

/// A segment shorter than `probe_len` has the selection that a shorter `probe_len` gives after the same tokens, and one
/// shorter than `probe_window` that of a shorter window.
#[test]
fn a_short_segment_asks_with_the_queries_that_it_has() {
    for rows in 1..8 {
        let config = config(true);
        let mut shorter = config.clone();
        let retrieval = &mut shorter.segment.as_mut().unwrap().retrieval;
        let RetrievalConfig::Blocks {
            probe_len,
            probe_window,
            ..
        } = retrieval
        else {
            panic!("{retrieval:?}")
        };
        *probe_len = (*probe_len).min(rows);
        *probe_window = (*probe_window).min(rows);
        for seed in 0..4 {
            let tokens = &tokens(seed, 16 + rows);
            let breaks = &[8, 16, 16 + rows];
            let got = first_layer(
                &config,
                Sequence {
                    tokens,
                    breaks,
                    rereads: &[],
                },
            );
            let breaks = &[8 + rows, 16 + rows];
            let expected = first_layer(
                &shorter,
                Sequence {
                    tokens,
                    breaks,
                    rereads: &[],
                },
            );
            assert_eq!(
                selected(&got),
                selected(&expected),
                "{rows} rows, seed {seed}"
            );
        }
    }
}

/// A head that reads prior and past rows must not find a token in both: the tail is not eligible, and it is as long as
/// the tokens so far allow.
#[test]
fn what_the_tail_holds_is_not_selected() {
    let mut config = config(true);
    let segment = config.segment.as_mut().unwrap();
    let both = HeadReads {
        prior: true,
        past: true,
    };
    segment.head_reads[0] = vec![both; 4];
    let all = tokens(6, 10);
    for len in 1..10usize {
        let breaks: Vec<usize> = (1..=len).collect();
        let (tokens, breaks) = (&all[..len], &breaks[..]);
        let carry = first_layer(
            &config,
            Sequence {
                tokens,
                breaks,
                rereads: &[],
            },
        );
        // Whole blocks of two.
        let eligible = len.saturating_sub(4) / 2 * 2;
        for tokens in selected(&carry) {
            assert_eq!(tokens.len(), eligible.min(4), "{len} tokens");
            assert!(tokens.iter().all(|token| *token < eligible));
        }
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

fn with_breaks(ids: Vec<u32>, after_prompt: bool) -> ModelConfig {
    let mut config = common::config_of(true, 16);
    let segment = config.segment.as_mut().unwrap();
    (segment.break_ids, segment.break_after_prompt) = (ids, after_prompt);
    config
}

/// A break changes what comes after it, and nothing before it.
#[test]
fn a_break_changes_what_follows_it() {
    let config = with_breaks(Vec::new(), false);
    let model = model_on(Cpu, &config, &values(&config, 8));
    let ids = tokens(4, 40);
    let without = score(&model, &ids, 1).unwrap();
    for at in [1, 5, 13, 21] {
        let broken = Tokens {
            ids: ids.clone(),
            breaks: vec![at],
            rereads: Vec::new(),
        };
        let with = score(&model, &broken, 1).unwrap();
        // Token `at` is predicted by the last row before the break.
        assert_eq!(bits(&with[..at]), bits(&without[..at]));
        assert!(bits(&with[at..]) != bits(&without[at..]), "break at {at}");
    }
    for nothing in [0, 8, 24, 39, 40] {
        let broken = Tokens {
            ids: ids.clone(),
            breaks: vec![nothing],
            rereads: Vec::new(),
        };
        let with = score(&model, &broken, 1).unwrap();
        assert_eq!(bits(&with), bits(&without), "break at {nothing}");
    }
}

#[test]
fn a_model_without_segments_passes_over_breaks() {
    let mut config = with_breaks(Vec::new(), false);
    config.segment = None;
    let model = model_on(Cpu, &config, &values(&config, 8));
    let ids = tokens(4, 20);
    let without = score(&model, &ids, 1).unwrap();
    let breaks = vec![3, 9];
    assert_eq!(
        score(
            &model,
            &Tokens {
                ids,
                breaks,
                rereads: Vec::new(),
            },
            1
        )
        .unwrap(),
        without
    );
}

/// Tokens that a model writes end its segments too, also several of one row in a row: what it says of them is what
/// scoring the whole says.
#[test]
fn generation_has_the_breaks_of_scoring() {
    let mut ended = 0;
    for (seed, after_prompt, suffix) in [
        (1, true, 0),
        (2, false, 0),
        (3, true, 0),
        (4, true, 1),
        (5, true, 6),
    ] {
        let mut config = with_breaks(vec![1, 2, 3, 9], after_prompt);
        config.segment.as_mut().unwrap().prompt_suffix_len = suffix;
        let model = model_on(Cpu, &config, &values(&config, seed));
        let prompts = [tokens(seed, 5), tokens(seed + 1, 19), tokens(seed + 2, 8)];
        let prompts: Vec<Prompt<'_>> = prompts
            .iter()
            .map(|tokens| Prompt {
                before: &[],
                breaks: &[],
                tokens,
                stream: seed,
                rereads: &[],
            })
            .collect();
        let mut session = Session::new(&model, 3, 60, 2).unwrap();
        let settings = GeneratorConfig {
            sampler: SamplerConfig::default(),
            max_new: 30,
            end_tokens: Vec::new(),
        };
        let mut generator = Generator::new(&mut session, &prompts, settings).unwrap();
        let generated = generator.run(|_| ControlFlow::Continue(())).unwrap();
        for (prompt, generated) in prompts.iter().zip(generated) {
            let at = prompt.tokens.len();
            let whole = Tokens {
                ids: [prompt.tokens, &generated.tokens].concat(),
                // The prompt of 5 tokens is shorter than the last suffix.
                breaks: match after_prompt {
                    true => vec![at - suffix.min(at - 1)],
                    false => Vec::new(),
                },
                rereads: Vec::new(),
            };
            let expected = score(&model, &whole, 2).unwrap();
            let got = bits(&generated.log_probabilities);
            assert_eq!(got, bits(&expected[at - 1..]));
            let listed = |t: &&u32| [1, 2, 3, 9].contains(*t);
            ended += generated.tokens.iter().filter(listed).count();
        }
    }
    assert!(ended > 20, "{ended} breaks");
}

fn feed(
    session: &mut Session<'_, Cpu>,
    tokens: &[u32],
    breaks: &[usize],
) -> segattn::device::Result<Vec<Vec<f32>>> {
    let sequence = 0;
    session.feed(&[Feed {
        sequence,
        tokens,
        targets: &[],
        breaks,
        rereads: &[],
    }])
}

/// A break at the end of a feed ends the segment at once: the next token is the first of the next segment, as if the
/// break had been known with it.
#[test]
fn a_break_goes_with_the_token_before_it() {
    let config = with_breaks(Vec::new(), false);
    let model: Decoder<Cpu> = model_on(Cpu, &config, &values(&config, 8));
    let all = tokens(4, 20);
    let logits = |pieces: &[(std::ops::Range<usize>, &[usize])]| {
        let mut session = Session::new(&model, 1, 20, 2).unwrap();
        for (piece, breaks) in pieces {
            feed(&mut session, &all[piece.clone()], breaks).unwrap();
        }
        bits(&session.logits(0).unwrap())
    };
    let expected = logits(&[(0..20, &[5, 6, 12])]);
    assert_eq!(
        logits(&[(0..5, &[5]), (5..6, &[1]), (6..20, &[6])]),
        expected
    );
    assert_eq!(
        logits(&[(0..3, &[]), (3..12, &[2, 3, 9]), (12..20, &[])]),
        expected
    );
    assert!(logits(&[(0..20, &[5, 6])]) != expected);
}

#[test]
fn breaks_that_a_feed_cannot_have_are_refused_and_change_nothing() {
    let config = with_breaks(Vec::new(), false);
    let model: Decoder<Cpu> = model_on(Cpu, &config, &values(&config, 8));
    let mut session = Session::new(&model, 1, 20, 1).unwrap();
    let tokens = tokens(4, 6);
    for breaks in [&[0][..], &[0, 2], &[2, 2], &[3, 1], &[7]] {
        let message = feed(&mut session, &tokens, breaks).unwrap_err().to_string();
        assert!(message.contains("breaks"), "{message}");
        assert_eq!(session.position(0), 0);
    }
    feed(&mut session, &tokens, &[6]).unwrap();
    assert_eq!(session.position(0), 6);
}
