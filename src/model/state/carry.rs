//! What a sequence carries from segment to segment: of each layer the prior tail, the sinks, the selected rows of the
//! past, and the pool.

use super::{LayerReads, LayerSlots, PastCalls, Plan, Sinks};
use crate::device::{
    Accumulate, Device, DeviceError, HostMemory, Kind, Move, PastPool, Purpose, Result, Rows,
    SelectedBlocks,
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
    /// Keys and values of the completed tokens that are held, for the same heads.
    pub pool: Option<D::Pool>,
    /// Backup for a step that fails; `None` outside a transaction.
    pub(super) undo: Option<Undo<D>>,
}

/// Parts of a [`Carry`] as they were before their first change in a step.
#[derive(Debug)]
pub(super) struct Undo<D: Device> {
    /// Keys and values of the tail, and its rows.
    tail: Option<([D::Buffer; 2], usize)>,
    tokens: usize,
    selected: Option<D::Blocks>,
    pub(super) pool_tokens: Option<usize>,
    /// The pool before it first dropped tokens, with no more than `pool_tokens`.
    pub(super) pool: Option<D::Pool>,
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
            pool: None,
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
        if undo.pool.is_some() {
            self.pool = undo.pool;
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

    /// Puts another selection in place of the one that there is.
    pub(super) fn replace_selected(&mut self, selected: D::Blocks) {
        let old = std::mem::replace(&mut self.selected, selected);
        if let Some(undo) = &mut self.undo {
            undo.selected.get_or_insert(old);
        }
    }

    /// Prepares the tail's buffers for the last rows of a complete segment, before which `kept` rows of the tail before
    /// stay. Returns the old buffers, unless they are the backup of this step or are written in place.
    fn make_room(&mut self, device: &D, kept: usize) -> Result<Option<[D::Buffer; 2]>> {
        // Rows that move up must not be overwritten before they are read, and a step that fails must find them again.
        let first_change = self.undo.as_ref().is_some_and(|undo| undo.tail.is_none());
        if !first_change && kept == 0 {
            return Ok(None);
        }
        let (before, replaced) = (self.prior_rows, self.replace_tail(device)?);
        match self.undo.as_mut().filter(|_| first_change) {
            Some(undo) => undo.tail = Some((replaced, before)),
            None => return Ok(Some(replaced)),
        }
        Ok(None)
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
    /// Refuses so many sequences that the host has no memory for their states, beside what the device holds of them.
    ///
    /// # Errors
    /// [`OutOfMemory`](crate::device::OutOfMemory).
    pub(in crate::model) fn check_host(plan: &Plan, sequences: usize) -> Result<()> {
        let blocks = |reads: &LayerReads| reads.past.len() * size_of::<Vec<u32>>();
        let layers = plan
            .reads
            .iter()
            .map(|reads| size_of::<Carry<D>>() + blocks(reads));
        let bytes = sequences.saturating_mul(size_of::<Self>() + layers.sum::<usize>());
        HostMemory::check(bytes)
            .map_err(|error| DeviceError::from(error).wanted_for(Purpose::Segments))
    }

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
                pool: (past > 0).then(|| D::Pool::new(device, plan.pool(past))),
                undo: None,
            })
        };
        let layers = plan.reads.iter().map(layer).collect::<Result<_>>();
        Ok(Self {
            layers: layers.map_err(|error| error.wanted_for(Purpose::Segments))?,
        })
    }
}

/// A segment that begins, and the state of its sequence.
pub(in crate::model) struct Opening<'a, D: Device> {
    pub sequence: usize,
    pub slot: usize,
    pub carry: &'a Carry<D>,
}

/// Writes the prior rows of slots and their sinks, for the segments that begin in them: each with the state of its
/// sequence. What has been selected for them is put off.
pub(in crate::model) fn open_segments<D: Device>(
    device: &D,
    plan: &Plan,
    layer: usize,
    opening: &[Opening<'_, D>],
    slots: &mut LayerSlots<D>,
    tables: (&D::Buffer, &D::Buffer),
    past: &mut PastCalls,
) -> Result<()> {
    let (width, reads) = (plan.kv_width(), &plan.reads[layer]);
    let kv = &mut slots.kv;
    let (prior_room, past_room) = (kv.rows.prior, kv.rows.past);
    let mut moves = Vec::new();
    for &Opening {
        sequence,
        slot,
        carry,
    } in opening
    {
        let rows = carry.prior_rows;
        kv.prior_len[slot] = rows;
        let prior = [
            (&carry.prior_k, Some(plan.origin() - rows)),
            (&carry.prior_v, None),
        ];
        for (target, (buffer, first_angle)) in prior.into_iter().enumerate() {
            moves.push(Move {
                src: Rows::packed(buffer, 0, width),
                target,
                start: slot * prior_room * width,
                stride: width,
                rows,
                heads: plan.heads.kv,
                first_angle,
            });
        }
        // Of each KV head: its sinks, its selected rows behind them, and the row of the tables behind these.
        let tail = |head| if reads.prior[head] { rows } else { 0 };
        let heads = 0..plan.heads.kv;
        let end: Vec<usize> = heads.clone().map(|h| plan.origin() - tail(h)).collect();
        let sinks: Vec<usize> = heads.map(|h| plan.sinks(carry.tokens, tail(h))).collect();
        let mut selected = vec![0; plan.heads.kv];
        let counts = past.selected(plan, reads, (sequence, carry));
        for (head, count) in reads.past.iter().zip(counts) {
            selected[*head] = count;
        }
        let before: Vec<usize> = end.iter().zip(&selected).map(|(e, n)| e - n).collect();
        let lens = slot * plan.heads.kv..(slot + 1) * plan.heads.kv;
        for (head, len) in kv.past_len[lens.clone()].iter_mut().enumerate() {
            *len = sinks[head] + selected[head];
        }
        if plan.sink_len > 0 {
            kv.sink_len[lens].copy_from_slice(&sinks);
            let first = slot * past_room * width;
            moves.extend(carry.sinks.place(plan, first, (&sinks, &before)));
        }
        let ends = reads.past.iter().map(|head| end[*head]);
        past.open(sequence, slot, ends.collect());
    }
    moves.retain(|at| at.rows > 0);
    let mut targets: [&mut D::Buffer; 4] = [
        &mut kv.prior_k,
        &mut kv.prior_v,
        &mut kv.past_k,
        &mut kv.past_v,
    ];
    let (dim, add) = (plan.heads.dim, Accumulate::No);
    device.move_rows(&moves, &mut targets, dim, tables, false, add)
}

/// A segment that is complete, its rows, and the state of its sequence.
pub(in crate::model) struct Complete<'a, D: Device> {
    pub sequence: usize,
    pub slot: usize,
    pub rows: usize,
    pub carry: &'a mut Carry<D>,
}

