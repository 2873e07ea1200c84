//! What the segments of a step read of the past and leave in it: their tokens join the pools, those beyond a pool's
//! length are dropped, and retrieval selects for the next segment, or for a segment that is read again
//! (docs/contract.md, section 2).
//!
//! It is put off until the last segment of the step is known: what it computes depends on keys and queries of before
//! attention alone, and so a device has it in a few calls.

use std::ops::Range;

use super::{Carry, LayerReads, LayerSlots, Plan};
use crate::device::{
    Asking, Device, Gathering, Joining, PastHeads, PastPool, Probes, Result, Rows, SelectedBlocks,
    Selection,
};

/// Calls of one layer that are put off.
#[derive(Debug)]
pub(in crate::model) struct PastCalls {
    openings: Vec<Opening>,
    joins: Vec<Join>,
    asks: Vec<Ask>,
    /// Of each sequence, the tokens that join its pool, and the last of its asks.
    joined: Vec<usize>,
    asked: Vec<Option<usize>>,
}

/// A segment that begins, and reads what has been selected.
#[derive(Debug)]
struct Opening {
    sequence: usize,
    slot: usize,
    /// Row of the angle tables behind the last selected row of each head that reads the past.
    ends: Vec<usize>,
    /// What selects for it; `None` where it has been selected before this step.
    ask: Option<usize>,
}

/// A complete segment's tokens.
#[derive(Debug)]
struct Join {
    sequence: usize,
    slot: usize,
    rows: usize,
}

/// The queries of a segment, complete or read again, that select.
#[derive(Debug)]
struct Ask {
    sequence: usize,
    slot: usize,
    rows: usize,
    /// What each head can select.
    eligible: Vec<Range<usize>>,
}

impl PastCalls {
    /// None, for so many sequences.
    pub(in crate::model) fn new(sequences: usize) -> Self {
        Self {
            openings: Vec::new(),
            joins: Vec::new(),
            asks: Vec::new(),
            joined: vec![0; sequences],
            asked: vec![None; sequences],
        }
    }

    /// Whether there is nothing to compute.
    pub(in crate::model) fn is_empty(&self) -> bool {
        self.openings.is_empty() && self.asks.is_empty()
    }

    /// How many rows a segment of the sequence that begins now finds selected, of each head that reads the past.
    pub(super) fn selected<D: Device>(
        &self,
        plan: &Plan,
        reads: &LayerReads,
        (sequence, carry): (usize, &Carry<D>),
    ) -> Vec<usize> {
        let heads = 0..reads.past.len();
        match self.asked[sequence] {
            None => heads.map(|head| carry.selected.count(head)).collect(),
            Some(ask) => {
                let selection = selection(plan, reads, &self.asks[ask].eligible);
                heads.map(|head| selection.count(head)).collect()
            }
        }
    }

    /// A segment begins. `ends`: of each head that reads the past, the row of the angle tables behind it.
    pub(super) fn open(&mut self, sequence: usize, slot: usize, ends: Vec<usize>) {
        let ask = self.asked[sequence];
        self.openings.push(Opening {
            sequence,
            slot,
            ends,
            ask,
        });
    }

    /// A segment is complete: its tokens join the pool, and its queries select for the next one.
    pub(super) fn complete<D: Device>(
        &mut self,
        plan: &Plan,
        reads: &LayerReads,
        [sequence, slot, rows]: [usize; 3],
        carry: &Carry<D>,
    ) {
        if carry.pool.is_some() {
            self.joins.push(Join {
                sequence,
                slot,
                rows,
            });
            self.joined[sequence] += rows;
            self.ask(plan, reads, [sequence, slot, rows], carry);
        }
    }

    /// The queries of a segment that is complete, or is read again, select anew.
    pub(in crate::model) fn ask<D: Device>(
        &mut self,
        plan: &Plan,
        reads: &LayerReads,
        [sequence, slot, rows]: [usize; 3],
        carry: &Carry<D>,
    ) {
        let Some(pool) = &carry.pool else { return };
        let held = plan.held(pool.tokens() + self.joined[sequence]);
        // Before the first segment has ended there is nothing to select.
        if held > 0 {
            self.asked[sequence] = Some(self.asks.len());
            self.asks.push(Ask {
                sequence,
                slot,
                rows,
                eligible: eligible(plan, reads, [held, carry.prior_rows]),
            });
        }
    }

    /// Computes all of it, for the states of a layer.
    pub(in crate::model) fn run<D: Device>(
        self,
        device: &D,
        plan: &Plan,
        layer: usize,
        carries: &mut [&mut Carry<D>],
        slots: &mut LayerSlots<D>,
        tables: (&D::Buffer, &D::Buffer),
    ) -> Result<()> {
        let reads = &plan.reads[layer];
        if reads.past.is_empty() {
            return Ok(());
        }
        let (later, now): (Vec<&Opening>, Vec<&Opening>) =
            self.openings.iter().partition(|o| o.ask.is_some());
        let now = now.into_iter();
        let now: Vec<(&Opening, &Carry<D>, &D::Blocks)> = now
            .map(|o| (o, &*carries[o.sequence], &carries[o.sequence].selected))
            .collect();
        gather(device, plan, reads, &now, slots, tables)?;
        self.join(device, plan, reads, carries, slots)?;
        let Some(queries) = &slots.probes else {
            return Ok(());
        };
        self.drop_beyond(device, plan, reads, carries, queries)?;
        let asking = self.asks.iter().filter_map(|ask| {
            let pool = carries[ask.sequence].pool.as_ref()?;
            Some(Asking {
                pool,
                probes: probes(plan, queries, ask),
                selection: selection(plan, reads, &ask.eligible),
            })
        });
        let asking: Vec<Asking<'_, D::Pool, D::Buffer>> = asking.collect();
        let selected = D::Pool::select_each(device, &asking)?;
        let later = later.into_iter().filter_map(|o| {
            let blocks = &selected[o.ask?];
            Some((o, &*carries[o.sequence], blocks))
        });
        let later: Vec<(&Opening, &Carry<D>, &D::Blocks)> = later.collect();
        gather(device, plan, reads, &later, slots, tables)?;
        for (i, (ask, blocks)) in self.asks.iter().zip(selected).enumerate() {
            if self.asked[ask.sequence] == Some(i) {
                carries[ask.sequence].replace_selected(blocks);
            }
        }
        Ok(())
    }

