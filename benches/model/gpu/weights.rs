//! Random weights of any size in about a second: one block of random numbers on the device, laid out again and again.

use segattn::device::{Accumulate, Device, Kind, Result, Rows, RowsMut};
use segattn::model::config::ModelConfig;
use segattn::model::decoder::Decoder;
use segattn::model::parameters::{Role, TensorSpec, index, specs};

/// Numbers of the block: a prime, so that no two rows of a matrix are equal and none looks like its neighbours.
const BLOCK: usize = 4_194_301;
/// Standard deviation, that of an untrained model.
const STD: f64 = 0.02;

/// The blocks that tensors are tiled from.
struct Tiles<D: Device> {
    specs: Vec<TensorSpec>,
    layers: usize,
    matrix: D::Buffer,
    /// For what writes to the residual stream.
    residual: D::Buffer,
}

/// Uniform numbers of a standard deviation.
fn uniform(std: f64) -> Vec<f32> {
    let mut state = 1u64;
    let mut next = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f64 / f64::from(1 << 23) - 1.0
    };
    let width = std * 3f64.sqrt();
    (0..BLOCK).map(|_| (width * next()) as f32).collect()
}

impl<D: Device> Tiles<D> {
    fn new(device: &D, config: &ModelConfig) -> Result<Self> {
        let layers = config.num_hidden_layers;
        let block = |std| -> Result<D::Buffer> {
            let mut block = device.empty(Kind::Exact, BLOCK)?;
            device.write(&mut block, 0, &uniform(std))?;
            Ok(block)
        };
        Ok(Self {
            specs: specs(config),
            layers,
            matrix: block(STD)?,
            residual: block(STD / (2.0 * layers as f64).sqrt())?,
        })
    }

    /// The values of tensor `i`.
    fn tensor(&self, device: &D, i: usize) -> Result<D::Buffer> {
        let role = self.specs[i].role;
        let mut values = device.empty(Kind::Exact, role.len())?;
        if !matches!(role, Role::Matrix { .. }) {
            device.write(&mut values, 0, &vec![1.0; role.len()])?;
            return Ok(values);
        }
        let residual = (0..self.layers).any(|l| i == index::output(l) || i == index::down(l));
        let block = if residual {
            &self.residual
        } else {
            &self.matrix
        };
        let mut from = i * 1_000_003 % BLOCK;
        let mut to = 0;
        while to < role.len() {
            let count = (BLOCK - from).min(role.len() - to);
            let src = Rows {
                buffer: block,
                start: from,
                stride: count,
            };
            let dst = RowsMut {
                buffer: &mut values,
                start: to,
                stride: count,
            };
            device.copy(src, dst, 1, count, Accumulate::No)?;
            (from, to) = (0, to + count);
        }
        Ok(values)
    }
}

/// A model of random weights.
pub fn decoder<D: Device + Clone>(device: &D, config: ModelConfig) -> Result<Decoder<D>> {
    let tiles = Tiles::new(device, &config)?;
    let values = |i| tiles.tensor(device, i);
    Decoder::new(device.clone(), config, values, false)
}
