//! The engine: one thread that owns the model's session. Sequences join and leave between steps.
//!
//! A turn of its loop takes new requests, reads at most so many tokens of prompts, and then chooses one more token for
//! every sequence whose prompt has been read. What a sequence yields does not depend on the others
//! (docs/contract.md, section 4).

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Instant;

use super::job::{Command, End, Event, Failure, Handle, Job, PromptRead, Token};
use super::prefixes::Prefixes;
use super::running::{Running, pauses};
use super::shared::Shared;
use crate::device::{Device, DeviceError};
use crate::generate::{Finish, GenerateError, Generator, NewToken, Prompt};
use crate::model::decoder::Decoder;
use crate::model::segmentation::{Sequence, Tokens};
use crate::model::session::Session;
use crate::model::session_file::SavedSequence;
use crate::model::tokenizer::Tokenizer;

/// A sequence that waits for a place, and since when.
type Waiting = (Box<Job>, Instant);

/// The channel's end that the engine takes its work from.
#[derive(Debug)]
pub struct Inbox(Receiver<Command>);

/// Both ends of the channel between HTTP and the engine.
pub fn connect(shared: Arc<Shared>) -> (Handle, Inbox) {
    let (to, from): (Sender<Command>, Receiver<Command>) = channel();
    (Handle { to, shared }, Inbox(from))
}

/// Generates what comes through `inbox`, until nobody can send any more and all has ended. `text` is the model's
/// tokenizer, where it has one.
///
/// # Errors
/// The device has no memory for the sequences. What fails later is told to those who asked for it.
pub fn run<D: Device>(
    model: &Decoder<D>,
    text: Option<&Tokenizer>,
    shared: &Shared,
    inbox: &Inbox,
) -> Result<(), DeviceError> {
    let _ended = Ended(shared);
    let limits = shared.limits;
    let mut session = Session::new(model, limits.running, limits.longest, 1)?;
    let mut engine = Engine {
        generator: Generator::idle(&mut session),
        text,
        shared,
        places: (0..limits.running).map(|_| None).collect(),
        waiting: VecDeque::new(),
        prefixes: Prefixes::new(limits.cache_bytes),
        arrivals: 0,
    };
    while engine.turn(inbox) {}
    Ok(())
}

/// Says that the engine has ended, however it has.
struct Ended<'s>(&'s Shared);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        self.0.places.close();
    }
}

struct Engine<'s, 'm, D: Device> {
    generator: Generator<'s, 'm, D>,
    text: Option<&'s Tokenizer>,
    shared: &'s Shared,
    /// What each sequence of the session does.
    places: Vec<Option<Running>>,
    waiting: VecDeque<Waiting>,
    prefixes: Prefixes,
    /// Sequences that have been given a place.
    arrivals: u64,
}

impl<D: Device> Engine<'_, '_, D> {
    /// One turn; whether there will be another.
    fn turn(&mut self, inbox: &Inbox) -> bool {
        let idle = self.waiting.is_empty() && self.places.iter().all(Option::is_none);
        if idle {
            match inbox.0.recv() {
                Ok(command) => self.take(command),
                Err(_) => return false,
            }
        }
        while let Ok(command) = inbox.0.try_recv() {
            self.take(command);
        }
        self.forget_cancelled();
        self.fill_places();
        self.read();
        self.choose();
        self.count();
        true
    }

    fn take(&mut self, command: Command) {
        match command {
            Command::Run(job) => self.waiting.push_back((job, Instant::now())),
            Command::Cut => {
                for (job, _) in std::mem::take(&mut self.waiting) {
                    job.events.send(Event::Failed(Failure::Stopping));
                }
                for place in 0..self.places.len() {
                    self.fail(place, Failure::Stopping);
                }
            }
        }
    }

    /// Ends what nobody waits for any more.
    fn forget_cancelled(&mut self) {
        let before = self.waiting.len();
        self.waiting.retain(|(job, _)| !job.events.nobody_listens());
        let left = (before - self.waiting.len()) as u64;
        add(&self.shared.metrics.ended[1], left);
        for place in 0..self.places.len() {
            let running = self.places[place].as_ref();
            if running.is_some_and(|r| r.job.events.nobody_listens()) {
                add(&self.shared.metrics.ended[1], 1);
                self.leave(place);
            }
        }
    }

    fn fill_places(&mut self) {
        while let Some(place) = self.places.iter().position(Option::is_none) {
            // One that begins with a prompt which is just being read waits for its state.
            let later = |(job, _): &Waiting| {
                let reads = |r: &Running| r.reads() && r.job.prompt == job.prompt;
                let same = self.places.iter().flatten().any(reads);
                same && self.prefixes.enabled() && job.prompt_top.is_none()
            };
            let Some(next) = self.waiting.iter().position(|waiting| !later(waiting)) else {
                return;
            };
            if let Some((job, since)) = self.waiting.remove(next) {
                self.start(place, job, since);
            }
        }
    }

