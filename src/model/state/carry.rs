//! What a sequence carries from segment to segment: of each layer the prior tail, the sinks, the selected rows of the
//! past, and the pool.

use super::{LayerReads, LayerSlots, Plan, Sinks};
use crate::device::{
    Accumulate, Device, Kind, PastHeads, PastPool, Probes, Purpose, Result, Rows, RowsMut,
    SelectedBlocks, Selection,
};

/// State of one layer that a complete segment hands to the next.
#[derive(Debug)]
pub struct Carry<D: Device> {
    /// The last `prior_len` keys before rotation.
    pub prior_k: D::Buffer,
    /// Their values.
    pub prior_v: D::Buffer,
    /// Number of rows of the tail: `prior_len`, or all completed tokens where they are fewer.
    pub prior_rows: usize,
    /// Completed tokens.
    pub tokens: usize,
    /// The first of them.
    pub sinks: Sinks<D>,
    /// Blocks selected for the next segment, for each KV head in [`LayerReads::past`].
    pub selected: D::Blocks,
    /// Keys and values of all completed tokens, for the same heads.
    pub pool: Option<D::Pool>,
    /// Backup for a step that fails; `None` outside a transaction.
    undo: Option<Undo<D>>,
}

/// Parts of a [`Carry`] as they were before their first change in a step.
#[derive(Debug)]
struct Undo<D: Device> {
    /// Keys and values of the tail, and its rows.
    tail: Option<([D::Buffer; 2], usize)>,
    tokens: usize,
    selected: Option<D::Blocks>,
    pool_tokens: Option<usize>,
}

/// For devices on host memory. Changes of the copy cannot be undone.
impl<D: Device> Clone for Carry<D>
where
    D::Buffer: Clone,
    D::Blocks: Clone,
    D::Pool: Clone,
{
    fn clone(&self) -> Self {
        Self {
            prior_k: self.prior_k.clone(),
            prior_v: self.prior_v.clone(),
            prior_rows: self.prior_rows,
            tokens: self.tokens,
            sinks: self.sinks.clone(),
            selected: self.selected.clone(),
            pool: self.pool.clone(),
            undo: None,
        }
    }
}

impl<D: Device> Carry<D> {
    /// Begins a transaction: changes from here on can be undone.
    pub(in crate::model) fn begin(&mut self) {
        self.undo = Some(Undo {
            tail: None,
            tokens: self.tokens,
            selected: None,
            pool_tokens: None,
        });
    }

    /// Commits the changes since [`Carry::begin`].
    pub(in crate::model) fn commit(&mut self) {
        self.undo = None;
    }

    /// Rolls back the changes since [`Carry::begin`].
    pub(in crate::model) fn roll_back(&mut self) {
        let Some(undo) = self.undo.take() else {
            return;
        };
        if let Some(([k, v], rows)) = undo.tail {
            (self.prior_k, self.prior_v, self.prior_rows) = (k, v, rows);
        }
        // The sinks among the tokens dropped are written again when they come again.
        self.tokens = undo.tokens;
        if let Some(selected) = undo.selected {
            self.selected = selected;
        }
        if let (Some(pool), Some(tokens)) = (&mut self.pool, undo.pool_tokens) {
            pool.truncate(tokens);
        }
    }

    /// Empties the state, as it was before the first token.
    pub(in crate::model) fn clear(
        &mut self,
        device: &D,
        plan: &Plan,
        reads: &LayerReads,
    ) -> Result<()> {
        let none = vec![Vec::new(); reads.past.len()];
        self.selected = D::Blocks::new(device, &none, plan.rule.block_len())?;
        if let Some(pool) = &mut self.pool {
            pool.truncate(0);
        }
        (self.prior_rows, self.tokens) = (0, 0);
        Ok(())
    }

