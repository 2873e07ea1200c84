//! The generation loop: prompts are read side by side, then every sequence goes on token by token.
//!
//! Each sequence stands at its own position of its own state, draws from its own stream and ends by
//! itself, so nothing that a sequence yields depends on its neighbours: not its tokens and not the
//! bits of their log-probabilities.

use super::error::GenerateError;
use super::sampler::SamplerConfig;
use crate::device::{Device, Sampled};
use crate::model::config::PromptBreak;
use crate::model::segmentation;
use crate::model::session::{Feed, Session};
use crate::model::session_file::SavedSequence;
use std::ops::ControlFlow;

/// Settings that all sequences share.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct GeneratorConfig {
    /// How tokens are chosen.
    pub sampler: SamplerConfig,
    /// Most new tokens of each sequence.
    pub max_new: usize,
    /// Tokens that end a sequence; the one met is its last token. Empty: only the length does.
    pub end_tokens: Vec<u32>,
}

/// What one sequence begins with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Prompt<'a> {
    /// The tokens that the session's sequence has read already, which the repetition penalty sees too; empty where it
    /// has read none or they are not known.
    pub before: &'a [u32],
    /// Its tokens, read after what the session's sequence has read already.
    pub tokens: &'a [u32],
    /// Breaks: a segment ends after so many of `tokens`, strictly ascending. A break at 0 changes nothing.
    pub breaks: &'a [usize],
    /// Rereads, as [`Sequence::rereads`](segmentation::Sequence::rereads) of `tokens`.
    pub rereads: &'a [usize],
    /// Number of the sequence's random stream.
    pub stream: u64,
}

impl<'a> Prompt<'a> {
    fn sequence(&self) -> segmentation::Sequence<'a> {
        segmentation::Sequence {
            tokens: self.tokens,
            breaks: self.breaks,
            rereads: self.rereads,
        }
    }
}

/// Why a sequence ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// It came to an end token.
    EndToken,
    /// It has all the tokens it may have.
    Length,
    /// The caller ended it.
    Stopped,
}

/// A token just chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NewToken {
    /// The sequence it belongs to.
    pub sequence: usize,
    /// Its id.
    pub token: u32,
    /// Its natural-log probability by the model's own distribution: before penalties and temperature.
    pub log_probability: f32,
    /// Why it is the sequence's last token, where it is.
    pub finish: Option<Finish>,
}

/// A sequence's new tokens.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Generated {
    /// Their ids, with the end token if there was one.
    pub tokens: Vec<u32>,
    /// Their log-probabilities, see [`NewToken::log_probability`].
    pub log_probabilities: Vec<f32>,
    /// Why it ended; `None` while it goes on.
    pub finish: Option<Finish>,
}

/// A sequence being generated.
#[derive(Debug, Default)]
struct Sequence {
    config: GeneratorConfig,
    /// The prompt and what came after it.
    history: Vec<u32>,
    /// Breaks of the prompt, with its own among them.
    breaks: Vec<usize>,
    /// Its rereads, likewise.
    rereads: Vec<usize>,
    /// Where the new tokens begin.
    prompt: usize,
    /// Tokens that the session had read before these.
    before: usize,
    /// Tokens of the history that the session has read.
    read: usize,
    /// Whether the tokens of the prompt are scored as they are read.
    scored: bool,
    /// Of the prompt's tokens from the second on, as far as they have been read.
    scores: Vec<f32>,
    log_probabilities: Vec<f32>,
    finish: Option<Finish>,
}

impl Sequence {
    fn new(
        prompt: &Prompt<'_>,
        config: GeneratorConfig,
        (before, own): (usize, PromptBreak),
    ) -> Self {
        let [mut breaks, mut rereads] = [prompt.breaks, prompt.rereads].map(<[usize]>::to_vec);
        own.add(prompt.tokens.len(), &mut breaks, &mut rereads);
        Self {
            before,
            history: prompt.tokens.to_vec(),
            breaks,
            rereads,
            prompt: prompt.tokens.len(),
            finish: (config.max_new == 0).then_some(Finish::Length),
            config,
            ..Self::default()
        }
    }

