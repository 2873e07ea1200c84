//! A sequence saved in host memory. States of one text share the tokens of their pools.

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::Arc;

use super::layout::{self, Part, Shapes};
use super::restore::{self, Source};
use crate::device::{Device, DeviceError, Result, SelectedBlocks};
use crate::model::segmentation::Cursor;
use crate::model::session::Session;

/// A sequence of a session as it was when it was saved, in f32: restored into a session of the same model and device,
/// it goes on to the same bits.
#[derive(Debug, Clone)]
pub struct SavedSequence {
    cursor: Cursor,
    parts: HashMap<Part, Arc<[f32]>>,
    /// Of each layer, the tokens that each head of its pool has selected.
    selected: Vec<Vec<Vec<usize>>>,
    /// Whether the state after fewer tokens of the open segment can be had from it: the queries that retrieval would
    /// begin from are not kept.
    divisible: bool,
}

impl SavedSequence {
    /// Saves a sequence. Keys and values in the pool that `earlier` holds as well, the state after fewer tokens of the
    /// same text, are shared with it.
    ///
    /// # Errors
    /// Those of the device.
    pub fn new<D: Device>(
        session: &Session<'_, D>,
        sequence: usize,
        earlier: Option<&Self>,
    ) -> Result<Self> {
        let plan = &session.plan;
        let completed = session.cursors[sequence].completed();
        let full = earlier.map_or(0, |earlier| {
            let before = earlier.cursor.completed();
            // A pool that has dropped tokens since has others now.
            let same = completed == before || completed == plan.held(completed);
            // A part that is not full in the earlier state has more tokens now.
            usize::from(same) * (plan.held(before) / plan.segment_len)
        });
        let mut parts = HashMap::new();
        for (part, _) in layout::sequence_parts(session, sequence, 0) {
            let shared = match part {
                Part::Selected(..) => continue,
                Part::Pool(_, number) if number < full => earlier.and_then(|e| e.parts.get(&part)),
                _ => None,
            };
            let values = match shared {
                Some(values) => values.clone(),
                None => layout::values(session, sequence, part)?.into(),
            };
            parts.insert(part, values);
        }
        let layers = session.states[sequence].layers.iter();
        let selected = layers.map(|carry| carry.selected.tokens(&session.model.device));
        Ok(Self {
            cursor: session.cursors[sequence],
            parts,
            selected: selected.collect::<Result<_>>()?,
            divisible: plan.reads.iter().all(|reads| reads.past.is_empty()),
        })
    }

    /// Tokens that the sequence has read.
    pub fn position(&self) -> usize {
        self.cursor.position
    }

    /// The fewest tokens from whose state on it can be restored: all of them where heads read the past, else those of
    /// complete segments.
    pub fn least(&self) -> usize {
        match self.divisible {
            true => self.cursor.completed(),
            false => self.cursor.position,
        }
    }

    /// Blocks of memory that it holds: an address that tells shared ones, and bytes.
    pub fn blocks(&self) -> impl Iterator<Item = (usize, usize)> {
        let block = |block: &Arc<[f32]>| (block.as_ptr().addr(), size_of_val::<[f32]>(block));
        self.parts.values().map(block)
    }

    /// Puts the state after its first `tokens` tokens in place of a sequence's own. The session is one of the same
    /// model. Where `tokens` are fewer than all, the sequence has no logits until it has read another token.
    ///
    /// # Errors
    /// [`DeviceError::Argument`] for a number of tokens that it has not the state after or that the session has no room
    /// for, or what the device says. The sequence is undefined then: restart it.
    pub fn restore<D: Device>(
        &self,
        session: &mut Session<'_, D>,
        sequence: usize,
        tokens: usize,
    ) -> Result<()> {
        let most = self.position().min(session.capacity());
        if tokens < self.least() || tokens > most {
            let expected = format!("from {} to {most}", self.least());
            return Err(DeviceError::argument(
                "tokens of a saved state",
                expected,
                tokens,
            ));
        }
        session.restart(sequence)?;
        let cursor = Cursor {
            position: tokens,
            rows: tokens - self.cursor.completed(),
            asked: self.cursor.asked,
        };
        restore::sequence(&mut Saved(self), sequence, cursor, session)
    }
}

struct Saved<'s>(&'s SavedSequence);

impl Source for Saved<'_> {
    type Error = DeviceError;

    fn floats(&mut self, part: Part, shape: &[usize]) -> Result<Cow<'_, [f32]>> {
        let values = self.0.parts.get(&part).map_or(&[][..], |values| values);
        let wanted: usize = shape.iter().product();
        if wanted == values.len() {
            return Ok(Cow::Borrowed(values));
        }
        // Fewer rows of the open segment: the first ones of keys and of values.
        let (k, v) = values.split_at(values.len() / 2);
        Ok(Cow::Owned([&k[..wanted / 2], &v[..wanted / 2]].concat()))
    }

    fn selected(&mut self, l: usize, h: usize, _: &Shapes, _: usize) -> Result<Vec<usize>> {
        Ok(self.0.selected[l][h].clone())
    }
}
