//! Backward of the norms and factors around attention and MLP (`model::switches`).

use super::Work;
use crate::device::{Accumulate, Device, Kind, Result, Rows, RowsMut};
use crate::model::decoder::{Normed, QkNormed};
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

    /// Backward of the norms of queries and keys: the gradient of the rows `[q | k | v]` before them.
    pub(super) fn qk_norm_grad(
        &self,
        l: usize,
        qk: &QkNormed<D>,
        d_y: Rows<'_, D::Buffer>,
    ) -> Result<D::Buffer> {
        let (model, device, plan) = (self.model, &self.model.device, self.plan);
        let width = plan.qkv_width();
        let mut d_x = device.zeros(Kind::Activation, self.rows * width)?;
        for (part, rstd) in model
            .qk_norms(plan, l)
            .iter()
            .flatten()
            .zip([&qk.q_rstd, &qk.k_rstd])
        {
            device.rms_norm_grad(
                d_y.column(part.column),
                Rows::packed(&qk.raw, self.first, width).column(part.column),
                Rows::packed(rstd, self.first, part.groups),
                [self.rows, part.groups],
                model.weights.vector(part.weight),
                RowsMut::packed(&mut d_x, 0, width).column(part.column),
            )?;
        }
        let v = plan.q_width() + plan.kv_width();
        let dst = RowsMut::packed(&mut d_x, 0, width).column(v);
        device.copy(
            d_y.column(v),
            dst,
            self.rows,
            plan.kv_width(),
            Accumulate::No,
        )?;
        Ok(d_x)
    }
}
