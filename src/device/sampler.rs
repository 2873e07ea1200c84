//! Samples the next token from its logits. A random draw depends only on (seed, stream, position).
//!
//! Every sequence has its own stream. So what it draws does not depend on the size of the batch, on the other
//! sequences or on interruptions. The steps, in this order:
//!
//! 1. Repetition penalty over the distinct ids of the history (Keskar et al. 2019, "CTRL", section 4.1, in the usual
//!    form): a positive logit is divided by it, any other is multiplied by it.
//! 2. Temperature: logits are divided by it. At 0 the highest logit is chosen, and steps 3 to 5 are skipped.
//! 3. Top-k: exactly the k highest logits are kept. On a tie the lower id is kept.
//! 4. Top-p (Holtzman et al. 2020): the kept tokens are renormalised and sorted by descending probability, ties by
//!    ascending id. The shortest prefix whose sum reaches p is kept, at least one token.
//! 5. Min-p: tokens less likely than `min_p` times the likeliest are dropped.
//!
//! All arithmetic is f64 in a fixed order.

use rand_chacha::ChaCha12Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use serde::{Deserialize, Serialize};
use std::cmp::Ordering;

/// Why no token could be sampled.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum SamplerError {
    /// A setting is outside its range.
    #[error("{name}: expected {expected}, got {got}")]
    Setting {
        /// The setting's name.
        name: &'static str,
        /// Its range.
        expected: &'static str,
        /// The value found.
        got: String,
    },
    /// A logit is NaN or +infinity. Minus infinity is allowed and masks the token.
    #[error("logits[{id}]: expected a finite number or -inf, got {got}")]
    Logit {
        /// The token's id.
        id: usize,
        /// The value found.
        got: f32,
    },
    /// All logits are minus infinity, so no token can be chosen.
    #[error("logits: expected at least one finite logit, got none among {len}")]
    NoCandidate {
        /// Number of logits.
        len: usize,
    },
    /// The history has an id that is not below the number of logits.
    #[error("history[{index}]: expected an id below {vocab}, got {got}")]
    History {
        /// Its index in the history.
        index: usize,
        /// Number of logits.
        vocab: usize,
        /// The id found.
        got: u32,
    },
    /// There are more logits than 32-bit ids.
    #[error("logits: expected at most 2^32 of them, got {len}")]
    TooManyLogits {
        /// Number of logits.
        len: usize,
    },
}

/// Settings of a [`Sampler`]. The default is temperature 1 without any filter or penalty.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SamplerConfig {
    /// The logits are divided by it. 0 chooses the highest logit, ties by the lowest id. At least 0, finite.
    pub temperature: f32,
    /// Number of tokens to keep; 0 keeps all.
    pub top_k: usize,
    /// Probability mass to keep, above 0 and at most 1; 1 keeps all.
    pub top_p: f32,
    /// Least probability to keep, as a fraction of the highest, from 0 to 1; 0 keeps all.
    pub min_p: f32,
    /// Penalty on tokens of the history; 1 means no penalty. Above 0, finite.
    pub repetition_penalty: f32,
    /// Seed of all random streams.
    pub seed: u64,
}

impl Default for SamplerConfig {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            seed: 0,
        }
    }
}

impl SamplerConfig {
    /// Settings for greedy decoding: temperature 0.
    pub fn greedy() -> Self {
        Self {
            temperature: 0.0,
            ..Self::default()
        }
    }

    /// Checks the range of every setting.
    ///
    /// # Errors
    /// [`SamplerError::Setting`] names the first setting outside its range.
    pub fn validate(&self) -> Result<(), SamplerError> {
        let check = |name, expected, value: f32, good: bool| {
            if good {
                return Ok(());
            }
            Err(SamplerError::Setting {
                name,
                expected,
                got: value.to_string(),
            })
        };
        let t = self.temperature;
        check(
            "temperature",
            "a finite number of at least 0",
            t,
            t.is_finite() && t >= 0.0,
        )?;
        let p = self.top_p;
        check(
            "top_p",
            "a number above 0 and at most 1",
            p,
            p > 0.0 && p <= 1.0,
        )?;
        let m = self.min_p;
        check("min_p", "a number from 0 to 1", m, (0.0..=1.0).contains(&m))?;
        let r = self.repetition_penalty;
        check(
            "repetition_penalty",
            "a finite number above 0",
            r,
            r.is_finite() && r > 0.0,
        )
    }
}

