//! Training tasks: questions about statements that are hidden in the run's own text.
//!
//! Plain text rarely teaches a model to use its past. Here statements stand somewhere in a sequence, and a question
//! about them comes later, at a distance that is equally likely in each octave. The question ends with a break, so that
//! the retrieval at the segment's end has the question's queries, and the answer comes in the next segment. With a
//! suffix the last tokens of the question come behind the break too. Answers weigh more than text; statements and
//! questions weigh nothing.
//!
//! A sequence is a function of its text, the seed and its number. Words and sentences are others than those of the
//! tests in `eval`.

mod facts;
mod words;

use facts::{Fact, Kind, facts};
use words::Names;

use super::example::Example;
use super::pieces::Encode;
use crate::model::config::PromptBreak;
use crate::random::Random;
use crate::train::config::TaskSection;
use crate::train::error::{Result, TrainError};

/// Distinguishes these random numbers from others of the same seed.
const PURPOSE: u8 = 0x74;
/// Most tokens that a place moves on, to the end of a line.
const LINE: usize = 128;
/// Groups of facts that are tried for each question.
const TRIES: usize = 4;

/// Weaves tasks into sequences.
pub struct Tasks<'a> {
    section: TaskSection,
    encode: &'a dyn Encode,
    vocab_size: usize,
    /// For each id whether a line ends with it.
    ends_line: Vec<bool>,
    newline: Vec<u32>,
    /// Where a question has its break.
    own: PromptBreak,
}

/// A fact in tokens: its statements, each with the end of its line, and the question and its answer.
struct Encoded {
    statements: Vec<Vec<u32>>,
    asked: Option<(Vec<u32>, Vec<u32>)>,
}

/// Something that is put into the text.
struct Piece {
    /// Where in the text.
    place: usize,
    ids: Vec<u32>,
    /// The answer, if it is a question.
    answer: Option<Vec<u32>>,
}

impl<'a> Tasks<'a> {
    /// For a tokenizer with ids below `vocab_size`.
    ///
    /// # Errors
    /// [`TrainError::Argument`] if the tokenizer refuses the tasks' sentences.
    pub fn new(section: TaskSection, encode: &'a dyn Encode, vocab_size: usize) -> Result<Self> {
        let ends_line = (0..vocab_size as u32).map(|id| encode.ends_line(id));
        let mut tasks = Self {
            section,
            encode,
            vocab_size,
            ends_line: ends_line.collect(),
            newline: Vec::new(),
            own: PromptBreak::before_suffix(0),
        };
        tasks.newline = tasks.ids("\n")?;
        Ok(tasks)
    }

    /// The same with questions whose breaks are those of prompts, not at their ends.
    #[must_use]
    pub fn with_break(self, own: PromptBreak) -> Self {
        Self { own, ..self }
    }

    fn ids(&self, text: &str) -> Result<Vec<u32>> {
        sentence(self.encode, text, self.vocab_size, "data.mixture.tasks")
    }

    /// `text` with tasks in it, of the same length: what is put in pushes text out at the end. At most half of it are
    /// tasks, so a short text may have none. `number` is that of the sequence in the run.
    ///
    /// # Errors
    /// As [`Tasks::new`].
    pub fn weave(&self, text: Example, seed: u64, number: u64) -> Result<Example> {
        let mut key = [0; 32];
        key[..8].copy_from_slice(&seed.to_le_bytes());
        key[8..16].copy_from_slice(&number.to_le_bytes());
        key[31] = PURPOSE;
        let mut random = Random::from_key(key);
        let (room, pieces) = self.pieces(text.tokens.len(), &mut random)?;
        if pieces.is_empty() {
            return Ok(text);
        }
        let mut sequence = Sequence::new(self, &text, room);
        for piece in pieces {
            sequence.take_text(piece.place);
            sequence.put(&piece);
        }
        Ok(sequence.finish())
    }

