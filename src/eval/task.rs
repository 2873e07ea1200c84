//! The synthetic tasks: their names, parameters, and the making of one sample.

use super::EvalError;
use super::aggregate::{CommonWords, FrequentWords, VariableTracking};
use super::fit::{Draft, fit};
use super::needle::{Filler, Needles, Plan, Value};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// Longest prompt, in tokens, that can be asked for.
pub const MAX_LENGTH: usize = 1 << 26;

/// A task. Parameters are those of RULER's `synthetic.yaml`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum TaskKind {
    /// A five-digit passkey in repeated noise (Mohtashami and Jaggi 2023, arXiv:2305.16300).
    #[serde(rename = "passkey")]
    Passkey,
    /// One number in repeated noise.
    #[serde(rename = "niah_single_1")]
    NiahSingle1,
    /// One number in prose.
    #[serde(rename = "niah_single_2")]
    NiahSingle2,
    /// One UUID in prose.
    #[serde(rename = "niah_single_3")]
    NiahSingle3,
    /// One number asked for, three other keys' numbers beside it, in prose.
    #[serde(rename = "niah_multikey_1")]
    NiahMultikey1,
    /// One number among nothing but other keys' numbers.
    #[serde(rename = "niah_multikey_2")]
    NiahMultikey2,
    /// One UUID, whose key is a UUID, among nothing but others of their kind.
    #[serde(rename = "niah_multikey_3")]
    NiahMultikey3,
    /// Four numbers of one key, in prose.
    #[serde(rename = "niah_multivalue")]
    NiahMultivalue,
    /// The numbers of four keys, in prose.
    #[serde(rename = "niah_multiquery")]
    NiahMultiquery,
    /// Variable tracking: one chain of four hops, in repeated noise.
    #[serde(rename = "vt")]
    VariableTracking,
    /// Common words: ten words that occur 30 times among others that occur 3 times.
    #[serde(rename = "cwe")]
    CommonWords,
    /// Frequent words: the three most frequent of words with zeta-distributed counts, alpha 2.
    #[serde(rename = "fwe")]
    FrequentWords,
}

impl TaskKind {
    /// All tasks.
    pub const ALL: [Self; 12] = [
        Self::Passkey,
        Self::NiahSingle1,
        Self::NiahSingle2,
        Self::NiahSingle3,
        Self::NiahMultikey1,
        Self::NiahMultikey2,
        Self::NiahMultikey3,
        Self::NiahMultivalue,
        Self::NiahMultiquery,
        Self::VariableTracking,
        Self::CommonWords,
        Self::FrequentWords,
    ];

    /// RULER's tasks: all but the passkey.
    pub fn ruler() -> &'static [Self] {
        &Self::ALL[1..]
    }

    /// The needle tasks.
    pub fn niah() -> &'static [Self] {
        &Self::ALL[1..9]
    }

    /// The name, as in RULER.
    pub fn name(self) -> &'static str {
        match self {
            Self::Passkey => "passkey",
            Self::NiahSingle1 => "niah_single_1",
            Self::NiahSingle2 => "niah_single_2",
            Self::NiahSingle3 => "niah_single_3",
            Self::NiahMultikey1 => "niah_multikey_1",
            Self::NiahMultikey2 => "niah_multikey_2",
            Self::NiahMultikey3 => "niah_multikey_3",
            Self::NiahMultivalue => "niah_multivalue",
            Self::NiahMultiquery => "niah_multiquery",
            Self::VariableTracking => "vt",
            Self::CommonWords => "cwe",
            Self::FrequentWords => "fwe",
        }
    }

    /// Most tokens the answer may have: RULER's, and 16 for the passkey.
    pub fn max_new(self) -> usize {
        match self {
            Self::Passkey => 16,
            Self::VariableTracking => 30,
            Self::CommonWords => 120,
            Self::FrequentWords => 50,
            _ => 128,
        }
    }

    /// Whether the answer lies at a place that [`TaskOptions::depth`] can set.
    pub fn has_depth(self) -> bool {
        !matches!(self, Self::CommonWords | Self::FrequentWords)
    }

    /// The task's number in seeds; it must never change.
    pub(crate) fn code(self) -> u8 {
        self as u8
    }
}

impl fmt::Display for TaskKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

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
    /// each for itself, where left out. Of a chain of variables it places the first statement; the
    /// others follow it at random depths.
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
    Ok(Sample {
        task,
        length,
        index,
        prompt: built.prompt,
        question_at: built.question_at,
        tokens,
        references: built.references,
        depths: built.depths,
    })
}

pub(crate) fn check_depth(task: TaskKind, depth: f64) -> Result<(), EvalError> {
    if !task.has_depth() {
        let expected = format!("none for {task}, whose answer is everywhere");
        return Err(EvalError::argument("depth", expected, depth));
    }
    if !(0.0..=1.0).contains(&depth) {
        return Err(EvalError::argument("depth", "a number from 0 to 1", depth));
    }
    Ok(())
}

/// All that a sample's content depends on.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Seeds {
    pub(crate) seed: u64,
    pub(crate) task: TaskKind,
    pub(crate) length: usize,
    pub(crate) index: usize,
}

impl Seeds {
    pub(crate) fn random(&self, purpose: u8) -> super::text::Random {
        super::text::Random::new(
            self.seed,
            self.task.code(),
            self.length,
            self.index,
            purpose,
        )
    }
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
