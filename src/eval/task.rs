//! The making of one sample of a synthetic task.

use super::aggregate::{CommonWords, FrequentWords, VariableTracking};
use super::error::EvalError;
use super::fit::{Draft, fit};
use super::kind::TaskKind;
use super::needle::{Filler, Needles, Plan, Value};
use super::relay::Relay;
use super::seeds::Seeds;
use super::stories::{MultiHop, Ordinal};
use serde::{Deserialize, Serialize};
use std::ops::Range;
use std::str::FromStr;

/// Longest prompt, in tokens, that can be asked for.
pub const MAX_LENGTH: usize = 1 << 26;

impl FromStr for TaskKind {
    type Err = EvalError;

    fn from_str(s: &str) -> Result<Self, EvalError> {
        let names = Self::ALL.map(Self::name).join(", ");
        Self::ALL
            .into_iter()
            .find(|t| t.name() == s)
            .ok_or_else(|| EvalError::argument("task", format!("one of {names}"), s))
    }
}

/// Options of [`generate`].
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TaskOptions {
    /// Share of the filler, 0 to 1, before the statements that the answer needs; drawn at random,
    /// each for itself, where left out. Of a chain (of variables, or of hands) it places the first
    /// statement; the others follow it at random depths.
    pub depth: Option<f64>,
    /// Takes [`TaskKind::max_new`] off the prompt's length, as RULER does, so that prompt and
    /// answer together fit in it.
    pub reserve_answer: bool,
}

/// One prompt with its answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Sample {
    /// The task.
    pub task: TaskKind,
    /// The length asked for, in tokens.
    pub length: usize,
    /// The sample's number.
    pub index: usize,
    /// The prompt; it ends with the beginning of the answer, for models without instruction tuning.
    pub prompt: String,
    /// Byte of the prompt at which the question begins.
    pub question_at: usize,
    /// The prompt's tokens, at most `length`.
    pub tokens: Vec<u32>,
    /// What the answer must contain.
    pub references: Vec<String>,
    /// Share of the filler before each statement that the answer needs; empty for words to count.
    pub depths: Vec<f64>,
    /// Tokens of each of these statements.
    pub needles: Vec<Range<usize>>,
}

/// Makes sample number `index` of a task: the same for the same arguments and tokenizer. The prompt
/// holds as much filler as fits in `length` tokens: one unit of filler (a sentence, a needle, a
/// word with its repetitions) more would not.
///
/// # Errors
/// [`EvalError::Argument`] for a length above [`MAX_LENGTH`], a depth outside 0 to 1 or for a task
/// without places, [`EvalError::TooShort`] if the smallest prompt is longer than `length`, and
/// what `encode` returns.
pub fn generate(
    task: TaskKind,
    length: usize,
    index: usize,
    seed: u64,
    options: TaskOptions,
    encode: &dyn Fn(&str) -> Result<Vec<u32>, EvalError>,
) -> Result<Sample, EvalError> {
    if length > MAX_LENGTH {
        let expected = format!("at most {MAX_LENGTH}");
        return Err(EvalError::argument("length", expected, length));
    }
    if let Some(depth) = options.depth {
        check_depth(task, depth)?;
    }
    let reserved = if options.reserve_answer {
        task.max_new()
    } else {
        0
    };
    let room = length.saturating_sub(reserved);
    let seeds = Seeds {
        seed,
        task,
        length,
        index,
    };
    let (built, tokens) = fit(task, &mut *draft(seeds, options.depth), room, encode)?;
    let needles = built.needles.iter();
    let needles = needles.map(|bytes| token_range(&built.prompt, bytes.clone(), &tokens, encode));
    Ok(Sample {
        task,
        length,
        index,
        needles: needles.collect::<Result<_, _>>()?,
        prompt: built.prompt,
        question_at: built.question_at,
        tokens,
        references: built.references,
        depths: built.depths,
    })
}

/// The tokens of a text that cover a range of its bytes. A prefix of a text begins with the text's tokens up to where
/// it is cut, so the common tokens of prefix and text are those that lie before the cut.
fn token_range(
    text: &str,
    bytes: Range<usize>,
    tokens: &[u32],
    encode: &dyn Fn(&str) -> Result<Vec<u32>, EvalError>,
) -> Result<Range<usize>, EvalError> {
    let before = |at: usize| -> Result<usize, EvalError> {
        let prefix = encode(&text[..at])?;
        Ok(prefix
            .iter()
            .zip(tokens)
            .take_while(|(a, b)| a == b)
            .count())
    };
    let (start, end) = (before(bytes.start)?, before(bytes.end)?);
    // A token over the end of the range belongs to it.
    let whole = encode(&text[..bytes.end])?.len() == end;
    Ok(start..(end + usize::from(!whole)).min(tokens.len()))
}

pub(crate) fn check_depth(task: TaskKind, depth: f64) -> Result<(), EvalError> {
    if !task.has_depth() {
        let expected = format!("none for {task}, whose answer has its own place");
        return Err(EvalError::argument("depth", expected, depth));
    }
    if !(0.0..=1.0).contains(&depth) {
        return Err(EvalError::argument("depth", "a number from 0 to 1", depth));
    }
    Ok(())
}

fn draft(seeds: Seeds, depth: Option<f64>) -> Box<dyn Draft> {
    let prose = Plan {
        filler: Filler::Prose,
        uuid_keys: false,
        value: Value::Number,
        keys: 1,
        asked: 1,
        values: 1,
    };
    let plan = match seeds.task {
        TaskKind::VariableTracking => return Box::new(VariableTracking::new(seeds, depth)),
        TaskKind::CommonWords => return Box::new(CommonWords::new(seeds)),
        TaskKind::FrequentWords => return Box::new(FrequentWords::new(seeds)),
        TaskKind::Ordinal => return Box::new(Ordinal::new(seeds, depth)),
        TaskKind::MultiHop => return Box::new(MultiHop::new(seeds, depth)),
        TaskKind::Relay => return Box::new(Relay::new(seeds)),
        TaskKind::Passkey => Plan {
            filler: Filler::Noise,
            value: Value::Passkey,
            ..prose
        },
        TaskKind::NiahSingle1 => Plan {
            filler: Filler::Noise,
            ..prose
        },
        TaskKind::NiahSingle2 => prose,
        TaskKind::NiahSingle3 => Plan {
            value: Value::Uuid,
            ..prose
        },
        TaskKind::NiahMultikey1 => Plan { keys: 4, ..prose },
        TaskKind::NiahMultikey2 => Plan {
            filler: Filler::Needles,
            ..prose
        },
        TaskKind::NiahMultikey3 => Plan {
            filler: Filler::Needles,
            uuid_keys: true,
            value: Value::Uuid,
            ..prose
        },
        TaskKind::NiahMultivalue => Plan { values: 4, ..prose },
        TaskKind::NiahMultiquery => Plan {
            keys: 4,
            asked: 4,
            ..prose
        },
    };
    Box::new(Needles::new(seeds, plan, depth))
}
