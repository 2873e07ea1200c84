//! Multiple choice by log-probability over long texts, on files of LongBench v2 (Bai et al. 2024, arXiv:2412.15204).
//!
//! The model reads text, question and the four choices, and the choice is the letter that it finds likeliest next. So
//! nothing is generated and no answer has to be understood. The wording of the prompt is this crate's own.

use super::error::EvalError;
use super::lookups::EncodeFramed;
use super::score::interval;
use crate::device::Device;
use crate::model::decoder::Decoder;
use crate::model::segmentation::Sequence;
use crate::model::session::{Feed, Session};
use serde::{Deserialize, Serialize};

/// Letters of the choices.
pub const LETTERS: [&str; 4] = ["A", "B", "C", "D"];

/// A question, with the keys of LongBench v2's files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Question {
    /// Its name.
    #[serde(rename = "_id", default)]
    pub id: String,
    /// What it belongs to.
    #[serde(default)]
    pub domain: String,
    /// `easy` or `hard`.
    #[serde(default)]
    pub difficulty: String,
    /// `short`, `medium` or `long`.
    #[serde(default)]
    pub length: String,
    /// What is asked.
    pub question: String,
    /// The choices.
    #[serde(rename = "choice_A")]
    pub a: String,
    /// The second.
    #[serde(rename = "choice_B")]
    pub b: String,
    /// The third.
    #[serde(rename = "choice_C")]
    pub c: String,
    /// The fourth.
    #[serde(rename = "choice_D")]
    pub d: String,
    /// The letter of the right one.
    pub answer: String,
    /// The text.
    pub context: String,
}

/// Reads questions: a JSON array of them, or one a line.
///
/// # Errors
/// [`EvalError::Argument`] for what is not JSON of that form, and for answers that are no letter of a choice.
pub fn read(text: &str) -> Result<Vec<Question>, EvalError> {
    let failed = |error: serde_json::Error| {
        let expected = "a JSON array of questions as in LongBench v2, or one a line";
        EvalError::argument("questions", expected, error)
    };
    let questions: Vec<Question> = match text.trim_start().starts_with('[') {
        true => serde_json::from_str(text).map_err(failed)?,
        false => {
            let lines = text.lines().filter(|line| !line.trim().is_empty());
            lines
                .map(serde_json::from_str)
                .collect::<Result<_, _>>()
                .map_err(failed)?
        }
    };
    match questions.iter().find(|q| q.right().is_none()) {
        Some(q) => Err(EvalError::argument(
            "answer",
            format!("one of {}", LETTERS.join(", ")),
            &q.answer,
        )),
        None if questions.is_empty() => {
            Err(EvalError::argument("questions", "at least one", "none"))
        }
        None => Ok(questions),
    }
}

impl Question {
    fn right(&self) -> Option<usize> {
        LETTERS
            .iter()
            .position(|letter| *letter == self.answer.trim())
    }

    /// The prompt before and behind the text. It goes on with a space and a letter.
    fn around(&self) -> [String; 2] {
        let Self {
            question,
            a,
            b,
            c,
            d,
            ..
        } = self;
        [
            "Read the text and answer the question about it.\n\n".to_owned(),
            format!(
                "\n\nQuestion: {}\nA) {}\nB) {}\nC) {}\nD) {}\nThe letter of the right answer:",
                question.trim(),
                a.trim(),
                b.trim(),
                c.trim(),
                d.trim()
            ),
        ]
    }
}

/// How questions are read.
pub struct Reading<'a> {
    /// Tokens of a text; with what stands around a text where it is told so.
    pub encode: &'a EncodeFramed<'a>,
    /// Most tokens of a prompt: of longer ones the middle of the text is left out, as LongBench does. `None` for all.
    pub longest: Option<usize>,
    /// Segments computed side by side.
    pub segments_per_step: usize,
}

/// A question's tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prompt {
    /// Up to the letter.
    pub tokens: Vec<u32>,
    /// Each letter's token.
    pub letters: [u32; 4],
    /// Tokens of the text that were left out.
    pub left_out: usize,
}

/// The answer to a question.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Choice {
    /// The question's name.
    pub id: String,
    /// See [`Question`].
    pub difficulty: String,
    /// See [`Question`].
    pub length: String,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens of the text that were left out.
    pub left_out: usize,
    /// Log-probability of each letter.
    pub log_probabilities: [f64; 4],
    /// The letter that was chosen.
    pub chosen: String,
    /// The right one.
    pub answer: String,
}

/// All answers, and how many are right.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ChoiceReport {
    /// Of all, then of each difficulty and length that the file names.
    pub groups: Vec<Group>,
    /// The answers.
    pub choices: Vec<Choice>,
}

/// How many answers of a group are right.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Group {
    /// Its name.
    pub name: String,
    /// Questions.
    pub count: usize,
    /// Right ones in percent.
    pub score: f64,
    /// 95% confidence interval of the score, in percent.
    pub interval: (f64, f64),
}

