//! Slots that hold segments in flight, and the angle tables of their rows.

use std::sync::Arc;

use super::{LayerReads, Plan, elements};
use crate::device::{
    Device, DeviceError, HostMemory, Kind, PerSource, Purpose, Result, SegmentCache,
};
use crate::model::config::ModelConfig;
use crate::model::rope::Rope;

/// One layer's slots.
#[derive(Debug)]
pub struct LayerSlots<D: Device> {
    /// Keys and values.
    pub kv: SegmentCache<D::Buffer>,
    /// The last `probe_rows` queries of each slot's segment before rotation, in layers that
    /// read the past.
    pub probes: Option<D::Buffer>,
}

impl<D: Device> LayerSlots<D> {
    /// `count` empty slots with room for `rows` of each source. `handed_on`: whether later segments read their keys.
    fn new(
        device: &D,
        plan: &Plan,
        count: usize,
        rows: PerSource<usize>,
        handed_on: bool,
    ) -> Result<Self> {
        let PerSource {
            past,
            prior,
            current: room,
        } = rows;
        let width = plan.kv_width();
        let short = |error: DeviceError| error.wanted_for(Purpose::Segments);
        let empty = |rows: usize| {
            let buffer = device.empty(Kind::Activation, elements([count, rows, width])?);
            buffer.map_err(short)
        };
        let lengths = [count, 1 + 2 * plan.heads.kv, size_of::<i32>()];
        HostMemory::check(elements(lengths)?).map_err(|error| short(error.into()))?;
        let kv = SegmentCache {
            rows,
            k: empty(room)?,
            raw_k: empty(if handed_on { room } else { 0 })?,
            v: empty(room)?,
            prior_k: empty(prior)?,
            prior_v: empty(prior)?,
            past_k: empty(past)?,
            past_v: empty(past)?,
            prior_len: vec![0; count],
            past_len: vec![0; count * plan.heads.kv],
            sink_len: vec![
                0;
                if plan.sink_len > 0 {
                    count * plan.heads.kv
                } else {
                    0
                }
            ],
        };
        let probes = (past > plan.sink_len)
            .then(|| {
                let len = elements([count, plan.probe_rows, plan.q_width()])?;
                device.empty(Kind::Activation, len)
            })
            .transpose()
            .map_err(short)?;
        Ok(Self { kv, probes })
    }
}

/// Cosines and sines of every position that a row can have. Position `p` is row [`Plan::origin`] + `p`.
#[derive(Debug)]
pub struct Angles<D: Device> {
    turning: Table<D>,
    /// For layers that do not rotate.
    still: Option<Table<D>>,
    unrotated: Arc<[usize]>,
}

type Table<D> = Arc<[<D as Device>::Buffer; 2]>;

impl<D: Device> Clone for Angles<D> {
    fn clone(&self) -> Self {
        Self {
            turning: self.turning.clone(),
            still: self.still.clone(),
            unrotated: self.unrotated.clone(),
        }
    }
}

impl<D: Device> Angles<D> {
    /// Tables for segments of at most `room` rows.
    pub fn new(device: &D, config: &ModelConfig, plan: &Plan, room: usize) -> Result<Self> {
        let origin = plan.origin() as i64;
        // Cosines and sines in f64 and in f32.
        let pair = 2 * (size_of::<f64>() + size_of::<f32>());
        let rows = plan.origin().saturating_add(room);
        let bytes = rows.saturating_mul(config.head_dim / 2 * pair);
        HostMemory::check(bytes)
            .map_err(|error| DeviceError::from(error).wanted_for(Purpose::Segments))?;
        let upload = |values: &[f32]| -> Result<D::Buffer> {
            let buffer = device.empty(Kind::Exact, values.len());
            let mut buffer = buffer.map_err(|error| error.wanted_for(Purpose::Segments))?;
            device.write(&mut buffer, 0, values)?;
            Ok(buffer)
        };
        let table = |rope: Rope| -> Result<Table<D>> {
            let tables = rope.tables(-origin..room as i64);
            Ok(Arc::new([
                upload(&tables.cos_f32)?,
                upload(&tables.sin_f32)?,
            ]))
        };
        let unrotated = &config.switches.unrotated;
        Ok(Self {
            turning: table(Rope::new(config))?,
            still: match unrotated.is_empty() {
                true => None,
                false => Some(table(Rope::still(config))?),
            },
            unrotated: unrotated.as_slice().into(),
        })
    }

    /// Cosines and sines of layer `l`, row `origin + position`.
    fn of_layer(&self, l: usize) -> (&D::Buffer, &D::Buffer) {
        let table = match &self.still {
            Some(still) if self.unrotated.contains(&l) => still,
            _ => &self.turning,
        };
        (&table[0], &table[1])
    }
}

/// Slots for segments in flight, and their angle tables.
#[derive(Debug)]
pub struct Slots<D: Device> {
    /// One entry per layer; a single one for all layers of [`Slots::passing`].
    pub layers: Vec<LayerSlots<D>>,
    passing: bool,
    /// Number of slots.
    pub count: usize,
    /// Capacity of a slot, in rows.
    pub room: usize,
    angles: Angles<D>,
}

impl<D: Device> Slots<D> {
    /// `count` empty slots with room for segments of `room` rows, which keep the rows of every layer.
    pub fn new(
        device: &D,
        plan: &Plan,
        angles: &Angles<D>,
        count: usize,
        room: usize,
    ) -> Result<Self> {
        let layer = |reads: &LayerReads| {
            let [prior, past] = plan.sources(reads);
            let rows = PerSource {
                past,
                prior,
                current: room,
            };
            LayerSlots::new(device, plan, count, rows, prior + past > 0)
        };
        Ok(Self {
            layers: plan.reads.iter().map(layer).collect::<Result<_>>()?,
            passing: false,
            count,
            room,
            angles: angles.clone(),
        })
    }

    /// `count` empty slots for segments of at most `room` rows that begin and end within one step without a backward
    /// pass. The keys and values of a layer are not read after that layer, so all layers share one buffer.
    pub fn passing(
        device: &D,
        plan: &Plan,
        angles: &Angles<D>,
        count: usize,
        room: usize,
    ) -> Result<Self> {
        let sources = plan.reads.iter().map(|reads| plan.sources(reads));
        let [prior, past] = sources.fold([0; 2], |a, b| [a[0].max(b[0]), a[1].max(b[1])]);
        let rows = PerSource {
            past,
            prior,
            current: room,
        };
        Ok(Self {
            layers: vec![LayerSlots::new(
                device,
                plan,
                count,
                rows,
                prior + past > 0,
            )?],
            passing: true,
            count,
            room,
            angles: angles.clone(),
        })
    }

    /// A layer's slots, and the angle tables.
    pub(in crate::model) fn layer_mut(
        &mut self,
        l: usize,
    ) -> (&mut LayerSlots<D>, (&D::Buffer, &D::Buffer)) {
        let layer = &mut self.layers[if self.passing { 0 } else { l }];
        (layer, self.angles.of_layer(l))
    }

    /// Cosines and sines of layer `l`, row `origin + position`.
    pub fn tables(&self, l: usize) -> (&D::Buffer, &D::Buffer) {
        self.angles.of_layer(l)
    }
}