    /// Statements and questions for a text of `len` tokens, in their order, and how many tokens of the text remain.
    fn pieces(&self, len: usize, random: &mut Random) -> Result<(usize, Vec<Piece>)> {
        let (mut names, mut groups) = (Names::default(), Vec::new());
        let (mut asked, mut size) = (0, 0);
        for _ in 0..TRIES * self.section.questions {
            if asked >= self.section.questions {
                break;
            }
            let group = facts(self.kind(random), random, &mut names);
            let group = group.iter().map(|fact| self.encoded(fact));
            let group = group.collect::<Result<Vec<_>>>()?;
            let more: usize = group.iter().map(|fact| self.most_tokens(fact)).sum();
            if size + more <= len / 2 {
                size += more;
                asked += group.iter().filter(|fact| fact.asked.is_some()).count();
                groups.push(group);
            }
        }
        let room = len - size;
        let mut pieces = Vec::new();
        for group in groups {
            self.place(group, room, random, &mut pieces);
        }
        // Of two at one place the one that was placed first comes first.
        pieces.sort_by_key(|piece| piece.place);
        Ok((room, pieces))
    }

    fn encoded(&self, fact: &Fact) -> Result<Encoded> {
        let line = |text: &String| self.ids(&format!("{text}\n"));
        let pair = |(question, answer): &(String, String)| -> Result<_> {
            Ok((self.ids(question)?, line(&format!(" {answer}"))?))
        };
        let asked = fact.asked.as_ref().map(pair);
        Ok(Encoded {
            statements: fact.statements.iter().map(line).collect::<Result<_>>()?,
            asked: asked.transpose()?,
        })
    }

    /// Tokens that a fact takes at most: each piece may need the end of a line before it.
    fn most_tokens(&self, fact: &Encoded) -> usize {
        let piece = |ids: &Vec<u32>| ids.len() + self.newline.len();
        let asked = fact.asked.as_ref().map_or(0, |(q, a)| piece(q) + a.len());
        fact.statements.iter().map(piece).sum::<usize>() + asked
    }

    /// A kind, each as likely as the configuration says.
    fn kind(&self, random: &mut Random) -> Kind {
        let shares = self.section.shares();
        let mut left = random.unit() * shares.iter().sum::<f64>();
        for (kind, share) in Kind::ALL.into_iter().zip(shares) {
            if left < share {
                return kind;
            }
            left -= share;
        }
        // Rounding may leave a little.
        let mut likely = Kind::ALL.into_iter().zip(shares).filter(|k| k.1 > 0.0);
        likely.next_back().map_or(Kind::Records, |k| k.0)
    }

    /// Places the facts of a group into a text of `room` tokens.
    fn place(
        &self,
        group: Vec<Encoded>,
        room: usize,
        random: &mut Random,
        pieces: &mut Vec<Piece>,
    ) {
        // What is not asked stands anywhere before the last question.
        let first = room / 8;
        let mut last = 0;
        for Encoded { statements, asked } in group {
            let question = asked
                .is_some()
                .then(|| first + random.below(room - first + 1));
            last = last.max(question.unwrap_or(0));
            let mut places: Vec<usize> = statements
                .iter()
                .map(|_| match question {
                    Some(at) => at - distance(random, self.section.min_distance, at),
                    None => random.below(last + 1),
                })
                .collect();
            places.sort_unstable();
            let statements = statements.into_iter().zip(places);
            pieces.extend(statements.map(|(ids, place)| Piece {
                place,
                ids,
                answer: None,
            }));
            if let (Some((ids, answer)), Some(place)) = (asked, question) {
                let answer = Some(answer);
                pieces.push(Piece { place, ids, answer });
            }
        }
    }
}

/// Tokens of a sentence, by a tokenizer whose ids are below `vocab_size`. `name`: whose sentence it is, for messages.
pub(super) fn sentence(
    encode: &dyn Encode,
    text: &str,
    vocab_size: usize,
    name: &'static str,
) -> Result<Vec<u32>> {
    let refused = |got: String| {
        let expected = format!("a tokenizer with ids below {vocab_size} for {text:?}");
        TrainError::argument(name, expected, got)
    };
    let ids = encode.encode(text).map_err(refused)?;
    match ids.iter().find(|id| **id as usize >= vocab_size) {
        Some(id) => Err(refused(id.to_string())),
        None => Ok(ids),
    }
}

