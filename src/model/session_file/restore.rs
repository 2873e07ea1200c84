//! A saved sequence put into a sequence of a session, from a file or from memory.

use std::borrow::Cow;

use super::layout::{Part, Shapes};
use crate::device::{Accumulate, Device, DeviceError, PastPool, Rows, RowsMut, SelectedBlocks};
use crate::model::segmentation::Cursor;
use crate::model::session::Session;
use crate::model::state::{Opening, PastCalls, open_segments};

/// Where the tensors of one sequence come from.
pub(super) trait Source {
    /// What can be wrong with them.
    type Error: From<DeviceError>;

    /// The numbers of a tensor of this shape, none for a shape with a zero.
    fn floats(&mut self, part: Part, shape: &[usize]) -> Result<Cow<'_, [f32]>, Self::Error>;

    /// The tokens that a head of a layer's pool has selected: ascending, whole blocks, at most as many as there may be.
    fn selected(
        &mut self,
        l: usize,
        h: usize,
        shapes: &Shapes,
        block_len: usize,
    ) -> Result<Vec<usize>, Self::Error>;
}

/// Puts a sequence that has been read up to `cursor` in place of sequence `to`.
pub(super) fn sequence<D: Device, S: Source>(
    source: &mut S,
    to: usize,
    cursor: Cursor,
    session: &mut Session<'_, D>,
) -> Result<(), S::Error> {
    let shapes = Shapes::new(session, cursor);
    session.cursors[to] = cursor;
    if session.model.config.part.ends {
        let logits = source.floats(Part::Logits, &shapes.logits())?;
        let first = to * session.model.config.vocab_size;
        let device = &session.model.device;
        device.write(&mut session.logits, first, &logits)?;
    }
    for l in 0..session.model.config.num_hidden_layers {
        carry(source, to, l, &shapes, session)?;
        if shapes.rows > 0 {
            segment(source, to, l, &shapes, session)?;
        }
    }
    Ok(())
}

/// The prior tail, the pool and the choice of past rows of one layer.
fn carry<D: Device, S: Source>(
    source: &mut S,
    to: usize,
    l: usize,
    shapes: &Shapes,
    session: &mut Session<'_, D>,
) -> Result<(), S::Error> {
    let device = &session.model.device;
    let carry = &mut session.states[to].layers[l];
    let prior = source.floats(Part::Prior(l), &shapes.prior(l))?;
    let (k, v) = prior.split_at(prior.len() / 2);
    device.write(&mut carry.prior_k, 0, k)?;
    device.write(&mut carry.prior_v, 0, v)?;
    carry.prior_rows = shapes.prior(l)[1];
    let sinks = source.floats(Part::Sinks(l), &shapes.sinks())?;
    let (k, v) = sinks.split_at(sinks.len() / 2);
    device.write(&mut carry.sinks.k, 0, k)?;
    device.write(&mut carry.sinks.v, 0, v)?;
    carry.tokens = shapes.completed;
    let Some(pool) = &mut carry.pool else {
        return Ok(());
    };
    let (heads, plan) = (shapes.past_heads(l), &session.plan);
    *pool = D::Pool::new(device, plan.pool(heads));
    for part in 0..shapes.pool_parts() {
        let values = source.floats(Part::Pool(l, part), &shapes.pool(l, part))?;
        let (k, v) = values.split_at(values.len() / 2);
        pool.write(device, k, v)?;
    }
    let block_len = session.plan.rule.block_len();
    let selected: Vec<Vec<usize>> = (0..heads)
        .map(|h| source.selected(l, h, shapes, block_len))
        .collect::<Result<_, _>>()?;
    carry.selected = D::Blocks::new(device, &selected, block_len)?;
    Ok(())
}

/// What has been read of the current segment, in its slot: prior and past rows come from the
/// carry, as when the segment began.
fn segment<D: Device, S: Source>(
    source: &mut S,
    to: usize,
    l: usize,
    shapes: &Shapes,
    session: &mut Session<'_, D>,
) -> Result<(), S::Error> {
    let device = &session.model.device;
    let plan = &session.plan;
    let slots = session.flight.open(device, plan)?;
    let room = slots.room;
    let (layer, tables) = slots.layer_mut(l);
    let carry = &mut session.states[to].layers[l];
    let mut past = PastCalls::new(1);
    let opening = [Opening {
        sequence: 0,
        slot: to,
        carry,
    }];
    open_segments(device, plan, l, &opening, layer, tables, &mut past)?;
    past.run(device, plan, l, &mut [carry], layer, tables)?;
    let width = plan.kv_width();
    let first = to * room;
    let rows = source.floats(Part::Segment(l), &shapes.segment())?;
    let (k, v) = rows.split_at(rows.len() / 2);
    device.write(&mut layer.kv.v, first * width, v)?;
    if device.len(&layer.kv.raw_k) == 0 {
        device.write(&mut layer.kv.k, first * width, k)?;
    } else {
        device.write(&mut layer.kv.raw_k, first * width, k)?;
        let angles: Vec<usize> = (0..shapes.rows).map(|p| plan.origin() + p).collect();
        device.rope(
            Rows::packed(&layer.kv.raw_k, first, width),
            RowsMut::packed(&mut layer.kv.k, first, width),
            plan.heads.kv,
            plan.heads.dim,
            tables,
            &angles,
            false,
            Accumulate::No,
        )?;
    }
    let probes = source.floats(Part::Probes(l), &shapes.probes(l))?;
    if let Some(buffer) = &mut layer.probes {
        let start = to * plan.probe_rows * plan.q_width();
        device.write(buffer, start, &probes)?;
    }
    Ok(())
}