    /// Of a sequence that nobody has joined.
    fn idle() -> Self {
        Self {
            finish: Some(Finish::Stopped),
            ..Self::default()
        }
    }

    /// Whether its next token can be chosen.
    fn ready(&self) -> bool {
        self.finish.is_none() && self.read >= self.prompt
    }

    fn prompt(&self) -> segmentation::Sequence<'_> {
        segmentation::Sequence {
            tokens: &self.history[..self.prompt],
            breaks: &self.breaks,
            rereads: &self.rereads,
        }
    }

    fn new_tokens(&self) -> usize {
        self.history.len() - self.prompt
    }

    /// Takes the token that it has chosen as number `index`; those before have been read.
    fn take(&mut self, index: usize, sampled: Sampled) -> NewToken {
        let Sampled {
            token,
            log_probability,
        } = sampled;
        self.read = self.history.len();
        self.history.push(token);
        self.log_probabilities.push(log_probability);
        if self.config.end_tokens.contains(&token) {
            self.finish = Some(Finish::EndToken);
        } else if self.new_tokens() == self.config.max_new {
            self.finish = Some(Finish::Length);
        }
        NewToken {
            sequence: index,
            token,
            log_probability,
            finish: self.finish,
        }
    }
}

/// Sequences of a session that go on by tokens of their own.
#[derive(Debug)]
pub struct Generator<'s, 'm, D: Device> {
    session: &'s mut Session<'m, D>,
    config: GeneratorConfig,
    sequences: Vec<Sequence>,
}

