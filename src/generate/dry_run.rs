//! Dry run of reading and generation on a [`DryRun`](crate::device::gpu::DryRun) GPU, to measure the memory they need.
//!
//! It calls the code of the real run. It takes little time for texts of any length.

use super::error::GenerateError;
use super::generator::{Generator, GeneratorConfig, Prompt};
use super::sampler::SamplerConfig;
use crate::device::Device;
use crate::model::decoder::Decoder;
use crate::model::session::{Feed, Session};
use serde::{Deserialize, Serialize};
use std::ops::ControlFlow;

/// What is read and generated.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reading {
    /// Of each sequence the tokens that it has read before, in a saved state, and those that it reads.
    pub sequences: Vec<[usize; 2]>,
    /// Whether the tokens are scored.
    pub scored: bool,
    /// New tokens of each sequence.
    pub new: usize,
    /// Segments computed side by side.
    pub segments_per_step: usize,
}

/// Runs `reading` on a dry-run device. Segments that leave the memory in use unchanged are skipped; only what they add
/// to the pools is allocated. `opened` is called once everything that lives as long as the session, except the pools,
/// is allocated.
///
/// # Errors
/// [`GenerateError::Device`].
pub fn dry_run<D: Device>(
    model: &Decoder<D>,
    reading: &Reading,
    opened: impl FnOnce(),
) -> Result<(), GenerateError> {
    let Reading {
        ref sequences,
        scored,
        new,
        segments_per_step,
    } = *reading;
    let of_each = |f: &dyn Fn(&[usize; 2]) -> usize| sequences.iter().map(f).collect::<Vec<_>>();
    let longest = of_each(&|[before, tokens]| before + tokens + new);
    let longest = longest.into_iter().max().unwrap_or(0);
    let session = &mut Session::new(model, sequences.len(), longest, segments_per_step)?;
    opened();
    if sequences.len() > 1 {
        drop_together(session, longest)?;
    }
    ahead(session, &of_each(&|[before, _]| *before))?;
    if new > 0 && model.config.part.ends {
        let (streams, none) = (vec![0; sequences.len()], vec![&[][..]; sequences.len()]);
        session.choose_by(&SamplerConfig::greedy(), &streams, &none)?;
    }
    // The first chunks fill the state, the last have the longest context. The last token of a prompt may end a segment,
    // and its break makes a whole one of what is before it, which is read side by side with others.
    let chunk = session.chunk();
    let own = model.config.prompt_break();
    let own = |tokens: usize| own.of(tokens).filter(|_| new > 0 && tokens > 0);
    let up_to_break = |tokens: usize| {
        let asked = usize::from(new > 0 && tokens > 0);
        own(tokens).unwrap_or(tokens - asked)
    };
    let passed = |tokens: usize| (tokens / chunk).saturating_sub(4) * chunk;
    let first = |tokens: usize| up_to_break(tokens).min(2 * chunk);
    let last = |tokens: usize| up_to_break(tokens) - first(tokens) - passed(tokens);
    let of_tokens = |f: &dyn Fn(usize) -> usize| of_each(&|[_, tokens]| f(*tokens));
    let lasts = of_tokens(&last);
    let breaks: Vec<bool> = sequences.iter().map(|[_, t]| own(*t).is_some()).collect();
    let ends_first = lasts.iter().zip(&breaks);
    let ends_first: Vec<bool> = ends_first.map(|(last, ends)| *last == 0 && *ends).collect();
    read(session, &of_tokens(&first), (scored, &ends_first))?;
    ahead(session, &of_tokens(&passed))?;
    read(session, &lasts, (scored, &breaks))?;
    // Of three steps in a segment one is recorded; two in a row begin or end one.
    generate(
        session,
        &of_tokens(&|tokens| tokens - up_to_break(tokens)),
        new.min(6),
    )?;
    generate_far(session, reading, own)
}

/// Generation ends a segment for the last time, and begins one. The last new token is never read. Segments are counted
/// from the break that `own` says.
fn generate_far<D: Device>(
    session: &mut Session<'_, D>,
    reading: &Reading,
    own: impl Fn(usize) -> Option<usize>,
) -> Result<(), GenerateError> {
    let Some(segment) = &session.model().config.segment else {
        return Ok(());
    };
    let far = |(i, [before, tokens]): (usize, &[usize; 2])| {
        let counted = own(*tokens).map_or(0, |own| before + own);
        let rest = (before + tokens + reading.new).saturating_sub(counted + 1);
        let end = counted + rest / segment.segment_len * segment.segment_len;
        end.saturating_sub(session.position(i) + 1)
    };
    let far: Vec<usize> = reading.sequences.iter().enumerate().map(far).collect();
    ahead(session, &far)?;
    let one: Vec<usize> = far.iter().map(|far| usize::from(*far > 0)).collect();
    (0..2).try_for_each(|_| read(session, &one, (false, &[])))
}

