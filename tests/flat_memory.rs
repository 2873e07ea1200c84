//! The memory of a gradient and of reading does not grow with the sequence: what does is counted out (results
//! and pool), the rest is held against a short sequence.

#[allow(dead_code, reason = "each test uses a part")]
mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use common::{config_of, model_on, tokens, values};
use segattn::device::cpu::Cpu;
use segattn::model::session::{Feed, Session};
use segattn::train::streams::{Gradients, StreamConfig, accumulate};

static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

/// The system's allocator with a count of bytes.
struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

// SAFETY: every call goes to the system's allocator with the same arguments.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = NOW.fetch_add(layout.size(), Relaxed) + layout.size();
        PEAK.fetch_max(now, Relaxed);
        // SAFETY: the caller's obligations are those of the system's allocator.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Relaxed);
        // SAFETY: as above.
        unsafe { System.dealloc(place, layout) }
    }
}

fn peak_of<T>(work: impl FnOnce() -> T) -> usize {
    let before = NOW.load(Relaxed);
    PEAK.store(before, Relaxed);
    drop(work());
    PEAK.load(Relaxed) - before
}

const SEGMENT: usize = 8;

/// One test, so that nothing else allocates beside it.
#[test]
fn only_results_and_pool_grow_with_the_sequence() {
    let config = config_of(true, 8);
    let model = model_on(Cpu, &config, &values(&config, 1));
    // Heads that read the past, over both layers; keys and values of 8 numbers of four bytes. A pool
    // that doubles when it is full holds up to twice that, and three times while it moves.
    let pool = 4 * 2 * 8 * 4;
    let gradient = |segments: usize, recompute| {
        let sequence = [tokens(2, segments * SEGMENT + 1)];
        let streams = StreamConfig {
            tbptt: 1,
            segments_per_step: 1,
            recompute,
        };
        let mut gradients = Gradients::new(&model).unwrap();
        peak_of(|| accumulate(&model, &sequence, streams, 1.0, &mut gradients).unwrap())
    };
    let read = |segments: usize| {
        let sequence = tokens(2, segments * SEGMENT);
        peak_of(|| {
            let mut session = Session::new(&model, 1, sequence.len(), 1).unwrap();
            let feed = Feed {
                sequence: 0,
                tokens: &sequence,
                targets: &[],
            };
            session.feed(&[feed]).unwrap();
        })
    };
    let runs: [(&str, &dyn Fn(usize) -> usize, usize); 3] = [
        // A log-probability of each token, on the device and twice on the host.
        ("gradient", &|n| gradient(n, false), 3 * pool + 4 + 3 * 8),
        ("recomputed", &|n| gradient(n, true), 3 * pool + 4 + 3 * 8),
        ("read", &read, 3 * pool),
    ];
    for (name, run, token) in runs {
        run(4);
        let [short, middle, long] = [4, 64, 256].map(run);
        eprintln!("{name}: {short} {middle} {long} bytes");
        for (segments, got) in [(64, middle), (256, long)] {
            let more = (segments - 4) * SEGMENT * token;
            assert!(
                got <= short + more + 4096,
                "{name}: {short} bytes at 4 segments, {got} at {segments}, may grow by {more}"
            );
        }
    }
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
