//! Needles in a haystack: statements with keys and values hidden in filler text.

use super::fit::{Built, Draft};
use super::seeds::Seeds;
use super::text::{distinct, key, noise, prose, uuid};
use crate::random::Random;
use std::collections::HashSet;
use std::ops::Range;

/// What surrounds the needles.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Filler {
    Noise,
    Prose,
    Needles,
}

/// What a needle gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Value {
    Passkey,
    Number,
    Uuid,
}

/// A task's parameters.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Plan {
    pub(crate) filler: Filler,
    pub(crate) uuid_keys: bool,
    pub(crate) value: Value,
    /// Keys in the text (besides filler needles), of which the first `asked` are asked for.
    pub(crate) keys: usize,
    pub(crate) asked: usize,
    /// Values of each key.
    pub(crate) values: usize,
}

/// A hidden statement and the share of the filler before it.
pub(crate) struct Placed {
    pub(crate) depth: f64,
    pub(crate) sentence: String,
}

/// Writes `units` pieces of filler with the statements between them. Returns the text and the bytes of each statement,
/// without the space at its end. Of statements at the same place the earlier in the list comes first.
pub(crate) fn interleave(filler: &[String], placed: &[Placed]) -> (String, Vec<Range<usize>>) {
    let place = |p: &Placed| (p.depth * filler.len() as f64).round() as usize;
    let mut order: Vec<(usize, usize)> = placed.iter().map(place).zip(0..).collect();
    order.sort_by_key(|o| o.0);
    let mut order = order.into_iter().peekable();
    let (mut text, mut statements) = (String::new(), vec![0..0; placed.len()]);
    for at in 0..=filler.len() {
        while let Some((_, i)) = order.next_if(|o| o.0 == at) {
            let start = text.len();
            text.push_str(&placed[i].sentence);
            statements[i] = start..text.trim_end().len();
        }
        text.push_str(filler.get(at).map_or("", String::as_str));
    }
    text.truncate(text.trim_end().len());
    (text, statements)
}

/// Ranges moved by `bytes`.
pub(crate) fn moved(ranges: &[Range<usize>], bytes: usize) -> Vec<Range<usize>> {
    let moved = |r: &Range<usize>| r.start + bytes..r.end + bytes;
    ranges.iter().map(moved).collect()
}

/// Filler that grows as needed and never changes what it has.
pub(crate) struct Haystack {
    filler: Filler,
    random: Random,
    units: Vec<String>,
}

impl Haystack {
    pub(crate) fn new(filler: Filler, random: Random) -> Self {
        Self {
            filler,
            random,
            units: Vec::new(),
        }
    }

    fn take(&mut self, count: usize, names: &mut Names) -> &[String] {
        while self.units.len() < count {
            let unit = match self.filler {
                Filler::Noise => format!("{} ", noise(self.units.len())),
                Filler::Prose => {
                    // A paragraph every six sentences.
                    let end = if self.units.len() % 6 == 5 { '\n' } else { ' ' };
                    format!("{}{end}", prose(&mut self.random))
                }
                Filler::Needles => {
                    let key = names.key(&mut self.random);
                    let value = names.value(&mut self.random);
                    names.sentence(&key, &value)
                }
            };
            self.units.push(unit);
        }
        &self.units[..count]
    }

    /// Filler without needles.
    pub(crate) fn plain(&mut self, count: usize) -> &[String] {
        let mut names = Names::new(Value::Number, false);
        self.take(count, &mut names)
    }
}

/// Keys and values, none given twice.
struct Names {
    value: Value,
    uuid_keys: bool,
    seen: HashSet<String>,
}

impl Names {
    fn new(value: Value, uuid_keys: bool) -> Self {
        Self {
            value,
            uuid_keys,
            seen: HashSet::new(),
        }
    }

    fn key(&mut self, random: &mut Random) -> String {
        let draw = if self.uuid_keys { uuid } else { key };
        distinct(&mut self.seen, "", || draw(random))
    }

