//! A shuffled order of any number of things without a table: a keyed bijection on `0..len`.
//!
//! A balanced Feistel network permutes the next power of four; results outside the range are permuted again
//! until they fall inside (cycle walking, Black & Rogaway 2002), fewer than four times on average.

const ROUNDS: u64 = 6;

/// A pseudo-random order of `0..len` for one seed and epoch.
#[derive(Clone, Copy, Debug)]
pub struct Permutation {
    len: u64,
    half_bits: u32,
    key: u64,
}

impl Permutation {
    /// The order of `len` things in `epoch`.
    pub fn new(len: u64, seed: u64, epoch: u64) -> Self {
        let bits = 64 - len.saturating_sub(1).leading_zeros();
        Self {
            len,
            half_bits: bits.div_ceil(2).max(1),
            key: mix(mix(seed) ^ epoch),
        }
    }

    /// What comes at place `i`; `None` beyond the last.
    pub fn at(&self, i: u64) -> Option<u64> {
        // From outside the range a walk may never come into it.
        if i >= self.len {
            return None;
        }
        let mut value = self.shuffle(i);
        while value >= self.len {
            value = self.shuffle(value);
        }
        Some(value)
    }

    fn shuffle(&self, value: u64) -> u64 {
        let mask = (1 << self.half_bits) - 1;
        let (mut left, mut right) = (value >> self.half_bits, value & mask);
        for round in 0..ROUNDS {
            let f = mix(self.key ^ mix(right ^ (round << 56)));
            (left, right) = (right, left ^ (f & mask));
        }
        left << self.half_bits | right
    }
}

/// The finalizer of SplitMix64 (Steele, Lea & Flood 2014).
fn mix(value: u64) -> u64 {
    let z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
