//! Which tensors a saved session has, their shapes, and their values in the session.

use std::ops::Range;

use super::stages::Saved;
use super::{CHECKSUM, FORMAT, Origin};
use safetensors::tensor::Dtype;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use crate::device::{Device, PastPool, Result, SelectedBlocks};
use crate::model::parameters::index;
use crate::model::segmentation::Cursor;
use crate::model::session::Session;
use crate::model::state::Plan;
use crate::model::switches::Switches;

/// Keys of the configuration that a state depends on.
const MODEL_KEYS: [&str; 12] = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "segment",
];

/// What is saved of a sequence; numbers are those of layer and head.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(super) enum Part {
    Logits,
    /// The tokens read.
    Tokens,
    Prior(usize),
    Sinks(usize),
    /// Of a layer, the part with this number.
    Pool(usize, usize),
    /// Of a layer and head, the selected tokens.
    Selected(usize, usize),
    Segment(usize),
    Probes(usize),
}

impl Part {
    fn dtype(self) -> (Dtype, &'static str) {
        match self {
            Self::Selected(..) => (Dtype::I64, "I64"),
            Self::Tokens => (Dtype::U32, "U32"),
            _ => (Dtype::F32, "F32"),
        }
    }

    /// Its bytes, if it has this shape.
    pub(super) fn bytes(self, shape: &[usize]) -> usize {
        shape.iter().product::<usize>() * self.dtype().0.bitsize() / 8
    }

    /// The same of the layer that stands so many layers behind.
    pub(super) fn behind(self, layers: usize) -> Self {
        match self {
            Self::Logits | Self::Tokens => self,
            Self::Prior(l) => Self::Prior(l + layers),
            Self::Sinks(l) => Self::Sinks(l + layers),
            Self::Pool(l, part) => Self::Pool(l + layers, part),
            Self::Selected(l, h) => Self::Selected(l + layers, h),
            Self::Segment(l) => Self::Segment(l + layers),
            Self::Probes(l) => Self::Probes(l + layers),
        }
    }

    pub(super) fn name(self, sequence: usize) -> String {
        match self {
            Self::Logits => format!("{sequence}.logits"),
            Self::Tokens => format!("{sequence}.tokens"),
            Self::Prior(l) => format!("{sequence}.{l}.prior"),
            Self::Sinks(l) => format!("{sequence}.{l}.sinks"),
            Self::Pool(l, part) => format!("{sequence}.{l}.pool.{part}"),
            Self::Selected(l, h) => format!("{sequence}.{l}.selected.{h}"),
            Self::Segment(l) => format!("{sequence}.{l}.segment"),
            Self::Probes(l) => format!("{sequence}.{l}.probes"),
        }
    }
}

/// The shapes that a sequence's parts have where it has been read so far; those with a zero are left out.
#[derive(Debug)]
pub(super) struct Shapes {
    /// Tokens of completed segments.
    pub(super) completed: usize,
    /// Those that pools hold.
    pub(super) held: usize,
    /// Rows of the current segment that have been read.
    pub(super) rows: usize,
    pub(super) past_len: usize,
    position: usize,
    vocab: usize,
    plan: Plan,
}

impl Shapes {
    pub(super) fn new<D: Device>(session: &Session<'_, D>, cursor: Cursor) -> Self {
        let plan = &session.plan;
        Self {
            completed: cursor.completed(),
            held: plan.held(cursor.completed()),
            rows: cursor.rows,
            past_len: plan.past_len,
            position: cursor.position,
            vocab: session.model.config.vocab_size,
            plan: plan.clone(),
        }
    }

    pub(super) fn past_heads(&self, l: usize) -> usize {
        self.plan.reads[l].past.len()
    }

    pub(super) fn logits(&self) -> [usize; 1] {
        [if self.position > 0 { self.vocab } else { 0 }]
    }

    pub(super) fn prior(&self, l: usize) -> [usize; 4] {
        let rows = match self.plan.reads[l].prior.contains(&true) {
            true => self.plan.prior_len.min(self.completed),
            false => 0,
        };
        [2, rows, self.plan.heads.kv, self.plan.heads.dim]
    }

    pub(super) fn sinks(&self) -> [usize; 4] {
        let rows = self.plan.sinks(self.completed, 0);
        [2, rows, self.plan.heads.kv, self.plan.heads.dim]
    }

    /// Parts in which the tokens that a pool holds are saved.
    pub(super) fn pool_parts(&self) -> usize {
        self.held.div_ceil(self.plan.segment_len)
    }

