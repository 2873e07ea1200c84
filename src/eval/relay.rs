//! Relay: a letter that the prompt states first and asks for last, with filler between that says nothing about it.
//!
//! The filler has any length, so a model without a past answers only if each segment's tail hands the letter on. It is
//! meant for models that are trained on it (`data.mixture.relay`), with words of filler that they have not read.

use super::fit::{Built, Draft};
use super::seeds::Seeds;
use crate::random::Random;

/// Letters that can be asked for.
const LETTERS: usize = 16;

pub(crate) struct Relay {
    letter: char,
    random: Random,
    /// Words that grow as needed and never change.
    words: Vec<String>,
}

impl Relay {
    pub(crate) fn new(seeds: Seeds) -> Self {
        let letter = seeds.random(0).below(LETTERS) as u8;
        Self {
            letter: char::from(b'A' + letter),
            random: seeds.random(1),
            words: Vec::new(),
        }
    }
}

/// A word that no training has, of letters that all trainings have.
fn word(random: &mut Random) -> String {
    let mut one = |letters: &[u8]| char::from(letters[random.below(letters.len())]);
    let parts = [one(b"nprstvz"), one(b"aeiou"), one(b"bdfgklmnprstvz")];
    std::iter::once(' ').chain(parts).collect()
}

impl Draft for Relay {
    fn min_units(&self) -> usize {
        1
    }

    fn build(&mut self, units: usize) -> Built {
        while self.words.len() < units {
            self.words.push(word(&mut self.random));
        }
        let statement = format!("Letter: {}", self.letter);
        let stated = 0..statement.len();
        let text = [&statement, &self.words[..units].concat()[..]].concat();
        Built {
            question_at: text.len(),
            prompt: text + ". Letter:",
            references: vec![self.letter.to_string()],
            depths: vec![0.0],
            needles: vec![stated],
        }
    }
}
