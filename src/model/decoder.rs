//! The only forward pass of the decoder. Training, scoring, prefill and decoding all call [`Decoder::forward`] with a
//! [`Step`]: rows of one or more segments, each in a slot.
//!
//! A layer computes, in this order:
//!
//! 1. the norm, the q/k/v projection and the rotation; keys and values go to the slots;
//! 2. the hand-over between segments, in the order of the spans: a segment that begins reads its prior and past rows
//!    from the state of its sequence, a segment that is complete writes its own to the state. So a segment can follow
//!    another within one step;
//! 3. one attention call over all slots;
//! 4. the MLP.
//!
//! Rows interact only in attention.

use super::config::ModelConfig;
use super::parameters::{TensorSpec, Weights, index, specs};
use super::state::{LayerSlots, Plan, SequenceState, Slots, close_segment, open_segment};
use crate::device::{
    Accumulate, Attention, Device, KeyStore, Kind, Result, Rows, RowsMut, SlotSpan, StepRows,
};

/// Rows of one segment of one sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// Index of the sequence among the step's states.
    pub sequence: usize,
    /// Range of rows, and the slot of their segment.
    pub rows: SlotSpan,
    /// Whether the segment is complete after these rows.
    pub closes: bool,
}

/// Rows that are computed together. Spans are sorted by segment, then by sequence. Their rows are packed from row 0 on.
#[derive(Debug, Clone, Default)]
pub struct Step {
    /// The spans.
    pub spans: Vec<Span>,
    /// The token of each row.
    pub tokens: Vec<u32>,
}

impl Step {
    /// Adds rows at position `start` of the segment in `slot`, which `closes` after them or goes on.
    pub fn push(
        &mut self,
        sequence: usize,
        slot: usize,
        start: usize,
        tokens: &[u32],
        closes: bool,
    ) {
        let rows = SlotSpan {
            row: self.tokens.len(),
            rows: tokens.len(),
            start,
            slot,
        };
        self.spans.push(Span {
            sequence,
            rows,
            closes,
        });
        self.tokens.extend_from_slice(tokens);
    }

    /// Row of the angle tables for the position of each row.
    pub fn angles(&self, plan: &Plan) -> Vec<usize> {
        let rows = self.spans.iter().map(|s| s.rows);
        rows.flat_map(|s| s.start..s.start + s.rows)
            .map(|position| plan.origin() + position)
            .collect()
    }

    /// Description of the rows for [`Device::step`]. A slot has room for `room` rows.
    pub fn rows(&self, plan: &Plan, room: usize) -> StepRows {
        let spans: Vec<SlotSpan> = self.spans.iter().map(|s| s.rows).collect();
        let row = |s: &SlotSpan, position| {
            let probe = plan.probe_row(s.slot, position, s.start + s.rows);
            (s.slot * room + position, probe)
        };
        let (cache_rows, probe_rows) = (spans.iter())
            .flat_map(|s| (s.start..s.start + s.rows).map(move |position| row(s, position)))
            .unzip();
        StepRows {
            tokens: self.tokens.clone(),
            angles: self.angles(plan),
            cache_rows,
            probe_rows,
            reach: spans.iter().map(|s| s.start + s.rows).max().unwrap_or(0),
            spans,
        }
    }
}

/// Activations of a layer that its backward pass needs and that cannot be recomputed without attention.
#[derive(Debug)]
pub struct LayerTape<D: Device> {
    /// The layer's input `[rows, hidden]`.
    pub x: D::Buffer,
    /// Attention's output `[rows, q_heads * head_dim]`.
    pub attended: D::Buffer,
    /// Attention's log-sum-exp, `[q_heads, rows]` for each span, spans packed.
    pub lse: D::Buffer,
}

/// The other activations that the backward pass needs. [`Decoder::derive`] recomputes them from the tape.
#[derive(Debug)]
pub struct Derived<D: Device> {
    /// The norm of the layer's input.
    pub x_normed: D::Buffer,
    /// Reciprocal root mean square of the input.
    pub x_rstd: D::Buffer,
    /// Rotated queries.
    pub q: D::Buffer,
    /// The residual stream between attention and MLP.
    pub mid: D::Buffer,
    /// Its norm.
    pub mid_normed: D::Buffer,
    /// Reciprocal root mean square of `mid`.
    pub mid_rstd: D::Buffer,
    /// Gate and up `[rows, 2 * inner]`.
    pub gate_up: D::Buffer,
}

