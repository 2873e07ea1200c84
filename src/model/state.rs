//! State that a sequence carries from segment to segment, and the slots that hold segments in flight.
//!
//! The state of a layer is the prior tail, the selected blocks of the past, and the pool.

use std::sync::Arc;

use super::config::{ModelConfig, RetrievalConfig};
use super::rope::Rope;
use crate::attention::PerSource;
use crate::device::{
    Accumulate, Device, DeviceError, Heads, Kind, PastHeads, PastPool, Probes, Purpose, Result,
    Rows, RowsMut, SegmentCache, SelectedBlocks, Selection, SelectionRule,
};

/// The sources that the KV heads of a layer read.
#[derive(Debug, Clone)]
pub struct LayerReads {
    /// Whether each KV head reads the prior tail.
    pub prior: Vec<bool>,
    /// KV heads that read the past, ascending.
    pub past: Vec<usize>,
}

/// Sizes of one run of a model: segments, sources, and the heads that read each source.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Head counts.
    pub heads: Heads,
    /// Tokens of a segment; the length of the sequence in a model without segments.
    pub segment_len: usize,
    /// Rows of the prior tail.
    pub prior_len: usize,
    /// Largest number of past rows.
    pub past_len: usize,
    /// Last rows of a segment, whose queries are averaged into probes.
    pub probe_rows: usize,
    /// How past rows are selected.
    pub rule: SelectionRule,
    /// Per layer.
    pub reads: Vec<LayerReads>,
}

impl Plan {
    /// The plan of `config` for sequences of at most `longest` tokens.
    pub fn new(config: &ModelConfig, longest: usize) -> Self {
        let heads = Heads {
            q: config.num_attention_heads,
            kv: config.num_key_value_heads,
            dim: config.head_dim,
        };
        let segment = config.segment.as_ref();
        let [prior_len, past_len] = segment.map_or([0, 0], |s| [s.prior_len, s.past_len]);
        // No head reads a source without rows: it needs no pool, no probes and no slots.
        let prior = |l, g| prior_len > 0 && config.reads_prior(l, g);
        let past = |l, g| past_len > 0 && config.reads_past(l, g);
        let layer = |l: usize| LayerReads {
            prior: (0..heads.kv).map(|g| prior(l, g)).collect(),
            past: (0..heads.kv).filter(|g| past(l, *g)).collect(),
        };
        let reads = (0..config.num_hidden_layers).map(layer).collect();
        let Some(segment) = &config.segment else {
            let segment_len = longest.max(1);
            return Self {
                heads,
                segment_len,
                prior_len: 0,
                past_len: 0,
                probe_rows: 0,
                rule: RetrievalConfig::default().rule(),
                reads,
            };
        };
        Self {
            heads,
            segment_len: segment.segment_len,
            prior_len,
            past_len,
            probe_rows: segment.retrieval.queries().min(segment.segment_len),
            rule: segment.retrieval.rule(),
            reads,
        }
    }

    /// Number of prior rows and of past rows that a layer with these reads needs.
    pub fn sources(&self, reads: &LayerReads) -> [usize; 2] {
        let prior = reads.prior.contains(&true);
        let past = !reads.past.is_empty();
        [
            if prior { self.prior_len } else { 0 },
            if past { self.past_len } else { 0 },
        ]
    }

    /// Elements of a row of keys.
    pub fn kv_width(&self) -> usize {
        self.heads.kv * self.heads.dim
    }

    /// Elements of a row of queries.
    pub fn q_width(&self) -> usize {
        self.heads.q * self.heads.dim
    }

    /// Row of the probes for a position of a segment; only the last `probe_rows` positions have one.
    pub fn probe_row(&self, slot: usize, position: usize) -> Option<usize> {
        let first = self.segment_len - self.probe_rows;
        (position >= first).then(|| slot * self.probe_rows + position - first)
    }

    /// Row of the angle tables that holds position 0.
    pub fn origin(&self) -> usize {
        self.prior_len + self.past_len
    }
}

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
            let buffer = device.empty(Kind::Activation, count * rows * width);
            buffer.map_err(short)
        };
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
        };
        let probes = (past > 0)
            .then(|| device.empty(Kind::Activation, count * plan.probe_rows * plan.q_width()))
            .transpose()
            .map_err(short)?;
        Ok(Self { kv, probes })
    }
}

