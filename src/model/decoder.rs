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
//! Biases, further norms and factors are as the model's switches say (`model::switches`). Rows interact only in attention.

use super::config::ModelConfig;
use super::parameters::{Extra, TensorSpec, Weights, index, specs};
use super::state::{LayerSlots, Plan, SequenceState, Slots, close_segment, open_segment};
use super::switches::QkNorm;
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
    /// The norm of attention: of the layer's input, or of what attention adds to it.
    pub attention_norm: Normed<D>,
    /// Rotated queries.
    pub q: D::Buffer,
    /// Queries and keys before their norm, where they have one.
    pub qk: Option<QkNormed<D>>,
    /// The residual stream between attention and MLP.
    pub mid: D::Buffer,
    /// The norm of the MLP: of `mid`, or of what the MLP adds to it.
    pub mlp_norm: Normed<D>,
    /// Gate and up `[rows, 2 * inner]`.
    pub gate_up: D::Buffer,
}

/// A norm of rows as wide as the residual stream.
#[derive(Debug)]
pub struct Normed<D: Device> {
    /// What is normed, where it is kept nowhere else: where the norm stands after the block.
    pub x: Option<D::Buffer>,
    /// Its norm; `None` where it was added to the residual stream and is not needed any more.
    pub y: Option<D::Buffer>,
    /// Reciprocal root mean square of each row.
    pub rstd: D::Buffer,
}

