//! One backward pass of one gradient stream, layer by layer, for consecutive segments of a group.

mod blocks;

use std::ops::Range;

use super::Group;
use super::tail::{Arrivals, Piece, StreamId, tail_pieces};
use crate::device::{
    Accumulate, Attention, AttentionGrad, Device, Kind, Move, Result, Rows, RowsMut, SlotSpan,
};
use crate::model::decoder::Decoder;
use crate::model::lora::Product;
use crate::model::parameters::index;
use crate::model::segmentation::Segment;
use crate::model::state::Plan;
use crate::model::switches::QkNorm;

/// What a pass does.
#[derive(Debug, Clone, Copy)]
pub struct Pass {
    /// Its stream.
    pub stream: StreamId,
    /// Whether the pass starts from the segments' own losses.
    pub own_loss: bool,
    /// Whether prior gradients are sent to the segments before.
    pub hand_down: bool,
}

/// Upstream gradients of a layer's GEMMs, summed over passes, for the weight gradients. The first pass over a span is
/// the one of its own loss. It overwrites the sums; later passes add to them.
pub struct LayerSums<D: Device> {
    /// Of q, k, v before rotation.
    pub d_qkv: D::Buffer,
    /// Of q, k, v before their norms, where they have some.
    pub d_raw_qkv: Option<D::Buffer>,
    /// Of the result of attention's norm.
    pub d_attention_norm: D::Buffer,
    /// Of the result of attention's output projection.
    pub d_output: D::Buffer,
    /// Of the result of the MLP's norm.
    pub d_mlp_norm: D::Buffer,
    /// Of gate and up.
    pub d_gate_up: D::Buffer,
    /// Of the result of the down projection.
    pub d_down: D::Buffer,
    /// Of the past gates `[span, q_heads]`.
    pub d_past_gate: D::Buffer,
    /// Of sink logits `[span, q_heads]`, where the model has them.
    pub d_sinks: Option<D::Buffer>,
}

impl<D: Device> LayerSums<D> {
    /// For `rows` rows in `spans` spans.
    pub fn new(model: &Decoder<D>, plan: &Plan, rows: usize, spans: usize) -> Result<Self> {
        let (hidden, inner) = (model.config.hidden_size, model.config.intermediate_size);
        let empty = |width: usize| model.device.empty(Kind::Activation, rows * width);
        let of_heads = || model.device.empty(Kind::Exact, spans * plan.heads.q);
        let has_sinks = model.config.switches.sink_logits;
        Ok(Self {
            d_qkv: empty(plan.qkv_width())?,
            d_raw_qkv: match model.config.switches.qk_norm {
                QkNorm::None => None,
                QkNorm::Head | QkNorm::Full => Some(empty(plan.qkv_width())?),
            },
            d_attention_norm: empty(hidden)?,
            d_output: empty(hidden)?,
            d_mlp_norm: empty(hidden)?,
            d_gate_up: empty(2 * inner)?,
            d_down: empty(hidden)?,
            d_past_gate: of_heads()?,
            d_sinks: has_sinks.then(of_heads).transpose()?,
        })
    }
}

/// State of a pass over some spans of a group. Row 0 of the pass is row `first` of the group.
pub struct Work<'a, D: Device> {
    /// Index of the group.
    pub group: usize,
    model: &'a Decoder<D>,
    plan: &'a Plan,
    /// Of each sequence.
    segments: &'a [Vec<Segment>],
    pass: Pass,
    spans: Range<usize>,
    /// Segment and sequence of each span.
    span_indices: Vec<(usize, usize)>,
    first: usize,
    rows: usize,
    /// Gradient of the output of the layer that comes next; `None` while it is zero.
    d: Option<D::Buffer>,
}

impl<'a, D: Device> Work<'a, D> {
    /// A pass before the last layer, over `spans` of the group with this index.
    pub(super) fn new(
        model: &'a Decoder<D>,
        plan: &'a Plan,
        segments: &'a [Vec<Segment>],
        pass: Pass,
        (index, group): (usize, &Group<D>),
        spans: Range<usize>,
    ) -> Result<Self> {
        let first = group.step.spans[spans.start].rows.row;
        let last = group.step.spans[spans.end - 1].rows;
        let rows = last.row + last.rows - first;
        let (device, hidden) = (&model.device, model.config.hidden_size);
        let mut d = None;
        if let (true, Some(d_top)) = (pass.own_loss, &group.d_top) {
            let dst = d.insert(device.empty(Kind::Activation, rows * hidden)?);
            let src = Rows::packed(d_top, first, hidden);
            let dst = RowsMut::packed(dst, 0, hidden);
            device.copy(src, dst, rows, hidden, Accumulate::No)?;
        }
        let indices = |i: usize| (group.segments[i], group.step.spans[i].sequence);
        Ok(Self {
            group: index,
            model,
            plan,
            segments,
            pass,
            span_indices: spans.clone().map(indices).collect(),
            spans,
            first,
            rows,
            d,
        })
    }