/// A model on a device.
#[derive(Debug)]
pub struct Decoder<D: Device> {
    /// The device it runs on.
    pub device: D,
    /// Sizes and settings of the model.
    pub config: ModelConfig,
    /// Names and shapes of its tensors.
    pub specs: Vec<TensorSpec>,
    /// The tensors on the device, packed for GEMMs.
    pub weights: Weights<D>,
}

/// Result of a forward.
#[derive(Debug)]
pub struct Forward<D: Device> {
    /// The residual stream after the last layer `[rows, hidden]`.
    pub x: D::Buffer,
    /// Its norm, the head's input.
    pub hidden: D::Buffer,
    /// Reciprocal root mean square of `x`.
    pub rstd: D::Buffer,
}

impl<D: Device> Decoder<D> {
    /// A model from its tensors' values, in the order of [`specs`].
    pub fn new(
        device: D,
        config: ModelConfig,
        values: impl FnMut(usize) -> Result<D::Buffer>,
        training: bool,
    ) -> Result<Self> {
        let specs = specs(&config);
        let weights = Weights::prepare(&device, &specs, values, training)?;
        Ok(Self {
            device,
            config,
            specs,
            weights,
        })
    }

    /// A model with arbitrary weights, allocated as a real one is: for dry runs, which only measure memory. Their
    /// tokens end no segment.
    pub fn for_dry_run(device: D, config: ModelConfig, training: bool) -> Result<Self> {
        let config = config.for_dry_run();
        let specs = specs(&config);
        let values = |i: usize| device.empty(Kind::Exact, specs[i].role.len());
        let weights = Weights::prepare(&device, &specs, values, training)?;
        Ok(Self {
            device,
            config,
            specs,
            weights,
        })
    }

    /// Matrix of the LM head: its own, or that of a tied embedding.
    pub fn head(&self) -> &D::Matrix {
        let i = if self.config.tie_word_embeddings {
            index::EMBEDDING
        } else {
            index::head(self.config.num_hidden_layers)
        };
        self.weights.matrix(i)
    }

    /// Runs the rows of a step through all layers. `placed` is [`Step::rows`] on the device. `keep` receives the tape
    /// and the derived activations of each layer.
    pub fn forward(
        &self,
        plan: &Plan,
        step: &Step,
        placed: &mut D::Step,
        states: &mut [&mut SequenceState<D>],
        slots: &mut Slots<D>,
        mut keep: impl FnMut(LayerTape<D>, Derived<D>),
    ) -> Result<Forward<D>> {
        let mut x = self.embed(placed)?;
        for l in 0..self.config.num_hidden_layers {
            let (tape, derived, next) = self.layer(plan, l, x, (step, placed), states, slots)?;
            keep(tape, derived);
            x = next;
        }
        let norm = self
            .weights
            .vector(index::final_norm(self.config.num_hidden_layers));
        let (hidden, rstd) = self.norm(&x, step.tokens.len(), norm)?;
        Ok(Forward { x, hidden, rstd })
    }

    /// [`Decoder::forward`] for rows whose output is not needed: it stops after the keys and values of the last layer.
    pub fn advance(
        &self,
        plan: &Plan,
        step: &Step,
        placed: &mut D::Step,
        states: &mut [&mut SequenceState<D>],
        slots: &mut Slots<D>,
    ) -> Result<()> {
        let mut x = self.embed(placed)?;
        let last = self.config.num_hidden_layers - 1;
        for l in 0..last {
            (_, _, x) = self.layer(plan, l, x, (step, placed), states, slots)?;
        }
        self.read(plan, last, &x, (step, placed), states, slots)?;
        Ok(())
    }

    fn embed(&self, placed: &mut D::Step) -> Result<D::Buffer> {
        let (rows, hidden) = (placed.as_ref().tokens.len(), self.config.hidden_size);
        let mut x = self.device.empty(Kind::Activation, rows * hidden)?;
        let table = self.weights.matrix(index::EMBEDDING);
        let y = RowsMut::packed(&mut x, 0, hidden);
        self.device.embed(table, placed, y)?;
        Ok(x)
    }

    fn layer(
        &self,
        plan: &Plan,
        l: usize,
        x: D::Buffer,
        (step, placed): (&Step, &mut D::Step),
        states: &mut [&mut SequenceState<D>],
        slots: &mut Slots<D>,
    ) -> Result<(LayerTape<D>, Derived<D>, D::Buffer)> {
        let from_x = self.read(plan, l, &x, (step, placed), states, slots)?;
        let (attended, lse) = self.attend(plan, l, &from_x.2, placed, slots.layer_mut(l).0)?;
        let tape = LayerTape { x, attended, lse };
        let derived = self.after_attention(l, &tape, step.tokens.len(), from_x)?;
        let next = self.down(l, &derived, step.tokens.len())?;
        Ok((tape, derived, next))
    }