/// The input of the norms of queries and keys.
#[derive(Debug)]
pub struct QkNormed<D: Device> {
    /// Rows `[q | k | v]` before the norms.
    pub raw: D::Buffer,
    /// Reciprocal root mean squares of the queries, `[rows, groups]`.
    pub q_rstd: D::Buffer,
    /// Those of the keys.
    pub k_rstd: D::Buffer,
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
    /// Its norm over the divisor of the logits: the head's input.
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
        let (rows, width) = (step.tokens.len(), self.config.hidden_size);
        let norm = index::final_norm(self.config.num_hidden_layers);
        let (hidden, rstd) = self.norm(&x, rows, norm)?;
        let hidden = self.times(
            1.0 / self.config.switches.logits_divisor,
            hidden,
            [rows, width],
        )?;
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
        self.times(self.config.switches.embedding_multiplier, x, [rows, hidden])
    }

    /// `factor * x`; `x` itself where the factor is 1.
    pub(crate) fn times(
        &self,
        factor: f64,
        x: D::Buffer,
        [rows, width]: [usize; 2],
    ) -> Result<D::Buffer> {
        if factor == 1.0 {
            return Ok(x);
        }
        let device = &self.device;
        let mut y = device.empty(Kind::Activation, rows * width)?;
        let (src, dst) = (
            Rows::packed(&x, 0, width),
            RowsMut::packed(&mut y, 0, width),
        );
        device.scale(factor, src, dst, [rows, width], Accumulate::No)?;
        Ok(y)
    }

    /// Position of a tensor that not every model has.
    pub(crate) fn extra(&self, l: usize, extra: Extra) -> Option<usize> {
        index::extra(&self.config, l, extra)
    }

    /// Adds a bias, where the model has it, to `rows` rows.
    fn add_bias(
        &self,
        l: usize,
        bias: Extra,
        y: RowsMut<'_, D::Buffer>,
        rows: usize,
    ) -> Result<()> {
        let Some(bias) = self.extra(l, bias) else {
            return Ok(());
        };
        let buffer = self.weights.vector(bias);
        let (src, width) = (
            Rows {
                buffer,
                start: 0,
                stride: 0,
            },
            self.device.len(buffer),
        );
        self.device.copy(src, y, rows, width, Accumulate::Yes)
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
        let (attended, lse) = self.attend(plan, l, &from_x.q, placed, slots.layer_mut(l).0)?;
        let tape = LayerTape { x, attended, lse };
        let (derived, next) = self.after_attention(l, &tape, step.tokens.len(), from_x, true)?;
        Ok((tape, derived, next.expect("the output is asked for")))
    }

    /// A layer up to its attention, including the hand-over between segments.
    fn read(
        &self,
        plan: &Plan,
        l: usize,
        x: &D::Buffer,
        (step, placed): (&Step, &mut D::Step),
        states: &mut [&mut SequenceState<D>],
        slots: &mut Slots<D>,
    ) -> Result<FromInput<D>> {
        let rows = step.tokens.len();
        let (layer, tables) = slots.layer_mut(l);
        let store = KeyStore {
            cache: &mut layer.kv,
            probes: layer.probes.as_mut(),
        };
        let from_x = self.queries(plan, l, x, rows, |qkv, q| {
            (self.device).split_qkv(qkv, plan.heads, tables, placed, q, store)
        })?;
        self.pass_on(plan, l, step, states, slots)?;
        Ok(from_x)
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
        let (heads, angles) = (plan.heads, step.angles(plan));
        let from_x = self.queries(plan, l, &tape.x, rows, |qkv, q| {
            let tables = slots.tables(l);
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
        let (derived, _) = self.after_attention(l, tape, rows, from_x, false)?;
        Ok(derived)
    }

    /// Norm of rows of the residual stream by the weight at `weight`, and the reciprocal root mean squares.
    fn norm(&self, x: &D::Buffer, rows: usize, weight: usize) -> Result<(D::Buffer, D::Buffer)> {
        let hidden = self.config.hidden_size;
        let (mut y, mut rstd) = (
            self.device.empty(Kind::Activation, rows * hidden)?,
            self.device.empty(Kind::Exact, rows)?,
        );
        self.device.rms_norm(
            Rows::packed(x, 0, hidden),
            [rows, 1],
            self.weights.vector(weight),
            self.config.rms_norm_eps,
            RowsMut::packed(&mut y, 0, hidden),
            RowsMut::packed(&mut rstd, 0, 1),
        )?;
        Ok((y, rstd))
    }

    /// The norm before a block, where there is one.
    fn norm_before(&self, x: &D::Buffer, rows: usize, weight: usize) -> Result<Option<Normed<D>>> {
        if self.config.switches.norm_after {
            return Ok(None);
        }
        let (y, rstd) = self.norm(x, rows, weight)?;
        Ok(Some(Normed {
            x: None,
            y: Some(y),
            rstd,
        }))
    }

    /// Rotated queries of all rows. `take` extracts them from the rows `[q | k | v]`.
    fn queries(
        &self,
        plan: &Plan,
        l: usize,
        x: &D::Buffer,
        rows: usize,
        take: impl FnOnce(Rows<'_, D::Buffer>, RowsMut<'_, D::Buffer>) -> Result<()>,
    ) -> Result<FromInput<D>> {
        let device = &self.device;
        let norm = self.norm_before(x, rows, index::attention_norm(l))?;
        let input = norm.as_ref().and_then(|norm| norm.y.as_ref()).unwrap_or(x);
        let (q_width, stride) = (plan.q_width(), plan.qkv_width());
        let mut qkv = device.empty(Kind::Activation, rows * stride)?;
        let input = Rows::packed(input, 0, self.config.hidden_size);
        let weight = self.weights.matrix(index::qkv(l));
        let target = RowsMut::packed(&mut qkv, 0, stride);
        device.linear(input, rows, weight, target, Accumulate::No)?;
        self.add_bias(
            l,
            Extra::QkvBias,
            RowsMut::packed(&mut qkv, 0, stride),
            rows,
        )?;
        let (qkv, qk) = self.norm_qk(plan, l, qkv, rows)?;
        let mut q = device.empty(Kind::Activation, rows * q_width)?;
        take(
            Rows::packed(&qkv, 0, stride),
            RowsMut::packed(&mut q, 0, q_width),
        )?;
        Ok(FromInput { norm, q, qk })
    }

    /// Queries and keys of the rows `[q | k | v]` normed, where the model norms them, and the rows before.
    fn norm_qk(
        &self,
        plan: &Plan,
        l: usize,
        raw: D::Buffer,
        rows: usize,
    ) -> Result<(D::Buffer, Option<QkNormed<D>>)> {
        let Some(parts) = self.qk_norms(plan, l) else {
            return Ok((raw, None));
        };
        let (device, stride) = (&self.device, plan.qkv_width());
        let mut normed = device.empty(Kind::Activation, rows * stride)?;
        let norm = |part: &QkNormPart, normed: &mut D::Buffer| -> Result<D::Buffer> {
            let mut rstd = device.empty(Kind::Exact, rows * part.groups)?;
            device.rms_norm(
                Rows::packed(&raw, 0, stride).column(part.column),
                [rows, part.groups],
                self.weights.vector(part.weight),
                self.config.rms_norm_eps,
                RowsMut::packed(normed, 0, stride).column(part.column),
                RowsMut::packed(&mut rstd, 0, part.groups),
            )?;
            Ok(rstd)
        };
        let (q_rstd, k_rstd) = (norm(&parts[0], &mut normed)?, norm(&parts[1], &mut normed)?);
        let v = plan.q_width() + plan.kv_width();
        let (src, dst) = (
            Rows::packed(&raw, 0, stride).column(v),
            RowsMut::packed(&mut normed, 0, stride).column(v),
        );
        device.copy(src, dst, rows, plan.kv_width(), Accumulate::No)?;
        let qk = QkNormed {
            raw,
            q_rstd,
            k_rstd,
        };
        Ok((normed, Some(qk)))
    }

    /// The norms of queries and of keys of a layer, where the model has them.
    pub(crate) fn qk_norms(&self, plan: &Plan, l: usize) -> Option<[QkNormPart; 2]> {
        let head = self.config.switches.qk_norm == QkNorm::Head;
        let part = |weight, heads, column| QkNormPart {
            weight,
            groups: if head { heads } else { 1 },
            column,
        };
        let weights = [Extra::QueryNorm, Extra::KeyNorm].map(|extra| self.extra(l, extra));
        let [q, k] = [weights[0]?, weights[1]?];
        Some([
            part(q, plan.heads.q, 0),
            part(k, plan.heads.kv, plan.q_width()),
        ])
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
            scale: plan.scale,
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

    /// What a block adds to the residual stream `x`, and the sum: `x + m norm(y wᵀ + bias)`, with the norm and the
    /// factor m as the model has them. Without `sum` only what the backward pass needs of it is computed.
    fn add_block(
        &self,
        x: &D::Buffer,
        y: &D::Buffer,
        block: &Block,
        rows: usize,
        sum: bool,
    ) -> Result<(Option<Normed<D>>, Option<D::Buffer>)> {
        let (device, hidden, switches) =
            (&self.device, self.config.hidden_size, &self.config.switches);
        let factor = switches.residual_multiplier;
        let empty = || device.empty(Kind::Activation, rows * hidden);
        let (y, weight) = (
            Rows::packed(y, 0, block.width),
            self.weights.matrix(block.weight),
        );
        let residual = Rows::packed(x, 0, hidden);
        if !switches.norm_after && factor == 1.0 {
            if !sum {
                return Ok((None, None));
            }
            let mut out = empty()?;
            let dst = RowsMut::packed(&mut out, 0, hidden);
            device.linear_residual(y, rows, weight, residual, dst, hidden)?;
            let dst = RowsMut::packed(&mut out, 0, hidden);
            self.add_bias(block.layer, block.bias, dst, rows)?;
            return Ok((None, Some(out)));
        }
        if !switches.norm_after && !sum {
            return Ok((None, None));
        }
        let mut added = empty()?;
        let dst = RowsMut::packed(&mut added, 0, hidden);
        device.linear(y, rows, weight, dst, Accumulate::No)?;
        let dst = RowsMut::packed(&mut added, 0, hidden);
        self.add_bias(block.layer, block.bias, dst, rows)?;
        let normed = match switches.norm_after {
            true => {
                let (y, rstd) = self.norm(&added, rows, block.norm)?;
                let x = Some(std::mem::replace(&mut added, y));
                Some(Normed { x, y: None, rstd })
            }
            false => None,
        };
        if !sum {
            return Ok((normed, None));
        }
        let mut out = empty()?;
        let dst = RowsMut::packed(&mut out, 0, hidden);
        device.copy(residual, dst, rows, hidden, Accumulate::No)?;
        let (src, dst) = (
            Rows::packed(&added, 0, hidden),
            RowsMut::packed(&mut out, 0, hidden),
        );
        device.scale(factor, src, dst, [rows, hidden], Accumulate::Yes)?;
        Ok((normed, Some(out)))
    }

    /// From attention's output to the layer's, which is left out where nobody asks for the `output`.
    fn after_attention(
        &self,
        l: usize,
        tape: &LayerTape<D>,
        rows: usize,
        from_x: FromInput<D>,
        output: bool,
    ) -> Result<(Derived<D>, Option<D::Buffer>)> {
        let (device, hidden) = (&self.device, self.config.hidden_size);
        let block = Block {
            layer: l,
            weight: index::output(l),
            width: self.config.q_dim(),
            bias: Extra::OutputBias,
            norm: index::attention_norm(l),
        };
        let (after, mid) = self.add_block(&tape.x, &tape.attended, &block, rows, true)?;
        let mid = mid.expect("the sum is asked for");
        let attention_norm = from_x
            .norm
            .or(after)
            .expect("a norm stands before or after");
        let before = self.norm_before(&mid, rows, index::mlp_norm(l))?;
        let input = before
            .as_ref()
            .and_then(|norm| norm.y.as_ref())
            .unwrap_or(&mid);
        let inner = self.config.intermediate_size;
        let mut gate_up = device.empty(Kind::Activation, rows * 2 * inner)?;
        device.linear(
            Rows::packed(input, 0, hidden),
            rows,
            self.weights.matrix(index::gate_up(l)),
            RowsMut::packed(&mut gate_up, 0, 2 * inner),
            Accumulate::No,
        )?;
        let dst = RowsMut::packed(&mut gate_up, 0, 2 * inner);
        self.add_bias(l, Extra::GateUpBias, dst, rows)?;
        let (after, next) = match output || self.config.switches.norm_after {
            true => {
                let mut act = device.empty(Kind::Activation, rows * inner)?;
                let src = Rows::packed(&gate_up, 0, 2 * inner);
                device.swiglu(src, rows, inner, RowsMut::packed(&mut act, 0, inner))?;
                let block = Block {
                    layer: l,
                    weight: index::down(l),
                    width: inner,
                    bias: Extra::DownBias,
                    norm: index::mlp_norm(l),
                };
                self.add_block(&mid, &act, &block, rows, output)?
            }
            false => (None, None),
        };
        let derived = Derived {
            attention_norm,
            q: from_x.q,
            qk: from_x.qk,
            mid,
            mlp_norm: before.or(after).expect("a norm stands before or after"),
            gate_up,
        };
        Ok((derived, next))
    }
}

/// What is computed from a layer's input before attention.
struct FromInput<D: Device> {
    norm: Option<Normed<D>>,
    q: D::Buffer,
    qk: Option<QkNormed<D>>,
}

/// The norm of queries or of keys.
pub(crate) struct QkNormPart {
    /// Its weight.
    pub weight: usize,
    /// Norms of a row.
    pub groups: usize,
    /// First column in `[q | k | v]`.
    pub column: usize,
}

/// The last projection of attention or of the MLP.
struct Block {
    layer: usize,
    weight: usize,
    /// Columns of its input.
    width: usize,
    bias: Extra,
    /// The norm that stands before or after the block.
    norm: usize,
}