/// A distance from `least` to `most`, equally likely in each octave; `most` if that is less.
fn distance(random: &mut Random, least: usize, most: usize) -> usize {
    if most <= least {
        return most;
    }
    let octaves = (most / least).ilog2() as usize + 1;
    let low = least << random.below(octaves);
    low + random.below(low.min(most - low + 1))
}

/// A sequence that is being put together.
struct Sequence<'a> {
    tasks: &'a Tasks<'a>,
    text: &'a Example,
    /// Tokens of the text before the last piece, at most.
    room: usize,
    /// Tokens of the text that are in it.
    used: usize,
    made: Example,
    weights: Vec<f32>,
}

impl<'a> Sequence<'a> {
    fn new(tasks: &'a Tasks<'a>, text: &'a Example, room: usize) -> Self {
        Self {
            tasks,
            text,
            room,
            used: 0,
            made: Example::default(),
            weights: Vec::new(),
        }
    }

    /// Takes the text up to `place`, and on to the end of a line if one is near. What stands before a text (BOS) stays
    /// there.
    fn take_text(&mut self, place: usize) {
        let place = place.max(1);
        if self.used >= place {
            return;
        }
        let on = self.text.tokens[place - 1..self.room].iter().take(LINE);
        let mut on = on.map(|id| self.tasks.ends_line[*id as usize]);
        let line = on.position(|ends| ends).unwrap_or(0);
        self.take_exactly(place + line);
    }

    fn take_exactly(&mut self, end: usize) {
        let (from, to) = (self.used, end.min(self.text.tokens.len()));
        let before = self.made.tokens.len();
        let within = |positions: &[usize]| -> Vec<usize> {
            let within = positions.iter().filter(|b| from < **b && **b <= to);
            within.map(|b| b - from + before).collect()
        };
        self.made.breaks.extend(within(&self.text.breaks));
        self.made.rereads.extend(within(&self.text.rereads));
        self.made.tokens.extend(&self.text.tokens[from..to]);
        match &self.text.weights {
            Some(weights) => self.weights.extend(&weights[from..to]),
            None => self.weights.resize(before + to - from, 1.0),
        }
        self.used = to;
    }

    fn push(&mut self, ids: &[u32], weight: f32) {
        self.made.tokens.extend(ids);
        self.weights.resize(self.made.tokens.len(), weight);
    }

    /// Puts a statement, or a question, a break and the answer. They begin on a line of their own.
    fn put(&mut self, piece: &Piece) {
        let last = self.made.tokens.last().copied();
        if !last.is_some_and(|id| self.tasks.ends_line[id as usize]) {
            self.push(&self.tasks.newline, 0.0);
        }
        self.push(&piece.ids, 0.0);
        if let Some(answer) = &piece.answer {
            let (at, asked) = (self.made.tokens.len(), piece.ids.len());
            let own = self.tasks.own.of(asked).unwrap_or(asked);
            let place = at - asked + own;
            self.made.breaks.retain(|b| *b != place);
            self.made.breaks.push(place);
            let rereads = self.tasks.own.rereads_of(asked);
            self.made.rereads.extend(rereads.iter().map(|_| at));
            self.push(answer, self.tasks.section.answer_weight);
            // The first is predicted before the break, when nothing has been retrieved for the question yet.
            if own == asked {
                self.weights[at] = 1.0;
            }
        }
    }

    /// The sequence, filled up with text to the length of the text.
    fn finish(mut self) -> Example {
        let len = self.text.tokens.len();
        self.take_exactly(self.used + len.saturating_sub(self.made.tokens.len()));
        self.made.weights = Some(self.weights);
        self.made
    }
}
