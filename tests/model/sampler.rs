//! The sampler's distribution, filters and draws, and stop strings in streams.

use proptest::prelude::*;
use segattn::generate::sampler::{Sampler, SamplerConfig, SamplerError};
use segattn::generate::stop::{StopError, StopMatcher};
use std::collections::BTreeSet;

fn config() -> SamplerConfig {
    SamplerConfig {
        seed: 7,
        ..SamplerConfig::default()
    }
}

fn sampler(config: SamplerConfig) -> Sampler {
    Sampler::new(config, 3).expect("valid settings")
}

/// Kept ids by the definitions, from a full sort and plain probabilities.
fn brute_force(c: &SamplerConfig, logits: &[f32], history: &[u32]) -> BTreeSet<u32> {
    let z: Vec<f64> = logits
        .iter()
        .enumerate()
        .map(|(i, &l)| {
            let l = f64::from(l);
            let r = f64::from(c.repetition_penalty);
            let l = match (history.contains(&(i as u32)), l > 0.0) {
                (false, _) => l,
                (true, true) => l / r,
                (true, false) => l * r,
            };
            l / f64::from(c.temperature)
        })
        .collect();
    let mut ids: Vec<usize> = (0..z.len()).filter(|&i| z[i] > f64::NEG_INFINITY).collect();
    ids.sort_by(|&a, &b| z[b].partial_cmp(&z[a]).expect("no NaN"));
    if c.top_k > 0 {
        ids.truncate(c.top_k);
    }
    let top = z[ids[0]];
    let weight = |i: usize| (z[i] - top).exp();
    let total: f64 = ids.iter().map(|&i| weight(i)).sum();
    if c.top_p < 1.0 {
        let cut = (1..=ids.len())
            .find(|&n| {
                ids[..n].iter().map(|&i| weight(i)).sum::<f64>() / total >= f64::from(c.top_p)
            })
            .unwrap_or(ids.len());
        ids.truncate(cut);
    }
    ids.retain(|&i| weight(i) >= f64::from(c.min_p));
    ids.into_iter().map(|i| i as u32).collect()
}

fn kept(c: SamplerConfig, logits: &[f32], history: &[u32]) -> BTreeSet<u32> {
    let d = sampler(c).distribution(logits, history).expect("samples");
    d.into_iter().map(|(id, _)| id).collect()
}

/// Chi-square statistic of `draws` samples against the softmax of `logits`.
fn chi_square(c: SamplerConfig, logits: &[f32], expected: &[f64], draws: usize) -> f64 {
    let mut s = sampler(c);
    let mut counts = vec![0usize; logits.len()];
    for _ in 0..draws {
        counts[s.sample(logits, &[]).expect("samples") as usize] += 1;
    }
    let term = |(n, p): (&usize, &f64)| {
        let e = p * draws as f64;
        if e == 0.0 {
            assert_eq!(*n, 0, "an excluded token was drawn");
            return 0.0;
        }
        (*n as f64 - e).powi(2) / e
    };
    counts.iter().zip(expected).map(term).sum()
}

fn softmax(logits: &[f64]) -> Vec<f64> {
    let total: f64 = logits.iter().map(|z| z.exp()).sum();
    logits.iter().map(|z| z.exp() / total).collect()
}

#[test]
fn draws_follow_the_softmax() {
    let logits = [0.0f32, 1.0, -1.0, 2.0, 0.5, -2.0];
    let z: Vec<f64> = logits.iter().map(|&l| f64::from(l)).collect();
    // 5 degrees of freedom: the 99.9% quantile is 20.5.
    for seed in 0..5 {
        let x = chi_square(
            SamplerConfig { seed, ..config() },
            &logits,
            &softmax(&z),
            20_000,
        );
        assert!(x < 20.5, "chi-square {x} at seed {seed}");
    }
    // The same draws against another temperature's distribution must fail the test.
    let wrong: Vec<f64> = z.iter().map(|z| z / 1.2).collect();
    assert!(chi_square(config(), &logits, &softmax(&wrong), 20_000) > 20.5);
}