    fn value(&mut self, random: &mut Random) -> String {
        let kind = self.value;
        distinct(&mut self.seen, "", || match kind {
            Value::Passkey => random.number(5),
            Value::Number => random.number(7),
            Value::Uuid => uuid(random),
        })
    }

    /// What the values are called, and the plural.
    fn noun(&self) -> (&'static str, &'static str) {
        match self.value {
            Value::Passkey => ("passkey", "passkeys"),
            Value::Number => ("secret number", "secret numbers"),
            Value::Uuid => ("secret code", "secret codes"),
        }
    }

    fn sentence(&self, key: &str, value: &str) -> String {
        match self.value {
            Value::Passkey => {
                format!("The passkey is {value}. Keep it in mind: {value} is the passkey. ")
            }
            _ => format!("The {} of {key} is {value}. ", self.noun().0),
        }
    }
}

/// A sample of a needle task.
pub(crate) struct Needles {
    haystack: Haystack,
    names: Names,
    placed: Vec<Placed>,
    /// How many of `placed`, from the first, the answer needs.
    needed: usize,
    references: Vec<String>,
    intro: String,
    question: String,
}

impl Needles {
    pub(crate) fn new(seeds: Seeds, plan: Plan, depth: Option<f64>) -> Self {
        let mut random = seeds.random(0);
        let mut names = Names::new(plan.value, plan.uuid_keys);
        let mut placed = Vec::new();
        let mut references = Vec::new();
        let mut asked = Vec::new();
        for k in 0..plan.keys {
            let key = names.key(&mut random);
            for _ in 0..plan.values {
                let value = names.value(&mut random);
                let drawn = random.unit();
                let needed = k < plan.asked;
                placed.push(Placed {
                    depth: if needed {
                        depth.unwrap_or(drawn)
                    } else {
                        drawn
                    },
                    sentence: names.sentence(&key, &value),
                });
                if needed {
                    references.push(value);
                }
            }
            if k < plan.asked {
                asked.push(key);
            }
        }
        let (intro, question) = frame(&names, &asked, references.len());
        Self {
            haystack: Haystack::new(plan.filler, seeds.random(1)),
            names,
            needed: references.len(),
            placed,
            references,
            intro,
            question,
        }
    }
}

/// What stands before and after the haystack.
fn frame(names: &Names, asked: &[String], answers: usize) -> (String, String) {
    let (one, many) = names.noun();
    if names.value == Value::Passkey {
        let intro = "A passkey is hidden in the text below. Find it and remember it.\n\n";
        let question =
            "\n\nQuestion: Which passkey does the text above give?\nAnswer: The passkey is";
        return (intro.to_owned(), question.to_owned());
    }
    let intro = format!(
        "The text below hides one or more {many}. Remember them: a question about the {many} follows.\n\n"
    );
    let keys = match asked {
        [first @ .., last] if !first.is_empty() => format!("{} and {last}", first.join(", ")),
        _ => asked.concat(),
    };
    let question = if answers == 1 {
        format!(
            "\n\nQuestion: Which {one} of {keys} does the text above give?\n\
             Answer: According to the text, the {one} of {keys} is"
        )
    } else {
        format!(
            "\n\nQuestion: Which {many} of {keys} does the text above give? Name all of them.\n\
             Answer: According to the text, the {many} of {keys} are"
        )
    };
    (intro, question)
}

impl Draft for Needles {
    fn min_units(&self) -> usize {
        1
    }

    fn build(&mut self, units: usize) -> Built {
        let filler = self.haystack.take(units, &mut self.names);
        let (text, statements) = interleave(filler, &self.placed);
        let question_at = self.intro.len() + text.len();
        let needed = &self.placed[..self.needed];
        Built {
            prompt: [self.intro.as_str(), &text, &self.question].concat(),
            question_at,
            references: self.references.clone(),
            depths: needed.iter().map(|p| p.depth).collect(),
            needles: moved(&statements[..self.needed], self.intro.len()),
        }
    }
}
