//! The memory of a gradient and of reading does not grow with the sequence: what does is counted out (results
//! and a pool without a bound), the rest is held against a short sequence.
#![cfg(feature = "cli")]

#[allow(dead_code, reason = "each test uses a part")]
mod common;

#[allow(dead_code, reason = "each test uses a part")]
#[path = "../src/cli/alloc.rs"]
mod alloc;

use common::{config_of, model_on, tokens, values};
use segattn::device::cpu::Cpu;
use segattn::model::decoder::Decoder;
use segattn::model::session::{Feed, Session};
use segattn::train::streams::{Gradients, StreamConfig, accumulate};

fn peak_of<T>(work: impl FnOnce() -> T) -> usize {
    alloc::peak_of(work).1
}

const SEGMENT: usize = 8;

/// Bytes of `run` for so many segments may grow by so many for each token of them, and a little.
fn grows_by_at_most(token: usize, run: impl Fn(usize) -> usize) {
    // A thread of the pool that gets its first work late allocates its scratch then, which is not the run's.
    let least = |segments| (0..3).map(|_| run(segments)).min().unwrap();
    let [short, middle, long] = [4, 64, 256].map(least);
    for (segments, got) in [(64, middle), (256, long)] {
        let more = (segments - 4) * SEGMENT * token;
        assert!(
            got <= short + more + 4096,
            "{short} bytes at 4 segments, {got} at {segments}, may grow by {more}"
        );
    }
}

/// One test, so that nothing else allocates beside it.
#[test]
fn only_results_and_pool_grow_with_the_sequence() {
    let config = config_of(true, 8);
    let model = model_on(Cpu, &config, &values(&config, 1));
    let mut bounded = config.clone();
    bounded.segment.as_mut().unwrap().pool_len = 16;
    bounded.validate().unwrap();
    let bounded = model_on(Cpu, &bounded, &values(&config, 1));
    // Heads that read the past, over both layers; keys and values of 8 numbers of four bytes. A pool
    // that doubles when it is full holds up to twice that, and three times while it moves.
    let pool = 4 * 2 * 8 * 4;
    let gradient_of = |model: &Decoder<Cpu>, segments: usize, recompute: bool| {
        let sequence = [tokens(2, segments * SEGMENT + 1)];
        let streams = StreamConfig {
            tbptt: 1,
            segments_per_step: 1,
            recompute,
        };
        let mut gradients = Gradients::new(model).unwrap();
        peak_of(|| accumulate(model, &sequence, streams, 1.0, &mut gradients).unwrap())
    };
    let gradient = |segments, recompute| gradient_of(&model, segments, recompute);
    let read = |model: &Decoder<Cpu>, segments: usize| {
        let sequence = tokens(2, segments * SEGMENT);
        peak_of(|| {
            let mut session = Session::new(model, 1, sequence.len(), 1).unwrap();
            let feed = Feed {
                sequence: 0,
                tokens: &sequence,
                targets: &[],
                breaks: &[],
                rereads: &[],
            };
            session.feed(&[feed]).unwrap();
        })
    };
    // A log-probability of each token, on the device and twice on the host.
    let scored = 4 + 2 * 8;
    grows_by_at_most(3 * pool + scored, |n| gradient(n, false));
    grows_by_at_most(3 * pool + scored, |n| gradient(n, true));
    grows_by_at_most(3 * pool, |n| read(&model, n));
    // A bounded pool is full after four segments, and does not grow at all: token ids and the list of segments do.
    grows_by_at_most(scored + 16, |n| gradient_of(&bounded, n, true));
    grows_by_at_most(0, |n| read(&bounded, n));
    // The same test would see activations that stay: with every segment side by side they do.
    let sequence = [tokens(2, 256 * SEGMENT + 1)];
    let all = StreamConfig {
        tbptt: 1,
        segments_per_step: usize::MAX,
        recompute: false,
    };
    let mut gradients = Gradients::new(&model).unwrap();
    let side_by_side = peak_of(|| accumulate(&model, &sequence, all, 1.0, &mut gradients).unwrap());
    assert!(side_by_side > 4 * gradient(256, false), "{side_by_side}");
}