/// Cosines and sines of every position that a row can have. Position `p` is row [`Plan::origin`] + `p`.
#[derive(Debug)]
pub struct Angles<D: Device> {
    cos: Arc<D::Buffer>,
    sin: Arc<D::Buffer>,
}

impl<D: Device> Clone for Angles<D> {
    fn clone(&self) -> Self {
        let (cos, sin) = (self.cos.clone(), self.sin.clone());
        Self { cos, sin }
    }
}

impl<D: Device> Angles<D> {
    /// Tables for segments of at most `room` rows.
    pub fn new(device: &D, config: &ModelConfig, plan: &Plan, room: usize) -> Result<Self> {
        let origin = plan.origin() as i64;
        let tables = Rope::new(config).tables(-origin..room as i64);
        let short = |error: DeviceError| error.wanted_for(Purpose::Segments);
        let upload = |values: &[f32]| -> Result<Arc<D::Buffer>> {
            let mut buffer = device.empty(Kind::Exact, values.len())?;
            device.write(&mut buffer, 0, values)?;
            Ok(Arc::new(buffer))
        };
        Ok(Self {
            cos: upload(&tables.cos_f32).map_err(short)?,
            sin: upload(&tables.sin_f32).map_err(short)?,
        })
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
    /// `count` empty slots with room for `room` rows, which keep the rows of every layer. `room` is a whole segment if
    /// other segments follow.
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

    /// `count` empty slots for segments that begin and end within one step without a backward pass. The keys and values
    /// of a layer are not read after that layer, so all layers share one buffer.
    pub fn passing(device: &D, plan: &Plan, angles: &Angles<D>, count: usize) -> Result<Self> {
        let sources = plan.reads.iter().map(|reads| plan.sources(reads));
        let [prior, past] = sources.fold([0; 2], |a, b| [a[0].max(b[0]), a[1].max(b[1])]);
        let rows = PerSource {
            past,
            prior,
            current: plan.segment_len,
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
            room: plan.segment_len,
            angles: angles.clone(),
        })
    }

    /// A layer's slots, and the angle tables.
    pub(super) fn layer_mut(&mut self, l: usize) -> (&mut LayerSlots<D>, (&D::Buffer, &D::Buffer)) {
        let layer = &mut self.layers[if self.passing { 0 } else { l }];
        (layer, (&self.angles.cos, &self.angles.sin))
    }

    /// Cosines and sines, row `origin + position`.
    pub fn tables(&self) -> (&D::Buffer, &D::Buffer) {
        (&self.angles.cos, &self.angles.sin)
    }
}

/// State of one layer that a complete segment hands to the next.
#[derive(Debug)]
pub struct Carry<D: Device> {
    /// The last `prior_len` keys before rotation.
    pub prior_k: D::Buffer,
    /// Their values.
    pub prior_v: D::Buffer,
    /// Number of rows of the tail; 0 before the first segment is complete.
    pub prior_rows: usize,
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
            selected: self.selected.clone(),
            pool: self.pool.clone(),
            undo: None,
        }
    }
}

impl<D: Device> Carry<D> {
    /// Begins a transaction: changes from here on can be undone.
    pub(super) fn begin(&mut self) {
        self.undo = Some(Undo {
            tail: None,
            selected: None,
            pool_tokens: None,
        });
    }

    /// Commits the changes since [`Carry::begin`].
    pub(super) fn commit(&mut self) {
        self.undo = None;
    }

    /// Rolls back the changes since [`Carry::begin`].
    pub(super) fn roll_back(&mut self) {
        let Some(undo) = self.undo.take() else {
            return;
        };
        if let Some(([k, v], rows)) = undo.tail {
            (self.prior_k, self.prior_v, self.prior_rows) = (k, v, rows);
        }
        if let Some(selected) = undo.selected {
            self.selected = selected;
        }
        if let (Some(pool), Some(tokens)) = (&mut self.pool, undo.pool_tokens) {
            pool.truncate(tokens);
        }
    }