/// The token sampler of one sequence. It serialises to its settings, stream and position. A deserialised sampler
/// continues with the same draws.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "SamplerState")]
pub struct Sampler {
    config: SamplerConfig,
    stream_id: u64,
    position: u64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SamplerState {
    config: SamplerConfig,
    stream_id: u64,
    position: u64,
}

impl TryFrom<SamplerState> for Sampler {
    type Error = SamplerError;

    fn try_from(state: SamplerState) -> Result<Self, SamplerError> {
        let mut sampler = Self::new(state.config, state.stream_id)?;
        sampler.position = state.position;
        Ok(sampler)
    }
}

/// A token that can still be chosen: its id, and its logit after penalty and temperature.
#[derive(Debug, Clone, Copy)]
struct Candidate {
    id: u32,
    logit: f64,
}

/// Orders by descending logit, then by ascending id.
fn by_rank(a: &Candidate, b: &Candidate) -> Ordering {
    b.logit.total_cmp(&a.logit).then(a.id.cmp(&b.id))
}

impl Sampler {
    /// A sampler at position 0 of stream `stream_id`. Each sequence needs its own stream.
    ///
    /// # Errors
    /// [`SamplerError::Setting`] if a setting is outside its range.
    pub fn new(config: SamplerConfig, stream_id: u64) -> Result<Self, SamplerError> {
        config.validate()?;
        Ok(Self {
            config,
            stream_id,
            position: 0,
        })
    }

    /// The settings.
    pub fn config(&self) -> &SamplerConfig {
        &self.config
    }

    /// The number of its random stream.
    pub fn stream_id(&self) -> u64 {
        self.stream_id
    }

    /// Number of tokens chosen so far. The next draw is the one of this position.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// Sets the position, and with it the next draw.
    pub fn set_position(&mut self, position: u64) {
        self.position = position;
    }

    /// Chooses the next token and advances the position by one, also in greedy decoding.
    ///
    /// - `logits`: `[vocab]`, unnormalised log-probabilities. Minus infinity excludes a token.
    /// - `history`: ids to which the repetition penalty applies, in any order. Repeated ids count once.
    ///
    /// # Errors
    /// See [`SamplerError`]. After an error the position is unchanged.
    pub fn sample(&mut self, logits: &[f32], history: &[u32]) -> Result<u32, SamplerError> {
        let kept = self.kept(logits, history)?;
        let id = if let [only] = kept.as_slice() {
            only.0
        } else {
            pick(&kept, self.draw())
        };
        self.position = self.position.wrapping_add(1);
        Ok(id)
    }

    /// The tokens that [`Sampler::sample`] chooses from, with their probabilities, by ascending id. There is at least
    /// one; greedy decoding has exactly one. The probabilities sum to 1 up to rounding.
    ///
    /// # Errors
    /// See [`SamplerError`].
    pub fn distribution(
        &self,
        logits: &[f32],
        history: &[u32],
    ) -> Result<Vec<(u32, f64)>, SamplerError> {
        let mut kept = self.kept(logits, history)?;
        let total: f64 = kept.iter().map(|k| k.1).sum();
        kept.iter_mut().for_each(|k| k.1 /= total);
        Ok(kept)
    }

    /// The tokens that all filters keep, by ascending id. Weights are relative to the highest, which is 1.
    fn kept(&self, logits: &[f32], history: &[u32]) -> Result<Vec<(u32, f64)>, SamplerError> {
        let mut candidates = candidates(logits)?;
        penalise(
            &mut candidates,
            logits.len(),
            history,
            self.config.repetition_penalty,
        )?;
        let best = candidates.iter().copied().min_by(by_rank);
        let Some(best) = best else {
            return Err(SamplerError::NoCandidate { len: logits.len() });
        };
        if self.config.temperature == 0.0 {
            return Ok(vec![(best.id, 1.0)]);
        }
        let temperature = f64::from(self.config.temperature);
        candidates
            .iter_mut()
            .for_each(|c| c.logit = (c.logit - best.logit) / temperature);
        top_k(&mut candidates, self.config.top_k);
        top_p(&mut candidates, self.config.top_p);
        let min_p = f64::from(self.config.min_p);
        candidates.retain(|c| c.logit.exp() >= min_p);
        candidates.sort_unstable_by_key(|c| c.id);
        Ok(candidates.iter().map(|c| (c.id, c.logit.exp())).collect())
    }

