//! Reproducible random numbers, shared by tests. Equal seeds give equal numbers.

// Every test program uses a part of this.
#![allow(dead_code)]

/// 64 random bits for each call (xorshift).
pub fn random_bits(seed: u64) -> impl FnMut() -> u64 {
    let mut s = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    move || {
        s ^= s << 13;
        s ^= s >> 7;
        s ^= s << 17;
        s
    }
}

/// Numbers in [-0.5, 0.5) that f32 represents exactly.
pub fn random(seed: u64) -> impl FnMut() -> f32 {
    let mut bits = random_bits(seed);
    move || (bits() >> 40) as f32 / (1u64 << 24) as f32 - 0.5
}

/// Numbers in [-0.5, 0.5) with 53 random bits.
pub fn random_f64(seed: u64) -> impl FnMut() -> f64 {
    let mut bits = random_bits(seed);
    move || (bits() >> 11) as f64 / (1u64 << 53) as f64 - 0.5
}