    /// Moves the buffers of the tail to the backup, so that the next write allocates new ones.
    fn keep_tail(&mut self, device: &D) -> Result<()> {
        let Some(undo) = self.undo.as_mut().filter(|undo| undo.tail.is_none()) else {
            return Ok(());
        };
        let empty = |old: &D::Buffer| device.empty(Kind::Activation, device.len(old));
        let (k, v) = (empty(&self.prior_k)?, empty(&self.prior_v)?);
        let old = [
            std::mem::replace(&mut self.prior_k, k),
            std::mem::replace(&mut self.prior_v, v),
        ];
        undo.tail = Some((old, self.prior_rows));
        Ok(())
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

/// Writes the prior and past rows of a slot for the segment that begins in it.
pub(super) fn open_segment<D: Device>(
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
    kv.past_len[slot * plan.heads.kv..][..plan.heads.kv].fill(0);
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
    let Some(pool) = &carry.pool else {
        return Ok(());
    };
    let mut ends = Vec::with_capacity(reads.past.len());
    for (i, head) in reads.past.iter().enumerate() {
        kv.past_len[slot * plan.heads.kv + head] = carry.selected.count(i);
        ends.push(plan.origin() - if reads.prior[*head] { rows } else { 0 });
    }
    let past = PastHeads {
        kv_heads: &reads.past,
        ends: &ends,
    };
    let first = slot * past_room;
    let k = RowsMut::packed(&mut kv.past_k, first, width);
    let v = RowsMut::packed(&mut kv.past_v, first, width);
    pool.gather(device, &carry.selected, &past, tables, [k, v])
}

/// Updates the state after a complete segment: its tail, its tokens in the pool, and the past blocks that its probes
/// select.
pub(super) fn close_segment<D: Device>(
    device: &D,
    plan: &Plan,
    layer: usize,
    slots: &LayerSlots<D>,
    slot: usize,
    carry: &mut Carry<D>,
) -> Result<()> {
    let (width, reads) = (plan.kv_width(), &plan.reads[layer]);
    let kv = &slots.kv;
    let first = slot * kv.rows.current;
    let [prior, _] = plan.sources(reads);
    if prior > 0 {
        carry.keep_tail(device)?;
        let tail = first + plan.segment_len - plan.prior_len;
        for (src, dst) in [(&kv.raw_k, &mut carry.prior_k), (&kv.v, &mut carry.prior_v)] {
            let (src, dst) = (
                Rows::packed(src, tail, width),
                RowsMut::packed(dst, 0, width),
            );
            device.copy(src, dst, plan.prior_len, width, Accumulate::No)?;
        }
    }
    carry.prior_rows = prior;
    let (Some(pool), Some(queries)) = (&mut carry.pool, &slots.probes) else {
        return Ok(());
    };
    let (k, v) = (
        Rows::packed(&kv.raw_k, first, width),
        Rows::packed(&kv.v, first, width),
    );
    if let Some(undo) = &mut carry.undo {
        undo.pool_tokens.get_or_insert(pool.tokens());
    }
    pool.append(device, &reads.past, [k, v], plan.segment_len)?;
    let tokens = pool.tokens();
    let tail = |head: &usize| {
        if reads.prior[*head] {
            plan.prior_len
        } else {
            0
        }
    };
    let eligible: Vec<_> = reads.past.iter().map(|h| 0..tokens - tail(h)).collect();
    let probes = Probes {
        q: Rows::packed(queries, slot * plan.probe_rows, plan.q_width()),
        rows: plan.probe_rows,
        first: 0,
        capacity: plan.probe_rows,
        group: plan.heads.q / plan.heads.kv,
    };
    let selection = Selection {
        kv_heads: &reads.past,
        eligible: &eligible,
        rows: plan.past_len,
        rule: plan.rule,
    };
    let selected = pool.select(device, &probes, &selection)?;
    let old = std::mem::replace(&mut carry.selected, selected);
    if let Some(undo) = &mut carry.undo {
        undo.selected.get_or_insert(old);
    }
    Ok(())
}

/// Allocates what [`close_segment`] would allocate, with arbitrary contents. For dry runs.
pub(super) fn pretend_segment<D: Device>(
    device: &D,
    plan: &Plan,
    layer: usize,
    rows: &D::Buffer,
    carry: &mut Carry<D>,
) -> Result<()> {
    let reads = &plan.reads[layer];
    carry.prior_rows = plan.sources(reads)[0];
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
