//! Numbers that look random.

use candle_core::{Device, Result, Tensor};

/// A tensor of f64 on the CPU, between -1 and 1.
pub fn numbers(shape: &[usize], seed: u64) -> Result<Tensor> {
    let mut state = seed;
    let mut number = || {
        state = state
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (state >> 40) as f64 / (1u64 << 23) as f64 - 1.0
    };
    let data: Vec<f64> = (0..shape.iter().product()).map(|_| number()).collect();
    Tensor::from_vec(data, shape, &Device::Cpu)
}