#[test]
fn temperature_flattens_the_distribution() {
    let logits = [0.0f32, 1.0, -1.0, 2.0];
    let z: Vec<f64> = logits.iter().map(|&l| f64::from(l) / 2.0).collect();
    let c = SamplerConfig {
        temperature: 2.0,
        ..config()
    };
    // 3 degrees of freedom: 99.9% quantile 16.3.
    assert!(chi_square(c, &logits, &softmax(&z), 20_000) < 16.3);
}

#[test]
fn filtered_draws_follow_the_renormalised_rest() {
    let logits = [0.0f32, 1.0, -1.0, 2.0, 0.5];
    let c = SamplerConfig {
        top_k: 3,
        ..config()
    };
    let ninf = f64::NEG_INFINITY;
    let expected = softmax(&[ninf, 1.0, ninf, 2.0, 0.5]);
    // 2 degrees of freedom: 99.9% quantile 13.8.
    assert!(chi_square(c, &logits, &expected, 20_000) < 13.8);
}

#[test]
fn streams_are_independent_of_each_other() {
    let logits = [0.0f32; 4];
    let mut pairs = [0usize; 16];
    let mut a = Sampler::new(config(), 0).expect("valid");
    let mut b = Sampler::new(config(), 1).expect("valid");
    for _ in 0..16_000 {
        let x = a.sample(&logits, &[]).expect("samples");
        let y = b.sample(&logits, &[]).expect("samples");
        pairs[(x * 4 + y) as usize] += 1;
    }
    // 15 degrees of freedom: 99.9% quantile 37.7.
    let x: f64 = pairs
        .iter()
        .map(|&n| (n as f64 - 1000.0).powi(2) / 1000.0)
        .sum();
    assert!(x < 37.7, "chi-square {x}");
}

#[test]
fn temperature_zero_takes_the_highest_and_ties_go_to_the_lowest_id() {
    let mut s = sampler(SamplerConfig::greedy());
    assert_eq!(s.sample(&[0.0, 3.0, 3.0, -1.0], &[]), Ok(1));
    assert_eq!(s.sample(&[-0.0, 0.0], &[]), Ok(0));
    assert_eq!(s.sample(&[f32::NEG_INFINITY, -9.0], &[]), Ok(1));
    assert_eq!(s.position(), 3);
}

#[test]
fn each_filter_keeps_exactly_its_set() {
    let logits = [1.0f32, 4.0, 2.0, 4.0, 3.0, 0.0];
    let set = |ids: &[u32]| ids.iter().copied().collect::<BTreeSet<u32>>();
    let with = |f: fn(&mut SamplerConfig)| {
        let mut c = config();
        f(&mut c);
        kept(c, &logits, &[])
    };
    assert_eq!(with(|c| c.top_k = 1), set(&[1]));
    assert_eq!(with(|c| c.top_k = 3), set(&[1, 3, 4]));
    // Weights e^-3, 1, e^-2, 1, e^-1, e^-4: masses .022 .387 .054 .387 .144 .007.
    assert_eq!(with(|c| c.top_p = 0.3), set(&[1]));
    assert_eq!(with(|c| c.top_p = 0.5), set(&[1, 3]));
    assert_eq!(with(|c| c.top_p = 0.9), set(&[1, 3, 4]));
    assert_eq!(with(|c| c.min_p = 0.36), set(&[1, 3, 4]));
    assert_eq!(with(|c| c.min_p = 0.37), set(&[1, 3]));
    assert_eq!(with(|c| c.min_p = 1.0), set(&[1, 3]));
    assert_eq!(with(|_| ()), set(&[0, 1, 2, 3, 4, 5]));
}

#[test]
fn top_p_counts_the_mass_that_top_k_left() {
    // Equal weights: of 8, p = 0.5 keeps 4; of the 4 that top-k leaves it keeps 2.
    let c = SamplerConfig {
        top_k: 4,
        top_p: 0.5,
        ..config()
    };
    assert_eq!(kept(c, &[0.0; 8], &[]), BTreeSet::from([0, 1]));
}