/// Runs what a server does ([`Generator::idle`]) on a dry-run device: `sequences` of `longest` tokens each that go on
/// side by side while one of them reads `piece` tokens of a prompt that is scored.
///
/// # Errors
/// [`GenerateError::Device`].
pub fn dry_run_serving<D: Device>(
    model: &Decoder<D>,
    sequences: usize,
    longest: usize,
    piece: usize,
) -> Result<(), GenerateError> {
    const STEPS: usize = 6;
    let session = &mut Session::new(model, sequences, longest, 1)?;
    drop_together(session, longest)?;
    let piece = piece.min(longest.saturating_sub(STEPS)).max(1);
    let mut before = vec![longest.saturating_sub(STEPS); sequences];
    if let Some(first) = before.first_mut() {
        *first = longest.saturating_sub(piece + STEPS);
    }
    ahead(session, &before)?;
    let mut generator = Generator::idle(session);
    let config = GeneratorConfig {
        sampler: SamplerConfig::greedy(),
        max_new: STEPS,
        end_tokens: Vec::new(),
    };
    let tokens = vec![0; piece];
    let own = model.config.prompt_break();
    let (mut breaks, mut rereads) = (Vec::new(), Vec::new());
    own.mark(0..piece, &mut breaks, &mut rereads);
    let prompt = |len: usize| Prompt {
        before: &[],
        tokens: &tokens[..len],
        breaks: if len == piece { &breaks } else { &[] },
        rereads: if len == piece { &rereads } else { &[] },
        stream: 0,
    };
    for sequence in 0..sequences {
        generator.join(sequence, &prompt(1), config.clone(), false)?;
    }
    let all: Vec<usize> = (0..sequences).collect();
    while generator.read_prompts()? > 0 {}
    // Of three steps in a segment one is recorded.
    (0..STEPS / 2).try_for_each(|_| generator.advance(&all).map(drop))?;
    // Whole segments are read in slots of their own, beside those of the sequences.
    generator.leave(0)?;
    generator.join(0, &prompt(piece), config, true)?;
    generator.read(&[(0, piece)])?;
    generator.session().likeliest(0, MOST_LIKELIEST)?;
    (0..2).try_for_each(|_| generator.advance(&all).map(drop))
}

/// Where pools drop tokens, all sequences may do so in one step. It keeps the pools of before until it is complete.
fn drop_together<D: Device>(
    session: &mut Session<'_, D>,
    longest: usize,
) -> Result<(), GenerateError> {
    let segment = session.model().config.segment.as_ref();
    let Some(segment) = segment.filter(|segment| segment.pool_len > 0) else {
        return Ok(());
    };
    let end = longest / segment.segment_len * segment.segment_len;
    let all = |tokens: usize| vec![tokens; session.sequences()];
    let (before, last) = (all(end.saturating_sub(1)), all(end.min(1)));
    ahead(session, &before)?;
    read(session, &last, (false, &[]))?;
    (0..last.len()).try_for_each(|sequence| session.restart(sequence))?;
    Ok(())
}

/// Most of the likeliest tokens that a server reports.
const MOST_LIKELIEST: usize = 20;

/// Moves sequences ahead by so many tokens each.
fn ahead<D: Device>(session: &mut Session<'_, D>, tokens: &[usize]) -> Result<(), GenerateError> {
    for (sequence, tokens) in tokens.iter().enumerate() {
        session.allocate_ahead(sequence, *tokens)?;
    }
    Ok(())
}

/// Reads so many tokens of each sequence, a chunk at a time; where `broken`, a break comes after the last of them.
fn read<D: Device>(
    session: &mut Session<'_, D>,
    tokens: &[usize],
    (scored, broken): (bool, &[bool]),
) -> Result<(), GenerateError> {
    let chunk = session.chunk();
    let most = tokens.iter().copied().max().unwrap_or(0);
    let row = vec![0; chunk.min(most)];
    for first in (0..most).step_by(chunk) {
        let ends = |(sequence, tokens): (usize, &usize)| {
            let here = first < *tokens && *tokens <= first + row.len();
            (here && broken.get(sequence) == Some(&true)).then(|| tokens - first)
        };
        let breaks: Vec<Option<usize>> = tokens.iter().enumerate().map(ends).collect();
        let feed = |(sequence, tokens): (usize, &usize)| {
            let tokens = &row[..row.len().min(tokens.saturating_sub(first))];
            Feed {
                sequence,
                tokens,
                targets: if scored { tokens } else { &[] },
                breaks: breaks[sequence].as_slice(),
                rereads: &[],
            }
        };
        let feeds: Vec<Feed<'_>> = tokens.iter().enumerate().map(feed).collect();
        session.feed(&feeds)?;
    }
    Ok(())
}

/// Generates after prompts of so many tokens. A stage that is not the last only passes rows on.
fn generate<D: Device>(
    session: &mut Session<'_, D>,
    prompts: &[usize],
    max_new: usize,
) -> Result<(), GenerateError> {
    let row = vec![0; prompts.iter().copied().max().unwrap_or(0)];
    if !session.model().config.part.ends {
        // A generator adds breaks itself.
        let own = session.model().config.prompt_break();
        let asked = prompts
            .iter()
            .map(|tokens| own.of(*tokens).filter(|_| *tokens > 0));
        let breaks: Vec<Option<usize>> = asked.collect();
        let again = prompts.iter().map(|tokens| own.rereads_of(*tokens));
        let rereads: Vec<Vec<usize>> = again.collect();
        let feed = |(sequence, tokens): (usize, &usize)| Feed {
            sequence,
            tokens: &row[..*tokens],
            targets: &[],
            breaks: breaks[sequence].as_slice(),
            rereads: &rereads[sequence],
        };
        let feeds: Vec<Feed<'_>> = prompts.iter().enumerate().map(feed).collect();
        session.feed(&feeds)?;
        let next: Vec<(usize, u32)> = (0..prompts.len()).map(|sequence| (sequence, 0)).collect();
        (1..max_new).try_for_each(|_| session.pass_on_decoding(&next))?;
        return Ok(());
    }
    let prompt = |tokens: &usize| Prompt {
        before: &[],
        tokens: &row[..*tokens],
        breaks: &[],
        rereads: &[],
        stream: 0,
    };
    let prompts: Vec<Prompt<'_>> = prompts.iter().map(prompt).collect();
    let config = GeneratorConfig {
        sampler: SamplerConfig::greedy(),
        max_new,
        end_tokens: Vec::new(),
    };
    Generator::new(session, &prompts, config)?.run(|_| ControlFlow::Continue(()))?;
    Ok(())
}
