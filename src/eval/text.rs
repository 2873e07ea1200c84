//! Seeded raw material of the tasks: invented words, identifiers and filler text.

use crate::random::Random;
use std::collections::HashSet;

/// Draws until `draw` gives something neither seen before nor part of `avoid` (lower case).
pub(crate) fn distinct(
    seen: &mut HashSet<String>,
    avoid: &str,
    mut draw: impl FnMut() -> String,
) -> String {
    loop {
        let s = draw();
        if !avoid.contains(&s.to_lowercase()) && seen.insert(s.clone()) {
            return s;
        }
    }
}

/// A pronounceable word of three syllables and six letters, one of 343,000. As all have the same
/// length, none is part of another.
pub(crate) fn word(random: &mut Random) -> String {
    const CONSONANTS: &[u8; 14] = b"bdfgklmnprstvz";
    const VOWELS: &[u8; 5] = b"aeiou";
    (0..3)
        .flat_map(|_| {
            let c = CONSONANTS[random.below(14)];
            let v = VOWELS[random.below(5)];
            [char::from(c), char::from(v)]
        })
        .collect()
}

/// Two words with a hyphen: the key of a needle.
pub(crate) fn key(random: &mut Random) -> String {
    format!("{}-{}", word(random), word(random))
}

/// Random letters, `'a'` or `'A'` being the first of their alphabet.
pub(crate) fn letters(random: &mut Random, first: u8, count: usize) -> String {
    (0..count)
        .map(|_| char::from(first + random.below(26) as u8))
        .collect()
}

/// A random (version 4) UUID in lower case.
pub(crate) fn uuid(random: &mut Random) -> String {
    let mut hex: Vec<char> = (0..32)
        .filter_map(|_| char::from_digit(random.below(16) as u32, 16))
        .collect();
    hex[12] = '4';
    hex[16] = ['8', '9', 'a', 'b'][random.below(4)];
    let part = |range: std::ops::Range<usize>| hex[range].iter().collect::<String>();
    [
        part(0..8),
        part(8..12),
        part(12..16),
        part(16..20),
        part(20..32),
    ]
    .join("-")
}

/// The `index`-th sentence of the noise that repeats for ever.
pub(crate) fn noise(index: usize) -> &'static str {
    const SENTENCES: [&str; 5] = [
        "Rain fell on the roof all day.",
        "The kettle stood on the stove.",
        "A cat slept by the door.",
        "Nobody came up the path.",
        "Then it was evening again.",
    ];
    SENTENCES[index % SENTENCES.len()]
}

/// A sentence of calm, meandering prose without digits, hyphens or quotes.
pub(crate) fn prose(random: &mut Random) -> String {
    const WHO: &[&str] = &[
        "a careful builder",
        "the old teacher",
        "my neighbour",
        "every gardener",
        "a young painter",
        "the night watch",
        "a travelling merchant",
        "the village doctor",
        "an honest critic",
        "the ferryman",
        "a patient reader",
        "the mapmaker",
    ];
    const DID: &[&str] = &[
        "learned to distrust",
        "kept returning to",
        "wrote at length about",
        "quietly repaired",
        "could never explain",
        "spoke fondly of",
        "spent years on",
        "gave away",
        "began with",
        "misjudged",
        "wanted to understand",
        "made little of",
    ];
    const WHAT: &[&str] = &[
        "the first draft",
        "small habits",
        "an unfinished bridge",
        "the price of bread",
        "other people's advice",
        "a broken clock",
        "the shape of the coast",
        "long winters",
        "a simple question",
        "the noise of the market",
        "borrowed tools",
        "the weather",
    ];
    const WHEN: &[&str] = &[
        "before the harvest",
        "after a long illness",
        "in the quiet months",
        "on the way home",
        "without much hope",
        "for no clear reason",
        "while the others argued",
        "once the debts were paid",
    ];
    const VIEW: &[&str] = &[
        "That was not a matter of talent",
        "It is easy to call this luck",
        "The reason is plain enough",
        "Most of us would have stopped there",
        "Nothing about it was urgent",
        "The lesson took years to sink in",
    ];
    let (who, did, what) = (random.pick(WHO), random.pick(DID), random.pick(WHAT));
    let sentence = match random.below(6) {
        0 => format!("{who} {did} {what} {}.", random.pick(WHEN)),
        1 => format!("{}, {who} {did} {what}.", random.pick(WHEN)),
        2 => format!("{}, and {who} {did} {what}.", random.pick(VIEW)),
        3 => format!(
            "{who} {did} {what}, but {} {} it.",
            random.pick(WHO),
            random.pick(DID)
        ),
        4 => {
            let name = capital(&word(random));
            format!("in {name}, {who} {did} {what} {}.", random.pick(WHEN))
        }
        _ => format!(
            "what {who} {did} was less {what} than {}.",
            random.pick(WHAT)
        ),
    };
    capital(&sentence)
}

pub(crate) fn capital(s: &str) -> String {
    let mut chars = s.chars();
    let first = chars.next().map(|c| c.to_ascii_uppercase());
    first.into_iter().chain(chars).collect()
}