    /// The uniform random number in [0, 1) of (seed, stream, position).
    fn draw(&self) -> f64 {
        let mut key = [0u8; 32];
        key[..8].copy_from_slice(&self.config.seed.to_le_bytes());
        key[8..16].copy_from_slice(&self.stream_id.to_le_bytes());
        key[16..].copy_from_slice(b"segattn sampling");
        let mut rng = ChaCha12Rng::from_seed(key);
        rng.set_word_pos(2 * u128::from(self.position));
        (rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// All tokens that are not masked, by ascending id.
fn candidates(logits: &[f32]) -> Result<Vec<Candidate>, SamplerError> {
    if u32::try_from(logits.len().saturating_sub(1)).is_err() {
        return Err(SamplerError::TooManyLogits { len: logits.len() });
    }
    let mut out = Vec::with_capacity(logits.len());
    for (id, &logit) in logits.iter().enumerate() {
        if logit.is_nan() || logit == f32::INFINITY {
            return Err(SamplerError::Logit { id, got: logit });
        }
        if logit.is_finite() {
            // Adding 0 turns -0 into +0; `total_cmp` would order them differently.
            let logit = f64::from(logit) + 0.0;
            out.push(Candidate {
                id: id as u32,
                logit,
            });
        }
    }
    Ok(out)
}

/// Applies the repetition penalty.
fn penalise(
    candidates: &mut [Candidate],
    vocab: usize,
    history: &[u32],
    penalty: f32,
) -> Result<(), SamplerError> {
    if let Some((index, &got)) = history
        .iter()
        .enumerate()
        .find(|(_, id)| **id as usize >= vocab)
    {
        return Err(SamplerError::History { index, vocab, got });
    }
    if penalty == 1.0 || history.is_empty() {
        return Ok(());
    }
    let mut seen = vec![false; vocab];
    history.iter().for_each(|id| seen[*id as usize] = true);
    let penalty = f64::from(penalty);
    for c in candidates.iter_mut().filter(|c| seen[c.id as usize]) {
        c.logit = if c.logit > 0.0 {
            c.logit / penalty
        } else {
            c.logit * penalty
        };
    }
    Ok(())
}

fn top_k(candidates: &mut Vec<Candidate>, k: usize) {
    if k == 0 || k >= candidates.len() {
        return;
    }
    candidates.select_nth_unstable_by(k - 1, by_rank);
    candidates.truncate(k);
    // `select_nth_unstable_by` leaves an unspecified order; sums over the candidates need a fixed one.
    candidates.sort_unstable_by_key(|c| c.id);
}

/// Expects logits relative to the highest, so that no `exp` overflows.
fn top_p(candidates: &mut Vec<Candidate>, p: f32) {
    if p >= 1.0 {
        return;
    }
    let goal = f64::from(p) * candidates.iter().map(|c| c.logit.exp()).sum::<f64>();
    // Usually a small part of the vocabulary has the mass. So sort a growing prefix instead of all candidates.
    let mut head = 256;
    loop {
        let ranked = head.min(candidates.len());
        if ranked < candidates.len() {
            candidates.select_nth_unstable_by(ranked, by_rank);
        }
        candidates[..ranked].sort_unstable_by(by_rank);
        let mut mass = 0.0;
        let reached = candidates[..ranked].iter().position(|c| {
            mass += c.logit.exp();
            mass >= goal
        });
        if let Some(last) = reached {
            return candidates.truncate(last + 1);
        }
        if ranked == candidates.len() {
            return;
        }
        head *= 8;
    }
}

/// The first token at which the running sum of the weights exceeds `u` times their total.
fn pick(kept: &[(u32, f64)], u: f64) -> u32 {
    let goal = u * kept.iter().map(|k| k.1).sum::<f64>();
    let mut mass = 0.0;
    let mut last = kept[0].0;
    for &(id, weight) in kept {
        mass += weight;
        if weight > 0.0 {
            last = id;
        }
        if mass > goal {
            return id;
        }
    }
    // Reached only where u * total rounds up to the total.
    last
}
