//! The past after a segment: its tokens join the pool, those beyond the pool's length are dropped, and retrieval
//! selects for the next segment (docs/contract.md, section 2).

use std::ops::Range;

use super::{Complete, LayerSlots, Plan};
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
        let (slot, rows) = (*slot, *rows);
        let (reads, kv) = (&plan.reads[layer], &slots.kv);
        carry.tokens += rows;
        let (Some(pool), Some(queries)) = (&mut carry.pool, &slots.probes) else {
            return Ok(());
        };
        if let Some(undo) = &mut carry.undo {
            undo.pool_tokens.get_or_insert(pool.tokens());
        }
        let first = slot * kv.rows.current;
        let rows_of = |buffer| Rows::packed(buffer, first, plan.kv_width());
        pool.append(device, &reads.past, [&kv.raw_k, &kv.v].map(rows_of), rows)?;
        let queries_len = plan.probe_rows.min(rows);
        let probes = Probes {
            q: Rows::packed(queries, slot * plan.probe_rows, plan.q_width()),
            rows: queries_len,
            first: (rows - queries_len) % plan.probe_rows,
            capacity: plan.probe_rows,
            group: plan.heads.q / plan.heads.kv,
        };
        let prior_rows = carry.prior_rows;
        let eligible = |tokens| -> Vec<Range<usize>> {
            let of_head = |head: &usize| plan.eligible(reads, *head, [tokens, prior_rows]);
            reads.past.iter().map(of_head).collect()
        };
        let selection = Selection {
            kv_heads: &reads.past,
            eligible: &[],
            rows: plan.past_len,
            rule: plan.rule,
            scale: plan.scale,
        };
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
        let old = std::mem::replace(&mut carry.selected, selected);
        if let Some(undo) = &mut carry.undo {
            undo.selected.get_or_insert(old);
        }
        Ok(())
    }
}
