//! Values of a model before training: the same bits for a seed on every machine and with any number of threads.

use rand_chacha::ChaCha12Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use rayon::prelude::*;

use crate::model::config::ModelConfig;
use crate::model::parameters::{Role, TensorSpec, base_specs, index, specs};

/// Standard deviation of matrices.
const STD: f64 = 0.02;
/// Numbers drawn from one random stream.
const PIECE: usize = 1 << 16;

/// The values of an untrained model.
///
/// Matrices are normal with standard deviation 0.02, those that write to the residual stream (attention's
/// output, down) with `0.02 / sqrt(2 * layers)` (Radford et al. 2019, section 2.3); norms and past gates are
/// 1, biases and sink logits 0. Of an adapter `A` is uniform within `1 / sqrt(inner)`, as in PEFT, and `B` is 0: it
/// adds nothing yet.
#[derive(Debug)]
pub struct Initial {
    specs: Vec<TensorSpec>,
    /// Tensors before those of adapters.
    base: usize,
    layers: usize,
    seed: u64,
}

/// The values of an untrained model of this shape.
pub fn initial(config: &ModelConfig, seed: u64) -> Initial {
    Initial {
        specs: specs(config),
        base: base_specs(config).len(),
        layers: config.num_hidden_layers,
        seed,
    }
}

impl Initial {
    /// Values of tensor `i` in the order of [`specs`].
    ///
    /// # Panics
    /// With no such tensor.
    pub fn tensor(&self, i: usize) -> Vec<f32> {
        let mut values = self.random(i);
        // Where heads are kept longer than in files, what is added is 0.
        self.specs[i].for_file(&mut values);
        self.specs[i].keep(&mut values);
        values
    }

    fn random(&self, i: usize) -> Vec<f32> {
        let role = self.specs[i].role;
        match role {
            Role::Matrix { .. } => {}
            Role::Bias { len } | Role::Sink { len } => return vec![0.0; len],
            Role::Norm { len } | Role::Gate { len } => return vec![1.0; len],
        }
        if let Some(at) = i.checked_sub(self.base) {
            let [(_, shape)] = &self.specs[i].parts[..] else {
                unreachable!("a tensor of an adapter is one in files");
            };
            let bound = if at % 2 == 0 {
                1.0 / (shape[1] as f64).sqrt()
            } else {
                0.0
            };
            return self.uniform(i, bound);
        }
        let residual = (0..self.layers).any(|l| i == index::output(l) || i == index::down(l));
        let std = match residual {
            true => STD / (2.0 * self.layers as f64).sqrt(),
            false => STD,
        };
        let mut values = vec![0.0; role.len()];
        let pieces = values.par_chunks_mut(PIECE).enumerate();
        pieces.for_each(|(piece, values)| {
            let mut normal = Normal::new(self.seed, (i as u64) << 40 | piece as u64);
            values.fill_with(|| (std * normal.draw()) as f32);
        });
        values
    }

    fn uniform(&self, i: usize, bound: f64) -> Vec<f32> {
        let mut random = Normal::new(self.seed, (i as u64) << 40);
        let len = self.specs[i].role.len();
        (0..len)
            .map(|_| (bound * random.uniform()) as f32)
            .collect()
    }
}

/// Normal numbers by Marsaglia's polar method, of which only the logarithm is not exact by IEEE 754;
/// so it is computed here, from exact operations.
struct Normal {
    random: ChaCha12Rng,
    spare: Option<f64>,
}

impl Normal {
    fn new(seed: u64, stream: u64) -> Self {
        let mut key = [0; 32];
        key[..8].copy_from_slice(&seed.to_le_bytes());
        let mut random = ChaCha12Rng::from_seed(key);
        random.set_stream(stream);
        Self {
            random,
            spare: None,
        }
    }

    /// Uniform in (-1, 1).
    fn uniform(&mut self) -> f64 {
        let bits = (self.random.next_u64() >> 11) as f64;
        (2.0 * bits + 1.0) / (1u64 << 53) as f64 - 1.0
    }

    fn draw(&mut self) -> f64 {
        if let Some(spare) = self.spare.take() {
            return spare;
        }
        loop {
            let (x, y) = (self.uniform(), self.uniform());
            let square = x * x + y * y;
            if square < 1.0 && square > 0.0 {
                let factor = (-2.0 * logarithm(square) / square).sqrt();
                self.spare = Some(y * factor);
                return x * factor;
            }
        }
    }
}

/// Natural logarithm of a positive normal number, to within 1e-15 relative or absolute: `x = m 2^e` with m in
/// [1/sqrt 2, sqrt 2), and `ln m = 2 artanh z`, `z = (m-1)/(m+1)`, `|z| < 0.172`, by its series.
fn logarithm(x: f64) -> f64 {
    let bits = x.to_bits();
    let mut exponent = (bits >> 52) as i32 - 1023;
    let mut m = f64::from_bits(bits & ((1 << 52) - 1) | 1023 << 52);
    if m >= std::f64::consts::SQRT_2 {
        m *= 0.5;
        exponent += 1;
    }
    let z = (m - 1.0) / (m + 1.0);
    let square = z * z;
    let series = (0..12)
        .rev()
        .fold(0.0, |sum, k| sum * square + 1.0 / f64::from(2 * k + 1));
    2.0 * z * series + f64::from(exponent) * std::f64::consts::LN_2
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_logarithm_agrees_with_the_systems() {
        for i in 1..20_000 {
            for x in [f64::from(i) / 20_000.0, 2f64.powi(-i % 100) * 1.1] {
                let error = (logarithm(x) - x.ln()).abs();
                assert!(
                    error <= 1e-15 * x.ln().abs().max(1.0),
                    "ln {x}: off by {error}"
                );
            }
        }
    }

    #[test]
    fn draws_are_normal() {
        let mut normal = Normal::new(7, 3);
        let count = 200_000;
        let draws: Vec<f64> = (0..count).map(|_| normal.draw()).collect();
        let moment = |p: i32| draws.iter().map(|x| x.powi(p)).sum::<f64>() / f64::from(count);
        // Six standard errors of each moment's mean.
        let bound = |variance: f64| 6.0 * (variance / f64::from(count)).sqrt();
        assert!(moment(1).abs() < bound(1.0));
        assert!((moment(2) - 1.0).abs() < bound(2.0));
        assert!(moment(3).abs() < bound(15.0));
        assert!((moment(4) - 3.0).abs() < bound(96.0));
    }
}
