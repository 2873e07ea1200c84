//! The only forward pass of the decoder. Training, scoring, prefill and decoding all call [`Decoder::forward`] with a
//! [`Step`]: rows of one or more segments, each in a slot.
//!
//! A layer computes, in this order:
//!
//! 1. the norm, the q/k/v projection and the rotation; keys and values go to the slots;
//! 2. the hand-over between segments, in the order of the spans: a segment that begins reads its prior and past rows
//!    from the state of its sequence, a segment that is complete writes its own to the state, one that is read again
//!    selects past rows. So a segment can follow another within one step;
//! 3. one attention call over all slots;
//! 4. the MLP.
//!
//! A decoder may have a part of its model's layers (`model::stage`): then the residual stream comes from the part
//! before, and goes on to the part behind.
//!
//! Biases, further norms and factors are as the model's switches say (`model::switches`, `decoder::blocks`).
//! Projections may have adapters (`decoder::adapters`). Rows interact only in attention.

mod adapters;
mod blocks;
mod hand_over;
mod tape;

use super::config::ModelConfig;
use super::lora::Product;
use super::parameters::{Extra, TensorSpec, Weights, index, specs};
use super::segmentation::End;
use super::stage::Stage;
use super::state::{LayerSlots, Plan, SequenceState, Slots};
use crate::device::{
    Attention, Device, DeviceError, KeyStore, Kind, QkNorms, Result, Rows, RowsMut, SlotSpan,
    StepRows,
};

use blocks::Block;
pub use tape::{Derived, LayerTape, Normed, QkNormed};

/// Rows of one segment of one sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// Index of the sequence among the step's states.
    pub sequence: usize,
    /// Range of rows, and the slot of their segment.
    pub rows: SlotSpan,
    /// What comes after these rows.
    pub end: End,
}

/// Rows that are computed together. Spans are sorted by segment, then by sequence. Their rows are packed from row 0 on,
/// those of asks behind them.
#[derive(Debug, Clone, Default)]
pub struct Step {
    /// The spans.
    pub spans: Vec<Span>,
    /// Readings of a segment from its start that only select for the next reading, which is here too: each with the
    /// number of the span that it comes before.
    pub asks: Vec<(usize, Span)>,
    /// The token of each row.
    pub tokens: Vec<u32>,
}

impl Step {
    /// Adds rows at position `start` of the segment in `slot`. All asks come later.
    pub fn push(&mut self, sequence: usize, slot: usize, start: usize, tokens: &[u32], end: End) {
        debug_assert!(self.asks.is_empty(), "rows of spans come first");
        let span = self.span(sequence, slot, start, tokens, end);
        self.spans.push(span);
    }

    /// Adds a reading that only selects for that of span `before`, or for the next one that comes before it.
    pub fn push_ask(&mut self, before: usize, slot: usize, tokens: &[u32]) {
        let sequence = self.spans[before].sequence;
        let span = self.span(sequence, slot, 0, tokens, End::Again);
        self.asks.push((before, span));
    }

    fn span(
        &mut self,
        sequence: usize,
        slot: usize,
        start: usize,
        tokens: &[u32],
        end: End,
    ) -> Span {
        let rows = SlotSpan {
            row: self.tokens.len(),
            rows: tokens.len(),
            start,
            slot,
        };
        self.tokens.extend_from_slice(tokens);
        Span {
            sequence,
            rows,
            end,
        }
    }

    /// Number of rows that are not of asks.
    pub fn own_rows(&self) -> usize {
        self.spans.iter().map(|span| span.rows.rows).sum()
    }

    /// All spans in the order of their rows.
    fn by_row(&self) -> impl Iterator<Item = &Span> {
        self.spans
            .iter()
            .chain(self.asks.iter().map(|(_, ask)| ask))
    }

    /// All spans in the order in which segments hand over to each other.
    fn in_order(&self) -> Vec<Span> {
        let mut asks = self.asks.iter().peekable();
        let mut all = Vec::with_capacity(self.spans.len() + self.asks.len());
        for (i, span) in self.spans.iter().enumerate() {
            while let Some((_, ask)) = asks.next_if(|(before, _)| *before == i) {
                all.push(*ask);
            }
            all.push(*span);
        }
        all
    }