#[test]
fn top_p_over_a_large_flat_vocabulary_ranks_beyond_the_first_head() {
    let c = SamplerConfig {
        top_p: 0.75,
        ..config()
    };
    let expected: BTreeSet<u32> = (0..3072).collect();
    assert_eq!(kept(c, &[0.0; 4096], &[]), expected);
}

#[test]
fn repetition_penalty_lowers_seen_tokens_once_and_on_both_sides_of_zero() {
    let c = SamplerConfig {
        repetition_penalty: 2.0,
        ..config()
    };
    let d = sampler(c)
        .distribution(&[2.0, 2.0, -1.0, -1.0], &[1, 3, 1, 1])
        .expect("samples");
    let expected = softmax(&[2.0, 1.0, -1.0, -2.0]);
    for (got, want) in d.iter().zip(expected) {
        assert!((got.1 - want).abs() < 1e-12, "{got:?} against {want}");
    }
}

#[test]
fn a_draw_depends_only_on_seed_stream_and_position() {
    let logits: Vec<f32> = (0..50).map(|i| (i as f32 * 0.37).sin()).collect();
    let mut s = sampler(config());
    let all: Vec<u32> = (0..40)
        .map(|_| s.sample(&logits, &[]).expect("samples"))
        .collect();
    for from in [0usize, 1, 17, 39] {
        let mut resumed = sampler(config());
        resumed.set_position(from as u64);
        let rest: Vec<u32> = (from..40)
            .map(|_| resumed.sample(&logits, &[]).expect("samples"))
            .collect();
        assert_eq!(rest, all[from..]);
    }
    let mut other = Sampler::new(config(), 4).expect("valid");
    let others: Vec<u32> = (0..40)
        .map(|_| other.sample(&logits, &[]).expect("samples"))
        .collect();
    assert_ne!(others, all);
}

#[test]
fn a_greedy_or_failed_choice_keeps_positions_in_step() {
    let logits = [0.0f32; 64];
    let mut s = sampler(config());
    let all: Vec<u32> = (0..3)
        .map(|_| s.sample(&logits, &[]).expect("samples"))
        .collect();
    let mut t = sampler(config());
    t.sample(&[1.0], &[]).expect("one candidate");
    assert!(t.sample(&[f32::NAN], &[]).is_err());
    assert_eq!(t.sample(&logits, &[]), Ok(all[1]));
}

#[test]
fn a_saved_sampler_goes_on_where_it_was() {
    let logits = [0.0f32; 100];
    let mut s = sampler(config());
    for _ in 0..5 {
        s.sample(&logits, &[]).expect("samples");
    }
    let text = serde_json::to_string(&s).expect("serialises");
    let mut back: Sampler = serde_json::from_str(&text).expect("reads back");
    assert_eq!(back, s);
    assert_eq!(back.sample(&logits, &[]), s.sample(&logits, &[]));
    let broken = text.replace("\"top_p\":1.0", "\"top_p\":7.0");
    assert_ne!(broken, text);
    let error = serde_json::from_str::<Sampler>(&broken).expect_err("bad top_p");
    assert!(error.to_string().contains("top_p"), "{error}");
}

#[test]
fn settings_out_of_range_are_refused_by_name() {
    type Change = fn(&mut SamplerConfig);
    let bad: [(&str, Change); 9] = [
        ("temperature", |c| c.temperature = -0.1),
        ("temperature", |c| c.temperature = f32::NAN),
        ("temperature", |c| c.temperature = f32::INFINITY),
        ("top_p", |c| c.top_p = 0.0),
        ("top_p", |c| c.top_p = 1.01),
        ("min_p", |c| c.min_p = -0.5),
        ("min_p", |c| c.min_p = f32::NAN),
        ("repetition_penalty", |c| c.repetition_penalty = 0.0),
        ("repetition_penalty", |c| {
            c.repetition_penalty = f32::INFINITY
        }),
    ];
    for (expected, change) in bad {
        let mut c = config();
        change(&mut c);
        match Sampler::new(c, 0) {
            Err(SamplerError::Setting { name, .. }) => assert_eq!(name, expected),
            other => panic!("{expected}: {other:?}"),
        }
    }
}

