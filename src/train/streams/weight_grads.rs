//! Gradients of the weights, and the contribution of segments to them.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

use super::Group;
use crate::device::{
    Accumulate, Device, DeviceError, Kind, Purpose, QkNormGrad, Result, Rows, RowsMut,
};
use crate::model::decoder::Decoder;
use crate::model::lora::Product;
use crate::model::parameters::{Extra, index};
use crate::model::state::Plan;

/// Gradients of every tensor of a model, in the order of its specs. They accumulate until [`Gradients::clear`].
#[derive(Debug)]
pub struct Gradients<D: Device> {
    /// None between [`Gradients::take`] and [`Gradients::renew`].
    tensors: Vec<D::Buffer>,
    /// Elements of each tensor.
    lens: Vec<usize>,
    /// Which of them are computed; the others are empty.
    wanted: Vec<bool>,
    /// Gradient of a tied embedding from its use as the head. It is kept apart so that the order of additions, and with
    /// it the bits, do not depend on the number of segments per step. The head may be on another stage than the
    /// embedding (`model::stage`): then the last one sends it to the first.
    tied_head: Option<D::Buffer>,
    /// Elements of `tied_head`, where there is one.
    tied: Option<usize>,
    /// Whether `tied_head` has changed since it was last added to the embedding's gradient.
    apart: bool,
    /// The head, where it is a tensor of its own.
    head: Option<usize>,
    /// Interrupts [`accumulate`](super::accumulate) when it is set.
    stop: Option<&'static AtomicBool>,
}

fn zeros<D: Device>(device: &D, len: usize) -> Result<D::Buffer> {
    let zeros = device.zeros(Kind::Exact, len);
    zeros.map_err(|error| error.wanted_for(Purpose::Optimizer))
}

impl<D: Device> Gradients<D> {
    /// Zeros for every tensor that is not frozen.
    pub fn new(model: &Decoder<D>) -> Result<Self> {
        let wanted: Vec<bool> = model.specs.iter().map(|spec| !spec.frozen).collect();
        Self::of(model, &wanted)
    }

    /// Zeros for the tensors that are `wanted`. For the others nothing is computed.
    pub fn of(model: &Decoder<D>, wanted: &[bool]) -> Result<Self> {
        let lens = model.specs.iter().zip(wanted);
        let mut lens: Vec<usize> = lens
            .map(|(spec, wanted)| if *wanted { spec.role.len() } else { 0 })
            .collect();
        let tied = model.config.tie_word_embeddings && wanted[index::EMBEDDING];
        let tied = tied.then_some(lens[index::EMBEDDING]);
        if !model.config.part.begins {
            lens[index::EMBEDDING] = 0;
        }
        let mut gradients = Self {
            tensors: Vec::new(),
            tied_head: tied.map(|len| zeros(&model.device, len)).transpose()?,
            tied,
            lens,
            wanted: wanted.to_vec(),
            apart: false,
            head: (!model.config.tie_word_embeddings)
                .then(|| index::head(model.config.num_hidden_layers)),
            stop: None,
        };
        gradients.renew(&model.device, || None)?;
        Ok(gradients)
    }

    /// Takes the complete gradients out. They are missing until [`Gradients::give`] or [`Gradients::renew`].
    pub(in crate::train) fn take(&mut self, device: &D) -> Result<Vec<D::Buffer>> {
        self.finish(device)?;
        Ok(std::mem::take(&mut self.tensors))
    }

    /// Puts gradients in, where they are missing.
    pub(in crate::train) fn give(&mut self, tensors: Vec<D::Buffer>) {
        self.tensors = tensors;
    }

    /// Puts in what `spare` has, or new buffers, where gradients are missing. What they hold is not said.
    pub(in crate::train) fn renew(
        &mut self,
        device: &D,
        spare: impl FnOnce() -> Option<Vec<D::Buffer>>,
    ) -> Result<&mut [D::Buffer]> {
        if self.tensors.is_empty() {
            let new = || self.lens.iter().map(|len| zeros(device, *len)).collect();
            self.tensors = spare().map_or_else(new, Ok)?;
        }
        Ok(&mut self.tensors)
    }

    /// Ends [`accumulate`](super::accumulate) with [`DeviceError::Interrupted`] between two segments once `flag` is
    /// set. The gradients are then incomplete and must not be used.
    pub fn interrupt_by(&mut self, flag: &'static AtomicBool) {
        self.stop = Some(flag);
    }

    pub(super) fn check_stop(&self) -> Result<()> {
        match self.stop {
            Some(flag) if flag.load(Ordering::SeqCst) => Err(DeviceError::Interrupted),
            _ => Ok(()),
        }
    }

    /// The complete gradients: adds the part of the tied head to the embedding first.
    pub fn finish(&mut self, device: &D) -> Result<&[D::Buffer]> {
        if let (Some(head), true) = (&mut self.tied_head, self.apart) {
            let len = device.len(head);
            let dst = RowsMut::packed(&mut self.tensors[index::EMBEDDING], 0, len);
            device.copy(Rows::packed(head, 0, len), dst, 1, len, Accumulate::Yes)?;
            device.clear(head)?;
            self.apart = false;
        }
        Ok(&self.tensors)
    }

