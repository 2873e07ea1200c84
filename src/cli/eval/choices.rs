//! LongBench v2's questions: which are read, and what is printed of the answers.

use std::path::Path;

use anyhow::{Context, Result};
use segattn::device::Device;
use segattn::eval::EvalError;
use segattn::eval::choice::{ChoiceReport, Question, Reading, read};
use segattn::eval::lookups::EncodeFramed;
use segattn::model::decoder::Decoder;
use segattn::model::tokenizer::Tokenizer;

use crate::cli::files::read_text;
use crate::cli::generate::progress;
use crate::cli::out::out;

/// Largest file of questions that is read, in bytes; LongBench v2 has 465 MB.
const MAX_FILE: u64 = 1 << 32;

/// Questions, and how they are read.
pub struct Choices {
    questions: Vec<Question>,
    longest: Option<usize>,
    segments_per_step: usize,
}

impl Choices {
    pub fn read(path: &Path, longest: Option<usize>, segments_per_step: usize) -> Result<Self> {
        let questions = read(&read_text(path, MAX_FILE)?);
        Ok(Self {
            questions: questions.with_context(|| path.display().to_string())?,
            longest,
            segments_per_step,
        })
    }

    /// Tokens of the longest prompt.
    pub fn longest_prompt(&self, text: &Tokenizer) -> Result<usize> {
        let encode = encoder(text);
        let reading = self.reading(&encode);
        let mut longest = 0;
        for question in &self.questions {
            longest = longest.max(reading.prompt(question)?.tokens.len());
        }
        Ok(longest)
    }

    pub fn run<D: Device>(
        &self,
        model: &Decoder<D>,
        text: &Tokenizer,
        working: &dyn Fn(),
        quiet: bool,
    ) -> Result<ChoiceReport> {
        let bar = progress(!quiet, self.questions.len() as u64, "questions");
        let encode = encoder(text);
        let report = self.reading(&encode).run(model, &self.questions, |done| {
            working();
            bar.set_position(done as u64);
        })?;
        bar.finish_and_clear();
        Ok(report)
    }

    fn reading<'a>(&self, encode: &'a EncodeFramed<'a>) -> Reading<'a> {
        Reading {
            encode,
            longest: self.longest,
            segments_per_step: self.segments_per_step,
        }
    }
}

fn encoder(text: &Tokenizer) -> Box<EncodeFramed<'_>> {
    Box::new(|s, framed| {
        // What stands behind a text has no place before the question.
        let mut ids = if framed {
            text.framing().before.clone()
        } else {
            Vec::new()
        };
        ids.extend(text.encode(s, false).map_err(EvalError::model)?);
        Ok(ids)
    })
}

pub fn print(report: &ChoiceReport) -> Result<()> {
    out!(
        "{:<16}{:>9}{:>9}   95% interval",
        "questions",
        "count",
        "right"
    )?;
    for group in &report.groups {
        let (low, high) = group.interval;
        out!(
            "{:<16}{:>9}{:>8.1}%   {low:.1} to {high:.1}",
            group.name,
            group.count,
            group.score
        )?;
    }
    Ok(())
}
