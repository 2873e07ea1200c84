//! The hand-over between segments: what a segment that begins reads of the segments before it, what one that is
//! complete leaves, and what one that is read again selects.

use super::{Decoder, Span, Step};
use crate::device::{Device, Result};
use crate::model::segmentation::End;
use crate::model::state::{
    Carry, Complete, Opening, PastCalls, Plan, SequenceState, Slots, close_segments, open_segments,
};

impl<D: Device> Decoder<D> {
    /// Opens the segments that begin, closes those that are complete, and selects for those that are read again: of
    /// different sequences together, and those of one sequence in their order.
    pub(super) fn pass_on(
        &self,
        plan: &Plan,
        l: usize,
        step: &Step,
        states: &mut [&mut SequenceState<D>],
        slots: &mut Slots<D>,
    ) -> Result<()> {
        // Most steps of decoding.
        let within = |span: &Span| span.rows.start > 0 && span.end == End::Open;
        if step.spans.iter().all(within) {
            return Ok(());
        }
        let spans = step.in_order();
        let mut spans = &spans[..];
        let mut past = PastCalls::new(states.len());
        while !spans.is_empty() {
            let mut carries: Vec<Option<&mut Carry<D>>> =
                states.iter_mut().map(|s| Some(&mut s.layers[l])).collect();
            // Up to the first span whose sequence comes again.
            let taken = spans.iter().map_while(|span| carries[span.sequence].take());
            let taken: Vec<&mut Carry<D>> = taken.collect();
            let (now, later) = spans.split_at(taken.len());
            self.hand_over(plan, l, now, taken, slots, &mut past)?;
            spans = later;
            // What a pool drops after a segment depends on what it dropped after the one before.
            let due = spans.is_empty() || plan.pool_len.is_some();
            if due && !past.is_empty() {
                let calls = std::mem::replace(&mut past, PastCalls::new(states.len()));
                let carries = states.iter_mut().map(|state| &mut state.layers[l]);
                let mut carries: Vec<&mut Carry<D>> = carries.collect();
                let (layer, tables) = slots.layer_mut(l);
                calls.run(&self.device, plan, l, &mut carries, layer, tables)?;
            }
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
        past: &mut PastCalls,
    ) -> Result<()> {
        let (layer, tables) = slots.layer_mut(l);
        let opening = spans.iter().zip(&carries);
        let opening = opening.filter(|(span, _)| span.rows.start == 0);
        let opening: Vec<Opening<'_, D>> = opening
            .map(|(span, carry)| Opening {
                sequence: span.sequence,
                slot: span.rows.slot,
                carry,
            })
            .collect();
        if !opening.is_empty() {
            open_segments(&self.device, plan, l, &opening, layer, tables, past)?;
        }
        let mut complete = Vec::new();
        for (span, carry) in spans.iter().zip(carries) {
            let (sequence, slot) = (span.sequence, span.rows.slot);
            let rows = span.rows.start + span.rows.rows;
            match span.end {
                End::Open => {}
                End::Complete => complete.push(Complete {
                    sequence,
                    slot,
                    rows,
                    carry,
                }),
                End::Again => past.ask(plan, &plan.reads[l], [sequence, slot, rows], carry),
            }
        }
        match complete.is_empty() {
            true => Ok(()),
            false => close_segments(&self.device, plan, l, layer, &mut complete, tables, past),
        }
    }
}
