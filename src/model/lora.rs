//! Low-rank adapters of projections (Hu et al. 2021, arXiv 2106.09685): `W x + B (s A x)`, docs/contract.md, section 2.
//!
//! The base model's weights stay as they are and may be shared by several models, each with adapters of its own
//! ([`Decoder::with_adapters`](super::decoder::Decoder::with_adapters)). In files adapters have PEFT's layout
//! ([`folder`]).

mod error;
pub mod folder;

pub use error::AdapterError;

use super::config::ModelConfig;
use super::parameters::{HeadOrder, Role, TensorSpec, base_specs, index, matrix};

/// Largest rank that is accepted.
pub const MAX_RANK: usize = 1 << 12;
/// A target that stands for every projection of the layers, as in PEFT.
pub const ALL: &str = "all-linear";
/// What names of adapters' tensors begin with.
const PREFIX: &str = "base_model.model.";
const DOWN: &str = ".lora_A.weight";
const UP: &str = ".lora_B.weight";
const WEIGHT: &str = ".weight";

/// A product of a layer, whose matrix may be stacked from several projections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Product {
    /// To queries, keys and values.
    Qkv,
    /// From attention to the residual stream.
    Output,
    /// To gate and up.
    GateUp,
    /// From the MLP to the residual stream.
    Down,
}

impl Product {
    /// All of a layer.
    pub const ALL: [Self; 4] = [Self::Qkv, Self::Output, Self::GateUp, Self::Down];

    /// Position of its matrix in layer `l`, in the order of the model's specs.
    pub fn weight(self, l: usize) -> usize {
        match self {
            Self::Qkv => index::qkv(l),
            Self::Output => index::output(l),
            Self::GateUp => index::gate_up(l),
            Self::Down => index::down(l),
        }
    }
}

/// The adapter of one projection.
#[derive(Clone, Debug, PartialEq)]
pub struct Adapter {
    /// The projection: `model.layers.0.self_attn.q_proj`.
    pub module: String,
    /// Position of `A [rank, inner]` in the model's specs; `B [out, rank]` comes after it.
    pub down: usize,
    /// The projection's first column in the result of the product that it belongs to.
    pub column: usize,
    /// Its columns.
    pub out: usize,
    /// Columns of its input.
    pub inner: usize,
    /// Its matrix in files `[out, inner]`.
    shape: [usize; 2],
    /// Order of the heads among its columns, in elements of one number.
    heads: Option<HeadOrder>,
    /// Order of the heads in a row of its input.
    input_heads: Option<HeadOrder>,
}

impl Adapter {
    /// Position of `B` in the model's specs.
    pub fn up(&self) -> usize {
        self.down + 1
    }

    /// Names of `A` and `B` in PEFT's files.
    pub fn names(&self) -> [String; 2] {
        [DOWN, UP].map(|end| format!("{PREFIX}{}{end}", self.module))
    }
}

/// The settings of a model's adapters.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraConfig {
    /// Columns of `B`.
    pub rank: usize,
    /// `alpha`: the factor of an adapter is `alpha / rank`.
    pub alpha: f64,
    /// The factor is `alpha / sqrt(rank)` instead (Kalajdzievski 2023, arXiv 2312.03732).
    pub rslora: bool,
    /// Ends of the names of projections, such as `q_proj` or `0.self_attn.q_proj`, or [`ALL`].
    pub targets: Vec<String>,
}

impl LoraConfig {
    /// The factor of an adapter.
    pub fn factor(&self) -> f64 {
        let rank = self.rank as f64;
        self.alpha / if self.rslora { rank.sqrt() } else { rank }
    }

    fn is_target(&self, module: &str) -> bool {
        let end = |target: &str| module.strip_suffix(target).is_some_and(ends_a_part);
        self.targets
            .iter()
            .any(|target| target == ALL || end(target))
    }

    fn validate(&self) -> Result<(), AdapterError> {
        if !(1..=MAX_RANK).contains(&self.rank) {
            let expected = format!("an integer from 1 to {MAX_RANK}");
            return Err(AdapterError::key("r", expected, self.rank));
        }
        if !(self.alpha.is_finite() && self.alpha > 0.0) {
            let (key, expected) = ("lora_alpha", "a finite number above 0");
            return Err(AdapterError::key(key, expected, self.alpha));
        }
        Ok(())
    }
}

/// Whether what stands before the end of a name is whole: nothing, or all of its parts.
fn ends_a_part(before: &str) -> bool {
    before.is_empty() || before.ends_with('.')
}

