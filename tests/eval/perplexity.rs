//! Perplexity by windows, and running a checkpoint another way than its configuration says.

use crate::common::{config, model, random, values};
use segattn::device::reference::Reference;
use segattn::eval::execution::apply;
use segattn::eval::perplexity::log_probabilities;
use segattn::eval::{
    Document, EvalError, Execution, PerplexityConfig, SegmentOverrides, perplexity,
};
use segattn::model::config::HeadReads;
use segattn::model::decoder::Decoder;
use segattn::model::segmentation::Sequence;
use segattn::model::session::score;

fn document(seed: u64, len: usize) -> Document {
    let mut next = random(seed);
    let tokens = (0..len).map(|_| ((next() + 0.5) * 11.0) as u32).collect();
    let bytes = Some(3 * len as u64);
    let breaks = Vec::new();
    Document {
        tokens,
        breaks,
        bytes,
        rereads: Vec::new(),
    }
}

fn a_model() -> Decoder<Reference> {
    let config = config(true);
    model(&config, &values(&config, 4))
}

fn mean(values: impl IntoIterator<Item = f32>) -> f64 {
    let values: Vec<f64> = values.into_iter().map(f64::from).collect();
    -values.iter().sum::<f64>() / values.len() as f64
}

#[test]
fn whole_documents_are_scored_as_score_does() {
    let model = a_model();
    let documents = [document(1, 30), document(2, 1), document(3, 9)];
    let report = perplexity(&model, &documents, &PerplexityConfig::default(), |_, _| ()).unwrap();
    let scored = [&documents[0], &documents[2]].map(|d| score(&model, &d.tokens, 1).unwrap());
    let expected = mean(scored.concat());
    assert!((report.loss - expected).abs() < 1e-12);
    assert_eq!(report.perplexity, report.loss.exp());
    assert_eq!(
        (report.documents, report.windows, report.tokens),
        (2, 2, 37)
    );
    let bits = expected * 37.0 / std::f64::consts::LN_2 / (3.0 * 39.0);
    assert!((report.bits_per_byte.unwrap() - bits).abs() < 1e-12);
    let counts: Vec<u64> = report.by_context.iter().map(|r| r.tokens).collect();
    assert_eq!(counts, [2, 4, 8, 9, 14]);
    let first = mean(scored.iter().map(|s| s[0]));
    assert!((report.by_context[0].loss - first).abs() < 1e-12);
    assert_eq!(report.by_context[3].context, 8..16);
}

#[test]
fn every_token_but_the_first_counts_once_with_the_context_of_its_window() {
    let model = a_model();
    let long = document(5, 50);
    for (window, stride) in [
        (20, None),
        (20, Some(7)),
        (20, Some(1)),
        (2, None),
        (64, None),
    ] {
        let config = PerplexityConfig {
            window: Some(window),
            stride,
            ..PerplexityConfig::default()
        };
        let report = perplexity(&model, std::slice::from_ref(&long), &config, |_, _| ()).unwrap();
        let stride = stride.unwrap_or(window - 1);
        let mut expected = Vec::new();
        for token in 1..50 {
            // The first window that reaches the token.
            let start = (0..)
                .map(|w| w * stride)
                .find(|s| s + window > token)
                .unwrap();
            let scored = score(&model, &long.tokens[start..=token], 1).unwrap();
            expected.push(*scored.last().unwrap());
        }
        assert_eq!(report.tokens, 49);
        assert!(
            (report.loss - mean(expected)).abs() < 1e-12,
            "{window} {stride}"
        );
    }
}

#[test]
fn batches_and_segments_side_by_side_change_no_bit() {
    let mut plain = config(true);
    plain.segment = None;
    for config in [config(true), plain] {
        let model = model(&config, &values(&config, 7));
        let documents = [document(1, 30), document(2, 17), document(3, 45)];
        let with = |batch, segments_per_step| {
            let config = PerplexityConfig {
                window: Some(19),
                stride: Some(11),
                batch,
                segments_per_step,
            };
            let (mut last, mut calls) = ((0, 0), 0);
            let report = perplexity(&model, &documents, &config, |done, total| {
                assert!(done > last.0 && done <= total);
                last = (done, total);
                calls += 1;
            });
            assert_eq!(last.0, last.1);
            assert!(calls > 0);
            report.unwrap()
        };
        let expected = with(1, 1);
        assert_eq!(with(3, 2), expected);
        assert_eq!(with(100, usize::MAX), expected);
        let all: Vec<Sequence<'_>> = documents.iter().map(|d| (&d.tokens).into()).collect();
        let scored = log_probabilities(&model, &all, 1, |_| ()).unwrap();
        for (tokens, got) in all.iter().zip(scored) {
            assert_eq!(got, score(&model, *tokens, 1).unwrap());
        }
    }
}