    /// Makes the last rows of a complete segment the tail: `rows` keys before rotation and values, `width` elements
    /// each. Where they are fewer than `len`, the last rows of the tail before move up in front of them.
    fn move_tail(
        &mut self,
        device: &D,
        [k, v]: [Rows<'_, D::Buffer>; 2],
        rows: usize,
        (len, width): (usize, usize),
    ) -> Result<()> {
        let new = rows.min(len);
        let (before, kept) = (self.prior_rows, self.prior_rows.min(len - new));
        // Rows that move up must not be overwritten before they are read, and a step that fails must find them again.
        let first_change = self.undo.as_ref().is_some_and(|undo| undo.tail.is_none());
        if first_change || kept > 0 {
            let replaced = self.replace_tail(device)?;
            let undo = self.undo.as_mut().filter(|_| first_change);
            let old = match undo {
                Some(undo) => &undo.tail.insert((replaced, before)).0,
                None => &replaced,
            };
            for (src, dst) in old.iter().zip([&mut self.prior_k, &mut self.prior_v]) {
                let src = Rows::packed(src, before - kept, width);
                let dst = RowsMut::packed(dst, 0, width);
                device.copy(src, dst, kept, width, Accumulate::No)?;
            }
        }
        for (src, dst) in [(k, &mut self.prior_k), (v, &mut self.prior_v)] {
            let start = src.start + (rows - new) * src.stride;
            let dst = RowsMut::packed(dst, kept, width);
            device.copy(Rows { start, ..src }, dst, new, width, Accumulate::No)?;
        }
        self.prior_rows = kept + new;
        Ok(())
    }

    /// Puts new buffers in place of the tail's keys and values, and returns these.
    fn replace_tail(&mut self, device: &D) -> Result<[D::Buffer; 2]> {
        let empty = |old: &D::Buffer| device.empty(Kind::Activation, device.len(old));
        let (k, v) = (empty(&self.prior_k)?, empty(&self.prior_v)?);
        Ok([
            std::mem::replace(&mut self.prior_k, k),
            std::mem::replace(&mut self.prior_v, v),
        ])
    }
}

/// The state of one sequence between segments.
#[derive(Debug)]
pub struct SequenceState<D: Device> {
    /// Per layer.
    pub layers: Vec<Carry<D>>,
}

impl<D: Device> SequenceState<D> {
    /// The state before the first token.
    pub fn new(device: &D, plan: &Plan) -> Result<Self> {
        let layer = |reads: &LayerReads| {
            let [rows, _] = plan.sources(reads);
            let past = reads.past.len();
            Ok(Carry {
                prior_k: device.empty(Kind::Activation, rows * plan.kv_width())?,
                prior_v: device.empty(Kind::Activation, rows * plan.kv_width())?,
                prior_rows: 0,
                tokens: 0,
                sinks: Sinks::new(device, plan)?,
                selected: D::Blocks::new(device, &vec![Vec::new(); past], plan.rule.block_len())?,
                pool: (past > 0)
                    .then(|| D::Pool::new(device, past, plan.heads.dim, plan.segment_len)),
                undo: None,
            })
        };
        let layers = plan.reads.iter().map(layer).collect::<Result<_>>();
        Ok(Self {
            layers: layers.map_err(|error| error.wanted_for(Purpose::Segments))?,
        })
    }
}

/// Writes the prior and past rows of a slot, sinks included, for the segment that begins in it.
pub(in crate::model) fn open_segment<D: Device>(
    device: &D,
    plan: &Plan,
    layer: usize,
    carry: &Carry<D>,
    slots: &mut LayerSlots<D>,
    slot: usize,
    tables: (&D::Buffer, &D::Buffer),
) -> Result<()> {
    let (width, reads) = (plan.kv_width(), &plan.reads[layer]);
    let kv = &mut slots.kv;
    let (prior_room, past_room) = (kv.rows.prior, kv.rows.past);
    let rows = carry.prior_rows;
    kv.prior_len[slot] = rows;
    if rows > 0 {
        let angles: Vec<usize> = (plan.origin() - rows..plan.origin()).collect();
        let first = slot * prior_room;
        device.rope(
            Rows::packed(&carry.prior_k, 0, width),
            RowsMut::packed(&mut kv.prior_k, first, width),
            plan.heads.kv,
            plan.heads.dim,
            tables,
            &angles,
            false,
            Accumulate::No,
        )?;
        let (src, dst) = (
            Rows::packed(&carry.prior_v, 0, width),
            RowsMut::packed(&mut kv.prior_v, first, width),
        );
        device.copy(src, dst, rows, width, Accumulate::No)?;
    }
    // Of each KV head: its sinks, its selected rows behind them, and the row of the tables behind these.
    let tail = |head| if reads.prior[head] { rows } else { 0 };
    let heads = 0..plan.heads.kv;
    let ends: Vec<usize> = heads.clone().map(|h| plan.origin() - tail(h)).collect();
    let sinks: Vec<usize> = heads.map(|h| plan.sinks(carry.tokens, tail(h))).collect();
    let mut selected = vec![0; plan.heads.kv];
    for (i, head) in reads.past.iter().enumerate() {
        selected[*head] = carry.selected.count(i);
    }
    let before: Vec<usize> = ends.iter().zip(&selected).map(|(e, n)| e - n).collect();
    let lens = slot * plan.heads.kv..(slot + 1) * plan.heads.kv;
    for (head, len) in kv.past_len[lens.clone()].iter_mut().enumerate() {
        *len = sinks[head] + selected[head];
    }
    if plan.sink_len > 0 {
        kv.sink_len[lens].copy_from_slice(&sinks);
        carry
            .sinks
            .place(device, plan, (&mut *kv, slot), (&sinks, &before), tables)?;
    }
    let Some(pool) = &carry.pool else {
        return Ok(());
    };
    let ends: Vec<usize> = reads.past.iter().map(|&h| ends[h]).collect();
    let past = PastHeads {
        kv_heads: &reads.past,
        ends: &ends,
    };
    // A head that has selected rows has all sinks before them: what is eligible begins after these.
    let first = slot * past_room + plan.sink_len;
    let k = RowsMut::packed(&mut kv.past_k, first, width);
    let v = RowsMut::packed(&mut kv.past_v, first, width);
    pool.gather(device, &carry.selected, &past, tables, [k, v])
}

/// Updates the state after a complete segment of `rows` rows: its tail, the sinks, its tokens in the pool, and the past
/// rows that its probes select.
pub(in crate::model) fn close_segment<D: Device>(
    device: &D,
    plan: &Plan,
    layer: usize,
    slots: &LayerSlots<D>,
    (slot, rows): (usize, usize),
    carry: &mut Carry<D>,
) -> Result<()> {
    let (width, reads) = (plan.kv_width(), &plan.reads[layer]);
    let kv = &slots.kv;
    let first = slot * kv.rows.current;
    let [prior, _] = plan.sources(reads);
    let [k, v] = [&kv.raw_k, &kv.v].map(|buffer| Rows::packed(buffer, first, width));
    if prior > 0 {
        carry.move_tail(device, [k, v], rows, (prior, width))?;
    }
    carry.sinks.keep(device, plan, [k, v], carry.tokens, rows)?;
    carry.tokens += rows;
    let (Some(pool), Some(queries)) = (&mut carry.pool, &slots.probes) else {
        return Ok(());
    };
    if let Some(undo) = &mut carry.undo {
        undo.pool_tokens.get_or_insert(pool.tokens());
    }
    pool.append(device, &reads.past, [k, v], rows)?;
    let tokens = pool.tokens();
    let eligible = |head: &usize| plan.eligible(reads, *head, [tokens, carry.prior_rows]);
    let eligible: Vec<_> = reads.past.iter().map(eligible).collect();
    let queries_len = plan.probe_rows.min(rows);
    let probes = Probes {
        q: Rows::packed(queries, slot * plan.probe_rows, plan.q_width()),
        rows: queries_len,
        first: (rows - queries_len) % plan.probe_rows,
        capacity: plan.probe_rows,
        group: plan.heads.q / plan.heads.kv,
    };
    let selection = Selection {
        kv_heads: &reads.past,
        eligible: &eligible,
        rows: plan.past_len,
        rule: plan.rule,
        scale: plan.scale,
    };
    let selected = pool.select(device, &probes, &selection)?;
    let old = std::mem::replace(&mut carry.selected, selected);
    if let Some(undo) = &mut carry.undo {
        undo.selected.get_or_insert(old);
    }
    Ok(())
}

/// Allocates what [`close_segment`] would allocate for a segment of full length, with arbitrary contents. For dry runs.
pub(in crate::model) fn allocate_segment<D: Device>(
    device: &D,
    plan: &Plan,
    layer: usize,
    rows: &D::Buffer,
    carry: &mut Carry<D>,
) -> Result<()> {
    let reads = &plan.reads[layer];
    carry.prior_rows = plan.sources(reads)[0];
    carry.tokens += plan.segment_len;
    let Some(pool) = &mut carry.pool else {
        return Ok(());
    };
    let rows = Rows::packed(rows, 0, plan.kv_width());
    pool.append(device, &reads.past, [rows; 2], plan.segment_len)?;
    let block_len = plan.rule.block_len();
    let tokens = plan.past_len.min(pool.tokens()) / block_len * block_len;
    let selected = vec![(0..tokens).collect(); reads.past.len()];
    carry.selected = D::Blocks::new(device, &selected, block_len)?;
    Ok(())
}
