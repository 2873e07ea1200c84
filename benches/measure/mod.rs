//! What the benches share: functions timed in turns, and the speed at which memory can be read.

use std::hint::black_box;
use std::time::{Duration, Instant};

use rayon::prelude::*;

/// Best time in seconds of each function, taken in turns for about `budget` and at least `rounds` times, so
/// that a neighbour on the machine slows all of them alike.
pub fn best<const N: usize>(
    rounds: usize,
    budget: Duration,
    mut run: [&mut dyn FnMut(); N],
) -> [f64; N] {
    let mut best = [f64::INFINITY; N];
    let start = Instant::now();
    let mut round = 0;
    while round < rounds || start.elapsed() < budget {
        for (f, best) in run.iter_mut().zip(&mut best) {
            let start = Instant::now();
            f();
            *best = best.min(start.elapsed().as_secs_f64());
        }
        round += 1;
    }
    best
}

/// Reads every element on all threads, as a GEMM must, and does as little else as possible.
pub fn read_all(x: &[f32]) {
    let parts = 4 * rayon::current_num_threads();
    let part = x.len().div_ceil(parts).next_multiple_of(128).max(128);
    let xor = |part: &[f32]| {
        let mut lanes = [0u32; 128];
        for chunk in part.chunks_exact(128) {
            for (lane, x) in lanes.iter_mut().zip(chunk) {
                *lane ^= x.to_bits();
            }
        }
        lanes.iter().fold(0, |a, b| a ^ b)
    };
    black_box(x.par_chunks(part).map(xor).reduce(|| 0, |a, b| a ^ b));
}