    /// Takes the head's share of a tied embedding's gradient out. It is missing until [`Gradients::clear`].
    pub(in crate::train) fn take_head(&mut self) -> Option<D::Buffer> {
        self.apart = false;
        self.tied_head.take()
    }

    /// The head's share of a tied embedding's gradient, to be written by the caller before [`Gradients::finish`].
    pub(in crate::train) fn head_mut(&mut self) -> Option<&mut D::Buffer> {
        self.apart = self.tied_head.is_some();
        self.tied_head.as_mut()
    }

    /// Sets every gradient to zero.
    pub fn clear(&mut self, device: &D) -> Result<()> {
        self.apart = false;
        if let (None, Some(len)) = (&self.tied_head, self.tied) {
            self.tied_head = Some(zeros(device, len)?);
        }
        self.tensors
            .iter_mut()
            .chain(&mut self.tied_head)
            .try_for_each(|t| device.clear(t))
    }

    /// Sets the gradient of tensor `i`, as far as it is wanted.
    pub fn write(&mut self, device: &D, i: usize, values: &[f32]) -> Result<()> {
        match self.tensor_mut(i) {
            Some(tensor) => device.write(tensor, 0, values),
            None => Ok(()),
        }
    }

    /// The gradient of tensor `i`; `None` if nobody wants it.
    pub(super) fn tensor_mut(&mut self, i: usize) -> Option<&mut D::Buffer> {
        self.wanted[i].then_some(&mut self.tensors[i])
    }

    /// The gradients of two tensors, as [`Gradients::tensor_mut`].
    fn two_tensors_mut(&mut self, indices: [usize; 2]) -> [Option<&mut D::Buffer>; 2] {
        let [first, second] = indices.map(|i| self.wanted[i]);
        let tensors = self.tensors.get_disjoint_mut(indices);
        let [a, b] = tensors.expect("two tensors of the model");
        [first.then_some(a), second.then_some(b)]
    }

    pub(super) fn add_head(
        &mut self,
        device: &D,
        d_logits: Rows<'_, D::Buffer>,
        hidden: Rows<'_, D::Buffer>,
        rows: usize,
        shape: [usize; 2],
    ) -> Result<()> {
        let target = match (&mut self.tied_head, self.head) {
            (Some(head), _) => {
                self.apart = true;
                head
            }
            (None, Some(head)) if self.wanted[head] => &mut self.tensors[head],
            (None, _) => return Ok(()),
        };
        device.linear_weight_grad(d_logits, hidden, rows, shape, target)
    }

    /// Adds the contribution of spans to the gradient of the embedding, after their last pass.
    pub(super) fn add_embedding(
        &mut self,
        model: &Decoder<D>,
        group: &Group<D>,
        spans: Range<usize>,
    ) -> Result<()> {
        let hidden = model.config.hidden_size;
        let [row, rows] = group.rows(spans);
        let tokens = &group.step.tokens[row..row + rows];
        let Some(d_table) = self.tensor_mut(index::EMBEDDING) else {
            return Ok(());
        };
        let mut d_y = Rows::packed(&group.d_embedded, row, hidden);
        let (device, factor) = (&model.device, model.config.switches.embedding_multiplier);
        let mut scaled = None;
        if factor != 1.0 {
            let to = scaled.insert(device.empty(Kind::Activation, rows * hidden)?);
            let dst = RowsMut::packed(to, 0, hidden);
            device.scale(factor, d_y, dst, [rows, hidden], Accumulate::No)?;
            d_y = Rows::packed(to, 0, hidden);
        }
        device.embed_grad(d_y, hidden, tokens, d_table)
    }