    /// Before the last layer: takes the gradient of its output from the part of the model behind it, if there is one.
    pub(super) fn take_over(&mut self) -> Result<()> {
        let Decoder { device, config, .. } = self.model;
        if !config.part.ends {
            let len = self.rows * config.hidden_size;
            self.d = self.model.stage.from_after(device, len)?;
        }
        Ok(())
    }

    /// After the first layer: gives the gradient of its input to the part of the model before it, if there is one.
    pub(super) fn hand_over(&mut self) -> Result<()> {
        let Decoder { device, config, .. } = self.model;
        match config.part.begins {
            true => Ok(()),
            false => self.model.stage.to_before(device, self.d.take()),
        }
    }

    /// Backward of layer `l`: from its output to its input.
    pub(super) fn layer(
        &mut self,
        l: usize,
        group: &mut Group<D>,
        arrivals: &mut Arrivals<D>,
    ) -> Result<()> {
        let arrives = |(segment, sequence): &(usize, usize)| {
            arrivals.contains_key(&(self.pass.stream, *segment, *sequence))
        };
        let arrived = self.span_indices.iter().any(arrives);
        let (mut d, mut d_qkv) = match self.d.take() {
            Some(mut d) => {
                group.prepare(self.model, self.plan, l)?;
                self.mlp(l, group, &mut d)?;
                let d_qkv = self.attention(l, group, arrivals, &d)?;
                (d, d_qkv)
            }
            // The upstream gradient is zero: the first gradient arrives from a later segment in this layer.
            None if arrived => {
                group.prepare(self.model, self.plan, l)?;
                let device = &self.model.device;
                let zeros = |width: usize| device.zeros(Kind::Activation, self.rows * width);
                let qkv = self.plan.qkv_width();
                (zeros(self.model.config.hidden_size)?, Some(zeros(qkv)?))
            }
            None => return Ok(()),
        };
        self.receive(l, group, arrivals, &mut d_qkv)?;
        self.qkv(l, group, &d_qkv, &mut d)?;
        self.d = Some(d);
        Ok(())
    }

    /// Ends the pass: adds its gradient to that of the embedded tokens.
    pub(super) fn embedding(&self, group: &mut Group<D>) -> Result<()> {
        match &self.d {
            Some(d) => self.add(d, &mut group.d_embedded, self.model.config.hidden_size),
            None => Ok(()),
        }
    }

    /// Adds the rows of this pass to a sum. The first pass overwrites it.
    fn add(&self, rows: &D::Buffer, sum: &mut D::Buffer, width: usize) -> Result<()> {
        let dst = RowsMut::packed(sum, self.first, width);
        let src = Rows::packed(rows, 0, width);
        let accumulate = self.accumulate();
        self.model
            .device
            .copy(src, dst, self.rows, width, accumulate)
    }

    fn accumulate(&self) -> Accumulate {
        match self.pass.own_loss {
            true => Accumulate::No,
            false => Accumulate::Yes,
        }
    }

    /// Temporary rows that are added to a sum later; `None` for the first pass, which writes to the sum itself.
    fn own(&self, width: usize) -> Result<Option<D::Buffer>> {
        let own = (!self.pass.own_loss).then(|| {
            let device = &self.model.device;
            device.empty(Kind::Activation, self.rows * width)
        });
        own.transpose()
    }