#[test]
fn hostile_logits_and_history_are_typed_errors() {
    let mut s = sampler(config());
    let ninf = f32::NEG_INFINITY;
    assert!(matches!(
        s.sample(&[0.0, f32::NAN], &[]),
        Err(SamplerError::Logit { id: 1, .. })
    ));
    assert_eq!(
        s.sample(&[f32::INFINITY, 0.0], &[]),
        Err(SamplerError::Logit {
            id: 0,
            got: f32::INFINITY
        })
    );
    assert_eq!(
        s.sample(&[], &[]),
        Err(SamplerError::NoCandidate { len: 0 })
    );
    assert_eq!(
        s.sample(&[ninf; 3], &[]),
        Err(SamplerError::NoCandidate { len: 3 })
    );
    assert_eq!(
        s.sample(&[0.0; 3], &[0, 3]),
        Err(SamplerError::History {
            index: 1,
            vocab: 3,
            got: 3
        })
    );
}

fn any_logit() -> impl Strategy<Value = f32> {
    prop_oneof![
        6 => -20.0f32..20.0,
        1 => Just(f32::NEG_INFINITY),
        1 => Just(f32::MAX),
        1 => Just(f32::MIN),
        1 => Just(0.0f32),
        1 => Just(-0.0f32),
        1 => Just(f32::from_bits(1)),
    ]
}

fn any_config() -> impl Strategy<Value = SamplerConfig> {
    (
        prop_oneof![
            Just(0.0f32),
            Just(f32::from_bits(1)),
            0.1f32..4.0,
            Just(f32::MAX)
        ],
        0usize..12,
        prop_oneof![Just(1.0f32), Just(f32::from_bits(1)), 0.01f32..1.0],
        prop_oneof![Just(0.0f32), Just(1.0f32), 0.0f32..1.0],
        prop_oneof![
            Just(1.0f32),
            Just(f32::from_bits(1)),
            0.5f32..2.0,
            Just(f32::MAX)
        ],
        any::<u64>(),
    )
        .prop_map(
            |(temperature, top_k, top_p, min_p, repetition_penalty, seed)| SamplerConfig {
                temperature,
                top_k,
                top_p,
                min_p,
                repetition_penalty,
                seed,
            },
        )
}

proptest! {
    #[test]
    fn any_logits_give_an_unmasked_token_or_an_error(
        c in any_config(),
        logits in prop::collection::vec(any_logit(), 0..40),
        history in prop::collection::vec(0u32..45, 0..6),
    ) {
        let mut s = Sampler::new(c, 0).expect("valid settings");
        match s.sample(&logits, &history) {
            Ok(id) => prop_assert!(logits[id as usize] > f32::NEG_INFINITY),
            Err(SamplerError::NoCandidate { .. }) =>
                prop_assert!(logits.iter().all(|l| *l == f32::NEG_INFINITY)),
            Err(SamplerError::History { .. }) =>
                prop_assert!(history.iter().any(|h| *h as usize >= logits.len())),
            Err(other) => prop_assert!(false, "{other}"),
        }
    }

    #[test]
    fn the_kept_set_is_that_of_the_definitions(
        temperature in 0.2f32..3.0,
        top_k in 0usize..10,
        top_p in prop_oneof![Just(1.0f32), 0.05f32..1.0],
        min_p in prop_oneof![Just(0.0f32), 0.001f32..0.9],
        repetition_penalty in 0.6f32..1.8,
        logits in prop::collection::vec(prop_oneof![-6.0f32..6.0, Just(1.0f32)], 1..12),
        history in prop::collection::vec(0u32..1, 0..3),
    ) {
        let c = SamplerConfig { temperature, top_k, top_p, min_p, repetition_penalty, seed: 0 };
        prop_assert_eq!(kept(c, &logits, &history), brute_force(&c, &logits, &history));
    }

    #[test]
    fn released_text_does_not_depend_on_how_the_stream_is_cut(
        text in "[abcé漢]{0,24}",
        stops in prop::collection::vec("[abé漢]{1,4}", 0..4),
        cuts in prop::collection::vec(1usize..5, 0..40),
    ) {
        let whole = stream(&stops, &[text.as_bytes()]);
        let mut pieces = Vec::new();
        let mut rest = text.as_bytes();
        for cut in cuts {
            let (piece, after) = rest.split_at(cut.min(rest.len()));
            pieces.push(piece);
            rest = after;
        }
        pieces.push(rest);
        prop_assert_eq!(&stream(&stops, &pieces), &whole);
        // By the definition: the earliest end of any stop string, its longest one.
        let ends = (1..=text.len()).find_map(|end| {
            let longest = stops.iter().filter(|s| text.as_bytes()[..end].ends_with(s.as_bytes()));
            longest.map(|s| s.len()).max().map(|n| end - n)
        });
        prop_assert_eq!(&whole.0, &text[..ends.unwrap_or(text.len())]);
        prop_assert_eq!(whole.1.is_some(), ends.is_some());
    }

    #[test]
    fn bytes_that_are_not_text_never_panic(
        pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..8), 0..8),
    ) {
        let refs: Vec<&[u8]> = pieces.iter().map(Vec::as_slice).collect();
        let whole = pieces.concat();
        prop_assert_eq!(stream(&[], &refs).0, String::from_utf8_lossy(&whole).into_owned());
    }
}

