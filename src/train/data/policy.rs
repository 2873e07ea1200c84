//! Policy gradients with clipped ratios (docs/contract.md, section 3).

use crate::device::{DeviceError, Result};

/// Largest difference of two log-probabilities that counts. So a ratio is a finite number, whatever the model says.
const MOST: f64 = 20.0;

/// What makes an example one for a policy gradient. The first token's numbers are not used.
#[derive(Clone, Debug, PartialEq)]
pub struct Policy {
    /// For each token its log-probability when it was drawn: finite, at most 0.
    pub old: Vec<f32>,
    /// For each token its advantage: finite.
    pub advantages: Vec<f32>,
    /// How far a ratio may fall below 1 and rise above it.
    pub clip: [f64; 2],
}

impl Policy {
    /// Checks it against a sequence of `len` tokens.
    ///
    /// # Errors
    /// [`DeviceError::Argument`].
    pub(super) fn check(&self, len: usize) -> Result<()> {
        for (name, numbers) in [
            ("log-probabilities", &self.old),
            ("advantages", &self.advantages),
        ] {
            if numbers.len() != len {
                let expected = format!("one for each of {len} tokens");
                return Err(DeviceError::argument(name, expected, numbers.len()));
            }
            if let Some(x) = numbers.iter().skip(1).find(|x| !x.is_finite()) {
                return Err(DeviceError::argument(name, "finite numbers", x));
            }
        }
        if let Some(x) = self.old.iter().skip(1).find(|x| **x > 0.0) {
            return Err(DeviceError::argument("log-probabilities", "at most 0", x));
        }
        let [below, above] = self.clip;
        if !((0.0..=1.0).contains(&below) && above.is_finite() && above >= 0.0) {
            let expected =
                "how far a ratio may fall, from 0 to 1, and rise, a finite number of at least 0";
            let got = format!("{:?}", self.clip);
            return Err(DeviceError::argument("clip", expected, got));
        }
        Ok(())
    }

    /// What target `i`, which is token `i + 1`, adds to the objective, and its derivative by the log-probability.
    pub(super) fn objective(&self, i: usize, log_probability: f64) -> [f64; 2] {
        let advantage = f64::from(self.advantages[i + 1]);
        let difference = log_probability - f64::from(self.old[i + 1]);
        let ratio = difference.clamp(-MOST, MOST).exp();
        let [below, above] = self.clip;
        let clipped = ratio.clamp(1.0 - below, 1.0 + above);
        if ratio * advantage > clipped * advantage {
            return [clipped * advantage, 0.0];
        }
        let slope = if difference.abs() <= MOST { ratio } else { 0.0 };
        [ratio * advantage, slope * advantage]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(old: f32, advantage: f32) -> Policy {
        Policy {
            old: vec![0.0, old],
            advantages: vec![0.0, advantage],
            clip: [0.2, 0.3],
        }
    }

    #[test]
    fn equal_log_probabilities_give_the_advantage_exactly() {
        for old in [-1.7f32, -1e-3, -80.0, 0.0] {
            for advantage in [1.5f32, -0.1] {
                let got = policy(old, advantage).objective(0, f64::from(old));
                assert_eq!(got, [f64::from(advantage); 2]);
            }
        }
    }

    #[test]
    fn a_ratio_is_clipped_where_going_on_would_pay() {
        let at = |advantage, ratio: f64| policy(-2.0, advantage).objective(0, -2.0 + ratio.ln());
        let near = |got: [f64; 2], expected: [f64; 2]| {
            let bad = (got[0] - expected[0]).abs() > 1e-12 || (got[1] - expected[1]).abs() > 1e-12;
            assert!(!bad, "{got:?}, {expected:?}");
        };
        near(at(2.0, 1.29), [2.58, 2.58]);
        near(at(2.0, 1.31), [2.6, 0.0]);
        near(at(2.0, 0.1), [0.2, 0.2]);
        near(at(-2.0, 0.81), [-1.62, -1.62]);
        near(at(-2.0, 0.79), [-1.6, 0.0]);
        near(at(-2.0, 3.0), [-6.0, -6.0]);
    }

    #[test]
    fn the_slope_is_the_derivative_of_the_value() {
        for advantage in [1.0f32, -0.7] {
            let policy = policy(-30.0, advantage);
            for step in 0..120 {
                let x = -29.99 + 0.4975 * f64::from(step - 50);
                let value = |x| policy.objective(0, x)[0];
                let [at, slope] = policy.objective(0, x);
                let expected = (value(x + 1e-7) - value(x - 1e-7)) / 2e-7;
                let size = 1.0 + at.abs();
                assert!(
                    (slope - expected).abs() < 1e-5 * size,
                    "{x}: {slope}, {expected}"
                );
            }
        }
    }

    #[test]
    fn what_no_token_can_have_is_refused() {
        let good = policy(-1.0, 1.0);
        assert!(good.check(2).is_ok() && good.check(3).is_err());
        for bad in [
            policy(0.5, 1.0),
            policy(f32::NEG_INFINITY, 1.0),
            policy(-1.0, f32::NAN),
            Policy {
                clip: [1.5, 0.2],
                ..good.clone()
            },
            Policy {
                clip: [0.2, f64::INFINITY],
                ..good
            },
        ] {
            assert!(bad.check(2).is_err(), "{bad:?}");
        }
    }
}