    fn start(&mut self, place: usize, job: Box<Job>, since: Instant) {
        self.arrivals += 1;
        let mut running = match Running::new(job, since, self.arrivals) {
            Ok(running) => running,
            Err((job, failure)) => {
                add(&self.shared.metrics.ended[2], 1);
                job.events.send(Event::Failed(failure));
                return;
            }
        };
        let started = self.begin(place, &mut running);
        self.places[place] = Some(running);
        match started {
            Ok(()) => self.after_reading(place),
            Err(error) => self.fail(place, Failure::Engine(error.to_string())),
        }
    }

    /// Puts the prompt into the sequence, behind what is known of it.
    fn begin(&mut self, place: usize, running: &mut Running) -> Result<(), GenerateError> {
        let job = &running.job;
        let prompt = Sequence {
            tokens: &job.prompt,
            breaks: &job.breaks,
            rereads: &job.rereads,
        };
        // The scores of tokens that were read for another request are not known.
        let hit = match job.prompt_top {
            None => self.prefixes.find(prompt),
            Some(_) => None,
        };
        let read = match &hit {
            Some(hit) => {
                self.generator.restore(place, &hit.state, hit.tokens)?;
                hit.tokens
            }
            None => {
                self.generator.leave(place)?;
                0
            }
        };
        let (before, tokens) = job.prompt.split_at(read);
        let rest = read..job.prompt.len();
        let breaks = prompt.breaks_within(rest.clone());
        let rereads = prompt.rereads_within(rest);
        let left = Sequence {
            tokens,
            breaks: &breaks,
            rereads: &rereads,
        };
        if self.prefixes.enabled() {
            let ends = self.generator.session().segment_ends(place, left);
            let ends: Vec<usize> = ends.into_iter().map(|end| end + read).collect();
            let shared = self.prefixes.shared(prompt);
            running.pauses = pauses(job.prompt.len(), &ends, shared);
        }
        let prompt = Prompt {
            before,
            tokens,
            breaks: &breaks,
            rereads: &rereads,
            stream: job.stream,
        };
        let scored = job.prompt_top.is_some();
        self.generator
            .join(place, &prompt, job.config.clone(), scored)?;
        running.cached = read;
        running.saved = hit.map(|hit| hit.state);
        let metrics = &self.shared.metrics;
        add(&metrics.prompt_tokens, job.prompt.len() as u64);
        add(&metrics.cached_tokens, read as u64);
        Ok(())
    }

    /// Reads prompts, those that came first first.
    fn read(&mut self) {
        let mut left = self.shared.limits.read_at_once;
        let mut pieces = Vec::new();
        for place in self.by_arrival() {
            let (unread, position) = (self.generator.unread_of(place), self.position(place));
            if let Some(running) = &self.places[place]
                && unread > 0
                && left > 0
            {
                let tokens = unread.min(left).min(running.until_pause(position));
                pieces.push((place, tokens));
                left -= tokens;
            }
        }
        if pieces.is_empty() {
            return;
        }
        if self.generator.read(&pieces).is_err() {
            // Each alone, so that only the one at fault ends.
            for piece in &pieces {
                if let Err(error) = self.generator.read(&[*piece]) {
                    self.fail(piece.0, Failure::Engine(error.to_string()));
                }
                // What had been read of it was not scored.
                let running = self.places[piece.0].as_ref();
                if running.is_some_and(|r| r.job.prompt_top.is_some()) {
                    self.fail(piece.0, Failure::Engine("the prompt was not scored".into()));
                }
            }
        }
        for (place, _) in pieces {
            self.after_reading(place);
        }
    }

    /// Keeps the state where it is worth it, and ends the prompt once it has been read.
    fn after_reading(&mut self, place: usize) {
        let position = self.position(place);
        let Some(running) = &mut self.places[place] else {
            return;
        };
        if let Some(top @ 1..) = running.job.prompt_top
            && position > 0
            && position < running.job.prompt.len()
        {
            match self.generator.session().likeliest(place, top) {
                Ok(likeliest) => running.prompt_top.push(likeliest),
                Err(error) => return self.fail(place, Failure::Engine(error.to_string())),
            }
        }
        if running.paused(position) {
            self.keep(place);
        }
        if self.generator.unread_of(place) > 0 {
            return;
        }
        let Some(running) = &mut self.places[place] else {
            return;
        };
        running.prompt_read = true;
        let prompt = PromptRead {
            cached: running.cached,
            scores: self.generator.scores(place).to_vec(),
            top: std::mem::take(&mut running.prompt_top),
        };
        running.job.events.send(Event::Prompt(prompt));
        if running.job.config.max_new == 0 {
            self.end(place, false, String::new());
        }
    }

