//! Products of a layer and the adapters of their projections (docs/contract.md, section 2).

use super::Decoder;
use crate::device::{Accumulate, Device, Kind, Result, Rows, RowsMut};
use crate::model::config::ModelConfig;
use crate::model::lora::{Adapter, Lora, Product};
use crate::model::parameters::{Weights, base_specs, specs};
use crate::model::stage::Stage;

impl<D: Device> Decoder<D> {
    /// This model with other adapters, or with none. The other weights are shared, not copied. `values(i)`: those of
    /// tensor `i` in the order of [`specs`], asked for of the adapters' tensors alone.
    ///
    /// # Errors
    /// Those of `values`, and what the device says.
    pub fn with_adapters<E: From<crate::device::DeviceError>>(
        &self,
        lora: Option<Lora>,
        values: impl FnMut(usize) -> std::result::Result<D::Buffer, E>,
    ) -> std::result::Result<Self, E>
    where
        D: Clone,
    {
        let config = ModelConfig {
            lora,
            ..self.config.clone()
        };
        self.with_adapters_for(config, values, false)
    }

    /// [`Decoder::with_adapters`] by a whole configuration, which differs in the adapters.
    pub(crate) fn with_adapters_for<E: From<crate::device::DeviceError>>(
        &self,
        config: ModelConfig,
        mut values: impl FnMut(usize) -> std::result::Result<D::Buffer, E>,
        training: bool,
    ) -> std::result::Result<Self, E>
    where
        D: Clone,
    {
        let (specs, base) = (specs(&config), base_specs(&config).len());
        let value = |i: usize| values(base + i);
        let adapters = Weights::prepare(&self.device, &specs[base..], value, training)?;
        Ok(Self {
            device: self.device.clone(),
            weights: self.weights.with(base, adapters),
            stage: Stage::planned(&config.part),
            config,
            specs,
        })
    }

    /// The adapters of a product's projections.
    pub(crate) fn adapters(&self, (l, product): (usize, Product)) -> &[Adapter] {
        let lora = self.config.lora.as_ref();
        lora.map_or(&[], |lora| lora.of_product(l, product))
    }

    /// `y = x Wᵀ` with the adapters of the product.
    pub(super) fn project(
        &self,
        product: (usize, Product),
        x: Rows<'_, D::Buffer>,
        rows: usize,
        mut y: RowsMut<'_, D::Buffer>,
    ) -> Result<()> {
        let weight = self.weights.matrix(product.1.weight(product.0));
        let to = y.reborrow();
        self.device.linear(x, rows, weight, to, Accumulate::No)?;
        self.adapt(product, x, rows, y)
    }

    /// `y += (x A'ᵀ) Bᵀ` for each adapter of the product, in its columns.
    pub(super) fn adapt(
        &self,
        product: (usize, Product),
        x: Rows<'_, D::Buffer>,
        rows: usize,
        mut y: RowsMut<'_, D::Buffer>,
    ) -> Result<()> {
        for adapter in self.adapters(product) {
            let lowered = self.lowered(adapter, x, rows)?;
            let (h, up) = (
                Rows::packed(&lowered, 0, self.rank()),
                self.weights.matrix(adapter.up()),
            );
            let to = y.reborrow().column(adapter.column);
            self.device.linear(h, rows, up, to, Accumulate::Yes)?;
        }
        Ok(())
    }

    /// `x A'ᵀ`, `[rows, rank]`.
    pub(crate) fn lowered(
        &self,
        adapter: &Adapter,
        x: Rows<'_, D::Buffer>,
        rows: usize,
    ) -> Result<D::Buffer> {
        let rank = self.rank();
        let mut h = self.device.empty(Kind::Activation, rows * rank)?;
        let (down, to) = (
            self.weights.matrix(adapter.down),
            RowsMut::packed(&mut h, 0, rank),
        );
        self.device.linear(x, rows, down, to, Accumulate::No)?;
        Ok(h)
    }

    /// The gradient of [`Decoder::lowered`] for the gradient `d_y` of the product's result: `d_y B`, `[rows, rank]`.
    pub(crate) fn lowered_grad(
        &self,
        adapter: &Adapter,
        d_y: Rows<'_, D::Buffer>,
        rows: usize,
    ) -> Result<D::Buffer> {
        let rank = self.rank();
        let mut d_h = self.device.empty(Kind::Activation, rows * rank)?;
        let (up, to) = (
            self.weights.matrix(adapter.up()),
            RowsMut::packed(&mut d_h, 0, rank),
        );
        let d_y = d_y.column(adapter.column);
        self.device
            .linear_input_grad(d_y, rows, up, to, Accumulate::No)?;
        Ok(d_h)
    }

    /// Rank of the adapters; 0 without any.
    pub(crate) fn rank(&self) -> usize {
        self.config.lora.as_ref().map_or(0, |lora| lora.config.rank)
    }
}