    /// Row of the angle tables for the position of each row.
    pub fn angles(&self, plan: &Plan) -> Vec<usize> {
        let rows = self.by_row().map(|s| s.rows);
        rows.flat_map(|s| s.start..s.start + s.rows)
            .map(|position| plan.origin() + position)
            .collect()
    }

    /// Description of the rows for [`Device::step`]. A slot has room for `room` rows.
    pub fn rows(&self, plan: &Plan, room: usize) -> StepRows {
        let spans: Vec<SlotSpan> = self.by_row().map(|s| s.rows).collect();
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
    /// Where the other layers are, if these are a part.
    pub stage: Stage<D>,
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
    /// Checks that the model has these token ids.
    ///
    /// # Errors
    /// [`DeviceError::Argument`] under this name.
    pub fn check_tokens(&self, argument: &'static str, tokens: &[u32]) -> Result<()> {
        let vocab_size = self.config.vocab_size;
        match tokens.iter().find(|id| **id as usize >= vocab_size) {
            None => Ok(()),
            Some(id) => {
                let expected = format!("ids below {vocab_size}");
                Err(DeviceError::argument(argument, expected, id))
            }
        }
    }

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
            stage: Stage::planned(&config.part),
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
            stage: Stage::planned(&config.part),
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
    /// and the derived activations of each layer. `None` from a part of the model that is not its end.
    pub fn forward(
        &self,
        plan: &Plan,
        step: &Step,
        placed: &mut D::Step,
        states: &mut [&mut SequenceState<D>],
        slots: &mut Slots<D>,
        mut keep: impl FnMut(LayerTape<D>, Derived<D>),
    ) -> Result<Option<Forward<D>>> {
        let mut x = self.input(placed)?;
        for l in 0..self.config.num_hidden_layers {
            let (tape, derived, next) = self.layer(plan, l, x, (step, placed), states, slots)?;
            keep(tape, derived);
            x = next;
        }
        if !self.config.part.ends {
            self.stage.to_after(&self.device, x)?;
            return Ok(None);
        }
        let (rows, width) = (step.tokens.len(), self.config.hidden_size);
        let norm = index::final_norm(self.config.num_hidden_layers);
        let (hidden, rstd) = self.norm(&x, rows, norm)?;
        let hidden = self.times(
            1.0 / self.config.switches.logits_divisor,
            hidden,
            [rows, width],
        )?;
        Ok(Some(Forward { x, hidden, rstd }))
    }

    /// [`Decoder::forward`] for rows whose output is not needed: it stops after the keys and values of the model's last
    /// layer.
    pub fn advance(
        &self,
        plan: &Plan,
        step: &Step,
        placed: &mut D::Step,
        states: &mut [&mut SequenceState<D>],
        slots: &mut Slots<D>,
    ) -> Result<()> {
        if !self.config.part.ends {
            let done = self.forward(plan, step, placed, states, slots, |_, _| ());
            return done.map(drop);
        }
        let mut x = self.input(placed)?;
        let last = self.config.num_hidden_layers - 1;
        for l in 0..last {
            (_, _, x) = self.layer(plan, l, x, (step, placed), states, slots)?;
        }
        self.read(plan, last, &x, (step, placed), states, slots)?;
        Ok(())
    }

    /// The residual stream before the first layer: embedded tokens, or what the part before has computed.
    fn input(&self, placed: &mut D::Step) -> Result<D::Buffer> {
        let (rows, hidden) = (placed.as_ref().tokens.len(), self.config.hidden_size);
        if !self.config.part.begins {
            return self.stage.from_before(&self.device, rows * hidden);
        }
        let mut x = self.device.empty(Kind::Activation, rows * hidden)?;
        let table = self.weights.matrix(index::EMBEDDING);
        let y = RowsMut::packed(&mut x, 0, hidden);
        self.device.embed(table, placed, y)?;
        self.times(self.config.switches.embedding_multiplier, x, [rows, hidden])
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
        let (derived, next) = self.after_attention(plan, l, &tape, placed, from_x, true)?;
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
        let from_x = self.queries(plan, l, x, (rows, placed), tables, Some(store))?;
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
        let room = slots.layers[l].kv.rows.current;
        let placed = self.device.step(step.rows(plan, room))?;
        let from_x = self.queries(plan, l, &tape.x, (rows, &placed), slots.tables(l), None)?;
        let (derived, _) = self.after_attention(plan, l, tape, &placed, from_x, false)?;
        Ok(derived)
    }

    /// Rotated queries of all rows. Keys, values and probes go to `store`.
    fn queries(
        &self,
        plan: &Plan,
        l: usize,
        x: &D::Buffer,
        (rows, placed): (usize, &D::Step),
        tables: (&D::Buffer, &D::Buffer),
        store: Option<KeyStore<'_, D::Buffer>>,
    ) -> Result<FromInput<D>> {
        let device = &self.device;
        let norm = self.norm_before(x, rows, index::attention_norm(l))?;
        let input = norm.as_ref().and_then(|norm| norm.y.as_ref()).unwrap_or(x);
        let (q_width, stride) = (plan.q_width(), plan.qkv_width());
        let mut qkv = device.empty(Kind::Activation, rows * stride)?;
        let input = Rows::packed(input, 0, self.config.hidden_size);
        let target = RowsMut::packed(&mut qkv, 0, stride);
        self.project((l, Product::Qkv), input, rows, target)?;
        let target = RowsMut::packed(&mut qkv, 0, stride);
        self.add_bias(l, Extra::QkvBias, target, rows)?;
        let mut rstd = self.qk_rstd(plan, l, rows)?;
        let norms = rstd.as_mut().zip(self.qk_norm_weights(plan, l));
        let norms = norms.map(|(rstd, weights)| QkNorms {
            weights,
            eps: self.config.rms_norm_eps,
            rstd: rstd.each_mut(),
        });
        let mut q = device.empty(Kind::Activation, rows * q_width)?;
        let (from, to) = (
            Rows::packed(&qkv, 0, stride),
            RowsMut::packed(&mut q, 0, q_width),
        );
        device.split_qkv(from, norms, plan.heads, tables, placed, to, store)?;
        let qk = rstd.map(|rstd| QkNormed { raw: qkv, rstd });
        Ok(FromInput { norm, q, qk })
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

    /// From attention's output to the layer's, which is left out where nobody asks for the `output`.
    fn after_attention(
        &self,
        plan: &Plan,
        l: usize,
        tape: &LayerTape<D>,
        placed: &D::Step,
        from_x: FromInput<D>,
        output: bool,
    ) -> Result<(Derived<D>, Option<D::Buffer>)> {
        let (device, hidden) = (&self.device, self.config.hidden_size);
        let rows = placed.as_ref().tokens.len();
        let scaled = self.scale_by_sinks(plan, l, tape, placed)?;
        let attended = scaled.as_ref().unwrap_or(&tape.attended);
        let block = Block {
            layer: l,
            product: Product::Output,
            width: self.config.q_dim(),
            bias: Extra::OutputBias,
            norm: index::attention_norm(l),
        };
        let (after, mid) = self.add_block(&tape.x, attended, &block, rows, true)?;
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
        let target = RowsMut::packed(&mut gate_up, 0, 2 * inner);
        let input = Rows::packed(input, 0, hidden);
        self.project((l, Product::GateUp), input, rows, target)?;
        let dst = RowsMut::packed(&mut gate_up, 0, 2 * inner);
        self.add_bias(l, Extra::GateUpBias, dst, rows)?;
        let (after, next) = match output || self.config.switches.norm_after {
            true => {
                let mut act = device.empty(Kind::Activation, rows * inner)?;
                let src = Rows::packed(&gate_up, 0, 2 * inner);
                device.swiglu(src, rows, inner, RowsMut::packed(&mut act, 0, inner))?;
                let block = Block {
                    layer: l,
                    product: Product::Down,
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
            scaled,
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
