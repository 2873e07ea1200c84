//! Gradients of the weights, and the contribution of one segment to them.

use std::sync::atomic::{AtomicBool, Ordering};

use super::Group;
use crate::device::{
    Accumulate, Device, DeviceError, Kind, Purpose, Result, Rows, RowsMut, SlotSpan,
};
use crate::model::decoder::Decoder;
use crate::model::parameters::{Role, index};
use crate::model::state::Plan;

/// Gradients of every tensor of a model, in the order of its specs. They accumulate until [`Gradients::clear`].
#[derive(Debug)]
pub struct Gradients<D: Device> {
    tensors: Vec<D::Buffer>,
    /// Gradient of a tied embedding from its use as the head. It is kept apart so that the order of additions, and with
    /// it the bits, do not depend on the number of segments per step.
    tied_head: Option<D::Buffer>,
    /// Whether `tied_head` has changed since it was last added to the embedding's gradient.
    apart: bool,
    head: usize,
    /// Interrupts [`accumulate`](super::accumulate) when it is set.
    stop: Option<&'static AtomicBool>,
}

impl<D: Device> Gradients<D> {
    /// Zeros for every tensor.
    pub fn new(model: &Decoder<D>) -> Result<Self> {
        let zeros = |role: Role| {
            let zeros = model.device.zeros(Kind::Exact, role.len());
            zeros.map_err(|error| error.wanted_for(Purpose::Optimizer))
        };
        let tied = model.config.tie_word_embeddings;
        Ok(Self {
            tensors: model
                .specs
                .iter()
                .map(|s| zeros(s.role))
                .collect::<Result<_>>()?,
            tied_head: tied
                .then(|| zeros(model.specs[index::EMBEDDING].role))
                .transpose()?,
            apart: false,
            head: index::head(model.config.num_hidden_layers),
            stop: None,
        })
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

    /// Sets every gradient to zero.
    pub fn clear(&mut self, device: &D) -> Result<()> {
        self.apart = false;
        self.tensors
            .iter_mut()
            .chain(&mut self.tied_head)
            .try_for_each(|t| device.clear(t))
    }

    pub(super) fn tensor_mut(&mut self, i: usize) -> &mut D::Buffer {
        &mut self.tensors[i]
    }

    pub(super) fn add_head(
        &mut self,
        device: &D,
        d_logits: Rows<'_, D::Buffer>,
        hidden: Rows<'_, D::Buffer>,
        rows: usize,
        shape: [usize; 2],
    ) -> Result<()> {
        let target = match &mut self.tied_head {
            Some(head) => {
                self.apart = true;
                head
            }
            None => &mut self.tensors[self.head],
        };
        device.linear_weight_grad(d_logits, hidden, rows, shape, target)
    }

    /// Adds the contribution of a span to the gradient of the embedding, after its last pass.
    pub(super) fn add_embedding(
        &mut self,
        model: &Decoder<D>,
        group: &Group<D>,
        span: usize,
    ) -> Result<()> {
        let hidden = model.config.hidden_size;
        let SlotSpan { row, rows, .. } = group.step.spans[span].rows;
        let d_y = Rows::packed(&group.d_embedded, row, hidden);
        let tokens = &group.step.tokens[row..row + rows];
        let d_table = self.tensor_mut(index::EMBEDDING);
        model.device.embed_grad(d_y, hidden, tokens, d_table)
    }

    /// Adds the contribution of a span to the gradients of layer `l`, after its last pass through that layer.
    pub(super) fn add_layer(
        &mut self,
        model: &Decoder<D>,
        plan: &Plan,
        group: &mut Group<D>,
        span: usize,
        l: usize,
    ) -> Result<()> {
        let (device, config) = (&model.device, &model.config);
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        let (q_width, qkv) = (plan.q_width(), plan.q_width() + 2 * plan.kv_width());
        let SlotSpan { row, rows, .. } = group.step.spans[span].rows;
        let (tape, derived, sums) = group.layers[l].parts();
        let at = |buffer, width| Rows::packed(buffer, row, width);
        let mut act = device.empty(Kind::Activation, rows * inner)?;
        let dst = RowsMut::packed(&mut act, 0, inner);
        device.swiglu(at(&derived.gate_up, 2 * inner), rows, inner, dst)?;
        let gemms = [
            (
                index::qkv(l),
                at(&sums.d_qkv, qkv),
                at(&derived.x_normed, hidden),
                [qkv, hidden],
            ),
            (
                index::output(l),
                at(&sums.d_mid, hidden),
                at(&tape.attended, q_width),
                [hidden, q_width],
            ),
            (
                index::gate_up(l),
                at(&sums.d_gate_up, 2 * inner),
                at(&derived.mid_normed, hidden),
                [2 * inner, hidden],
            ),
            (
                index::down(l),
                at(&sums.d_next, hidden),
                Rows::packed(&act, 0, inner),
                [hidden, inner],
            ),
        ];
        for (tensor, d_y, x, shape) in gemms {
            device.linear_weight_grad(d_y, x, rows, shape, self.tensor_mut(tensor))?;
        }
        let (x, mid) = (
            (&tape.x, &derived.x_rstd),
            (&derived.mid, &derived.mid_rstd),
        );
        let norms = [
            (index::attention_norm(l), &sums.d_x_normed, x),
            (index::mlp_norm(l), &sums.d_mid_normed, mid),
        ];
        for (tensor, d_y, (x, rstd)) in norms {
            let (d_y, x, rstd) = (at(d_y, hidden), at(x, hidden), at(rstd, 1));
            device.rms_norm_weight_grad(d_y, x, rstd, rows, self.tensor_mut(tensor))?;
        }
        let heads = plan.heads.q;
        let gates = RowsMut::packed(self.tensor_mut(index::past_gate(l)), 0, heads);
        let src = Rows::packed(&sums.d_past_gate, span, heads);
        device.copy(src, gates, 1, heads, Accumulate::Yes)
    }
}
