//! Decoding: a token of each sequence is read and the next one chosen, all of it on the device.
//!
//! Between two ends of a segment nothing but numbers in the step's tables changes from one step to the next. So the
//! first such step runs as every other, the second is recorded, and from then on steps are replays of it. Steps in
//! which a segment begins or is complete run as usual in between; what was recorded stays good, since everything it
//! touches stays where it is.

use super::{Session, Step};
use crate::device::sampler::SamplerConfig;
use crate::device::{Device, Purpose, Recording, Result, Sampled, Samplers};
use crate::model::state::SequenceState;

/// Rows of a segment that a recording is good for, at least; then twice as many, until the slot's room is reached.
const LEAST_REACH: usize = 1024;

/// How a session's sequences choose tokens, and the steps in which they do.
#[derive(Debug)]
pub(in crate::model) struct Decoding<D: Device> {
    samplers: Option<D::Samplers>,
    steps: Option<Steps<D>>,
}

/// Steps of the same sequences.
#[derive(Debug)]
struct Steps<D: Device> {
    sequences: Vec<usize>,
    reach: usize,
    placed: D::Step,
    /// Whether the step before was one of these, so that the device knows all that stays.
    warm: bool,
    recording: Option<D::Recording>,
}

impl<D: Device> Default for Decoding<D> {
    fn default() -> Self {
        Self {
            samplers: None,
            steps: None,
        }
    }
}

impl<D: Device> Decoding<D> {
    /// Other tokens are read: the next step tells the device all that it needs to know.
    pub(super) fn interrupt(&mut self) {
        if let Some(steps) = &mut self.steps {
            steps.warm = false;
        }
    }

    fn samplers(&mut self) -> &mut D::Samplers {
        let samplers = self.samplers.as_mut();
        samplers.expect("`Session::choose_by` comes before sampling")
    }
}

impl<D: Device> Session<'_, D> {
    /// Says how the sequences choose their tokens: the settings, and for each its random stream and the tokens that the
    /// repetition penalty sees besides those it chooses. Every stream begins anew.
    ///
    /// # Errors
    /// A setting out of its range, or what the device says.
    pub fn choose_by(
        &mut self,
        config: &SamplerConfig,
        streams: &[u64],
        histories: &[&[u32]],
    ) -> Result<()> {
        let (device, vocab) = (&self.model.device, self.model.config.vocab_size);
        self.decoding = Decoding {
            samplers: Some(D::Samplers::new(device, config, streams, histories, vocab)?),
            steps: None,
        };
        Ok(())
    }

    /// Chooses the next token of each of these sequences, which have read at least one.
    ///
    /// # Errors
    /// [`DeviceError::Sampler`](crate::device::DeviceError::Sampler), or what the device says.
    ///
    /// # Panics
    /// Without a call of [`Session::choose_by`] before, here and in [`Session::decode`].
    pub fn sample(&mut self, sequences: &[usize]) -> Result<Vec<Sampled>> {
        if sequences.is_empty() {
            return Ok(Vec::new());
        }
        let device = &self.model.device;
        let samplers = self.decoding.samplers();
        samplers.select(device, sequences)?;
        device.together(|| samplers.sample(device, &mut self.logits))?;
        samplers.sampled(device, &self.logits)
    }

    /// Reads one token of each of these sequences, and chooses the next one. The same as [`Session::feed`] and
    /// [`Session::sample`], to the bit.
    ///
    /// # Errors
    /// As [`Session::sample`]. The sequences and their random streams are where they were then, and the same step can
    /// be made again. [`Session::logits`] are undefined until then.
    pub fn decode(&mut self, next: &[(usize, u32)]) -> Result<Vec<Sampled>> {
        if next.is_empty() {
            return Ok(Vec::new());
        }
        let sequences: Vec<usize> = next.iter().map(|(sequence, _)| *sequence).collect();
        let device = &self.model.device;
        self.undone_on_error(|session| {
            let decoded = device.together(|| session.decode_step(next, sequences));
            decoded.map_err(|error| error.wanted_for(Purpose::Activations))?;
            session.decoding.samplers().sampled(device, &session.logits)
        })
    }

    fn decode_step(&mut self, next: &[(usize, u32)], sequences: Vec<usize>) -> Result<()> {
        let device = &self.model.device;
        let step = self.next_rows(next);
        self.decoding.samplers().select(device, &sequences)?;
        let mut steps = self.placed(&step, sequences)?;
        if steps.warm && !self.hands_over(&step) {
            if steps.recording.is_none() {
                let placed = &mut steps.placed;
                let recorded = device.record(|| self.run(&step, placed))?;
                steps.recording = recorded.map(|((), recording)| recording);
            }
            if let Some(recording) = &steps.recording {
                recording.replay()?;
                self.decoding.steps = Some(steps);
                return Ok(());
            }
        }
        self.run(&step, &mut steps.placed)?;
        steps.warm = true;
        self.decoding.steps = Some(steps);
        Ok(())
    }

    /// The next row of each sequence, in the slots of their open segments also where a row is a segment of its own.
    fn next_rows(&mut self, next: &[(usize, u32)]) -> Step {
        let mut step = Step::default();
        for (sequence, token) in next {
            let (cursor, token) = (&mut self.cursors[*sequence], std::slice::from_ref(token));
            let part = self.plan.next_part(cursor.rows, token.into(), 0);
            let rows = &token[..part.rows];
            step.push(*sequence, *sequence, cursor.rows, rows, part.closes);
            cursor.advance(part);
        }
        step
    }

    /// Puts the step where the last one of the same sequences was, if it may stay there.
    fn placed(&mut self, step: &Step, sequences: Vec<usize>) -> Result<Steps<D>> {
        let device = &self.model.device;
        let room = self.flight.open(device, &self.plan)?.room;
        let mut rows = step.rows(&self.plan, room);
        rows.reach = (rows.reach.next_power_of_two().max(LEAST_REACH)).min(room);
        let reach = rows.reach;
        let same = |steps: &Steps<D>| steps.sequences == sequences && steps.reach == reach;
        match self.decoding.steps.take().filter(same) {
            Some(mut steps) => {
                device.renew(&mut steps.placed, rows)?;
                Ok(steps)
            }
            None => Ok(Steps {
                placed: device.step(rows)?,
                sequences,
                reach,
                warm: false,
                recording: None,
            }),
        }
    }

    /// Whether a segment begins in the step, or is complete after it.
    fn hands_over(&self, step: &Step) -> bool {
        step.spans.iter().any(|s| s.rows.start == 0 || s.closes)
    }

    /// The step's calls. All that they use and that stays is where it was in the step before.
    fn run(&mut self, step: &Step, placed: &mut D::Step) -> Result<()> {
        let mut states: Vec<&mut SequenceState<D>> = self.states.iter_mut().collect();
        let (model, plan) = (self.model, &self.plan);
        let slots = self.flight.open(&model.device, plan)?;
        let forward = model.forward(plan, step, placed, &mut states, slots, |_, _| ())?;
        let spans = step.spans.iter();
        let ended: Vec<(usize, usize)> = spans.map(|s| (s.sequence, s.rows.row)).collect();
        for ended in ended.chunks(D::LOGIT_ROWS) {
            self.take_logits(&forward, ended)?;
        }
        let samplers = self.decoding.samplers();
        samplers.sample(&model.device, &mut self.logits)
    }
}
