//! Scalings of the rotary frequencies, and their bounds.

use super::rope_keys::ORIGINAL;
use super::{MAX_POSITIONS, invalid};
use crate::model::error::ConfigError;

/// Change of the rotary frequencies for longer contexts.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// None.
    Default,
    /// Every frequency divided by `factor`.
    Linear {
        /// At least 1.
        factor: f64,
    },
    /// Llama 3.1: low frequencies divided by `factor`, high ones kept, a ramp between.
    Llama3 {
        /// At least 1.
        factor: f64,
        /// Turns over the original context below which a frequency is divided.
        low_freq_factor: f64,
        /// Turns above which it is kept; more than `low_freq_factor`.
        high_freq_factor: f64,
        /// The original context in tokens.
        original_max_position_embeddings: usize,
    },
    /// YaRN (arXiv:2309.00071): as Llama 3.1, with a ramp that is linear in the pair, and longer vectors.
    Yarn {
        /// At least 1.
        factor: f64,
        /// The original context in tokens.
        original_max_position_embeddings: usize,
        /// Factor on rotated queries and keys.
        attention_factor: f64,
        /// Turns over the original context above which a frequency is kept.
        beta_fast: f64,
        /// Turns below which it is divided.
        beta_slow: f64,
        /// The ends of the ramp are rounded outwards to whole pairs.
        truncate: bool,
    },
    /// A base that grows with the length of the text beyond the context.
    Dynamic {
        /// At least 1.
        factor: f64,
        /// The context in tokens.
        max_position_embeddings: usize,
    },
    /// LongRoPE (arXiv:2402.13753): a divisor for each pair, one list for texts up to the original context and one
    /// for longer ones.
    LongRope {
        /// Divisors within the original context, one a rotated pair.
        short_factor: Vec<f64>,
        /// Divisors beyond it.
        long_factor: Vec<f64>,
        /// The original context in tokens.
        original_max_position_embeddings: usize,
        /// Factor on rotated queries and keys.
        attention_factor: f64,
    },
}

impl RopeScaling {
    /// Factor on rotated queries and keys.
    pub fn attention_factor(&self) -> f64 {
        match self {
            Self::Yarn {
                attention_factor, ..
            }
            | Self::LongRope {
                attention_factor, ..
            } => *attention_factor,
            _ => 1.0,
        }
    }
}

/// Checks the bounds of a scaling with this base, of heads in which so many elements rotate.
pub(super) fn validate(
    theta: f64,
    scaling: &RopeScaling,
    rotary_dim: usize,
) -> Result<(), ConfigError> {
    if !(theta.is_finite() && theta >= 1.0) {
        return invalid("rope_theta", "a finite number, at least 1", theta);
    }
    let bounded = |key: &str, number: f64, least: f64| match number.is_finite() && number >= least {
        true => Ok(()),
        false => {
            let key = format!("rope_scaling.{key}");
            invalid(&key, format!("a finite number, at least {least}"), number)
        }
    };
    let positive = |key: &str, number: f64| match number.is_finite() && number > 0.0 {
        true => Ok(()),
        false => invalid(
            &format!("rope_scaling.{key}"),
            "a finite number above 0",
            number,
        ),
    };
    let above =
        |key: &str, number: f64, least: (&str, f64)| match number.is_finite() && number > least.1 {
            true => Ok(()),
            false => {
                let expected = format!("a finite number above {} = {}", least.0, least.1);
                invalid(&format!("rope_scaling.{key}"), expected, number)
            }
        };
    let context = |original: usize| match (1..=MAX_POSITIONS).contains(&original) {
        true => Ok(()),
        false => {
            let expected = format!("an integer from 1 to {MAX_POSITIONS}");
            invalid(&format!("rope_scaling.{ORIGINAL}"), expected, original)
        }
    };
    match scaling {
        RopeScaling::Default => Ok(()),
        RopeScaling::Linear { factor } => bounded("factor", *factor, 1.0),
        RopeScaling::Llama3 {
            factor,
            low_freq_factor: low,
            high_freq_factor: high,
            original_max_position_embeddings: original,
        } => {
            bounded("factor", *factor, 1.0)?;
            positive("low_freq_factor", *low)?;
            above("high_freq_factor", *high, ("low_freq_factor", *low))?;
            context(*original)
        }
        RopeScaling::Yarn {
            factor,
            original_max_position_embeddings: original,
            attention_factor,
            beta_fast,
            beta_slow,
            ..
        } => {
            bounded("factor", *factor, 1.0)?;
            positive("attention_factor", *attention_factor)?;
            positive("beta_slow", *beta_slow)?;
            above("beta_fast", *beta_fast, ("beta_slow", *beta_slow))?;
            if theta <= 1.0 {
                return invalid("rope_theta", "a number above 1 where YaRN scales it", theta);
            }
            context(*original)
        }
        RopeScaling::Dynamic {
            factor,
            max_position_embeddings,
        } => {
            bounded("factor", *factor, 1.0)?;
            if rotary_dim <= 2 {
                let expected = "more than 2 elements of a head that rotate, where the base grows";
                return invalid("head_dim", expected, rotary_dim);
            }
            context(*max_position_embeddings)
        }
        RopeScaling::LongRope {
            short_factor,
            long_factor,
            original_max_position_embeddings: original,
            attention_factor,
        } => {
            for (key, list) in [("short_factor", short_factor), ("long_factor", long_factor)] {
                if list.len() != rotary_dim / 2 {
                    let expected = format!("{} numbers, one a rotated pair", rotary_dim / 2);
                    return invalid(&format!("rope_scaling.{key}"), expected, list.len());
                }
            }
            positive("attention_factor", *attention_factor)?;
            context(*original)
        }
    }
}
