//! Tasks that need more than one place of the text, or one among several that look alike: the n-th of equal requests,
//! as in MRCR (Vodrahalli et al. 2024, arXiv:2409.12640), and a thing that passes from hand to hand, as in bAbI (Weston
//! et al. 2015, arXiv:1502.05698). Wording and words are this crate's own.

use super::fit::{Built, Draft};
use super::needle::{Placed, interleave, moved};
use super::seeds::Seeds;
use super::text::{capital, distinct, word};
use crate::random::Random;
use std::collections::HashSet;

/// Units of filler that grow as needed and never change.
struct Filler {
    random: Random,
    units: Vec<String>,
}

impl Filler {
    fn take(&mut self, count: usize, unit: impl Fn(&mut Random) -> String) -> &[String] {
        while self.units.len() < count {
            self.units.push(unit(&mut self.random));
        }
        &self.units[..count]
    }
}

/// Verses with a number in the order in which they stand: four of one kind and topic, of which one is asked for.
pub(crate) struct Ordinal {
    filler: Filler,
    placed: Vec<Placed>,
    /// Which of the placed is asked for.
    asked: usize,
    /// Kind and topic.
    title: [&'static str; 2],
    /// Words of the placed verses.
    taken: HashSet<String>,
    references: Vec<String>,
}

const EQUAL: usize = 4;
const ORDINALS: [&str; EQUAL] = ["first", "second", "third", "fourth"];
const VERSE_WORDS: usize = 4;
const KINDS: &[&str] = &["verse", "riddle", "toast", "charm", "rhyme", "motto"];
const TOPICS: &[&str] = &[
    "lamps", "rivers", "bees", "bells", "ropes", "salt", "moths", "ladders",
];
const VERSES: &str =
    "Below are short texts of invented words. Several have the same title; number those.\n\n";

impl Ordinal {
    pub(crate) fn new(seeds: Seeds, depth: Option<f64>) -> Self {
        let mut random = seeds.random(0);
        let title = [random.pick(KINDS), random.pick(TOPICS)];
        let asked = random.below(EQUAL);
        let mut taken = HashSet::new();
        let verses: Vec<Vec<String>> = (0..EQUAL)
            .map(|_| {
                let one = |_| distinct(&mut taken, "", || word(&mut random));
                (0..VERSE_WORDS).map(one).collect()
            })
            .collect();
        let mut depths: Vec<f64> = (0..EQUAL).map(|_| random.unit()).collect();
        depths.sort_by(f64::total_cmp);
        if let Some(depth) = depth {
            // Those before it lie before it, those behind it behind.
            for (i, d) in depths.iter_mut().enumerate() {
                *d = match i.cmp(&asked) {
                    std::cmp::Ordering::Less => *d * depth,
                    std::cmp::Ordering::Equal => depth,
                    std::cmp::Ordering::Greater => depth + *d * (1.0 - depth),
                };
            }
        }
        let placed = verses.iter().zip(depths);
        let placed = placed.map(|(words, depth)| Placed {
            depth,
            sentence: verse(title, words),
        });
        Self {
            placed: placed.collect(),
            references: verses[asked].clone(),
            asked,
            title,
            taken,
            filler: Filler {
                random: seeds.random(1),
                units: Vec::new(),
            },
        }
    }
}

fn verse([kind, topic]: [&str; 2], words: &[String]) -> String {
    format!("The {kind} about {topic} goes: {}. ", words.join(" "))
}

impl Draft for Ordinal {
    fn min_units(&self) -> usize {
        1
    }

