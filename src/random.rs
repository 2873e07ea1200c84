//! Random numbers that stay the same over versions of any dependency: only raw ChaCha output is used.

use rand_chacha::ChaCha12Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// A generator of such numbers.
pub(crate) struct Random(ChaCha12Rng);

impl Random {
    /// The generator that belongs to a key.
    pub(crate) fn from_key(key: [u8; 32]) -> Self {
        Self(ChaCha12Rng::from_seed(key))
    }

    /// Uniform in `0..n`; `n` of 0 counts as 1.
    pub(crate) fn below(&mut self, n: usize) -> usize {
        let n = n.max(1) as u64;
        // Draws from the incomplete last cycle are thrown away, so that none is favoured.
        let limit = u64::MAX - u64::MAX % n;
        loop {
            let x = self.0.next_u64();
            if x < limit {
                return (x % n) as usize;
            }
        }
    }

    /// Uniform in [0, 1).
    pub(crate) fn unit(&mut self) -> f64 {
        (self.0.next_u64() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// One of `list`, which is not empty.
    pub(crate) fn pick<'a, T: ?Sized>(&mut self, list: &[&'a T]) -> &'a T {
        list[self.below(list.len())]
    }

    /// Puts `list` into a random order.
    pub(crate) fn shuffle<T>(&mut self, list: &mut [T]) {
        for i in (1..list.len()).rev() {
            list.swap(i, self.below(i + 1));
        }
    }

    /// A number of exactly `digits` digits.
    pub(crate) fn number(&mut self, digits: u32) -> String {
        let low = 10usize.pow(digits - 1);
        (low + self.below(9 * low)).to_string()
    }
}