impl<'s, 'm, D: Device> Generator<'s, 'm, D> {
    /// A generator over all sequences of `session`, one prompt for each. The repetition penalty sees
    /// the prompt and the new tokens. A prompt may be empty where the session's sequence has read
    /// something before.
    ///
    /// # Errors
    /// Every [`GenerateError`]; nothing has been read then.
    pub fn new(
        session: &'s mut Session<'m, D>,
        prompts: &[Prompt<'_>],
        config: GeneratorConfig,
    ) -> Result<Self, GenerateError> {
        if prompts.len() != session.sequences() {
            return Err(GenerateError::Prompts {
                expected: session.sequences(),
                got: prompts.len(),
            });
        }
        let own = session.model().config.prompt_break();
        let mut sequences = Vec::with_capacity(prompts.len());
        for (i, prompt) in prompts.iter().enumerate() {
            check(session, i, prompt, config.max_new)?;
            let place = (session.position(i), own);
            sequences.push(Sequence::new(prompt, config.clone(), place));
        }
        let streams: Vec<u64> = prompts.iter().map(|p| p.stream).collect();
        let histories: Vec<Vec<u32>> = prompts
            .iter()
            .map(|p| [p.before, p.tokens].concat())
            .collect();
        let histories: Vec<&[u32]> = histories.iter().map(Vec::as_slice).collect();
        session.choose_by(&config.sampler, &streams, &histories)?;
        Ok(Self {
            session,
            config,
            sequences,
        })
    }

    /// A generator over the sequences of `session`, none of which has anything to do until it is joined
    /// ([`Generator::join`]). Sequences join and leave between steps, each with settings of its own.
    pub fn idle(session: &'s mut Session<'m, D>) -> Self {
        let sequences = (0..session.sequences()).map(|_| Sequence::idle());
        Self {
            sequences: sequences.collect(),
            session,
            config: GeneratorConfig::default(),
        }
    }

    /// Gives a sequence a prompt, which it reads after what the session's sequence has read already. What it did
    /// before is forgotten. Its breaks and rereads are all that there are: none is added at its end. With `scored`, the
    /// tokens of the prompt are scored as they are read ([`Generator::scores`]).
    ///
    /// # Errors
    /// As [`Generator::new`]; the sequence is idle then.
    pub fn join(
        &mut self,
        sequence: usize,
        prompt: &Prompt<'_>,
        config: GeneratorConfig,
        scored: bool,
    ) -> Result<(), GenerateError> {
        self.sequences[sequence] = Sequence::idle();
        check(self.session, sequence, prompt, config.max_new)?;
        let history = [prompt.before, prompt.tokens].concat();
        let (sampler, stream) = (&config.sampler, prompt.stream);
        (self.session).choose_one_by(sequence, sampler, stream, &history)?;
        let place = (self.session.position(sequence), PromptBreak::default());
        self.sequences[sequence] = Sequence {
            scored,
            ..Sequence::new(prompt, config, place)
        };
        Ok(())
    }

    /// Puts the state after the first `tokens` tokens of a saved sequence in place of a sequence's own, for a prompt
    /// that goes on from there.
    ///
    /// # Errors
    /// [`GenerateError::Device`], as [`SavedSequence::restore`].
    pub fn restore(
        &mut self,
        sequence: usize,
        state: &SavedSequence,
        tokens: usize,
    ) -> Result<(), GenerateError> {
        self.sequences[sequence] = Sequence::idle();
        Ok(state.restore(self.session, sequence, tokens)?)
    }

    /// Empties a sequence, in the session too: it is free for another prompt.
    ///
    /// # Errors
    /// [`GenerateError::Device`].
    pub fn leave(&mut self, sequence: usize) -> Result<(), GenerateError> {
        self.sequences[sequence] = Sequence::idle();
        Ok(self.session.restart(sequence)?)
    }

    /// Reads what is left of the prompts, at most a chunk of each, and says how many tokens are
    /// still to be read: 0 means that all have been.
    ///
    /// # Errors
    /// [`GenerateError::Device`].
    pub fn read_prompts(&mut self) -> Result<usize, GenerateError> {
        let chunk = self.session.chunk();
        let pieces: Vec<(usize, usize)> = (0..self.sequences.len()).map(|i| (i, chunk)).collect();
        self.read(&pieces)?;
        Ok(self.unread())
    }

    /// Reads so many more tokens of the prompts of these sequences, each named once, or what is left of them; other
    /// numbers where a segment that is read twice would be cut, but at least one token.
    ///
    /// # Errors
    /// [`GenerateError::Device`]. What is left can be read then; the scores of what had been read are lost.
    pub fn read(&mut self, pieces: &[(usize, usize)]) -> Result<(), GenerateError> {
        let mut parts = Vec::new();
        for (i, tokens) in pieces {
            let s = &self.sequences[*i];
            if *tokens == 0 || s.read >= s.prompt {
                continue;
            }
            let prompt = s.prompt();
            let piece = self.session.next_piece(*i, prompt, s.read, *tokens);
            let breaks = prompt.breaks_within(piece.clone());
            let rereads = prompt.rereads_within(piece.clone());
            parts.push((*i, piece, breaks, rereads));
        }
        let feeds: Vec<Feed<'_>> = parts
            .iter()
            .map(|(i, piece, breaks, rereads)| {
                let s = &self.sequences[*i];
                let known = piece.start + 1..s.prompt.min(piece.end + 1);
                Feed {
                    sequence: *i,
                    tokens: &s.history[piece.clone()],
                    targets: if s.scored { &s.history[known] } else { &[] },
                    breaks,
                    rereads,
                }
            })
            .collect();
        let scores = self.session.feed(&feeds);
        // A call that fails may have read a part.
        for (i, ..) in &parts {
            let s = &mut self.sequences[*i];
            s.read = self.session.position(*i) - s.before;
        }
        for ((i, ..), scores) in parts.into_iter().zip(scores?) {
            self.sequences[i].scores.extend(scores);
        }
        Ok(())
    }

    /// The settings that all sequences share.
    pub fn config(&self) -> &GeneratorConfig {
        &self.config
    }

    /// The session, for saving its state.
    pub fn session(&self) -> &Session<'m, D> {
        self.session
    }

