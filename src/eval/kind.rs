//! The synthetic tasks: their names and parameters.

use serde::{Deserialize, Serialize};
use std::fmt;

/// A task. Parameters of RULER's tasks are those of its `synthetic.yaml`.
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
    /// Which of four texts of the same title, by its place in their order (as MRCR).
    #[serde(rename = "ordinal")]
    Ordinal,
    /// Where a thing is that passed from hand to hand: three facts (as bAbI).
    #[serde(rename = "multi_hop")]
    MultiHop,
    /// The letter that stands first, with nothing but filler behind it: for models trained on it.
    #[serde(rename = "relay")]
    Relay,
}

impl TaskKind {
    /// All tasks.
    pub const ALL: [Self; 15] = [
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
        Self::Ordinal,
        Self::MultiHop,
        Self::Relay,
    ];

    /// RULER's tasks.
    pub fn ruler() -> &'static [Self] {
        &Self::ALL[1..12]
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
            Self::Ordinal => "ordinal",
            Self::MultiHop => "multi_hop",
            Self::Relay => "relay",
        }
    }

    /// Most tokens the answer may have: RULER's where it is one of RULER's tasks.
    pub fn max_new(self) -> usize {
        match self {
            Self::Passkey | Self::MultiHop => 16,
            Self::Ordinal => 40,
            // A space and a letter.
            Self::Relay => 2,
            Self::VariableTracking => 30,
            Self::CommonWords => 120,
            Self::FrequentWords => 50,
            _ => 128,
        }
    }

    /// Whether the answer lies at a place that [`TaskOptions::depth`](super::task::TaskOptions::depth) can set.
    pub fn has_depth(self) -> bool {
        !matches!(self, Self::CommonWords | Self::FrequentWords | Self::Relay)
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