/// Updates the states of different sequences after complete segments: their tails and the sinks. What joins the pools,
/// and the past rows that their queries select, are put off.
pub(in crate::model) fn close_segments<D: Device>(
    device: &D,
    plan: &Plan,
    layer: usize,
    slots: &LayerSlots<D>,
    closing: &mut [Complete<'_, D>],
    tables: (&D::Buffer, &D::Buffer),
    past: &mut PastCalls,
) -> Result<()> {
    move_tails(device, plan, layer, slots, closing, tables)?;
    for Complete {
        sequence,
        slot,
        rows,
        carry,
    } in closing
    {
        carry.tokens += *rows;
        past.complete(plan, &plan.reads[layer], [*sequence, *slot, *rows], carry);
    }
    Ok(())
}

/// Makes the last rows of complete segments the tails, keys before rotation, and keeps those of the rows that are
/// sinks. Where a segment has fewer rows than a tail, the last rows of the tail before move up in front of them.
fn move_tails<D: Device>(
    device: &D,
    plan: &Plan,
    layer: usize,
    slots: &LayerSlots<D>,
    closing: &mut [Complete<'_, D>],
    tables: (&D::Buffer, &D::Buffer),
) -> Result<()> {
    let (width, kv) = (plan.kv_width(), &slots.kv);
    let [len, _] = plan.sources(&plan.reads[layer]);
    let shape = |complete: &Complete<'_, D>| {
        let new = complete.rows.min(len);
        [new, complete.carry.prior_rows.min(len - new)]
    };
    let shapes: Vec<[usize; 2]> = closing.iter().map(shape).collect();
    let old = closing.iter_mut().zip(&shapes);
    let old = old.map(|(complete, [_, kept])| match len {
        0 => Ok(None),
        _ => complete.carry.make_room(device, *kept),
    });
    let old = old.collect::<Result<Vec<_>>>()?;
    let (mut moves, mut targets) = (Vec::new(), Vec::new());
    for ((complete, old), [new, kept]) in closing.iter_mut().zip(&old).zip(&shapes) {
        let rows_of =
            |buffer, row| Rows::packed(buffer, complete.slot * kv.rows.current + row, width);
        let Carry {
            prior_k,
            prior_v,
            prior_rows,
            sinks,
            tokens,
            undo,
            ..
        } = &mut *complete.carry;
        let backup = undo.as_ref().and_then(|undo| undo.tail.as_ref());
        let old = old.as_ref().or(backup.map(|(tail, _)| tail));
        let of = |src, target, row: usize, rows| Move {
            src,
            target,
            start: row * width,
            stride: width,
            rows,
            heads: plan.heads.kv,
            first_angle: None,
        };
        for (i, (from, to)) in [(&kv.raw_k, prior_k), (&kv.v, prior_v)]
            .into_iter()
            .enumerate()
        {
            if let (Some(old), 1..) = (old, *kept) {
                let src = Rows::packed(&old[i], *prior_rows - kept, width);
                moves.push(of(src, targets.len(), 0, *kept));
            }
            moves.push(of(
                rows_of(from, complete.rows - new),
                targets.len(),
                *kept,
                *new,
            ));
            targets.push(to);
        }
        let new = sinks.missing(plan, *tokens, complete.rows);
        for (from, to) in [(&kv.raw_k, &mut sinks.k), (&kv.v, &mut sinks.v)] {
            moves.push(of(rows_of(from, 0), targets.len(), *tokens, new));
            targets.push(to);
        }
    }
    moves.retain(|at| at.rows > 0);
    let (dim, add) = (plan.heads.dim, Accumulate::No);
    device.move_rows(&moves, &mut targets, dim, tables, false, add)?;
    for (complete, [new, kept]) in closing.iter_mut().zip(shapes) {
        complete.carry.prior_rows = kept + new;
    }
    Ok(())
}

/// Allocates what [`close_segments`] would allocate for a segment of full length, with arbitrary contents. For dry
/// runs.
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
    pool.truncate(plan.held(pool.tokens()));
    let block_len = plan.rule.block_len();
    let tokens = plan.past_len.min(pool.tokens()) / block_len * block_len;
    let selected = vec![(0..tokens).collect(); reads.past.len()];
    carry.selected = D::Blocks::new(device, &selected, block_len)?;
    Ok(())
}