    /// The session, to look into and to change what the next segments read.
    pub(crate) fn session_mut(&mut self) -> &mut Session<'m, D> {
        self.session
    }

    /// Tokens of the prompts that are still to be read.
    pub fn unread(&self) -> usize {
        let left = |s: &Sequence| s.prompt.saturating_sub(s.read);
        self.sequences.iter().map(left).sum()
    }

    /// Tokens of a sequence's prompt that are still to be read.
    pub fn unread_of(&self, sequence: usize) -> usize {
        let s = &self.sequences[sequence];
        s.prompt.saturating_sub(s.read)
    }

    /// Log-probabilities of the tokens of a scored prompt, from its second token on, as far as it has been read.
    pub fn scores(&self, sequence: usize) -> &[f32] {
        &self.sequences[sequence].scores
    }

    /// Sequences whose prompt has been read and that have not ended.
    pub fn ready(&self) -> Vec<usize> {
        let each = self.sequences.iter().enumerate();
        each.filter(|(_, s)| s.ready()).map(|(i, _)| i).collect()
    }

    /// One more token for every sequence that has not ended; empty once all have. Reads the
    /// prompts first if they have not been read.
    ///
    /// # Errors
    /// [`GenerateError::Device`] and [`GenerateError::Sampler`].
    pub fn step(&mut self) -> Result<Vec<NewToken>, GenerateError> {
        while self.read_prompts()? > 0 {}
        self.advance(&self.ready())
    }

    /// One more token for each of these sequences that is ready ([`Generator::ready`]): for those alone that have none
    /// yet, if there are any; then for all.
    ///
    /// # Errors
    /// As [`Generator::step`]. The sequences are as they were then, and the same step can be made again.
    pub fn advance(&mut self, sequences: &[usize]) -> Result<Vec<NewToken>, GenerateError> {
        let of = |i: &usize| &self.sequences[*i];
        let ready = sequences.iter().filter(|i| of(i).ready());
        // All have one more token than they have read, but for those right after the prompts.
        let (fresh, going): (Vec<usize>, Vec<usize>) =
            ready.partition(|i| of(i).read == of(i).history.len());
        let (chosen, sampled) = match fresh.is_empty() {
            false => (fresh.clone(), self.session.sample(&fresh)?),
            true => {
                let next = going.iter().map(|i| (*i, of(i).history[of(i).read]));
                let next: Vec<(usize, u32)> = next.collect();
                (going, self.session.decode(&next)?)
            }
        };
        let sequences = &mut self.sequences;
        let one = |(i, sampled): (usize, Sampled)| sequences[i].take(i, sampled);
        Ok(chosen.into_iter().zip(sampled).map(one).collect())
    }

    /// Ends a sequence that has not ended yet.
    pub fn stop(&mut self, sequence: usize) {
        self.sequences[sequence]
            .finish
            .get_or_insert(Finish::Stopped);
    }

    /// What every sequence has yielded so far.
    pub fn generated(&self) -> Vec<Generated> {
        let one = |s: &Sequence| Generated {
            tokens: s.history[s.prompt..].to_vec(),
            log_probabilities: s.log_probabilities.clone(),
            finish: s.finish,
        };
        self.sequences.iter().map(one).collect()
    }

    /// Goes on until every sequence has ended. `on_token` sees each token as it comes; `Break` ends
    /// its sequence.
    ///
    /// # Errors
    /// As [`Generator::step`].
    pub fn run(
        &mut self,
        mut on_token: impl FnMut(&NewToken) -> ControlFlow<()>,
    ) -> Result<Vec<Generated>, GenerateError> {
        loop {
            let chosen = self.step()?;
            if chosen.is_empty() {
                return Ok(self.generated());
            }
            for token in &chosen {
                if on_token(token).is_break() {
                    self.stop(token.sequence);
                }
            }
        }
    }
}

fn check<D: Device>(
    session: &Session<'_, D>,
    prompt: usize,
    given: &Prompt<'_>,
    max_new: usize,
) -> Result<(), GenerateError> {
    let (read, tokens) = (session.position(prompt), given.tokens);
    given.sequence().check()?;
    if tokens.is_empty() && read == 0 {
        return Err(GenerateError::EmptyPrompt { prompt });
    }
    let vocab_size = session.model().config.vocab_size;
    if let Some(at) = tokens.iter().position(|t| *t as usize >= vocab_size) {
        let got = tokens[at];
        return Err(GenerateError::Token {
            prompt,
            at,
            vocab_size,
            got,
        });
    }
    // The last new token is never read.
    let got = read
        .saturating_add(tokens.len())
        .saturating_add(max_new.saturating_sub(1));
    let capacity = session.capacity();
    if got > capacity {
        return Err(GenerateError::TooLong {
            prompt,
            capacity,
            got,
        });
    }
    Ok(())
}
