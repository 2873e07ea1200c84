//! Rotary position embedding: inverse frequencies and tables of cosines and sines.
//!
//! Pair `i` of a head (elements `i` and `i + head_dim/2`, "rotate half") turns by
//! `position * inv_freq[i]`, with `inv_freq[i] = theta^(-2i/rotary_dim)` (RoFormer, arXiv:2104.09864, section 3.2),
//! changed by [`RopeScaling`]. The pairs behind the first `rotary_dim / 2` do not turn. Some scalings also lengthen the
//! vectors that turn. Everything is computed in f64 and rounded to f32 once.

use std::f64::consts::TAU;
use std::ops::Range;

use super::config::{ModelConfig, RopeScaling};

/// The rotary frequencies of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    inv_freq: Vec<f64>,
    /// Length of the unit vectors of the first pairs, which turn, and their number.
    longer: (f64, usize),
}

/// Cosines and sines of consecutive positions, row-major `[positions, head_dim/2]`.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeTables {
    /// Cosines in f64.
    pub cos: Vec<f64>,
    /// Sines in f64.
    pub sin: Vec<f64>,
    /// The same cosines, rounded to f32.
    pub cos_f32: Vec<f32>,
    /// The same sines, rounded to f32.
    pub sin_f32: Vec<f32>,
    /// Position of the first row.
    pub first_position: i64,
    /// Number of rows.
    pub rows: usize,
    /// Row length: `head_dim / 2`.
    pub half_dim: usize,
}

impl Rope {
    /// The frequencies of a validated configuration.
    pub fn new(config: &ModelConfig) -> Self {
        let dim = config.rotary_dim();
        let theta = base(config);
        let plain = |pair: usize| theta.powf(-2.0 * pair as f64 / dim as f64);
        let scaled = |pair| scaled(plain(pair), pair, config);
        let mut inv_freq: Vec<f64> = (0..dim / 2).map(scaled).collect();
        inv_freq.resize(config.head_dim / 2, 0.0);
        Self {
            inv_freq,
            longer: (config.rope_scaling.attention_factor(), dim / 2),
        }
    }

    /// Frequencies of a layer that does not rotate.
    pub fn still(config: &ModelConfig) -> Self {
        Self {
            inv_freq: vec![0.0; config.head_dim / 2],
            longer: (1.0, 0),
        }
    }

    /// Turn of each pair in one position, in radians, `[head_dim/2]`.
    pub fn inv_freq(&self) -> &[f64] {
        &self.inv_freq
    }

    /// Tables for the given positions; negative positions turn the other way. An empty range gives
    /// empty tables.
    pub fn tables(&self, positions: Range<i64>) -> RopeTables {
        let rows = usize::try_from(positions.end.saturating_sub(positions.start)).unwrap_or(0);
        let half_dim = self.inv_freq.len();
        let mut tables = RopeTables {
            cos: Vec::with_capacity(rows * half_dim),
            sin: Vec::with_capacity(rows * half_dim),
            cos_f32: Vec::new(),
            sin_f32: Vec::new(),
            first_position: positions.start,
            rows,
            half_dim,
        };
        for position in positions {
            for (pair, frequency) in self.inv_freq.iter().enumerate() {
                let (sin, cos) = (position as f64 * frequency).sin_cos();
                let (factor, pairs) = self.longer;
                let length = if pair < pairs { factor } else { 1.0 };
                tables.cos.push(length * cos);
                tables.sin.push(length * sin);
            }
        }
        tables.cos_f32 = tables.cos.iter().map(|&cos| cos as f32).collect();
        tables.sin_f32 = tables.sin.iter().map(|&sin| sin as f32).collect();
        tables
    }
}

impl RopeTables {
    /// Row of a position, where the tables hold it.
    pub fn row_of(&self, position: i64) -> Option<usize> {
        let row = usize::try_from(position.checked_sub(self.first_position)?).ok()?;
        (row < self.rows).then_some(row)
    }
}

/// Base of the frequencies. That of [`RopeScaling::Dynamic`] grows with the length beyond the context:
/// `theta (factor length / context - (factor - 1))^(dim / (dim - 2))`.
fn base(config: &ModelConfig) -> f64 {
    let RopeScaling::Dynamic {
        factor,
        max_position_embeddings: context,
    } = config.rope_scaling
    else {
        return config.rope_theta;
    };
    let longer = config.rope_length().max(context) as f64 / context as f64;
    let dim = config.rotary_dim() as f64;
    config.rope_theta * (factor * longer - (factor - 1.0)).powf(dim / (dim - 2.0))
}

/// The frequency of a pair under a scaling. Llama 3: with t = turns over the original context, divided by
/// `factor` for t < low, kept for t > high, between them a mean of both, linear in t. YaRN: the mean is linear in the
/// pair, between the pairs that turn `beta_fast` and `beta_slow` times.
fn scaled(frequency: f64, pair: usize, config: &ModelConfig) -> f64 {
    let mean = |kept: f64, factor: f64| frequency * (kept + (1.0 - kept) / factor);
    match &config.rope_scaling {
        RopeScaling::Default | RopeScaling::Dynamic { .. } => frequency,
        RopeScaling::Linear { factor } => frequency / factor,
        RopeScaling::Llama3 {
            factor,
            low_freq_factor: low,
            high_freq_factor: high,
            original_max_position_embeddings: original,
        } => {
            let turns = *original as f64 * frequency / TAU;
            mean(((turns - low) / (high - low)).clamp(0.0, 1.0), *factor)
        }
        RopeScaling::Yarn {
            factor,
            original_max_position_embeddings: original,
            beta_fast,
            beta_slow,
            truncate,
            ..
        } => {
            let dim = config.rotary_dim() as f64;
            let pair_of = |turns: f64| {
                dim * (*original as f64 / (turns * TAU)).ln() / (2.0 * config.rope_theta.ln())
            };
            let (mut low, mut high) = (pair_of(*beta_fast), pair_of(*beta_slow));
            if *truncate {
                (low, high) = (low.floor(), high.ceil());
            }
            let (low, mut high) = (low.max(0.0), high.min(dim - 1.0));
            if high == low {
                // As Transformers avoids the division by 0.
                high += 0.001;
            }
            mean(
                1.0 - ((pair as f64 - low) / (high - low)).clamp(0.0, 1.0),
                *factor,
            )
        }
        RopeScaling::LongRope {
            short_factor,
            long_factor,
            original_max_position_embeddings: original,
            ..
        } => {
            let long = config.rope_length() > *original;
            frequency / if long { long_factor } else { short_factor }[pair]
        }
    }
}
