//! The past after a segment: its tokens join the pool, those beyond the pool's length are dropped, and retrieval
//! selects for the next segment, or for a segment that is read again (docs/contract.md, section 2).

use std::ops::Range;

use super::{Complete, LayerReads, LayerSlots, Plan};
use crate::device::{Device, PastPool, Probes, Result, Rows, Selection};

impl<D: Device> Complete<'_, D> {
    /// Appends the segment's tokens to the pool, shortens it, and selects what the next segment reads of it.
    pub(super) fn remember(
        &mut self,
        device: &D,
        plan: &Plan,
        layer: usize,
        slots: &LayerSlots<D>,
    ) -> Result<()> {
        let Self { slot, rows, carry } = self;
        let (reads, kv) = (&plan.reads[layer], &slots.kv);
        carry.tokens += *rows;
        let (Some(pool), Some(queries)) = (&mut carry.pool, &slots.probes) else {
            return Ok(());
        };
        if let Some(undo) = &mut carry.undo {
            undo.pool_tokens.get_or_insert(pool.tokens());
        }
        let first = *slot * kv.rows.current;
        let rows_of = |buffer| Rows::packed(buffer, first, plan.kv_width());
        pool.append(device, &reads.past, [&kv.raw_k, &kv.v].map(rows_of), *rows)?;
        let probes = probes(plan, queries, *slot, *rows);
        let prior_rows = carry.prior_rows;
        let eligible = |tokens| eligible(plan, reads, [tokens, prior_rows]);
        let selection = selection(plan, reads);
        let (tokens, held) = (pool.tokens(), plan.held(pool.tokens()));
        if held < tokens {
            let beyond = Selection {
                eligible: &eligible(tokens),
                rows: tokens - held,
                ..selection
            };
            let dropped = pool.lowest(device, &probes, &beyond)?;
            let left = pool.without(device, &dropped)?;
            let mut before = std::mem::replace(pool, left);
            if let Some(undo) = &mut carry.undo
                && let (None, Some(tokens)) = (&undo.pool, undo.pool_tokens)
            {
                before.truncate(tokens);
                undo.pool = Some(before);
            }
        }
        let selection = Selection {
            eligible: &eligible(held),
            ..selection
        };
        let selected = pool.select(device, &probes, &selection)?;
        carry.replace_selected(selected);
        Ok(())
    }

    /// Selects what the segment reads when it is read again: all else stays as it was before the segment.
    pub(super) fn ask(
        &mut self,
        device: &D,
        plan: &Plan,
        layer: usize,
        slots: &LayerSlots<D>,
    ) -> Result<()> {
        let (carry, reads) = (&mut *self.carry, &plan.reads[layer]);
        let (Some(pool), Some(queries)) = (&carry.pool, &slots.probes) else {
            return Ok(());
        };
        // Before the first segment has ended there is nothing to select.
        if pool.tokens() == 0 {
            return Ok(());
        }
        let probes = probes(plan, queries, self.slot, self.rows);
        let selection = Selection {
            eligible: &eligible(plan, reads, [pool.tokens(), carry.prior_rows]),
            ..selection(plan, reads)
        };
        let selected = pool.select(device, &probes, &selection)?;
        carry.replace_selected(selected);
        Ok(())
    }
}

/// The last queries of the `rows` rows of a slot.
fn probes<'a, B>(plan: &Plan, queries: &'a B, slot: usize, rows: usize) -> Probes<'a, B> {
    let count = plan.probe_rows.min(rows);
    Probes {
        q: Rows::packed(queries, slot * plan.probe_rows, plan.q_width()),
        rows: count,
        first: (rows - count) % plan.probe_rows,
        capacity: plan.probe_rows,
        group: plan.heads.q / plan.heads.kv,
    }
}

/// What each head can select of `tokens` tokens that the pool holds, of which `prior_rows` are the tail.
fn eligible(plan: &Plan, reads: &LayerReads, rows: [usize; 2]) -> Vec<Range<usize>> {
    let heads = reads.past.iter();
    heads.map(|h| plan.eligible(reads, *h, rows)).collect()
}

/// The rule by which a layer's heads select, of nothing.
fn selection<'a>(plan: &Plan, reads: &'a LayerReads) -> Selection<'a> {
    Selection {
        kv_heads: &reads.past,
        eligible: &[],
        rows: plan.past_len,
        rule: plan.rule,
        scale: plan.scale,
    }
}