    /// The tokens of a part.
    pub(super) fn pool_part(&self, part: usize) -> Range<usize> {
        let first = part * self.plan.segment_len;
        first..self.held.min(first + self.plan.segment_len)
    }

    pub(super) fn pool(&self, l: usize, part: usize) -> [usize; 4] {
        let rows = self.pool_part(part).len();
        [2, rows, self.past_heads(l), self.plan.heads.dim]
    }

    pub(super) fn segment(&self) -> [usize; 4] {
        [2, self.rows, self.plan.heads.kv, self.plan.heads.dim]
    }

    pub(super) fn probes(&self, l: usize) -> [usize; 3] {
        let rows = match self.past_heads(l) > 0 {
            true => self.plan.probe_rows.min(self.rows),
            false => 0,
        };
        [rows, self.plan.heads.q, self.plan.heads.dim]
    }
}

/// Every tensor that is saved of the layers that are here, with its sequence and shape, in the file's order.
pub(super) fn parts<D: Device>(
    session: &Session<'_, D>,
    origin: Origin<'_>,
) -> Vec<(usize, Part, Vec<usize>)> {
    let mut parts = Vec::new();
    for s in 0..session.sequences() {
        let tokens = origin.tokens.get(s).map_or(0, Vec::len);
        let of_sequence = sequence_parts(session, s, tokens).into_iter();
        parts.extend(of_sequence.map(|(part, shape)| (s, part, shape)));
    }
    parts
}

/// Every tensor of one sequence, of which `tokens` tokens are saved, with its shape, in the file's order.
pub(super) fn sequence_parts<D: Device>(
    session: &Session<'_, D>,
    s: usize,
    tokens: usize,
) -> Vec<(Part, Vec<usize>)> {
    let mut parts = Vec::new();
    let shapes = Shapes::new(session, session.cursors[s]);
    let mut push = |part, shape: &[usize]| {
        if !shape.contains(&0) {
            parts.push((part, shape.to_vec()));
        }
    };
    if session.model.config.part.ends {
        push(Part::Logits, &shapes.logits());
    }
    push(Part::Tokens, &[tokens]);
    for l in 0..session.states[s].layers.len() {
        push(Part::Prior(l), &shapes.prior(l));
        push(Part::Sinks(l), &shapes.sinks());
        for part in 0..shapes.pool_parts() {
            push(Part::Pool(l, part), &shapes.pool(l, part));
        }
        push(Part::Segment(l), &shapes.segment());
        push(Part::Probes(l), &shapes.probes(l));
    }
    if shapes.completed == 0 {
        return parts;
    }
    for (l, carry) in session.states[s].layers.iter().enumerate() {
        for h in 0..session.plan.reads[l].past.len() {
            parts.push((Part::Selected(l, h), vec![carry.selected.count(h)]));
        }
    }
    parts
}

/// The header: tensors in order, metadata with the `model`'s fingerprint, and spaces up to a multiple of 8 bytes.
pub(super) fn header<D: Device>(
    session: &Session<'_, D>,
    origin: Origin<'_>,
    model: &str,
    parts: &[Saved],
) -> Vec<u8> {
    let mut header = Map::new();
    let of_each = |f: fn(&Cursor) -> usize| {
        let numbers: Vec<usize> = session.cursors.iter().map(f).collect();
        json!(numbers).to_string()
    };
    let mut metadata = json!({
        "format": FORMAT,
        "positions": of_each(|cursor| cursor.position),
        "rows": of_each(|cursor| cursor.rows),
        "model": model,
        "weights": origin.weights,
    });
    if !origin.note.is_empty() {
        metadata["note"] = origin.note.into();
    }
    header.insert("__metadata__".to_owned(), metadata);
    let mut start = 0;
    for saved in parts {
        let end = start + saved.part.bytes(&saved.shape);
        let entry = json!({
            "dtype": saved.part.dtype().1,
            "shape": saved.shape,
            "data_offsets": [start, end],
        });
        header.insert(saved.part.name(saved.sequence), entry);
        start = end;
    }
    let checksum = json!({"dtype": "U8", "shape": [32], "data_offsets": [start, start + 32]});
    header.insert(CHECKSUM.to_owned(), checksum);
    let mut text = Value::Object(header).to_string().into_bytes();
    text.resize(text.len().next_multiple_of(8), b' ');
    text
}

