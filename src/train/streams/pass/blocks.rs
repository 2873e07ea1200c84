//! Backward of the norms and factors around attention and MLP (`model::switches`).

use super::{LayerSums, Work};
use crate::device::{
    Accumulate, Device, Kind, QkNormGrad, Result, Rows, RowsMut, SinkLogitsGrad, SlotSpan,
};
use crate::model::decoder::{LayerTape, Normed, QkNormed};
use crate::model::lora::Product;

impl<D: Device> Work<'_, D> {
    /// From the gradient `d` of the sum of the residual stream and a block to that of the block's last product, which
    /// is also added to `d_product`. `d_norm` sums the gradient of the norm between them, where there is one.
    pub(super) fn block_grad(
        &self,
        d: &D::Buffer,
        norm: &Normed<D>,
        tensor: usize,
        [d_norm, d_product]: [&mut D::Buffer; 2],
    ) -> Result<Option<D::Buffer>> {
        let (model, hidden) = (self.model, self.model.config.hidden_size);
        let (device, factor) = (&model.device, model.config.switches.residual_multiplier);
        let mut product = None;
        if factor != 1.0 {
            let dst = product.insert(device.empty(Kind::Activation, self.rows * hidden)?);
            let (src, dst) = (Rows::packed(d, 0, hidden), RowsMut::packed(dst, 0, hidden));
            device.scale(factor, src, dst, [self.rows, hidden], Accumulate::No)?;
        }
        if let Some(x) = &norm.x {
            let d_y = product.as_ref().unwrap_or(d);
            self.add(d_y, d_norm, hidden)?;
            let mut d_x = device.zeros(Kind::Activation, self.rows * hidden)?;
            let d_y = Rows::packed(d_y, 0, hidden);
            self.norm_grad(d_y, x, &norm.rstd, tensor, &mut d_x)?;
            product = Some(d_x);
        }
        self.add(product.as_ref().unwrap_or(d), d_product, hidden)?;
        Ok(product)
    }

    /// Adds the gradient of the residual stream that comes from a block's first product, whose gradient is `d_y`, to
    /// `d`. `d_norm` sums the gradient of the norm before the block, where there is one; `x` is the norm's input.
    pub(super) fn input_of_block(
        &self,
        d_y: Rows<'_, D::Buffer>,
        product: (usize, Product),
        (x, norm, tensor): (&D::Buffer, &Normed<D>, usize),
        d_norm: &mut D::Buffer,
        d: &mut D::Buffer,
    ) -> Result<()> {
        let hidden = self.model.config.hidden_size;
        if norm.x.is_some() {
            let dst = RowsMut::packed(d, 0, hidden);
            return self.input_grad(d_y, product, dst, Accumulate::Yes);
        }
        let mut own = self.own(hidden)?;
        let dst = self.target(&mut own, d_norm, hidden);
        self.input_grad(d_y, product, dst, Accumulate::No)?;
        let d_normed = self.summed(&own, d_norm, hidden)?;
        self.norm_grad(d_normed, x, &norm.rstd, tensor, d)
    }

    /// Backward of sink logits, where the model has them: the gradients of attention's output and of its log-sum-exp.
    pub(super) fn sinks_grad(
        &self,
        l: usize,
        (tape, sums): (&LayerTape<D>, &mut LayerSums<D>),
        spans: &[SlotSpan],
        d_y: &D::Buffer,
    ) -> Result<Option<(D::Buffer, D::Buffer)>> {
        let (device, heads, width) = (&self.model.device, self.plan.heads.q, self.plan.q_width());
        let sinks = self.model.sinks(self.plan, l, tape, self.first);
        let (Some(sinks), Some(sum)) = (sinks, &mut sums.d_sinks) else {
            return Ok(None);
        };
        let exact = |len: usize| device.empty(Kind::Exact, len);
        let (mut d_lse, mut d_logits) = (exact(self.rows * heads)?, exact(spans.len() * heads)?);
        let mut d_out = device.empty(Kind::Activation, self.rows * width)?;
        let grad = SinkLogitsGrad {
            spans,
            d_y: Rows::packed(d_y, 0, width),
            d_out: RowsMut::packed(&mut d_out, 0, width),
            d_lse: RowsMut::packed(&mut d_lse, 0, heads),
            d_logits: &mut d_logits,
        };
        device.sink_logits_grad(&sinks, grad)?;
        self.add_heads(&d_logits, sum)?;
        Ok(Some((d_out, d_lse)))
    }

    /// Adds numbers `[span, q_heads]` of this pass to a sum. The first pass overwrites it.
    pub(super) fn add_heads(&self, numbers: &D::Buffer, sum: &mut D::Buffer) -> Result<()> {
        let (heads, spans) = (self.plan.heads.q, self.spans.clone());
        let (src, dst) = (
            Rows::packed(numbers, 0, heads),
            RowsMut::packed(sum, spans.start, heads),
        );
        let accumulate = self.accumulate();
        self.model
            .device
            .copy(src, dst, spans.len(), heads, accumulate)
    }

    /// Backward of the norms of queries and keys: the gradient of the rows `[q | k | v]` before them.
    pub(super) fn qk_norm_grad(
        &self,
        l: usize,
        qk: &QkNormed<D>,
        d_y: Rows<'_, D::Buffer>,
        d_x: RowsMut<'_, D::Buffer>,
    ) -> Result<()> {
        let (model, plan) = (self.model, self.plan);
        let norms = model.qk_norms(plan, l).expect("norms of queries and keys");
        let [q, k] = [0, 1].map(|i| Rows::packed(&qk.rstd[i], self.first, norms[i].groups));
        let grad = QkNormGrad {
            d_y,
            x: Rows::packed(&qk.raw, self.first, plan.qkv_width()),
            rstd: [q, k],
            rows: self.rows,
            heads: plan.heads,
        };
        let weights = norms.map(|part| model.weights.vector(part.weight));
        model.device.qk_norm_grad(&grad, weights, d_x)
    }
}