    /// Destination of rows: the temporary of [`Work::own`], or else the sum.
    fn target<'b>(
        &self,
        own: &'b mut Option<D::Buffer>,
        sum: &'b mut D::Buffer,
        width: usize,
    ) -> RowsMut<'b, D::Buffer> {
        match own {
            Some(own) => RowsMut::packed(own, 0, width),
            None => RowsMut::packed(sum, self.first, width),
        }
    }

    /// Adds the rows written to [`Work::target`] to the sum, and returns them.
    fn summed<'b>(
        &self,
        own: &'b Option<D::Buffer>,
        sum: &'b mut D::Buffer,
        width: usize,
    ) -> Result<Rows<'b, D::Buffer>> {
        match own {
            Some(own) => {
                self.add(own, sum, width)?;
                Ok(Rows::packed(own, 0, width))
            }
            None => Ok(Rows::packed(sum, self.first, width)),
        }
    }

    /// Input gradient of a product of layer `l`, with that of its adapters.
    fn input_grad(
        &self,
        d_y: Rows<'_, D::Buffer>,
        (l, product): (usize, Product),
        mut d_x: RowsMut<'_, D::Buffer>,
        accumulate: Accumulate,
    ) -> Result<()> {
        let (model, device) = (self.model, &self.model.device);
        let weight = model.weights.matrix(product.weight(l));
        device.linear_input_grad(d_y, self.rows, weight, d_x.reborrow(), accumulate)?;
        for adapter in model.adapters((l, product)) {
            let d_h = model.lowered_grad(adapter, d_y, self.rows)?;
            let d_h = Rows::packed(&d_h, 0, model.rank());
            let (down, d_x) = (model.weights.matrix(adapter.down), d_x.reborrow());
            device.linear_input_grad(d_h, self.rows, down, d_x, Accumulate::Yes)?;
        }
        Ok(())
    }

    /// Adds the input gradient of a norm of rows of the residual stream to `d`.
    fn norm_grad(
        &self,
        d_y: Rows<'_, D::Buffer>,
        x: &D::Buffer,
        rstd: &D::Buffer,
        tensor: usize,
        d: &mut D::Buffer,
    ) -> Result<()> {
        let hidden = self.model.config.hidden_size;
        self.model.device.rms_norm_grad(
            d_y,
            Rows::packed(x, self.first, hidden),
            Rows::packed(rstd, self.first, 1),
            [self.rows, 1],
            self.model.weights.vector(tensor),
            RowsMut::packed(d, 0, hidden),
        )
    }

    /// Backward of the MLP: from the layer's output to the residual stream before the MLP.
    fn mlp(&self, l: usize, group: &mut Group<D>, d: &mut D::Buffer) -> Result<()> {
        let (device, config) = (&self.model.device, &self.model.config);
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        let (_, derived, sums) = group.layers[l].parts();
        let (norm, tensor) = (&derived.mlp_norm, index::mlp_norm(l));
        let to = [&mut sums.d_mlp_norm, &mut sums.d_down];
        let product = self.block_grad(d, norm, tensor, to)?;
        let d_down = Rows::packed(product.as_ref().unwrap_or(d), 0, hidden);
        let mut d_act = device.empty(Kind::Activation, self.rows * inner)?;
        let dst = RowsMut::packed(&mut d_act, 0, inner);
        self.input_grad(d_down, (l, Product::Down), dst, Accumulate::No)?;
        let mut own = self.own(2 * inner)?;
        device.swiglu_grad(
            Rows::packed(&d_act, 0, inner),
            Rows::packed(&derived.gate_up, self.first, 2 * inner),
            self.rows,
            inner,
            self.target(&mut own, &mut sums.d_gate_up, 2 * inner),
        )?;
        let d_gate_up = self.summed(&own, &mut sums.d_gate_up, 2 * inner)?;
        let norm = (&derived.mid, norm, tensor);
        let to = &mut sums.d_mlp_norm;
        self.input_of_block(d_gate_up, (l, Product::GateUp), norm, to, d)
    }

    /// Backward of attention: from the residual stream after it to q, k, v before rotation, as in [`Work::own`].
    fn attention(
        &self,
        l: usize,
        group: &mut Group<D>,
        arrivals: &mut Arrivals<D>,
        d: &D::Buffer,
    ) -> Result<Option<D::Buffer>> {
        let (hidden, q_width) = (self.model.config.hidden_size, self.plan.q_width());
        let device = &self.model.device;
        let (_, derived, sums) = group.layers[l].parts();
        let norm = (&derived.attention_norm, index::attention_norm(l));
        let to = [&mut sums.d_attention_norm, &mut sums.d_output];
        let product = self.block_grad(d, norm.0, norm.1, to)?;
        let mut d_attended = device.empty(Kind::Activation, self.rows * q_width)?;
        let dst = RowsMut::packed(&mut d_attended, 0, q_width);
        let d_output = Rows::packed(product.as_ref().unwrap_or(d), 0, hidden);
        self.input_grad(d_output, (l, Product::Output), dst, Accumulate::No)?;
        self.attention_op(l, group, &d_attended, arrivals)
    }

    /// Backward of the q, k, v projection and the norms around it: from q, k, v before rotation to the layer's input.
    fn qkv(
        &self,
        l: usize,
        group: &mut Group<D>,
        d_qkv: &Option<D::Buffer>,
        d: &mut D::Buffer,
    ) -> Result<()> {
        let width = self.plan.qkv_width();
        let (tape, derived, sums) = group.layers[l].parts();
        let d_qkv = self.summed(d_qkv, &mut sums.d_qkv, width)?;
        let mut own;
        let d_product = match (&derived.qk, &mut sums.d_raw_qkv) {
            (Some(qk), Some(sum)) => {
                own = self.own(width)?;
                let d_x = self.target(&mut own, sum, width);
                self.qk_norm_grad(l, qk, d_qkv, d_x)?;
                self.summed(&own, sum, width)?
            }
            _ => d_qkv,
        };
        let norm = (&tape.x, &derived.attention_norm, index::attention_norm(l));
        let to = &mut sums.d_attention_norm;
        self.input_of_block(d_product, (l, Product::Qkv), norm, to, d)
    }

    /// Backward of the segment attention operation. Returns the gradient of q, k, v before rotation, as in
    /// [`Work::own`], and sends the prior gradients to the segments before.
    fn attention_op(
        &self,
        l: usize,
        group: &mut Group<D>,
        d_attended: &D::Buffer,
        arrivals: &mut Arrivals<D>,
    ) -> Result<Option<D::Buffer>> {
        let (device, plan) = (&self.model.device, self.plan);
        let (heads, q_width, kv_width) = (plan.heads, plan.q_width(), plan.kv_width());
        let spans: Vec<SlotSpan> = group.step.spans[self.spans.clone()]
            .iter()
            .map(|s| SlotSpan {
                row: s.rows.row - self.first,
                ..s.rows
            })
            .collect();
        let (tape, derived, sums) = group.layers[l].parts();
        let sinks = self.sinks_grad(l, (tape, sums), &spans, d_attended)?;
        let (d_out, d_lse) = match &sinks {
            Some((d_out, d_lse)) => (d_out, Some(Rows::packed(d_lse, 0, heads.q))),
            None => (d_attended, None),
        };
        let cache = &group.slots.layers[l].kv;
        let (gates, prior_heads) = self.model.reads(plan, l);
        let empty = |width: usize| device.empty(Kind::Activation, self.rows * width);
        let (mut d_q, mut d_k, mut d_v) = (empty(q_width)?, empty(kv_width)?, empty(kv_width)?);
        let prior = cache.rows.prior;
        let send = self.pass.hand_down && prior > 0;
        let prior_len = if send {
            spans.len() * prior * kv_width
        } else {
            0
        };
        let empty = || device.empty(Kind::Activation, prior_len);
        let mut d_prior = (empty()?, empty()?);
        let mut d_gate = device.empty(Kind::Exact, spans.len() * heads.q)?;
        let call = Attention {
            heads,
            scale: plan.scale,
            past_gate: &gates,
            prior_heads: &prior_heads,
            spans: &spans,
            q: Rows::packed(&derived.q, self.first, q_width),
            cache,
        };
        let grad = AttentionGrad {
            out: Rows::packed(&tape.attended, self.first, q_width),
            lse: Rows::packed(&tape.lse, self.first, heads.q),
            d_out: Rows::packed(d_out, 0, q_width),
            d_lse,
            d_q: RowsMut::packed(&mut d_q, 0, q_width),
            d_k: RowsMut::packed(&mut d_k, 0, kv_width),
            d_v: RowsMut::packed(&mut d_v, 0, kv_width),
            d_prior: send.then_some((&mut d_prior.0, &mut d_prior.1)),
            d_past_gate: &mut d_gate,
        };
        device.attention_grad(&call, grad)?;
        self.add_heads(&d_gate, &mut sums.d_past_gate)?;
        let stride = plan.qkv_width();
        let mut own = self.own(stride)?;
        let angles = group.step.angles(plan);
        device.join_qkv(
            [
                Rows::packed(&d_q, 0, q_width),
                Rows::packed(&d_k, 0, kv_width),
                Rows::packed(&d_v, 0, kv_width),
            ],
            heads,
            group.slots.tables(l),
            &angles[self.first..self.first + self.rows],
            self.target(&mut own, &mut sums.d_qkv, stride),
        )?;
        if send {
            self.send(group.slots.tables(l), &d_prior, arrivals)?;
        }
        Ok(own)
    }

    /// Sends the prior gradient of each span to the segments that computed the rows, as far as its stream goes back.
    fn send(
        &self,
        tables: (&D::Buffer, &D::Buffer),
        d_prior: &(D::Buffer, D::Buffer),
        arrivals: &mut Arrivals<D>,
    ) -> Result<()> {
        let (device, plan) = (&self.model.device, self.plan);
        let (heads, width) = (plan.heads.kv, plan.kv_width());
        let (mut sent, mut moves) = (Vec::new(), Vec::new());
        for (i, (segment, sequence)) in self.span_indices.iter().enumerate() {
            let segments = &self.segments[*sequence][..=*segment];
            let tail = plan.prior_len.min(segments[*segment].tokens.start);
            for (back, rows) in tail_pieces(segments, plan.prior_len) {
                let Some(stream) = self.pass.stream.back(back) else {
                    break;
                };
                let angle = plan.origin() - tail + rows.start;
                let parts = [(&d_prior.0, Some(angle)), (&d_prior.1, None)];
                for (part, (buffer, first_angle)) in parts.into_iter().enumerate() {
                    moves.push(Move {
                        src: Rows::packed(buffer, i * plan.prior_len + rows.start, width),
                        target: 2 * sent.len() + part,
                        start: 0,
                        stride: width,
                        rows: rows.len(),
                        heads,
                        first_angle,
                    });
                }
                let empty = || device.empty(Kind::Activation, rows.len() * width);
                let (k, v, rows) = (empty()?, empty()?, rows.len());
                let piece = Piece { back, rows, k, v };
                sent.push(((stream, segment - back, *sequence), piece));
            }
        }
        let targets = sent
            .iter_mut()
            .flat_map(|(_, piece)| [&mut piece.k, &mut piece.v]);
        let (mut targets, dim) = (targets.collect::<Vec<_>>(), plan.heads.dim);
        device.move_rows(&moves, &mut targets, dim, tables, true, Accumulate::No)?;
        for (to, piece) in sent {
            arrivals.entry(to).or_default().push(piece);
        }
        Ok(())
    }

    /// Adds the prior gradients of later segments to the gradients of this segment's last keys and values, that of the
    /// next segment first.
    fn receive(
        &self,
        l: usize,
        group: &mut Group<D>,
        arrivals: &mut Arrivals<D>,
        d_qkv: &mut Option<D::Buffer>,
    ) -> Result<()> {
        let (device, heads, width) = (&self.model.device, self.plan.heads, self.plan.kv_width());
        let (k_column, stride) = (self.plan.q_width(), self.plan.qkv_width());
        let spans = &group.step.spans[self.spans.clone()];
        let arrived: Vec<(usize, Vec<Piece<D>>)> = (spans.iter().zip(&self.span_indices))
            .map(|(span, (segment, sequence))| {
                let key = (self.pass.stream, *segment, *sequence);
                let mut pieces = arrivals.remove(&key).unwrap_or_default();
                pieces.sort_unstable_by_key(|piece| piece.back);
                (span.rows.row - self.first + span.rows.rows, pieces)
            })
            .collect();
        let most = arrived.iter().map(|(_, pieces)| pieces.len()).max();
        let tables = group.slots.tables(l);
        let (_, _, sums) = group.layers[l].parts();
        // Pieces of one span may have rows in common, so they are added one after the other.
        for round in 0..most.unwrap_or(0) {
            let RowsMut { buffer, start, .. } = self.target(d_qkv, &mut sums.d_qkv, stride);
            let pieces = arrived.iter();
            let pieces = pieces.filter_map(|(end, pieces)| Some((*end, pieces.get(round)?)));
            let moves = pieces.flat_map(|(end, piece)| {
                let parts = [(&piece.k, k_column), (&piece.v, k_column + width)];
                parts.map(|(from, column)| Move {
                    src: Rows::packed(from, 0, width),
                    target: 0,
                    start: start + (end - piece.rows) * stride + column,
                    stride,
                    rows: piece.rows,
                    heads: heads.kv,
                    first_angle: None,
                })
            });
            let (moves, add) = (moves.collect::<Vec<_>>(), Accumulate::Yes);
            device.move_rows(&moves, &mut [buffer], heads.dim, tables, false, add)?;
        }
        Ok(())
    }
}