    /// A layer up to its attention, including the hand-over between segments. Returns the normed input, its reciprocal
    /// root mean square, and the rotated queries.
    fn read(
        &self,
        plan: &Plan,
        l: usize,
        x: &D::Buffer,
        (step, placed): (&Step, &mut D::Step),
        states: &mut [&mut SequenceState<D>],
        slots: &mut Slots<D>,
    ) -> Result<(D::Buffer, D::Buffer, D::Buffer)> {
        let rows = step.tokens.len();
        let norm = self.weights.vector(index::attention_norm(l));
        let (x_normed, x_rstd) = self.norm(x, rows, norm)?;
        let (layer, tables) = slots.layer_mut(l);
        let store = KeyStore {
            cache: &mut layer.kv,
            probes: layer.probes.as_mut(),
        };
        let q = self.queries(plan, l, &x_normed, rows, |qkv, q| {
            (self.device).split_qkv(qkv, plan.heads, tables, placed, q, store)
        })?;
        self.pass_on(plan, l, step, states, slots)?;
        Ok((x_normed, x_rstd, q))
    }

    /// Recomputes the activations that [`Decoder::forward`] derived from a layer's tape, with the same bits.
    pub fn derive(
        &self,
        plan: &Plan,
        l: usize,
        tape: &LayerTape<D>,
        step: &Step,
        slots: &Slots<D>,
    ) -> Result<Derived<D>> {
        let rows = step.tokens.len();
        let norm = self.weights.vector(index::attention_norm(l));
        let (x_normed, x_rstd) = self.norm(&tape.x, rows, norm)?;
        let (heads, angles) = (plan.heads, step.angles(plan));
        let q = self.queries(plan, l, &x_normed, rows, |qkv, q| {
            let tables = slots.tables();
            (self.device).rope(
                qkv,
                q,
                heads.q,
                heads.dim,
                tables,
                &angles,
                false,
                Accumulate::No,
            )
        })?;
        self.after_attention(l, tape, rows, (x_normed, x_rstd, q))
    }

    fn norm(
        &self,
        x: &D::Buffer,
        rows: usize,
        weight: &D::Buffer,
    ) -> Result<(D::Buffer, D::Buffer)> {
        let hidden = self.config.hidden_size;
        let (mut y, mut rstd) = (
            self.device.empty(Kind::Activation, rows * hidden)?,
            self.device.empty(Kind::Exact, rows)?,
        );
        self.device.rms_norm(
            Rows::packed(x, 0, hidden),
            rows,
            weight,
            self.config.rms_norm_eps,
            RowsMut::packed(&mut y, 0, hidden),
            RowsMut::packed(&mut rstd, 0, 1),
        )?;
        Ok((y, rstd))
    }

    /// Rotated queries of all rows. `take` extracts them from the rows `[q | k | v]`.
    fn queries(
        &self,
        plan: &Plan,
        l: usize,
        x_normed: &D::Buffer,
        rows: usize,
        take: impl FnOnce(Rows<'_, D::Buffer>, RowsMut<'_, D::Buffer>) -> Result<()>,
    ) -> Result<D::Buffer> {
        let device = &self.device;
        let (q_width, stride) = (plan.q_width(), plan.q_width() + 2 * plan.kv_width());
        let mut qkv = device.empty(Kind::Activation, rows * stride)?;
        let input = Rows::packed(x_normed, 0, self.config.hidden_size);
        let weight = self.weights.matrix(index::qkv(l));
        let target = RowsMut::packed(&mut qkv, 0, stride);
        device.linear(input, rows, weight, target, Accumulate::No)?;
        let mut q = device.empty(Kind::Activation, rows * q_width)?;
        take(
            Rows::packed(&qkv, 0, stride),
            RowsMut::packed(&mut q, 0, q_width),
        )?;
        Ok(q)
    }

    /// Opens the segments that begin and closes those that are complete, in the order of the spans.
    fn pass_on(
        &self,
        plan: &Plan,
        l: usize,
        step: &Step,
        states: &mut [&mut SequenceState<D>],
        slots: &mut Slots<D>,
    ) -> Result<()> {
        for Span {
            sequence,
            rows,
            closes,
        } in &step.spans
        {
            let carry = &mut states[*sequence].layers[l];
            if rows.start == 0 {
                let (layer, tables) = slots.layer_mut(l);
                open_segment(&self.device, plan, l, carry, layer, rows.slot, tables)?;
            }
            if *closes {
                let (layer, _) = slots.layer_mut(l);
                let complete = (rows.slot, rows.start + rows.rows);
                close_segment(&self.device, plan, l, layer, complete, carry)?;
            }
        }
        Ok(())
    }

