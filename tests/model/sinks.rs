//! Sinks in the model (docs/contract.md, section 2), in f64.

use crate::common::{config, model, random, values};
use segattn::model::config::ModelConfig;
use segattn::model::session::score;

fn scores(config: &ModelConfig, values: &[Vec<f64>], tokens: &[u32]) -> Vec<f32> {
    score(&model(config, values), tokens, 1).unwrap()
}

/// Sinks, tail and segment are the whole sequence at its true distances, for every role; nothing is left to select.
#[test]
fn two_segments_with_sinks_of_a_whole_segment_are_full_attention() {
    let mut sinks = config(false);
    let values = values(&sinks, 4);
    let segment = sinks.segment.as_mut().unwrap();
    segment.sink_len = segment.segment_len;
    let mut full = sinks.clone();
    full.segment = None;
    let mut none = sinks.clone();
    none.segment.as_mut().unwrap().sink_len = 0;
    let mut next = random(6);
    let tokens: Vec<u32> = (0..16).map(|_| ((next() + 0.5) * 11.0) as u32).collect();
    let [sinks, full, none] = [&sinks, &full, &none].map(|config| scores(config, &values, &tokens));
    for (i, (a, b)) in sinks.iter().zip(&full).enumerate() {
        assert!((a - b).abs() < 1e-5, "token {i}: {a}, full attention {b}");
    }
    assert!(none.iter().zip(&full).any(|(a, b)| (a - b).abs() > 1e-3));
}
