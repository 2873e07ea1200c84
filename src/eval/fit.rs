//! Fills a prompt with as many units of filler as its length in tokens allows.

use super::error::EvalError;
use super::kind::TaskKind;
use std::ops::Range;

/// A prompt under construction.
#[derive(Debug, Clone)]
pub(crate) struct Built {
    pub(crate) prompt: String,
    /// Byte at which the question, after all filler, begins.
    pub(crate) question_at: usize,
    pub(crate) references: Vec<String>,
    /// Share of the filler before each statement that the answer needs, where it has a place.
    pub(crate) depths: Vec<f64>,
    /// Bytes of each of these statements in the prompt.
    pub(crate) needles: Vec<Range<usize>>,
}

/// Builds prompts of one sample with any number of units of filler.
pub(crate) trait Draft {
    /// Fewest units that make a well-posed prompt.
    fn min_units(&self) -> usize;
    /// Most units there can be.
    fn max_units(&self) -> usize {
        usize::MAX
    }
    /// The prompt with `units` of filler; the same for the same `units`.
    fn build(&mut self, units: usize) -> Built;
}

/// The prompt with `n` units such that `n` fit in `length` tokens and `n + 1` do not (or cannot be
/// had), and its tokens. `n` is guessed from the tokens per unit and bracketed, because encoding is what costs.
pub(crate) fn fit(
    task: TaskKind,
    draft: &mut dyn Draft,
    length: usize,
    encode: &dyn Fn(&str) -> Result<Vec<u32>, EvalError>,
) -> Result<(Built, Vec<u32>), EvalError> {
    let first = draft.min_units();
    let built = draft.build(first);
    let tokens = encode(&built.prompt)?;
    if tokens.len() > length {
        return Err(EvalError::TooShort {
            task,
            expected: tokens.len(),
            got: length,
        });
    }
    let base = tokens.len();
    let mut best = (first, built, tokens);
    let most = draft.max_units();
    let mut over: Option<usize> = None;
    let mut rate = 16.0f64;
    let mut round = 0u32;
    while best.0 < most && over.is_none_or(|n| n - best.0 > 1) {
        let room = (length - best.2.len()) as f64;
        let step = ((room / rate) as usize).max(1 << round.min(20));
        let next = match over {
            None => (best.0 + step).min(most),
            // Halving every other time bounds the rounds when the guess is poor.
            Some(n) if round.is_multiple_of(2) => best.0 + (n - best.0) / 2,
            Some(n) => (best.0 + ((room / rate) as usize).max(1)).min(n - 1),
        };
        round += 1;
        if next - first > 2 * length + 64 {
            return Err(EvalError::Tokenizer {
                tokens: best.2.len(),
                units: best.0,
            });
        }
        let built = draft.build(next);
        let tokens = encode(&built.prompt)?;
        rate = (tokens.len().saturating_sub(base) as f64 / (next - first) as f64).max(0.5);
        if tokens.len() <= length {
            best = (next, built, tokens);
        } else {
            over = Some(next);
        }
    }
    Ok((best.1, best.2))
}