    /// Adds the contribution of spans, whose rows lie one after another, to the gradients of layer `l`, after their
    /// last pass through that layer.
    pub(super) fn add_layer(
        &mut self,
        model: &Decoder<D>,
        plan: &Plan,
        group: &mut Group<D>,
        spans: Range<usize>,
        l: usize,
    ) -> Result<()> {
        let (device, config) = (&model.device, &model.config);
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        let (q_width, qkv) = (plan.q_width(), plan.qkv_width());
        let [row, rows] = group.rows(spans.clone());
        let (tape, derived, sums) = group.layers[l].parts();
        let at = |buffer, width| Rows::packed(buffer, row, width);
        let down = self.wanted[index::down(l)] || !model.adapters((l, Product::Down)).is_empty();
        let mut act = device.empty(Kind::Activation, if down { rows * inner } else { 0 })?;
        if down {
            let dst = RowsMut::packed(&mut act, 0, inner);
            device.swiglu(at(&derived.gate_up, 2 * inner), rows, inner, dst)?;
        }
        let d_qkv = sums.d_raw_qkv.as_ref().unwrap_or(&sums.d_qkv);
        let (first, second) = (&derived.attention_norm, &derived.mlp_norm);
        let gemms = [
            (
                (Product::Qkv, Extra::QkvBias),
                at(d_qkv, qkv),
                at(first.y.as_ref().unwrap_or(&tape.x), hidden),
                [qkv, hidden],
            ),
            (
                (Product::Output, Extra::OutputBias),
                at(&sums.d_output, hidden),
                at(derived.scaled.as_ref().unwrap_or(&tape.attended), q_width),
                [hidden, q_width],
            ),
            (
                (Product::GateUp, Extra::GateUpBias),
                at(&sums.d_gate_up, 2 * inner),
                at(second.y.as_ref().unwrap_or(&derived.mid), hidden),
                [2 * inner, hidden],
            ),
            (
                (Product::Down, Extra::DownBias),
                at(&sums.d_down, hidden),
                Rows::packed(&act, 0, inner),
                [hidden, inner],
            ),
        ];
        for ((product, bias), d_y, x, shape) in gemms {
            if let Some(tensor) = self.tensor_mut(product.weight(l)) {
                device.linear_weight_grad(d_y, x, rows, shape, tensor)?;
            }
            self.add_adapters(model, (l, product), [d_y, x], rows)?;
            let bias = model.extra(l, bias);
            if let Some(bias) = bias.and_then(|bias| self.tensor_mut(bias)) {
                device.column_sums(d_y, rows, bias)?;
            }
        }
        let norms = [
            (
                index::attention_norm(l),
                &sums.d_attention_norm,
                first,
                &tape.x,
            ),
            (index::mlp_norm(l), &sums.d_mlp_norm, second, &derived.mid),
        ];
        for (tensor, d_y, norm, before) in norms {
            let x = norm.x.as_ref().unwrap_or(before);
            let (d_y, x, rstd) = (at(d_y, hidden), at(x, hidden), at(&norm.rstd, 1));
            if let Some(tensor) = self.tensor_mut(tensor) {
                device.rms_norm_weight_grad(d_y, x, rstd, [rows, 1], tensor)?;
            }
        }
        if let (Some(qk), Some(norms)) = (&derived.qk, model.qk_norms(plan, l)) {
            let [q, k] = [0, 1].map(|i| at(&qk.rstd[i], norms[i].groups));
            let grad = QkNormGrad {
                d_y: at(&sums.d_qkv, qkv),
                x: at(&qk.raw, qkv),
                rstd: [q, k],
                rows,
                heads: plan.heads,
            };
            let tensors = self.two_tensors_mut(norms.map(|part| part.weight));
            device.qk_norm_weight_grad(&grad, tensors)?;
        }
        let of_heads = [
            (Some(index::past_gate(l)), Some(&sums.d_past_gate)),
            (model.extra(l, Extra::SinkLogits), sums.d_sinks.as_ref()),
        ];
        for (tensor, sums) in of_heads {
            if let (Some(tensor), Some(sums)) = (tensor, sums) {
                self.add_heads(model, plan, tensor, sums, spans.clone())?;
            }
        }
        Ok(())
    }

    /// Adds what spans give to a tensor of a number for each query head, span by span.
    fn add_heads(
        &mut self,
        model: &Decoder<D>,
        plan: &Plan,
        tensor: usize,
        sums: &D::Buffer,
        spans: Range<usize>,
    ) -> Result<()> {
        let heads = plan.heads.q;
        let Some(tensor) = self.tensor_mut(tensor) else {
            return Ok(());
        };
        for span in spans {
            let (src, dst) = (
                Rows::packed(sums, span, heads),
                RowsMut::packed(tensor, 0, heads),
            );
            model.device.copy(src, dst, 1, heads, Accumulate::Yes)?;
        }
        Ok(())
    }

    /// Adds the gradients of the adapters of a product, from the gradient `d_y` of its result and from its input `x`:
    /// `d_B += d_yᵀ (x A'ᵀ)` and `d_A += s (d_y B)ᵀ x`.
    fn add_adapters(
        &mut self,
        model: &Decoder<D>,
        product: (usize, Product),
        [d_y, x]: [Rows<'_, D::Buffer>; 2],
        rows: usize,
    ) -> Result<()> {
        let (device, rank) = (&model.device, model.rank());
        for adapter in model.adapters(product) {
            if let Some(d_up) = self.tensor_mut(adapter.up()) {
                let h = model.lowered(adapter, x, rows)?;
                let (h, d_y) = (Rows::packed(&h, 0, rank), d_y.column(adapter.column));
                device.linear_weight_grad(d_y, h, rows, [adapter.out, rank], d_up)?;
            }
            if let Some(d_down) = self.tensor_mut(adapter.down) {
                let d_h = model.lowered_grad(adapter, d_y, rows)?;
                let d_h = model.times(model.specs[adapter.down].factor, d_h, [rows, rank])?;
                let d_h = Rows::packed(&d_h, 0, rank);
                device.linear_weight_grad(d_h, x, rows, [rank, adapter.inner], d_down)?;
            }
        }
        Ok(())
    }
}
