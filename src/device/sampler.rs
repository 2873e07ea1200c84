//! Choice of the next token from its logits, with draws that depend on nothing but
//! (seed, stream, position).
//!
//! Every sequence has its own stream, so neither the size of a batch, nor its neighbours, nor an
//! interruption changes what a sequence draws. Operations, in this order:
//!
//! 1. repetition penalty over the distinct ids of the history (Keskar et al. 2019, "CTRL",
//!    section 4.1, in the usual form: a positive logit is divided by it, others multiplied);
//! 2. temperature: logits divided by it; at 0 the highest logit wins and steps 3 to 5 are skipped;
//! 3. top-k: exactly the k highest stay, ties to the lower id;
//! 4. top-p (Holtzman et al. 2020): of what is left, renormalised, the shortest prefix in descending
//!    order (ties to the lower id) whose mass reaches p, at least one token;
//! 5. min-p: tokens less likely than `min_p` times the likeliest fall out.
//!
//! All arithmetic is f64 and its order is fixed.

use rand_chacha::ChaCha12Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use serde::{Deserialize, Serialize};
use std::cmp::Ordering;

/// What can go wrong in choosing a token.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum SamplerError {
    /// A setting is out of its range.
    #[error("{name}: expected {expected}, got {got}")]
    Setting {
        /// The setting's name.
        name: &'static str,
        /// Its range.
        expected: &'static str,
        /// The value given.
        got: String,
    },
    /// A logit is NaN or +infinity (minus infinity is allowed: a masked token).
    #[error("logits[{id}]: expected a finite number or -inf, got {got}")]
    Logit {
        /// The token's id.
        id: usize,
        /// The logit found.
        got: f32,
    },
    /// No logit is finite, so that there is nothing to choose from.
    #[error("logits: expected at least one finite logit, got none among {len}")]
    NoCandidate {
        /// Number of logits.
        len: usize,
    },
    /// The history holds an id that the logits do not.
    #[error("history[{index}]: expected an id below {vocab}, got {got}")]
    History {
        /// Index in the history.
        index: usize,
        /// Number of logits.
        vocab: usize,
        /// The id found.
        got: u32,
    },
    /// More logits than ids of 32 bits.
    #[error("logits: expected at most 2^32 of them, got {len}")]
    TooManyLogits {
        /// Number of logits.
        len: usize,
    },
}

/// Settings of a [`Sampler`]. The default is plain sampling: temperature 1 and nothing else.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SamplerConfig {
    /// Divides the logits; 0 picks the highest (ties to the lowest id). At least 0, finite.
    pub temperature: f32,
    /// Number of tokens kept; 0 keeps all.
    pub top_k: usize,
    /// Probability mass kept, above 0 and at most 1; 1 keeps all.
    pub top_p: f32,
    /// Least probability kept, as a share of the highest, in 0..=1; 0 keeps all.
    pub min_p: f32,
    /// Penalty on tokens of the history; 1 is none. Above 0, finite.
    pub repetition_penalty: f32,
    /// Seed of all streams.
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
    /// Greedy choice: temperature 0.
    pub fn greedy() -> Self {
        Self {
            temperature: 0.0,
            ..Self::default()
        }
    }

    /// Checks every setting's range.
    ///
    /// # Errors
    /// [`SamplerError::Setting`] names the first setting out of its range.
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

/// The token sampler of one sequence. Serialises to its settings, stream and position; what is
/// read back goes on with the same draws.
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

/// A token still in the running: its id and its logit after penalty and temperature.
#[derive(Debug, Clone, Copy)]
struct Candidate {
    id: u32,
    logit: f64,
}

/// Higher logit first, then lower id.
fn by_rank(a: &Candidate, b: &Candidate) -> Ordering {
    b.logit.total_cmp(&a.logit).then(a.id.cmp(&b.id))
}

impl Sampler {
    /// A sampler at position 0 of stream `stream_id` (one stream per sequence).
    ///
    /// # Errors
    /// [`SamplerError::Setting`] if a setting is out of its range.
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

    /// The stream's number.
    pub fn stream_id(&self) -> u64 {
        self.stream_id
    }

    /// Number of tokens chosen so far; the next draw belongs to this position.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// Goes to another position, so that the next draw is the one that belongs to it.
    pub fn set_position(&mut self, position: u64) {
        self.position = position;
    }

    /// Chooses the next token and moves on by one position (also when greedy).
    ///
    /// - `logits`: `[vocab]`, unnormalised log-probabilities; minus infinity excludes a token.
    /// - `history`: ids the repetition penalty applies to, in any order, repeats count once.
    ///
    /// # Errors
    /// See [`SamplerError`]; after an error the position is unchanged.
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

    /// The tokens that [`Sampler::sample`] chooses among and their probabilities, in order of id.
    /// They are never empty and sum to 1 but for rounding; greedy choice gives one token.
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

    /// Tokens left by all filters with weights relative to the highest (which is 1), by id.
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

    /// The uniform number in [0, 1) that belongs to (seed, stream, position).
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

/// All tokens but the masked ones, by id.
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
            // Adding 0 turns -0 into +0, which rank differently in a total order.
            let logit = f64::from(logit) + 0.0;
            out.push(Candidate {
                id: id as u32,
                logit,
            });
        }
    }
    Ok(out)
}

/// Applies the repetition penalty; `candidates` must be in order of id.
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
    // Back to an order that does not depend on the selection's inner workings.
    candidates.sort_unstable_by_key(|c| c.id);
}

/// Logits are relative to the highest, so that no weight overflows.
fn top_p(candidates: &mut Vec<Candidate>, p: f32) {
    if p >= 1.0 {
        return;
    }
    let goal = f64::from(p) * candidates.iter().map(|c| c.logit.exp()).sum::<f64>();
    // A vocabulary is large and the part that matters small: rank ever longer heads, not all of it.
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

/// The token at which the running sum of the weights passes `u` times their total.
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
    // Only rounding of u * total up to the total leads here.
    last
}