impl Reading<'_> {
    /// The tokens of a question.
    ///
    /// # Errors
    /// What `encode` returns; [`EvalError::Argument`] where a letter is more than one token, or where question and
    /// choices alone are too long.
    pub fn prompt(&self, question: &Question) -> Result<Prompt, EvalError> {
        let [before, behind] = question.around();
        // Text and prompt are encoded by themselves, so that what is left out is the text's alone.
        let framed = (self.encode)(&before, true)?;
        let text = (self.encode)(&question.context, false)?;
        let ends: Vec<Vec<u32>> = LETTERS
            .iter()
            .map(|letter| (self.encode)(&format!("{behind} {letter}"), false))
            .collect::<Result<_, _>>()?;
        let same = (0..ends[0].len())
            .take_while(|i| ends.iter().all(|end| end.get(*i) == Some(&ends[0][*i])))
            .count();
        if ends.iter().any(|end| end.len() != same + 1) {
            let got = ends.iter().map(|end| end.len() - same).max().unwrap_or(0);
            return Err(EvalError::argument(
                "tokenizer",
                "one token for each of the letters A to D",
                got,
            ));
        }
        let around = framed.len() + same;
        let room = self
            .longest
            .map_or(usize::MAX, |longest| longest.saturating_sub(around));
        if room == 0 {
            let expected = format!(
                "at least {} tokens for the question {}",
                around + 1,
                question.id
            );
            return Err(EvalError::argument("lengths", expected, around + room));
        }
        let left_out = text.len().saturating_sub(room);
        let half = (text.len() - left_out) / 2;
        let mut tokens = framed;
        tokens.extend(&text[..half]);
        tokens.extend(&text[half + left_out..]);
        tokens.extend(&ends[0][..same]);
        Ok(Prompt {
            tokens,
            letters: std::array::from_fn(|i| ends[i][same]),
            left_out,
        })
    }

    /// Answers every question. `progress` hears how many are done.
    ///
    /// # Errors
    /// As [`Reading::prompt`]; [`EvalError::Model`] where the model fails.
    pub fn run<D: Device>(
        &self,
        model: &Decoder<D>,
        questions: &[Question],
        mut progress: impl FnMut(usize),
    ) -> Result<ChoiceReport, EvalError> {
        let mut choices = Vec::with_capacity(questions.len());
        for (i, question) in questions.iter().enumerate() {
            progress(i);
            let prompt = self.prompt(question)?;
            let scores = self.letters(model, &prompt).map_err(EvalError::model)?;
            let likeliest = (0..4)
                .rev()
                .max_by(|a, b| scores[*a].total_cmp(&scores[*b]));
            choices.push(Choice {
                id: question.id.clone(),
                difficulty: question.difficulty.clone(),
                length: question.length.clone(),
                prompt_tokens: prompt.tokens.len(),
                left_out: prompt.left_out,
                log_probabilities: scores.map(f64::from),
                chosen: LETTERS[likeliest.unwrap_or(0)].to_owned(),
                answer: question.answer.trim().to_owned(),
            });
        }
        Ok(ChoiceReport {
            groups: groups(&choices),
            choices,
        })
    }

    /// Log-probability of each letter after the prompt, which has the break that the model's configuration says.
    fn letters<D: Device>(
        &self,
        model: &Decoder<D>,
        prompt: &Prompt,
    ) -> crate::device::Result<[f32; 4]> {
        let count = prompt.tokens.len();
        let mut session = Session::new(model, 1, count, self.segments_per_step)?;
        let own = model.config.prompt_break();
        let (breaks, rereads) = (own.of(count), own.rereads_of(count));
        let whole = Sequence {
            tokens: &prompt.tokens,
            breaks: breaks.as_slice(),
            rereads: &rereads,
        };
        while session.position(0) < count {
            let piece = session.next_piece(0, whole, session.position(0), session.chunk());
            session.feed(&[Feed {
                sequence: 0,
                tokens: &prompt.tokens[piece.clone()],
                targets: &[],
                breaks: &whole.breaks_within(piece.clone()),
                rereads: &whole.rereads_within(piece),
            }])?;
        }
        let mut scores = [0.0; 4];
        for (score, letter) in scores.iter_mut().zip(prompt.letters) {
            *score = session.log_probability(0, letter)?;
        }
        Ok(scores)
    }
}

fn groups(choices: &[Choice]) -> Vec<Group> {
    let named = |of: fn(&Choice) -> &String| {
        let mut names: Vec<&String> = choices
            .iter()
            .map(of)
            .filter(|name| !name.is_empty())
            .collect();
        names.sort();
        names.dedup();
        names
            .into_iter()
            .map(move |name| group(name, choices.iter().filter(|c| of(c) == name)))
    };
    let mut all = vec![group("all", choices.iter())];
    all.extend(named(|c| &c.difficulty));
    all.extend(named(|c| &c.length));
    all
}

fn group<'a>(name: &str, choices: impl Iterator<Item = &'a Choice>) -> Group {
    let right: Vec<bool> = choices.map(|c| c.chosen == c.answer).collect();
    let count = right.len();
    let mean = right.iter().filter(|right| **right).count() as f64 / count.max(1) as f64;
    let (low, high) = interval(mean, count);
    Group {
        name: name.to_owned(),
        count,
        score: 100.0 * mean,
        interval: (100.0 * low, 100.0 * high),
    }
}