/// All text released by a stream of pieces, saved and read back between them.
fn stream(stops: &[String], pieces: &[&[u8]]) -> (String, Option<usize>) {
    let mut matcher = StopMatcher::new(stops.to_vec()).expect("no empty stop");
    let mut text = String::new();
    for piece in pieces {
        text += &matcher.push(piece).text;
        let saved = serde_json::to_string(&matcher).expect("serialises");
        matcher = serde_json::from_str(&saved).expect("reads back");
    }
    text += &matcher.finish();
    (text, matcher.stopped())
}

fn stops(list: &[&str]) -> Vec<String> {
    list.iter().map(|s| (*s).to_owned()).collect()
}

#[test]
fn only_text_that_may_begin_a_stop_string_is_held_back() {
    let mut m = StopMatcher::new(stops(&["END", "\n\n"])).expect("valid");
    assert_eq!(m.push(b"The E").text, "The ");
    assert_eq!(m.push(b"N").text, "");
    assert_eq!(m.push(b"ERGY\n").text, "ENERGY");
    assert_eq!(m.push(b"x EN").text, "\nx ");
    let out = m.push(b"D tail");
    assert_eq!((out.text.as_str(), out.stopped), ("", Some(0)));
    assert_eq!(m.push(b"more").text, "");
    assert_eq!(m.finish(), "");
}

#[test]
fn a_stop_string_is_found_across_the_bytes_of_a_character() {
    let mut m = StopMatcher::new(stops(&["漢字"])).expect("valid");
    let bytes = "a漢字b".as_bytes();
    let outs: Vec<String> = bytes.iter().map(|b| m.push(&[*b]).text).collect();
    assert_eq!(outs.concat(), "a");
    assert_eq!(m.stopped(), Some(0));
}

#[test]
fn an_unfinished_character_at_the_end_is_shown_as_a_replacement() {
    let mut m = StopMatcher::new(Vec::new()).expect("valid");
    assert_eq!(m.push(&[b'a', 0xE6, 0xBC]).text, "a");
    assert_eq!(m.finish(), "\u{FFFD}");
}

#[test]
fn an_empty_stop_string_and_a_forged_state_are_refused() {
    assert_eq!(
        StopMatcher::new(stops(&["a", ""])),
        Err(StopError::Empty { index: 1 })
    );
    let forged = r#"{"stops":["ab"],"held":"aaaa","partial":[],"stopped":null}"#;
    let error = serde_json::from_str::<StopMatcher>(forged).expect_err("too much held");
    assert!(error.to_string().contains("held"), "{error}");
}
