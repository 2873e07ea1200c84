//! The slots of a session's segments.

use crate::device::{Device, Result};
use crate::model::decoder::Decoder;
use crate::model::state::{Angles, Plan, Slots};

/// Slots of a session's segments in flight, allocated on first use.
#[derive(Debug)]
pub struct Flight<D: Device> {
    angles: Angles<D>,
    sequences: usize,
    /// Capacity of a slot, in rows.
    pub room: usize,
    open: Option<Slots<D>>,
    passing: Option<Slots<D>>,
}

impl<D: Device> Flight<D> {
    /// For so many sequences, in slots of `room` rows.
    pub fn new(model: &Decoder<D>, plan: &Plan, sequences: usize, room: usize) -> Result<Self> {
        Ok(Self {
            angles: Angles::new(&model.device, &model.config, plan, room)?,
            sequences,
            room,
            open: None,
            passing: None,
        })
    }

    /// One slot for each sequence, which keeps its segment across steps.
    pub fn open(&mut self, device: &D, plan: &Plan) -> Result<&mut Slots<D>> {
        // The slots for whole segments are not needed any more: free them first.
        self.passing = None;
        if self.open.is_none() {
            let slots = Slots::new(device, plan, &self.angles, self.sequences, self.room)?;
            self.open = Some(slots);
        }
        Ok(self.open.as_mut().expect("just made"))
    }

    /// The slots of segments that are being read, if there are any.
    pub fn opened(&self) -> Option<&Slots<D>> {
        self.open.as_ref()
    }

    /// `count` slots for whole segments.
    pub fn passing(&mut self, device: &D, plan: &Plan, count: usize) -> Result<&mut Slots<D>> {
        if self.passing.is_none() {
            let slots = Slots::passing(device, plan, &self.angles, count, self.room)?;
            self.passing = Some(slots);
        }
        Ok(self.passing.as_mut().expect("just made"))
    }
}