    fn build(&mut self, units: usize) -> Built {
        let (title, taken) = (self.title, &self.taken);
        let other = |random: &mut Random| {
            let title = loop {
                let drawn = [random.pick(KINDS), random.pick(TOPICS)];
                if drawn != title {
                    break drawn;
                }
            };
            let free = |random: &mut Random| loop {
                let word = word(random);
                if !taken.contains(&word) {
                    break word;
                }
            };
            let words: Vec<String> = (0..VERSE_WORDS).map(|_| free(random)).collect();
            verse(title, &words)
        };
        let (text, statements) = interleave(self.filler.take(units, other), &self.placed);
        let [kind, topic] = title;
        let which = ORDINALS[self.asked];
        let question = format!(
            "\n\nQuestion: How does the {which} {kind} about {topic} go?\n\
             Answer: The {which} {kind} about {topic} goes:"
        );
        Built {
            question_at: VERSES.len() + text.len(),
            prompt: [VERSES, &text, &question].concat(),
            references: self.references.clone(),
            depths: vec![self.placed[self.asked].depth],
            needles: moved(&statements[self.asked..=self.asked], VERSES.len()),
        }
    }
}

/// A thing that passes from one person to another, who goes somewhere: three facts give its place. Both also go where
/// the thing is not.
pub(crate) struct MultiHop {
    filler: Filler,
    placed: Vec<Placed>,
    /// Names of the people and things of the answer.
    taken: HashSet<String>,
    thing: String,
    place: String,
}

/// Which of the placed statements give the answer.
const FACTS: [usize; 3] = [1, 2, 4];
const STORY: &str = "Read the story below and keep track of who is where and has what.\n\n";

impl MultiHop {
    pub(crate) fn new(seeds: Seeds, depth: Option<f64>) -> Self {
        let mut random = seeds.random(0);
        let mut taken = HashSet::new();
        let mut name = || distinct(&mut taken, "", || word(&mut random));
        let (giver, taker) = (capital(&name()), capital(&name()));
        let (thing, place) = (name(), capital(&name()));
        let [before, elsewhere] = [capital(&name()), capital(&name())];
        let statements = [
            format!("{taker} went to {before}. "),
            format!("{giver} picked up the {thing}. "),
            format!("{giver} gave the {thing} to {taker}. "),
            format!("{giver} went to {elsewhere}. "),
            format!("{taker} went to {place}. "),
        ];
        let mut depths = statements.each_ref().map(|_| random.unit());
        depths.sort_by(f64::total_cmp);
        if let Some(first) = depth {
            // The first fact lies there, what comes later behind it.
            for (i, d) in depths.iter_mut().enumerate() {
                *d = match i.cmp(&FACTS[0]) {
                    std::cmp::Ordering::Less => *d * first,
                    std::cmp::Ordering::Equal => first,
                    std::cmp::Ordering::Greater => first + *d * (1.0 - first),
                };
            }
        }
        let placed = statements.into_iter().zip(depths);
        let placed = placed.map(|(sentence, depth)| Placed { depth, sentence });
        Self {
            placed: placed.collect(),
            filler: Filler {
                random: seeds.random(1),
                units: Vec::new(),
            },
            taken,
            thing,
            place,
        }
    }
}

impl Draft for MultiHop {
    fn min_units(&self) -> usize {
        1
    }

    fn build(&mut self, units: usize) -> Built {
        let taken = &self.taken;
        let other = |random: &mut Random| {
            let mut name = || loop {
                let word = word(random);
                if !taken.contains(&word) {
                    break word;
                }
            };
            let (who, what) = (capital(&name()), name());
            let whom = capital(&name());
            match random.below(3) {
                0 => format!("{who} picked up the {what}. "),
                1 => format!("{who} gave the {what} to {whom}. "),
                _ => format!("{who} went to {whom}. "),
            }
        };
        let (text, statements) = interleave(self.filler.take(units, other), &self.placed);
        let thing = &self.thing;
        let question =
            format!("\n\nQuestion: Where is the {thing} at the end?\nAnswer: The {thing} is in");
        let facts = FACTS.map(|i| statements[i].clone());
        Built {
            question_at: STORY.len() + text.len(),
            prompt: [STORY, &text, &question].concat(),
            references: vec![self.place.clone()],
            depths: FACTS.map(|i| self.placed[i].depth).to_vec(),
            needles: moved(&facts, STORY.len()),
        }
    }
}