/// The values of one tensor, little endian.
pub(super) fn bytes<D: Device>(
    session: &Session<'_, D>,
    origin: Origin<'_>,
    sequence: usize,
    part: Part,
) -> Result<Vec<u8>> {
    Ok(match part {
        Part::Tokens => {
            let tokens = &origin.tokens[sequence];
            tokens.iter().flat_map(|t| t.to_le_bytes()).collect()
        }
        Part::Selected(l, h) => {
            let selected = selected(session, sequence, l, h)?.into_iter();
            selected
                .flat_map(|token| (token as i64).to_le_bytes())
                .collect()
        }
        part => {
            let values = values(session, sequence, part)?.into_iter();
            values.flat_map(f32::to_le_bytes).collect()
        }
    })
}

/// The tokens that a head of a layer's pool has selected.
pub(super) fn selected<D: Device>(
    session: &Session<'_, D>,
    sequence: usize,
    l: usize,
    h: usize,
) -> Result<Vec<usize>> {
    let carry = &session.states[sequence].layers[l];
    Ok(carry.selected.tokens(&session.model.device)?.swap_remove(h))
}

/// The values of one tensor of numbers; none of a tensor of ids.
pub(super) fn values<D: Device>(
    session: &Session<'_, D>,
    sequence: usize,
    part: Part,
) -> Result<Vec<f32>> {
    let (device, plan) = (&session.model.device, &session.plan);
    let carry = |l: usize| &session.states[sequence].layers[l];
    let shapes = Shapes::new(session, session.cursors[sequence]);
    let layer = |l: usize| {
        session
            .flight
            .opened()
            .map(|slots| (&slots.layers[l], slots.room))
    };
    let width = plan.kv_width();
    let values = match part {
        Part::Logits => session.logits(sequence)?,
        Part::Tokens | Part::Selected(..) => Vec::new(),
        Part::Prior(l) => {
            let range = 0..carry(l).prior_rows * width;
            let mut values = device.read(&carry(l).prior_k, range.clone())?;
            values.extend(device.read(&carry(l).prior_v, range)?);
            values
        }
        Part::Sinks(l) => {
            let range = 0..shapes.sinks()[1] * width;
            let mut values = device.read(&carry(l).sinks.k, range.clone())?;
            values.extend(device.read(&carry(l).sinks.v, range)?);
            values
        }
        Part::Pool(l, part) => match &carry(l).pool {
            Some(pool) => {
                let (mut values, v) = pool.read(device, shapes.pool_part(part))?;
                values.extend(v);
                values
            }
            None => Vec::new(),
        },
        Part::Segment(l) => match layer(l) {
            Some((layer, room)) => {
                let first = sequence * room * width;
                let range = first..first + shapes.rows * width;
                let keys = match device.len(&layer.kv.raw_k) {
                    0 => &layer.kv.k,
                    _ => &layer.kv.raw_k,
                };
                let mut values = device.read(keys, range.clone())?;
                values.extend(device.read(&layer.kv.v, range)?);
                values
            }
            None => Vec::new(),
        },
        Part::Probes(l) => match layer(l).and_then(|(layer, _)| layer.probes.as_ref()) {
            Some(probes) => {
                let first = sequence * plan.probe_rows * plan.q_width();
                let rows = shapes.probes(l)[0];
                device.read(probes, first..first + rows * plan.q_width())?
            }
            None => Vec::new(),
        },
    };
    Ok(values)
}

/// What a state depends on in the model: its shape, how it runs, and a digest of its last norm and
/// its gates, which no two trainings share.
pub(super) fn fingerprint<D: Device>(session: &Session<'_, D>) -> Result<String> {
    let model = session.model;
    let config = model.stage.whole().unwrap_or(&model.config);
    let mut digest = Sha256::new();
    let norm = index::final_norm(model.config.num_hidden_layers);
    let norm = model.weights.vector(norm);
    for value in model.device.read(norm, 0..config.hidden_size)? {
        digest.update(value.to_le_bytes());
    }
    for gate in session.all_gates()? {
        digest.update(gate.to_le_bytes());
    }
    let mut shown = Map::new();
    if let Value::Object(mut config) = config.to_json() {
        for key in MODEL_KEYS {
            if let Some(value) = config.remove(key) {
                shown.insert(key.to_owned(), value);
            }
        }
    }
    let hex: String = digest
        .finalize()
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect();
    let (family, switches) = (config.family, &config.switches);
    if *switches != Switches::PLAIN || config.rope_length.is_some() {
        let of = (family, switches, config.rope_length);
        shown.insert("switches".to_owned(), format!("{of:?}").into());
    }
    shown.insert("weights".to_owned(), hex.into());
    Ok(Value::Object(shown).to_string())
}
