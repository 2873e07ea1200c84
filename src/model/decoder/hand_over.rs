//! The hand-over between segments: what a segment that begins reads of the segments before it, and what one that is
//! complete leaves.

use super::{Decoder, Span, Step};
use crate::device::{Device, Result};
use crate::model::state::{
    Carry, Complete, Plan, SequenceState, Slots, close_segments, open_segments,
};

impl<D: Device> Decoder<D> {
    /// Opens the segments that begin and closes those that are complete: of different sequences together, and those of
    /// one sequence in their order.
    pub(super) fn pass_on(
        &self,
        plan: &Plan,
        l: usize,
        step: &Step,
        states: &mut [&mut SequenceState<D>],
        slots: &mut Slots<D>,
    ) -> Result<()> {
        let mut spans = &step.spans[..];
        while !spans.is_empty() {
            let mut carries: Vec<Option<&mut Carry<D>>> =
                states.iter_mut().map(|s| Some(&mut s.layers[l])).collect();
            // Up to the first span whose sequence comes again.
            let taken = spans.iter().map_while(|span| carries[span.sequence].take());
            let taken: Vec<&mut Carry<D>> = taken.collect();
            let (now, later) = spans.split_at(taken.len());
            self.hand_over(plan, l, now, taken, slots)?;
            spans = later;
        }
        Ok(())
    }

    /// [`Decoder::pass_on`] for spans of different sequences, with their states.
    fn hand_over(
        &self,
        plan: &Plan,
        l: usize,
        spans: &[Span],
        carries: Vec<&mut Carry<D>>,
        slots: &mut Slots<D>,
    ) -> Result<()> {
        let (layer, tables) = slots.layer_mut(l);
        let opening = spans.iter().zip(&carries);
        let opening = opening.filter(|(span, _)| span.rows.start == 0);
        let opening: Vec<(usize, &Carry<D>)> = opening
            .map(|(span, carry)| (span.rows.slot, &**carry))
            .collect();
        if !opening.is_empty() {
            open_segments(&self.device, plan, l, &opening, layer, tables)?;
        }
        let closing = spans.iter().zip(carries).filter(|(span, _)| span.closes);
        let closing = closing.map(|(span, carry)| Complete {
            slot: span.rows.slot,
            rows: span.rows.start + span.rows.rows,
            carry,
        });
        let mut closing: Vec<Complete<'_, D>> = closing.collect();
        if closing.is_empty() {
            return Ok(());
        }
        close_segments(&self.device, plan, l, layer, &mut closing, tables)
    }
}