    /// One more token for every sequence whose prompt has been read.
    fn choose(&mut self) {
        let ready = self.generator.ready();
        if ready.is_empty() {
            return;
        }
        add(&self.shared.metrics.steps, 1);
        let mut chosen = self.advance(&ready);
        if chosen.len() < ready.len() {
            // Those that had none yet came first.
            let new = |place: &usize| chosen.iter().any(|token| token.sequence == *place);
            let others: Vec<usize> = ready.into_iter().filter(|place| !new(place)).collect();
            chosen.extend(self.advance(&others));
        }
        for token in chosen {
            self.give(token);
        }
    }

    fn advance(&mut self, places: &[usize]) -> Vec<NewToken> {
        match (self.generator.advance(places), places) {
            (Ok(chosen), _) => chosen,
            (Err(error), [place]) => {
                self.fail(*place, Failure::Engine(error.to_string()));
                Vec::new()
            }
            // Each alone, so that only the one at fault ends.
            (Err(_), _) => {
                let each = places.iter().flat_map(|place| self.advance(&[*place]));
                each.collect()
            }
        }
    }

    /// Tells of a new token.
    fn give(&mut self, new: NewToken) {
        let place = new.sequence;
        let Some(running) = &mut self.places[place] else {
            return;
        };
        let mut token = Token {
            id: new.token,
            log_probability: new.log_probability,
            top: Vec::new(),
            text: String::new(),
        };
        if running.job.top > 0 {
            let session = self.generator.session();
            match session.likeliest(place, running.job.top) {
                Ok(likeliest) => token.top = likeliest,
                Err(error) => return self.fail(place, Failure::Engine(error.to_string())),
            }
        }
        let ends = new.finish == Some(Finish::EndToken);
        let text = match running.take(&token, ends, new.finish.is_some(), self.text) {
            Ok(text) => text,
            Err(failure) => return self.fail(place, failure),
        };
        token.text = text.certain;
        let metrics = &self.shared.metrics;
        add(&metrics.new_tokens, 1);
        match running.last.replace(Instant::now()) {
            None => metrics.first_token.add(running.since.elapsed()),
            Some(last) => metrics.next_token.add(last.elapsed()),
        }
        running.job.events.send(Event::Token(token));
        if text.stopped || new.finish.is_some() {
            self.end(place, ends || text.stopped, text.rest);
        }
    }

    /// Ends a sequence, and keeps its state for a request that goes on from it.
    fn end(&mut self, place: usize, stopped: bool, text: String) {
        self.generator.stop(place);
        if self.prefixes.enabled() {
            self.keep(place);
        }
        if let Some(running) = &self.places[place] {
            self.shared.metrics.whole.add(running.since.elapsed());
            add(&self.shared.metrics.ended[0], 1);
            running.job.events.send(Event::End(End { stopped, text }));
        }
        self.leave(place);
    }

    fn fail(&mut self, place: usize, failure: Failure) {
        if let Some(running) = &self.places[place] {
            tracing::warn!("a sequence failed: {failure}");
            add(&self.shared.metrics.ended[2], 1);
            running.job.events.send(Event::Failed(failure));
            self.leave(place);
        }
    }

    fn leave(&mut self, place: usize) {
        self.places[place] = None;
        if let Err(error) = self.generator.leave(place) {
            // The next sequence in this place empties it again, or fails.
            tracing::warn!("{error}");
        }
    }

    /// Keeps the state of a sequence as it is now.
    fn keep(&mut self, place: usize) {
        let session = self.generator.session();
        let position = session.position(place);
        let Some(running) = &mut self.places[place] else {
            return;
        };
        let known = running.saved.as_deref();
        if known.is_some_and(|known| known.position() == position) || position == 0 {
            return;
        }
        match SavedSequence::new(session, place, known) {
            Ok(state) => {
                let state = Arc::new(state);
                let read = |positions: &[usize]| {
                    let within = positions.partition_point(|b| *b <= position);
                    positions[..within].to_vec()
                };
                let read = Tokens {
                    ids: running.tokens[..position].to_vec(),
                    breaks: read(&running.job.breaks),
                    rereads: read(&running.job.rereads),
                };
                running.saved = Some(state.clone());
                self.prefixes.keep(read, state);
            }
            Err(error) => tracing::warn!("the state of a prompt is not kept: {error}"),
        }
    }

    fn position(&self, place: usize) -> usize {
        self.generator.session().position(place)
    }

    fn by_arrival(&self) -> Vec<usize> {
        let arrival = |place: &usize| self.places[*place].as_ref().map(|r| r.arrival);
        let mut places: Vec<usize> = (0..self.places.len()).collect();
        places.retain(|place| arrival(place).is_some());
        places.sort_unstable_by_key(arrival);
        places
    }

    fn count(&self) {
        let metrics = &self.shared.metrics;
        let running = self.places.iter().flatten().count();
        metrics.running.store(running, Ordering::Relaxed);
        metrics.waiting.store(self.waiting.len(), Ordering::Relaxed);
        for (count, value) in metrics.cache.iter().zip(self.prefixes.size()) {
            count.store(value, Ordering::Relaxed);
        }
    }
}

fn add(count: &AtomicU64, more: u64) {
    count.fetch_add(more, Ordering::Relaxed);
}
