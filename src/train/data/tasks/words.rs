//! Keys and values: words that no task of `eval` uses (`tests/train_tasks.rs` compares).

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