#[test]
fn bad_settings_are_typed_errors() {
    let model = a_model();
    let fails = |documents: &[Document], window, stride| {
        let config = PerplexityConfig {
            window,
            stride,
            ..PerplexityConfig::default()
        };
        match perplexity(&model, documents, &config, |_, _| ()).unwrap_err() {
            EvalError::Argument { name, .. } => name,
            other => panic!("{other}"),
        }
    };
    let good = [document(1, 12)];
    assert_eq!(fails(&good, Some(1), None), "window");
    assert_eq!(fails(&good, Some(4), Some(4)), "stride");
    assert_eq!(fails(&good, Some(4), Some(0)), "stride");
    assert_eq!(fails(&good, None, Some(3)), "stride");
    assert_eq!(fails(&[document(1, 1)], None, None), "documents");
    assert_eq!(fails(&[], None, None), "documents");
    let outside = Document {
        tokens: vec![1, 11],
        breaks: Vec::new(),
        bytes: None,
        rereads: Vec::new(),
    };
    assert_eq!(fails(&[outside], None, None), "tokens");
}

#[test]
fn a_segmented_checkpoint_run_in_full_is_the_plain_model() {
    let mut full = config(true);
    apply(&mut full, Execution::Full, &SegmentOverrides::default()).unwrap();
    let mut plain = config(true);
    plain.segment = None;
    assert_eq!(full, plain);
    let weights = values(&plain, 4);
    let (full, plain) = (model(&full, &weights), model(&plain, &weights));
    let tokens = document(1, 30).tokens;
    assert_eq!(
        score(&full, &tokens, 1).unwrap(),
        score(&plain, &tokens, 1).unwrap()
    );
    // Within the first segment nothing is different; after it, it is.
    let segmented = score(&a_model(), &tokens, 1).unwrap();
    let full = score(&full, &tokens, 1).unwrap();
    for (a, b) in segmented[..8].iter().zip(&full) {
        assert!((a - b).abs() < 1e-6);
    }
    assert!((8..29).any(|i| (segmented[i] - full[i]).abs() > 1e-3));
}

#[test]
fn a_plain_checkpoint_runs_in_segments_given_their_settings() {
    let mut plain = config(true);
    plain.segment = None;
    let overrides = SegmentOverrides {
        segment_len: Some(16),
        prior_len: Some(8),
        past_len: Some(8),
        past_layers: Some(vec![1]),
        past_heads: Some(vec![0, 3]),
    };
    let mut segmented = plain.clone();
    apply(&mut segmented, Execution::Segmented, &overrides).unwrap();
    let segment = segmented.segment.clone().unwrap();
    assert_eq!(
        [segment.segment_len, segment.prior_len, segment.past_len],
        [16, 8, 8]
    );
    let reads = |prior, past| HeadReads { prior, past };
    let (local, none, past) = (reads(true, false), reads(false, false), reads(false, true));
    assert_eq!(
        segment.head_reads,
        [
            vec![none, local, local, none],
            vec![past, local, local, past]
        ]
    );
    let error = apply(
        &mut plain,
        Execution::Segmented,
        &SegmentOverrides::default(),
    );
    assert!(matches!(
        error,
        Err(EvalError::Argument {
            name: "segment_len",
            ..
        })
    ));
    let wrong = SegmentOverrides {
        past_heads: Some(vec![4]),
        ..overrides.clone()
    };
    let error = apply(&mut segmented.clone(), Execution::Segmented, &wrong);
    assert!(matches!(
        error,
        Err(EvalError::Argument {
            name: "past_heads",
            ..
        })
    ));
    let wrong = SegmentOverrides {
        prior_len: Some(32),
        ..overrides.clone()
    };
    let error = apply(&mut segmented.clone(), Execution::Segmented, &wrong);
    assert!(matches!(
        error,
        Err(EvalError::Argument {
            name: "segment",
            ..
        })
    ));
    let error = apply(&mut segmented, Execution::Full, &overrides);
    assert!(matches!(
        error,
        Err(EvalError::Argument {
            name: "execution",
            ..
        })
    ));
}
