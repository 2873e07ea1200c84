//! Tasks whose answer is spread over the text: variable tracking, common words, frequent words.

use super::fit::{Built, Draft};
use super::needle::{Filler, Haystack, Placed, interleave, moved};
use super::seeds::Seeds;
use super::text::{distinct, letters, word};
use crate::random::Random;
use std::collections::HashSet;

/// Joins the parts of a prompt and notes where the question begins.
fn assemble(head: &str, text: &str, question: &str) -> (String, usize) {
    ([head, text, question].concat(), head.len() + text.len())
}

/// Variable tracking: a chain of assignments, `HOPS` of them copying from the one before.
pub(crate) struct VariableTracking {
    haystack: Haystack,
    placed: Vec<Placed>,
    names: Vec<String>,
    head: String,
    question: String,
}

const HOPS: usize = 4;

impl VariableTracking {
    pub(crate) fn new(seeds: Seeds, depth: Option<f64>) -> Self {
        let mut random = seeds.random(0);
        let mut seen = HashSet::new();
        let shown = Chain::new(&mut random, &mut seen);
        let asked = Chain::new(&mut random, &mut seen);
        let mut depths: Vec<f64> = (0..=HOPS).map(|_| random.unit()).collect();
        if let Some(first) = depth {
            depths
                .iter_mut()
                .for_each(|d| *d = first + *d * (1.0 - first));
            depths[0] = first;
        }
        depths.sort_by(f64::total_cmp);
        let place = |(sentence, depth)| Placed { depth, sentence };
        let mut example = Haystack::new(Filler::Noise, seeds.random(2));
        let spread: Vec<Placed> = shown
            .statements
            .iter()
            .enumerate()
            .map(|(i, s)| place((s.clone(), i as f64 / HOPS as f64)))
            .collect();
        let head = format!(
            "{INTRO}{}{}{}\n\n{INTRO}",
            interleave(example.plain(10), &spread).0,
            shown.question(),
            shown.names.join(" "),
        );
        Self {
            haystack: Haystack::new(Filler::Noise, seeds.random(1)),
            question: asked.question(),
            placed: asked
                .statements
                .into_iter()
                .zip(depths)
                .map(place)
                .collect(),
            names: asked.names,
            head,
        }
    }
}

const INTRO: &str = "Follow the variable assignments that are hidden in the text below.\n\n";

struct Chain {
    names: Vec<String>,
    value: String,
    statements: Vec<String>,
}

impl Chain {
    fn new(random: &mut Random, seen: &mut HashSet<String>) -> Self {
        let value = distinct(seen, "", || random.number(5));
        let words = question("");
        let avoid = format!("{INTRO}{words}").to_lowercase();
        let names: Vec<String> = (0..=HOPS)
            .map(|_| distinct(seen, &avoid, || letters(random, b'A', 5)))
            .collect();
        let first = format!("VAR {} = {value}. ", names[0]);
        let copies = names
            .windows(2)
            .map(|w| format!("VAR {} = VAR {}. ", w[1], w[0]));
        Self {
            statements: std::iter::once(first).chain(copies).collect(),
            names,
            value,
        }
    }

    fn question(&self) -> String {
        question(&self.value)
    }
}

fn question(value: &str) -> String {
    format!(
        "\n\nQuestion: Which variables have the value {value}, directly or through others?\n\
         Answer: Following the assignments in the text, {} variables have the value {value}: ",
        HOPS + 1
    )
}

impl Draft for VariableTracking {
    fn min_units(&self) -> usize {
        1
    }

    fn build(&mut self, units: usize) -> Built {
        let (text, statements) = interleave(self.haystack.plain(units), &self.placed);
        let (prompt, question_at) =
            assemble(&self.head, &text, self.question.trim_end_matches(' '));
        Built {
            prompt,
            question_at,
            references: self.names.clone(),
            depths: self.placed.iter().map(|p| p.depth).collect(),
            needles: moved(&statements, self.head.len()),
        }
    }
}

/// Common words: ten words 30 times each among others 3 times each, in a numbered list. A worked
/// example with other words goes before, as in RULER.
pub(crate) struct CommonWords {
    seeds: Seeds,
    words: Random,
    seen: HashSet<String>,
    common: Vec<String>,
    others: Vec<String>,
    head: String,
}

const COMMON: usize = 10;
const COMMON_TIMES: usize = 30;
const OTHER_TIMES: usize = 3;
/// Of the 343,000 words; the more are taken, the longer a new one is looked for.
const MOST_OTHERS: usize = 300_000;
const LIST: &str = "Here are numbered words, a few of which occur far more often than the rest. \
     Keep track of those.\n\n";
const LIST_QUESTION: &str = "\n\nQuestion: Which 10 words occur most often in the list above?\n\
    Answer: The 10 words that occur most often in the list are:";

