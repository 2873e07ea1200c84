//! A model as what a run asks: reads prompts side by side and takes the likeliest tokens.

use super::error::EvalError;
use super::recall::{self, HeadRecall, Oracle};
use super::run::{Answer, Respond};
use super::task::Sample;
use crate::device::Device;
use crate::generate::sampler::SamplerConfig;
use crate::generate::{Finish, GenerateError, Generated, Generator, GeneratorConfig, Prompt};
use crate::model::decoder::Decoder;
use crate::model::session::{Feed, SelectedTokens, Session};

/// A model that answers greedily, up to an end token or the task's longest answer.
pub struct Greedy<'a, D: Device> {
    /// The model.
    pub model: &'a Decoder<D>,
    /// Tokens of a prompt.
    pub encode: &'a (dyn Fn(&str) -> Result<Vec<u32>, EvalError> + Sync),
    /// Text of new tokens.
    pub decode: &'a (dyn Fn(&[u32]) -> Result<String, EvalError> + Sync),
    /// Segments of a prompt computed side by side.
    pub segments_per_step: usize,
    /// See [`RunConfig::oracle`](super::run::RunConfig::oracle).
    pub oracle: Option<Oracle>,
}

impl<D: Device> Respond for Greedy<'_, D> {
    fn encode(&self, text: &str) -> Result<Vec<u32>, EvalError> {
        (self.encode)(text)
    }

    fn respond(&mut self, samples: &[Sample]) -> Result<Vec<Answer>, EvalError> {
        let max_new = samples.iter().map(|s| s.task.max_new()).max().unwrap_or(0);
        let longest = samples.iter().map(|s| s.tokens.len()).max().unwrap_or(0) + max_new;
        let segment = self.model.config.segment.as_ref();
        let rereads = segment.is_some_and(|segment| segment.reread_suffix > 0);
        if self.oracle.is_some() && rereads {
            let expected = "a model that reads the ends of prompts once (`segment.reread_suffix`)";
            return Err(EvalError::argument(
                "oracle",
                expected,
                "one that reads them again",
            ));
        }
        let mut at_ends = match self.oracle {
            Some(Oracle::Prompt) => self.select_at_ends(samples, longest)?,
            _ => Vec::new(),
        }
        .into_iter();
        let mut session = Session::new(self.model, samples.len(), longest, self.segments_per_step)
            .map_err(EvalError::model)?;
        let prompts: Vec<Prompt<'_>> = samples
            .iter()
            .map(|s| Prompt {
                before: &[],
                tokens: &s.tokens,
                breaks: &[],
                rereads: &[],
                stream: 0,
            })
            .collect();
        let config = GeneratorConfig {
            sampler: SamplerConfig::greedy(),
            max_new,
            end_tokens: self.model.config.eos_token_id.clone(),
        };
        let mut generator =
            Generator::new(&mut session, &prompts, config).map_err(EvalError::model)?;
        match rereads {
            // What answers read is selected once the suffix has been read.
            true => while generator.read_prompts().map_err(EvalError::model)? > 0 {},
            false => self
                .read_to_breaks(&mut generator, samples)
                .map_err(EvalError::model)?,
        }
        let mut recalls = Vec::new();
        for (i, sample) in samples.iter().enumerate() {
            let positions = generator.session().holds_all(i);
            let at_end = at_ends.next().unwrap_or_default();
            let wanted = !sample.needles.is_empty() || self.oracle == Some(Oracle::Prompt);
            if self.oracle.is_some() && !positions && wanted {
                let expected = "a prompt that no pool has dropped tokens of (`segment.pool_len`)";
                let got = format!("{} tokens", sample.tokens.len());
                return Err(EvalError::argument("oracle", expected, got));
            }
            // Reading the selection waits for the device. It has no positions where tokens have been dropped.
            if !wanted || !positions {
                recalls.push(Vec::new());
                continue;
            }
            let selected = generator.session().selected(i).map_err(EvalError::model)?;
            recalls.push(match sample.needles.is_empty() {
                true => Vec::new(),
                false => recall::recall(&selected, &sample.needles),
            });
            if let Some(oracle) = self.oracle {
                Self::correct(oracle, &mut generator, i, (selected, at_end), sample)?;
            }
        }
        while generator.read_prompts().map_err(EvalError::model)? > 0 {}
        let generated = generator
            .run(|_| std::ops::ControlFlow::Continue(()))
            .map_err(EvalError::model)?;
        let answer = |(g, recall): (&Generated, Vec<HeadRecall>)| {
            let ended = g.finish == Some(Finish::EndToken);
            let text = (self.decode)(&g.tokens[..g.tokens.len() - usize::from(ended)])?;
            Ok(Answer { text, recall })
        };
        generated.iter().zip(recalls).map(answer).collect()
    }
}

impl<D: Device> Greedy<'_, D> {
    /// Reads prompts up to the break at which answers' past rows are selected.
    fn read_to_breaks(
        &self,
        generator: &mut Generator<'_, '_, D>,
        samples: &[Sample],
    ) -> Result<(), GenerateError> {
        let own = self.model.config.prompt_break();
        let chunk = generator.session().chunk();
        loop {
            let piece = |(i, sample): (usize, &Sample)| {
                let tokens = sample.tokens.len();
                let behind = tokens - own.of(tokens).unwrap_or(tokens);
                (i, generator.unread_of(i).saturating_sub(behind).min(chunk))
            };
            let pieces: Vec<(usize, usize)> = samples.iter().enumerate().map(piece).collect();
            if pieces.iter().all(|piece| piece.1 == 0) {
                return Ok(());
            }
            generator.read(&pieces)?;
        }
    }

    /// What heads select where prompts have their only break at their end.
    fn select_at_ends(
        &self,
        samples: &[Sample],
        longest: usize,
    ) -> Result<Vec<Vec<SelectedTokens>>, EvalError> {
        let mut session = Session::new(self.model, samples.len(), longest, self.segments_per_step)
            .map_err(EvalError::model)?;
        let ends: Vec<[usize; 1]> = samples.iter().map(|s| [s.tokens.len()]).collect();
        let feed = |(sequence, breaks)| Feed {
            sequence,
            tokens: &samples[sequence].tokens,
            targets: &[],
            breaks,
            rereads: &[],
        };
        let ends = ends.iter().map(|end| &end[..]).enumerate();
        let feeds: Vec<Feed<'_>> = ends.map(feed).collect();
        session.feed(&feeds).map_err(EvalError::model)?;
        let selected = (0..samples.len()).map(|i| session.selected(i));
        selected.collect::<Result<_, _>>().map_err(EvalError::model)
    }

    /// Lets every head read what an oracle selects.
    fn correct(
        oracle: Oracle,
        generator: &mut Generator<'_, '_, D>,
        sequence: usize,
        (mut selected, at_end): (Vec<SelectedTokens>, Vec<SelectedTokens>),
        sample: &Sample,
    ) -> Result<(), EvalError> {
        let session = generator.session_mut();
        let sizes = [session.block_len(), session.past_len()];
        let mut at_end = at_end.into_iter();
        for head in &mut selected {
            let at_end = at_end.next().map_or_else(Vec::new, |h| h.tokens);
            head.tokens = oracle.tokens(&sample.needles, head, &at_end, sizes);
        }
        session
            .replace_selected(sequence, &selected)
            .map_err(EvalError::model)
    }
}
