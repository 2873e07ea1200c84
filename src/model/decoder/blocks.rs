//! The parts of a layer that models compute differently (`model::switches`): norms, biases and factors.

use super::{Decoder, LayerTape, Normed};
use crate::device::{Accumulate, Device, Kind, Result, Rows, RowsMut, SinkLogits};
use crate::model::lora::Product;
use crate::model::parameters::{Extra, index};
use crate::model::state::Plan;
use crate::model::switches::QkNorm;

/// What a block adds to the residual stream, where the backward pass needs it, and the sum, where it was asked for.
type Added<D> = (Option<Normed<D>>, Option<<D as Device>::Buffer>);

impl<D: Device> Decoder<D> {
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
    pub(super) fn add_bias(
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

    /// Norm of rows of the residual stream by the weight at `weight`, and the reciprocal root mean squares.
    pub(super) fn norm(
        &self,
        x: &D::Buffer,
        rows: usize,
        weight: usize,
    ) -> Result<(D::Buffer, D::Buffer)> {
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
    pub(super) fn norm_before(
        &self,
        x: &D::Buffer,
        rows: usize,
        weight: usize,
    ) -> Result<Option<Normed<D>>> {
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

    /// Where the norms of queries and keys of `rows` rows leave their reciprocal root mean squares, in models that have
    /// them.
    pub(super) fn qk_rstd(
        &self,
        plan: &Plan,
        l: usize,
        rows: usize,
    ) -> Result<Option<[D::Buffer; 2]>> {
        let Some([q, k]) = self.qk_norms(plan, l) else {
            return Ok(None);
        };
        let empty = |part: QkNormPart| self.device.empty(Kind::Exact, rows * part.groups);
        Ok(Some([empty(q)?, empty(k)?]))
    }

    /// Weights of the norms of queries and of keys of a layer, where the model has them.
    pub(super) fn qk_norm_weights(&self, plan: &Plan, l: usize) -> Option<[&D::Buffer; 2]> {
        let parts = self.qk_norms(plan, l)?;
        Some(parts.map(|part| self.weights.vector(part.weight)))
    }

    /// The norms of queries and of keys of a layer, where the model has them.
    pub(crate) fn qk_norms(&self, plan: &Plan, l: usize) -> Option<[QkNormPart; 2]> {
        let head = self.config.switches.qk_norm == QkNorm::Head;
        let part = |weight, heads| QkNormPart {
            weight,
            groups: if head { heads } else { 1 },
        };
        let weights = [Extra::QueryNorm, Extra::KeyNorm].map(|extra| self.extra(l, extra));
        let [q, k] = [weights[0]?, weights[1]?];
        Some([part(q, plan.heads.q), part(k, plan.heads.kv)])
    }

    /// The sink logits of a layer, where the model has them, with attention's output from row `first` on.
    pub(crate) fn sinks<'a>(
        &'a self,
        plan: &Plan,
        l: usize,
        tape: &'a LayerTape<D>,
        first: usize,
    ) -> Option<SinkLogits<'a, D::Buffer>> {
        Some(SinkLogits {
            logits: self.weights.vector(self.extra(l, Extra::SinkLogits)?),
            heads: plan.heads,
            out: Rows::packed(&tape.attended, first, plan.q_width()),
            lse: Rows::packed(&tape.lse, first, plan.heads.q),
        })
    }

    /// Attention's output as sink logits scale it, where the model has them.
    pub(super) fn scale_by_sinks(
        &self,
        plan: &Plan,
        l: usize,
        tape: &LayerTape<D>,
        placed: &D::Step,
    ) -> Result<Option<D::Buffer>> {
        let Some(sinks) = self.sinks(plan, l, tape, 0) else {
            return Ok(None);
        };
        let len = placed.as_ref().tokens.len() * plan.q_width();
        let mut scaled = self.device.empty(Kind::Activation, len)?;
        let y = RowsMut::packed(&mut scaled, 0, plan.q_width());
        self.device.sink_logits(&sinks, placed, y)?;
        Ok(Some(scaled))
    }

    /// What a block adds to the residual stream `x`, and the sum: `x + m norm(y wᵀ + bias)`, with the norm and the
    /// factor m as the model has them. Without `sum` only what the backward pass needs of it is computed.
    pub(super) fn add_block(
        &self,
        x: &D::Buffer,
        y: &D::Buffer,
        block: &Block,
        rows: usize,
        sum: bool,
    ) -> Result<Added<D>> {
        let (device, hidden, switches) =
            (&self.device, self.config.hidden_size, &self.config.switches);
        let factor = switches.residual_multiplier;
        let empty = || device.empty(Kind::Activation, rows * hidden);
        let (y, product) = (
            Rows::packed(y, 0, block.width),
            (block.layer, block.product),
        );
        let residual = Rows::packed(x, 0, hidden);
        if !switches.norm_after && factor == 1.0 {
            if !sum {
                return Ok((None, None));
            }
            let mut out = empty()?;
            let dst = RowsMut::packed(&mut out, 0, hidden);
            let weight = self.weights.matrix(block.product.weight(block.layer));
            device.linear_residual(y, rows, weight, residual, dst, hidden)?;
            self.adapt(product, y, rows, RowsMut::packed(&mut out, 0, hidden))?;
            let dst = RowsMut::packed(&mut out, 0, hidden);
            self.add_bias(block.layer, block.bias, dst, rows)?;
            return Ok((None, Some(out)));
        }
        if !switches.norm_after && !sum {
            return Ok((None, None));
        }
        let mut added = empty()?;
        let dst = RowsMut::packed(&mut added, 0, hidden);
        self.project(product, y, rows, dst)?;
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
}

/// The norm of queries or of keys.
pub(crate) struct QkNormPart {
    /// Its weight.
    pub weight: usize,
    /// Norms of a row.
    pub groups: usize,
}

/// The last projection of attention or of the MLP.
pub(super) struct Block {
    pub(super) layer: usize,
    pub(super) product: Product,
    /// Columns of its input.
    pub(super) width: usize,
    pub(super) bias: Extra,
    /// The norm that stands before or after the block.
    pub(super) norm: usize,
}