impl CommonWords {
    pub(crate) fn new(seeds: Seeds) -> Self {
        let mut words = seeds.random(0);
        let mut seen = HashSet::new();
        let shown = pool(&mut words, &mut seen, COMMON);
        let beside = pool(&mut words, &mut seen, COMMON);
        let list = mixed(&mut seeds.random(2), &shown, 3, &beside, 1);
        let head = format!(
            "{LIST}{}{LIST_QUESTION} {}\n\n{LIST}",
            numbered(&list),
            numbered(&shown.iter().map(String::as_str).collect::<Vec<_>>()),
        );
        Self {
            common: pool(&mut words, &mut seen, COMMON),
            others: Vec::new(),
            seeds,
            words,
            seen,
            head,
        }
    }
}

fn pool(random: &mut Random, seen: &mut HashSet<String>, count: usize) -> Vec<String> {
    let avoid = format!("{LIST}{LIST_QUESTION}").to_lowercase();
    (0..count)
        .map(|_| distinct(seen, &avoid, || word(random)))
        .collect()
}

fn mixed<'a>(
    random: &mut Random,
    common: &'a [String],
    common_times: usize,
    others: &'a [String],
    other_times: usize,
) -> Vec<&'a str> {
    let times = |words: &'a [String], n| {
        words
            .iter()
            .flat_map(move |w| std::iter::repeat_n(w.as_str(), n))
    };
    let mut list: Vec<&str> = times(common, common_times)
        .chain(times(others, other_times))
        .collect();
    random.shuffle(&mut list);
    list
}

fn numbered(words: &[&str]) -> String {
    let items: Vec<String> = words
        .iter()
        .enumerate()
        .map(|(i, w)| format!("{}. {w}", i + 1))
        .collect();
    items.join(" ")
}

impl Draft for CommonWords {
    fn min_units(&self) -> usize {
        COMMON
    }

    fn max_units(&self) -> usize {
        MOST_OTHERS
    }

    fn build(&mut self, units: usize) -> Built {
        let missing = units.saturating_sub(self.others.len());
        let more = pool(&mut self.words, &mut self.seen, missing);
        self.others.extend(more);
        let mut order = self.seeds.random(1);
        let others = &self.others[..units];
        let list = mixed(&mut order, &self.common, COMMON_TIMES, others, OTHER_TIMES);
        let (prompt, question_at) = assemble(&self.head, &numbered(&list), LIST_QUESTION);
        Built {
            prompt,
            question_at,
            references: self.common.clone(),
            depths: Vec::new(),
            needles: Vec::new(),
        }
    }
}

/// Frequent words: counts follow a zeta distribution with alpha 2; the most frequent word is dots,
/// to be left out, and the next three are the answer.
pub(crate) struct FrequentWords {
    seeds: Seeds,
    /// In order of frequency.
    vocabulary: Vec<String>,
}

const ANSWERS: usize = 3;
const DOTS: &str = "...";
const CODED: &str = "In the coded text below, watch how often each coded word occurs.\n\n";
const CODED_QUESTION: &str = "\n\nQuestion: Leaving out the dots, which three coded words occur most often \
     in the text above?\n\
    Answer: The three coded words that occur most often in the text are:";

impl FrequentWords {
    pub(crate) fn new(seeds: Seeds) -> Self {
        let mut random = seeds.random(0);
        let mut seen = HashSet::new();
        let avoid = format!("{CODED}{CODED_QUESTION}").to_lowercase();
        // RULER's vocabulary grows with the length in the same way.
        let size = (seeds.length / 50).max(ANSWERS + 8);
        let coded =
            (1..size).map(|_| distinct(&mut seen, &avoid, || letters(&mut random, b'a', 6)));
        Self {
            vocabulary: std::iter::once(DOTS.to_owned()).chain(coded).collect(),
            seeds,
        }
    }
}

/// Share of the word of each rank from 1: rank^-2 / zeta(2).
fn share(rank: usize) -> f64 {
    let zeta_2 = std::f64::consts::PI.powi(2) / 6.0;
    (rank as f64).powi(-2) / zeta_2
}

impl Draft for FrequentWords {
    fn min_units(&self) -> usize {
        // From here on the last answer occurs at least once more than the word after it.
        let margin = share(ANSWERS + 1) - share(ANSWERS + 2);
        (1.0 / margin).ceil() as usize
    }

    fn build(&mut self, units: usize) -> Built {
        let mut list = Vec::with_capacity(units);
        for (i, word) in self.vocabulary.iter().enumerate() {
            let count = (units as f64 * share(i + 1)) as usize;
            list.extend(std::iter::repeat_n(word.as_str(), count));
        }
        self.seeds.random(1).shuffle(&mut list);
        let (prompt, question_at) = assemble(CODED, &list.join(" "), CODED_QUESTION);
        Built {
            prompt,
            question_at,
            references: self.vocabulary[1..=ANSWERS].to_vec(),
            depths: Vec::new(),
            needles: Vec::new(),
        }
    }
}
