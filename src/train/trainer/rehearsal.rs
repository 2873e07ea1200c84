//! What a run does, in a dry run.

use super::Trainer;
use crate::device::Device;
use crate::train::data::Example;
use crate::train::error::Result;

impl<D: Device> Trainer<D> {
    /// Steps on `sequences` sequences of `tokens` predictions each, one on `others` if there are some, and a
    /// validation: all that a run does, for its memory.
    ///
    /// # Errors
    /// As [`Trainer::step_on`].
    pub fn rehearse(
        &mut self,
        sequences: usize,
        tokens: usize,
        others: Vec<Example>,
    ) -> Result<()> {
        let (ranks, sequence) = (self.ranks().world(), vec![0u32; tokens + 1]);
        // What ranks exchange is allocated late in the first step. The second has to find room around it.
        for _ in 0..ranks.min(2) {
            self.step_on(&[vec![sequence.clone(); sequences]])?;
        }
        if !others.is_empty() {
            self.step_on(&[others])?;
        }
        self.validate(&vec![sequence; self.spread.ranks.world()])?;
        Ok(())
    }
}
