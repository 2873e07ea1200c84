//! Keys and values: words that no task of `eval` uses (`tests/train/tasks.rs` compares).

use std::collections::HashSet;

use crate::random::Random;

const ADJECTIVES: [&str; 20] = [
    "amber", "brisk", "copper", "dusty", "eager", "frosty", "hollow", "ivory", "jolly", "keen",
    "lunar", "mossy", "nimble", "olive", "rapid", "rusty", "silver", "tidy", "velvet", "woolly",
];
const NOUNS: [&str; 20] = [
    "anchor", "barrel", "candle", "dragon", "engine", "falcon", "hammer", "island", "jacket",
    "ladder", "magnet", "orchard", "pencil", "quarry", "rocket", "saddle", "trumpet", "tunnel",
    "vessel", "zeppelin",
];
const WORDS: [&str; 24] = [
    "apple", "badge", "castle", "desert", "eagle", "forest", "guitar", "harbor", "iceberg",
    "jungle", "kitchen", "lantern", "meadow", "novel", "ocean", "piano", "quilt", "river",
    "statue", "temple", "thunder", "umbrella", "valley", "whistle",
];
/// A part of a made-up key is an onset, a vowel and a coda: no English word, and several tokens.
const ONSETS: [&str; 10] = ["bl", "dv", "fr", "gn", "kr", "pf", "sk", "tv", "vl", "zm"];
const VOWELS: [&str; 5] = ["a", "e", "i", "o", "u"];
const CODAS: [&str; 10] = ["bs", "dz", "fk", "gm", "kt", "lv", "mz", "rb", "vt", "zg"];
/// What stands between two parts of a key.
const JOINTS: [&str; 4] = [" ", "-", "_", "."];
/// Digits of a value that is a number.
const DIGITS: [u32; 2] = [4, 9];
/// Groups of a code, and what stands between them.
const GROUPS: [usize; 2] = [4, 8];
const SEPARATORS: [&str; 3] = [":", ".", " "];

/// How a key is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Style {
    /// `rusty anchor`
    Words,
    /// `rusty_anchor_31`
    Identifier,
}

/// The parts that the keys of a group share, and what joins them.
#[derive(Debug)]
pub(super) struct Parts {
    parts: [String; 4],
    joint: &'static str,
}

impl Parts {
    pub(super) fn new(random: &mut Random) -> Self {
        Self {
            parts: [(); 4].map(|()| part(random)),
            joint: random.pick(&JOINTS),
        }
    }
}

fn part(random: &mut Random) -> String {
    [&ONSETS[..], &VOWELS, &CODAS]
        .map(|list| random.pick(list))
        .concat()
}

/// Keys and values of one sequence. No key and no value is given twice.
#[derive(Debug, Default)]
pub(super) struct Names {
    seen: HashSet<String>,
}

impl Names {
    fn distinct(&mut self, mut draw: impl FnMut() -> String) -> String {
        loop {
            let name = draw();
            if self.seen.insert(name.clone()) {
                return name;
            }
        }
    }

    /// A key.
    pub(super) fn key(&mut self, random: &mut Random, style: Style) -> String {
        let mut round = 0;
        self.distinct(|| {
            let (adjective, noun) = (random.pick(&ADJECTIVES), random.pick(&NOUNS));
            round += 1;
            match style {
                Style::Identifier => format!("{adjective}_{noun}_{}", 10 + random.below(90)),
                // There are 400 pairs: a sequence that has most of them goes on with three words.
                Style::Words if round > 8 => format!("{adjective} {} {noun}", random.pick(&WORDS)),
                Style::Words => format!("{adjective} {noun}"),
            }
        })
    }

    /// A key of two parts. Other keys of the group have the same parts, so only both in their order name it.
    pub(super) fn lookalike(&mut self, random: &mut Random, parts: &Parts) -> String {
        let mut round = 0;
        self.distinct(|| {
            round += 1;
            let mut chosen = [(); 2]
                .map(|()| parts.parts[random.below(4)].clone())
                .to_vec();
            // Keys of other groups may have taken all pairs.
            if round > 8 {
                chosen.push(part(random));
            }
            chosen.join(parts.joint)
        })
    }

    /// The name of a register.
    pub(super) fn register(&mut self, random: &mut Random) -> String {
        self.distinct(|| format!("r{}", random.number(4)))
    }

    /// A number.
    pub(super) fn number(&mut self, random: &mut Random) -> String {
        let [least, most] = DIGITS;
        let choices = (most - least + 1) as usize;
        self.distinct(|| {
            let digits = least + random.below(choices) as u32;
            random.number(digits)
        })
    }

    /// A code: groups of four hexadecimal digits.
    pub(super) fn code(&mut self, random: &mut Random) -> String {
        let [least, most] = GROUPS;
        self.distinct(|| {
            let (count, separator) = (least + random.below(most - least + 1), SEPARATORS);
            let separator = separator[random.below(separator.len())];
            let groups = (0..count).map(|_| format!("{:04x}", random.below(1 << 16)));
            groups.collect::<Vec<_>>().join(separator)
        })
    }

    /// A value: a number, or words in quotation marks. What follows the break is then a space or a quotation mark,
    /// which can be predicted before it.
    pub(super) fn value(&mut self, random: &mut Random) -> String {
        if random.below(10) < 7 {
            return self.number(random);
        }
        self.distinct(|| {
            let words = [0; 3].map(|_| random.pick(&WORDS));
            format!("\"{}\"", words.join(" "))
        })
    }
}
