//! What a run does, in a dry run.

use super::Trainer;
use crate::device::Device;
use crate::train::data::Example;
use crate::train::error::Result;

impl<D: Device> Trainer<D> {
    /// Steps on `sequences` sequences of `tokens` predictions each, and a validation: all that a run does, for its
    /// memory. In segments there is one more step, whose sequences have breaks: its buffers have other sizes, and leave
    /// gaps between them. They are read again as often as the run's tasks ask.
    ///
    /// # Errors
    /// As [`Trainer::step_on`].
    pub fn rehearse(&mut self, sequences: usize, tokens: usize) -> Result<()> {
        let (ranks, sequence) = (self.ranks().world(), vec![0u32; tokens + 1]);
        // What ranks exchange is allocated late in the first step. The second has to find room around it.
        for _ in 0..ranks.min(2) {
            self.step_on(&[vec![sequence.clone(); sequences]])?;
        }
        if let Some(segment) = &self.model.config.segment {
            let (most, times, asked) = (segment.segment_len, segment.reread_suffix, self.asked());
            let others = (0..sequences).map(|i| broken(&sequence, most, i, (times, asked)));
            let others: Vec<Example> = others.collect();
            self.step_on(&[others])?;
        }
        self.validate(&vec![sequence; self.spread.ranks.world()])?;
        Ok(())
    }

    /// Questions of a sequence at most.
    fn asked(&self) -> usize {
        let parts = self.config.data.mixture.iter();
        let tasks = parts.filter_map(|part| part.tasks.as_ref());
        tasks.map(|tasks| tasks.questions).max().unwrap_or(0)
    }
}

/// A sequence with breaks up to `most` tokens apart, at other places for each `seed`. So many of the segments before
/// them, the longest ones, are read again so many times.
fn broken(sequence: &[u32], most: usize, seed: usize, (times, asked): (usize, usize)) -> Example {
    let (mut random, mut at, mut breaks) = (seed as u64, 0, Vec::new());
    loop {
        // Knuth's multiplier; its upper bits are random enough.
        random = random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        at += 1 + (random >> 33) as usize % most;
        if at >= sequence.len() {
            break;
        }
        breaks.push(at);
    }
    let lens = std::iter::once(0).chain(breaks.iter().copied());
    let mut longest: Vec<(usize, usize)> = lens
        .zip(&breaks)
        .map(|(start, end)| (end - start, *end))
        .collect();
    longest.sort_unstable_by(|a, b| b.cmp(a));
    longest.truncate(asked);
    let again = longest.into_iter().map(|(_, end)| end);
    let mut rereads: Vec<usize> = again
        .flat_map(|end| std::iter::repeat_n(end, times))
        .collect();
    rereads.sort_unstable();
    Example {
        tokens: sequence.to_vec(),
        breaks,
        rereads,
        ..Example::default()
    }
}