    /// Appends the tokens of complete segments to the pools.
    fn join<D: Device>(
        &self,
        device: &D,
        plan: &Plan,
        reads: &LayerReads,
        carries: &mut [&mut Carry<D>],
        slots: &LayerSlots<D>,
    ) -> Result<()> {
        let kv = &slots.kv;
        let mut runs: Vec<Vec<_>> = carries.iter().map(|_| Vec::new()).collect();
        for join in &self.joins {
            let first = join.slot * kv.rows.current;
            let rows_of = |buffer| Rows::packed(buffer, first, plan.kv_width());
            runs[join.sequence].push(([&kv.raw_k, &kv.v].map(rows_of), join.rows));
        }
        let joining = carries.iter_mut().zip(runs).filter_map(|(carry, runs)| {
            let pool = carry.pool.as_mut().filter(|_| !runs.is_empty())?;
            if let Some(undo) = &mut carry.undo {
                undo.pool_tokens.get_or_insert(pool.tokens());
            }
            Some(Joining { pool, runs })
        });
        let mut joining: Vec<Joining<'_, D::Pool, D::Buffer>> = joining.collect();
        D::Pool::append_each(device, &reads.past, &mut joining)
    }

    /// Drops the tokens of pools that are too long.
    fn drop_beyond<D: Device>(
        &self,
        device: &D,
        plan: &Plan,
        reads: &LayerReads,
        carries: &mut [&mut Carry<D>],
        queries: &D::Buffer,
    ) -> Result<()> {
        for ask in &self.asks {
            let carry = &mut *carries[ask.sequence];
            let Some(pool) = &mut carry.pool else {
                continue;
            };
            let (tokens, held) = (pool.tokens(), plan.held(pool.tokens()));
            if held == tokens {
                continue;
            }
            let eligible = eligible(plan, reads, [tokens, carry.prior_rows]);
            let beyond = Selection {
                rows: tokens - held,
                ..selection(plan, reads, &eligible)
            };
            let dropped = pool.lowest(device, &probes(plan, queries, ask), &beyond)?;
            let left = pool.without(device, &dropped)?;
            let mut before = std::mem::replace(pool, left);
            if let Some(undo) = &mut carry.undo
                && let (None, Some(tokens)) = (&undo.pool, undo.pool_tokens)
            {
                before.truncate(tokens);
                undo.pool = Some(before);
            }
        }
        Ok(())
    }
}

/// Copies what has been selected to the past rows of segments that begin.
fn gather<D: Device>(
    device: &D,
    plan: &Plan,
    reads: &LayerReads,
    openings: &[(&Opening, &Carry<D>, &D::Blocks)],
    slots: &mut LayerSlots<D>,
    tables: (&D::Buffer, &D::Buffer),
) -> Result<()> {
    let kv = &mut slots.kv;
    let gathering = openings.iter().filter_map(|&(opening, carry, blocks)| {
        Some(Gathering {
            pool: carry.pool.as_ref()?,
            blocks,
            past: PastHeads {
                kv_heads: &reads.past,
                ends: &opening.ends,
            },
            // A head that has selected rows has all sinks before them: what is eligible begins after these.
            row: opening.slot * kv.rows.past + plan.sink_len,
        })
    });
    let gathering: Vec<Gathering<'_, D::Pool, D::Blocks>> = gathering.collect();
    let rows = [&mut kv.past_k, &mut kv.past_v];
    D::Pool::gather_each(device, &gathering, tables, rows, plan.kv_width())
}

/// The last queries of the rows of a slot.
fn probes<'a, B>(plan: &Plan, queries: &'a B, ask: &Ask) -> Probes<'a, B> {
    let count = plan.probe_rows.min(ask.rows);
    Probes {
        q: Rows::packed(queries, ask.slot * plan.probe_rows, plan.q_width()),
        rows: count,
        first: (ask.rows - count) % plan.probe_rows,
        capacity: plan.probe_rows,
        group: plan.heads.q / plan.heads.kv,
    }
}

/// What each head can select of `tokens` tokens that the pool holds, of which `prior_rows` are the tail.
fn eligible(plan: &Plan, reads: &LayerReads, rows: [usize; 2]) -> Vec<Range<usize>> {
    let heads = reads.past.iter();
    heads.map(|h| plan.eligible(reads, *h, rows)).collect()
}

/// The rule by which a layer's heads select of the eligible tokens.
fn selection<'a>(
    plan: &Plan,
    reads: &'a LayerReads,
    eligible: &'a [Range<usize>],
) -> Selection<'a> {
    Selection {
        kv_heads: &reads.past,
        eligible,
        rows: plan.past_len,
        rule: plan.rule,
        scale: plan.scale,
    }
}
