//! Decoding: a step reads one token of each sequence and samples the next one, on the device.
//!
//! Within a segment, steps differ only in the numbers of the step's tables. So the first step within a segment runs
//! normally, the second is recorded, and the following ones replay the recording. Steps in which a segment begins or
//! ends run normally. The recording stays valid across them, because the buffers that it uses do not move.

use super::follow::Command;
use super::{Session, Step};
use crate::device::sampler::SamplerConfig;
use crate::device::{Device, Purpose, Recording, Result, Sampled, Samplers};
use crate::model::segmentation::End;
use crate::model::state::SequenceState;

/// A recording is valid up to a number of rows of the segment. This is the first such number; it doubles up to the
/// capacity of the slot.
const LEAST_REACH: usize = 1024;

/// The samplers of a session, and its decoding steps.
#[derive(Debug)]
pub(in crate::model) struct Decoding<D: Device> {
    samplers: Option<D::Samplers>,
    steps: Option<Steps<D>>,
}

/// Decoding steps of the same sequences.
#[derive(Debug)]
struct Steps<D: Device> {
    sequences: Vec<usize>,
    reach: usize,
    placed: D::Step,
    /// Whether the previous step was one of these. Only then does the device have all that does not change.
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
    /// To be called when tokens are read in any other way: the next step then runs normally.
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
    /// Sets how tokens are sampled: the settings for all sequences, and for each sequence its random stream and its
    /// history. The repetition penalty applies to the history and to sampled tokens. All streams start at position 0.
    ///
    /// # Errors
    /// A setting outside its range, or an error of the device.
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

    /// Sets how the tokens of one sequence are sampled, from the beginning of its random stream. The others go on as
    /// they were. Until they are set, sequences take the likeliest token.
    ///
    /// # Errors
    /// As [`Session::choose_by`].
    pub fn choose_one_by(
        &mut self,
        sequence: usize,
        config: &SamplerConfig,
        stream: u64,
        history: &[u32],
    ) -> Result<()> {
        if self.decoding.samplers.is_none() {
            let sequences = self.sequences();
            let (streams, histories) = (vec![0; sequences], vec![&[][..]; sequences]);
            self.choose_by(&SamplerConfig::greedy(), &streams, &histories)?;
        }
        let device = &self.model.device;
        let samplers = self.decoding.samplers();
        samplers.set(device, sequence, config, stream, history)
    }

    /// Samples the next token of each of these sequences. Each must have read at least one token.
    ///
    /// # Errors
    /// [`DeviceError::Sampler`](crate::device::DeviceError::Sampler), or another error of the device.
    ///
    /// # Panics
    /// If [`Session::choose_by`] was not called before. The same holds for [`Session::decode`].
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

    /// Reads one token of each of these sequences and samples the next one. The result has the same bits as that of
    /// [`Session::feed`] and [`Session::sample`].
    ///
    /// # Errors
    /// As [`Session::sample`]. After an error the sequences and random streams are unchanged, and the same step can be
    /// made again. [`Session::logits`] are undefined until a step succeeds.
    pub fn decode(&mut self, next: &[(usize, u32)]) -> Result<Vec<Sampled>> {
        if next.is_empty() {
            return Ok(Vec::new());
        }
        if !self.model.stage.is_whole() {
            self.told.tell(&Command::Decode(next.to_vec()))?;
        }
        let sequences: Vec<usize> = next.iter().map(|(sequence, _)| *sequence).collect();
        let device = &self.model.device;
        self.undone_on_error(|session| {
            let decoded = device.together(|| session.decode_step(next, sequences));
            decoded.map_err(|error| error.wanted_for(Purpose::Activations))?;
            session.decoding.samplers().sampled(device, &session.logits)
        })
    }

    /// [`Session::decode`] of a stage that is not the last (`model::stage`): its layers' part of the step.
    ///
    /// # Errors
    /// Those of the device.
    pub fn pass_on_decoding(&mut self, next: &[(usize, u32)]) -> Result<()> {
        let sequences = next.iter().map(|(sequence, _)| *sequence).collect();
        let device = &self.model.device;
        self.undone_on_error(|session| device.together(|| session.decode_step(next, sequences)))
    }

    fn decode_step(&mut self, next: &[(usize, u32)], sequences: Vec<usize>) -> Result<()> {
        let device = &self.model.device;
        let step = self.next_rows(next);
        let part = &self.model.config.part;
        if part.ends {
            self.decoding.samplers().select(device, &sequences)?;
        }
        let mut steps = self.placed(&step, sequences)?;
        // What comes from other stages cannot be recorded.
        let is_whole = self.model.stage.is_whole();
        if steps.warm && is_whole && !self.hands_over(&step) {
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
            let part = self.plan.next_part(*cursor, token.into(), 0);
            let rows = &token[..part.rows];
            step.push(*sequence, *sequence, cursor.rows, rows, part.end);
            cursor.advance(part);
        }
        step
    }

    /// Places the step on the device. It reuses the memory of the previous step of the same sequences if that fits.
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

    /// Whether a segment begins or ends in the step.
    fn hands_over(&self, step: &Step) -> bool {
        step.spans
            .iter()
            .any(|s| s.rows.start == 0 || s.end != End::Open)
    }

    /// The device calls of a step. They use the buffers of the previous step, so that they can be recorded.
    fn run(&mut self, step: &Step, placed: &mut D::Step) -> Result<()> {
        let mut states: Vec<&mut SequenceState<D>> = self.states.iter_mut().collect();
        let (model, plan) = (self.model, &self.plan);
        let slots = self.flight.open(&model.device, plan)?;
        let forward = model.forward(plan, step, placed, &mut states, slots, |_, _| ())?;
        let Some(forward) = forward else {
            return Ok(());
        };
        let spans = step.spans.iter();
        let ended: Vec<(usize, usize)> = spans.map(|s| (s.sequence, s.rows.row)).collect();
        for ended in ended.chunks(D::LOGIT_ROWS) {
            self.take_logits(&forward, ended)?;
        }
        let samplers = self.decoding.samplers();
        samplers.sample(&model.device, &mut self.logits)
    }
}
