//! What training reads: tokens, how much each counts as a target, and where segments end.

use super::policy::Policy;
use crate::device::{DeviceError, Result};
use crate::model::segmentation::{Sequence, Tokens};

/// A sequence to train on.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Example {
    /// Its tokens. All but the first are targets.
    pub tokens: Vec<u32>,
    /// For each token how much it counts as a target: finite and at least 0. The first is not used. `None`: 1 for all.
    pub weights: Option<Vec<f32>>,
    /// Breaks, ascending: a segment ends after so many tokens.
    pub breaks: Vec<usize>,
    /// Rereads, ascending ([`Sequence::rereads`]). The loss of a token is that of its second reading.
    pub rereads: Vec<usize>,
    /// Makes the targets' objective that of a policy gradient; `None`: their log-probability.
    pub policy: Option<Policy>,
}

/// An [`Example`], borrowed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ExampleRef<'a> {
    /// See [`Example::tokens`].
    pub tokens: &'a [u32],
    /// See [`Example::weights`].
    pub weights: Option<&'a [f32]>,
    /// See [`Example::breaks`].
    pub breaks: &'a [usize],
    /// See [`Example::rereads`].
    pub rereads: &'a [usize],
    /// See [`Example::policy`].
    pub policy: Option<&'a Policy>,
}

/// What can be trained on: examples, or lists of tokens whose targets all count 1.
pub trait AsExample: Sync {
    /// The example.
    fn as_example(&self) -> ExampleRef<'_>;
}

impl AsExample for Vec<u32> {
    fn as_example(&self) -> ExampleRef<'_> {
        ExampleRef {
            tokens: self,
            weights: None,
            breaks: &[],
            rereads: &[],
            policy: None,
        }
    }
}

impl AsExample for Tokens {
    fn as_example(&self) -> ExampleRef<'_> {
        ExampleRef {
            tokens: &self.ids,
            weights: None,
            breaks: &self.breaks,
            rereads: &self.rereads,
            policy: None,
        }
    }
}

impl AsExample for Example {
    fn as_example(&self) -> ExampleRef<'_> {
        ExampleRef {
            tokens: &self.tokens,
            weights: self.weights.as_deref(),
            breaks: &self.breaks,
            rereads: &self.rereads,
            policy: self.policy.as_ref(),
        }
    }
}

impl AsExample for ExampleRef<'_> {
    fn as_example(&self) -> ExampleRef<'_> {
        *self
    }
}

impl From<Vec<u32>> for Example {
    fn from(tokens: Vec<u32>) -> Self {
        Self {
            tokens,
            ..Self::default()
        }
    }
}

impl From<Tokens> for Example {
    fn from(tokens: Tokens) -> Self {
        Self {
            tokens: tokens.ids,
            breaks: tokens.breaks,
            rereads: tokens.rereads,
            ..Self::default()
        }
    }
}

impl<'a> ExampleRef<'a> {
    /// Checks what a step takes for granted.
    ///
    /// # Errors
    /// [`DeviceError::Argument`] for fewer than two tokens, another number of weights than of tokens, and breaks or
    /// numbers of a policy gradient that the tokens cannot have.
    pub fn check(&self) -> Result<()> {
        self.sequence().check()?;
        let len = self.tokens.len();
        if len < 2 {
            return Err(DeviceError::argument(
                "sequences",
                "at least two tokens each",
                len,
            ));
        }
        let weights = self.weights.unwrap_or_default();
        if self.weights.is_some() && weights.len() != len {
            let expected = format!("one for each of {len} tokens");
            return Err(DeviceError::argument("weights", expected, weights.len()));
        }
        self.policy.map_or(Ok(()), |policy| policy.check(len))?;
        match weights.iter().find(|w| !w.is_finite() || **w < 0.0) {
            Some(weight) => {
                let expected = "finite numbers of at least 0";
                Err(DeviceError::argument("weights", expected, weight))
            }
            None => Ok(()),
        }
    }

    /// Its tokens with their breaks and rereads.
    pub fn sequence(&self) -> Sequence<'a> {
        Sequence {
            tokens: self.tokens,
            breaks: self.breaks,
            rereads: self.rereads,
        }
    }

    /// How many targets there are.
    pub fn targets(&self) -> usize {
        self.tokens.len().saturating_sub(1)
    }

    /// Weight of the target `i`, which is token `i + 1`.
    pub fn weight(&self, i: usize) -> f64 {
        self.weights
            .map_or(1.0, |weights| f64::from(weights[i + 1]))
    }

    /// Sum of the weights of all targets.
    pub fn total_weight(&self) -> f64 {
        match self.weights {
            // Exact for any number of targets.
            None => self.targets() as f64,
            Some(_) => (0..self.targets()).map(|i| self.weight(i)).sum(),
        }
    }

    /// Weight times objective of each target; 0 for one that weighs nothing, whatever its log-probability is.
    pub fn weighted(self, log_probabilities: &'a [f64]) -> impl Iterator<Item = f64> + 'a {
        let all = log_probabilities.iter().enumerate();
        all.map(move |(i, x)| match (self.weight(i), self.policy) {
            (0.0, _) => 0.0,
            (weight, None) => weight * x,
            (weight, Some(policy)) => weight * policy.objective(i, *x)[0],
        })
    }

    /// Sum of a number of each target times its weight; without those that weigh nothing, whatever their numbers are.
    pub fn weighed(&self, numbers: &[f64]) -> f64 {
        let all = numbers.iter().enumerate();
        let weighed = all.map(|(i, x)| match self.weight(i) {
            0.0 => 0.0,
            weight => weight * x,
        });
        weighed.sum()
    }

    /// Weight of target `i` times the derivative of its objective by its log-probability, which only that of a policy
    /// gradient depends on.
    pub fn slope(&self, i: usize, log_probability: f64) -> f64 {
        match (self.weight(i), self.policy) {
            (0.0, _) => 0.0,
            (weight, None) => weight,
            (weight, Some(policy)) => weight * policy.objective(i, log_probability)[1],
        }
    }
}