/// The adapters of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct Lora {
    /// What they are.
    pub config: LoraConfig,
    adapters: Vec<Adapter>,
    /// The first of each product's adapters, product by product and layer by layer, and their number.
    starts: Vec<usize>,
}

impl Lora {
    /// The adapters of `model` by these settings.
    ///
    /// # Errors
    /// [`AdapterError::Key`] for numbers out of their range, for no target at all, and for a target that no projection
    /// of the model has at the end of its name.
    pub fn new(model: &ModelConfig, config: LoraConfig) -> Result<Self, AdapterError> {
        config.validate()?;
        let modules = modules(model);
        let hits = |target: &String| {
            let one = LoraConfig {
                targets: vec![target.clone()],
                ..config.clone()
            };
            modules.iter().any(|module| one.is_target(module))
        };
        let missed = config.targets.iter().find(|target| !hits(target));
        if config.targets.is_empty() || missed.is_some() {
            let last = |module: &String| module.rsplit('.').next().unwrap_or_default().to_owned();
            let mut names: Vec<String> = modules.iter().map(last).collect();
            names.sort();
            names.dedup();
            let expected = format!("projections of the layers ({}), or {ALL}", names.join(", "));
            let got = missed.map_or("none".to_owned(), |target| format!("{target:?}"));
            return Err(AdapterError::key("target_modules", expected, got));
        }
        Ok(Self::of(model, config))
    }

    fn of(model: &ModelConfig, config: LoraConfig) -> Self {
        let base = base_specs(model);
        let (mut adapters, mut starts) = (Vec::new(), Vec::new());
        for l in 0..model.num_hidden_layers {
            for product in Product::ALL {
                starts.push(adapters.len());
                let spec = &base[product.weight(l)];
                let Role::Matrix {
                    out: all,
                    inner: kept,
                } = spec.role
                else {
                    unreachable!("a product's weight is a matrix");
                };
                let rows: usize = spec.parts.iter().map(|(_, shape)| shape[0]).sum();
                let mut column = 0;
                for (name, shape) in &spec.parts {
                    let module = name.strip_suffix(WEIGHT).unwrap_or(name);
                    let (shape, out) = ([shape[0], shape[1]], shape[0] * all / rows);
                    if config.is_target(module) {
                        let (heads, input_heads) = match (spec.heads, product) {
                            (Some(order), Product::Output) => (None, Some(order.of_row(rows))),
                            (order, _) => (order.and_then(|o| o.part(column, out)), None),
                        };
                        adapters.push(Adapter {
                            module: module.to_owned(),
                            down: base.len() + 2 * adapters.len(),
                            column,
                            out,
                            inner: kept,
                            shape,
                            heads,
                            input_heads,
                        });
                    }
                    column += out;
                }
            }
        }
        starts.push(adapters.len());
        Self {
            config,
            adapters,
            starts,
        }
    }

    /// All adapters, in the order of their tensors.
    pub fn adapters(&self) -> &[Adapter] {
        &self.adapters
    }

    /// Those of one product.
    pub fn of_product(&self, l: usize, product: Product) -> &[Adapter] {
        let at = l * Product::ALL.len() + product as usize;
        &self.adapters[self.starts[at]..self.starts[at + 1]]
    }

    /// Their tensors: `A` and `B` of each.
    pub(super) fn specs(&self) -> Vec<TensorSpec> {
        let rank = self.config.rank;
        let specs = self.adapters.iter().flat_map(|adapter| {
            let [down, up] = adapter.names();
            let [out, inner] = adapter.shape;
            let down = TensorSpec {
                factor: self.config.factor(),
                heads: adapter.input_heads.map(|order| order.rows(rank)),
                role: Role::Matrix {
                    out: rank,
                    inner: adapter.inner,
                },
                ..matrix(&[down], &[rank], inner)
            };
            let up = TensorSpec {
                heads: adapter.heads.map(|order| HeadOrder {
                    width: rank,
                    ..order
                }),
                role: Role::Matrix {
                    out: adapter.out,
                    inner: rank,
                },
                ..matrix(&[up], &[out], rank)
            };
            [down, up]
        });
        specs.collect()
    }
}

/// Names of all projections of a model's layers.
fn modules(model: &ModelConfig) -> Vec<String> {
    let base = base_specs(model);
    let layers = 0..model.num_hidden_layers;
    let products = layers.flat_map(|l| Product::ALL.map(|product| product.weight(l)));
    let parts = products.flat_map(|i| &base[i].parts);
    parts
        .map(|(name, _)| name.strip_suffix(WEIGHT).unwrap_or(name).to_owned())
        .collect()
}