    fn attend(
        &self,
        plan: &Plan,
        l: usize,
        q: &D::Buffer,
        placed: &mut D::Step,
        slots: &LayerSlots<D>,
    ) -> Result<(D::Buffer, D::Buffer)> {
        let spans = placed.as_ref().spans.clone();
        let (rows, width) = (placed.as_ref().tokens.len(), plan.q_width());
        let (gates, prior) = self.reads(plan, l);
        let call = Attention {
            heads: plan.heads,
            past_gate: &gates,
            prior_heads: &prior,
            spans: &spans,
            q: Rows::packed(q, 0, width),
            cache: &slots.kv,
        };
        let mut out = self.device.empty(Kind::Activation, rows * width)?;
        let mut lse = self.device.empty(Kind::Exact, rows * plan.heads.q)?;
        let lse_rows = RowsMut::packed(&mut lse, 0, plan.heads.q);
        let out_rows = RowsMut::packed(&mut out, 0, width);
        self.device
            .attention(&call, placed, l, out_rows, lse_rows)?;
        Ok((out, lse))
    }

    /// For each query head of a layer: the gate of the past, and whether it reads the prior tail.
    pub fn reads(&self, plan: &Plan, l: usize) -> (Vec<f32>, Vec<bool>) {
        let (reads, group) = (&plan.reads[l], plan.heads.q / plan.heads.kv);
        let gates = self.weights.gate(index::past_gate(l)).iter().enumerate();
        let gates = gates.map(|(h, g)| {
            if reads.past.contains(&(h / group)) {
                *g
            } else {
                0.0
            }
        });
        (
            gates.collect(),
            (0..plan.heads.q).map(|h| reads.prior[h / group]).collect(),
        )
    }

    /// `x + y wᵀ`.
    fn add_product(
        &self,
        x: &D::Buffer,
        y: &D::Buffer,
        weight: usize,
        rows: usize,
    ) -> Result<D::Buffer> {
        let hidden = self.config.hidden_size;
        let mut sum = self.device.empty(Kind::Activation, rows * hidden)?;
        let weight_width = match self.specs[weight].role {
            super::parameters::Role::Matrix { inner, .. } => inner,
            _ => unreachable!("GEMMs have matrices"),
        };
        self.device.linear_residual(
            Rows::packed(y, 0, weight_width),
            rows,
            self.weights.matrix(weight),
            Rows::packed(x, 0, hidden),
            RowsMut::packed(&mut sum, 0, hidden),
            hidden,
        )?;
        Ok(sum)
    }

    /// From attention's output to gate and up.
    fn after_attention(
        &self,
        l: usize,
        tape: &LayerTape<D>,
        rows: usize,
        (x_normed, x_rstd, q): (D::Buffer, D::Buffer, D::Buffer),
    ) -> Result<Derived<D>> {
        let mid = self.add_product(&tape.x, &tape.attended, index::output(l), rows)?;
        let norm = self.weights.vector(index::mlp_norm(l));
        let (mid_normed, mid_rstd) = self.norm(&mid, rows, norm)?;
        let width = 2 * self.config.intermediate_size;
        let mut gate_up = self.device.empty(Kind::Activation, rows * width)?;
        self.device.linear(
            Rows::packed(&mid_normed, 0, self.config.hidden_size),
            rows,
            self.weights.matrix(index::gate_up(l)),
            RowsMut::packed(&mut gate_up, 0, width),
            Accumulate::No,
        )?;
        Ok(Derived {
            x_normed,
            x_rstd,
            q,
            mid,
            mid_normed,
            mid_rstd,
            gate_up,
        })
    }

    /// The layer's output.
    fn down(&self, l: usize, derived: &Derived<D>, rows: usize) -> Result<D::Buffer> {
        let inner = self.config.intermediate_size;
        let mut act = self.device.empty(Kind::Activation, rows * inner)?;
        let src = Rows::packed(&derived.gate_up, 0, 2 * inner);
        self.device
            .swiglu(src, rows, inner, RowsMut::packed(&mut act, 0, inner))?;
        self.add_product(&derived.mid, &act, index::down(l), rows)
    }
}
