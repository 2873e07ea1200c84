//! The model's weights on a device: which tensors there are, in which order, and which named tensors
//! of a checkpoint each is made of.
//!
//! Products that read the same input are one tensor: q, k and v are stacked, and so are gate and up.
//! Row-major weights stack by concatenation, so a stacked tensor is its parts one after the other. Families that store
//! the stacked tensor have one part.

mod heads;
mod weights;

use super::config::ModelConfig;
use super::switches::{QkNorm, Switches};
pub use heads::HeadOrder;
pub use weights::{Weight, Weights};

/// What a tensor is used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// A weight `[out, in]` of a GEMM, or the embedding table.
    Matrix {
        /// Rows.
        out: usize,
        /// Columns.
        inner: usize,
    },
    /// The weight of a norm.
    Norm {
        /// Elements.
        len: usize,
    },
    /// A bias: added to every row.
    Bias {
        /// Elements.
        len: usize,
    },
    /// Past gates of a layer, one for each query head.
    Gate {
        /// Query heads.
        len: usize,
    },
    /// Sink logits of a layer, one for each query head.
    Sink {
        /// Query heads.
        len: usize,
    },
}

impl Role {
    /// Number of elements.
    pub fn len(self) -> usize {
        match self {
            Role::Matrix { out, inner } => out * inner,
            Role::Norm { len } | Role::Bias { len } | Role::Gate { len } | Role::Sink { len } => {
                len
            }
        }
    }

    /// Whether the tensor has no elements.
    pub fn is_empty(self) -> bool {
        self.len() == 0
    }
}

/// One tensor of the model.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorSpec {
    /// Checkpoint names and shapes of the parts it is stacked from.
    pub parts: Vec<(String, Vec<usize>)>,
    /// Its use.
    pub role: Role,
    /// Elements of its heads stand at other places than in files.
    pub heads: Option<HeadOrder>,
    /// Factor on the matrix that products read: of an adapter.
    pub factor: f64,
    /// Training keeps it as it is: it has neither gradient, nor moments, nor values in f32 beside the prepared ones.
    pub frozen: bool,
}

impl TensorSpec {
    /// In the place of a tensor that another part of the model has.
    const ABSENT: Self = Self {
        parts: Vec::new(),
        role: Role::Matrix { out: 0, inner: 0 },
        heads: None,
        factor: 1.0,
        frozen: false,
    };

    /// Whether another part of the model has this tensor.
    pub fn is_absent(&self) -> bool {
        self.parts.is_empty()
    }

    /// Brings the values of all parts, as files have them, to the places at which they are kept.
    pub fn keep(&self, values: &mut Vec<f32>) {
        if let Some(order) = self.heads {
            *values = order.kept(values);
        }
    }

    /// Brings values to the places that files have: undoes [`Self::keep`].
    pub fn for_file(&self, values: &mut Vec<f32>) {
        if let Some(order) = self.heads {
            *values = order.filed(values);
        }
    }
}

/// A tensor of a layer that not every model has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extra {
    /// Bias of q, k, v.
    QkvBias,
    /// Bias of attention's output projection.
    OutputBias,
    /// Bias of gate and up.
    GateUpBias,
    /// Bias of the down projection.
    DownBias,
    /// Norm of queries.
    QueryNorm,
    /// Norm of keys.
    KeyNorm,
    /// Sink logits.
    SinkLogits,
}

impl Extra {
    const ALL: [Self; 7] = [
        Self::QkvBias,
        Self::OutputBias,
        Self::GateUpBias,
        Self::DownBias,
        Self::QueryNorm,
        Self::KeyNorm,
        Self::SinkLogits,
    ];

    fn is_in(self, switches: &Switches) -> bool {
        match self {
            Self::QkvBias => switches.qkv_bias,
            Self::OutputBias => switches.output_bias,
            Self::GateUpBias | Self::DownBias => switches.mlp_bias,
            Self::QueryNorm | Self::KeyNorm => switches.qk_norm != QkNorm::None,
            Self::SinkLogits => switches.sink_logits,
        }
    }

    /// Those that a model has, in the order of [`specs`].
    fn of(config: &ModelConfig) -> impl Iterator<Item = Self> {
        let all = Self::ALL.into_iter();
        all.filter(|extra| extra.is_in(&config.switches))
    }
}

/// Positions of the tensors in [`specs`].
pub mod index {
    use super::{Extra, ModelConfig};

    /// The embedding table.
    pub const EMBEDDING: usize = 0;
    const FIRST_LAYER: usize = 1;
    const PER_LAYER: usize = 7;
    /// Norm before attention, of layer `l`.
    pub const fn attention_norm(l: usize) -> usize {
        FIRST_LAYER + l * PER_LAYER
    }
    /// Stacked q, k, v.
    pub const fn qkv(l: usize) -> usize {
        attention_norm(l) + 1
    }
    /// Output projection of attention.
    pub const fn output(l: usize) -> usize {
        attention_norm(l) + 2
    }
    /// Norm before the MLP.
    pub const fn mlp_norm(l: usize) -> usize {
        attention_norm(l) + 3
    }
    /// Stacked gate and up.
    pub const fn gate_up(l: usize) -> usize {
        attention_norm(l) + 4
    }
    /// Down projection.
    pub const fn down(l: usize) -> usize {
        attention_norm(l) + 5
    }
    /// Past gates.
    pub const fn past_gate(l: usize) -> usize {
        attention_norm(l) + 6
    }
    /// The last norm of a model of `layers` layers.
    pub const fn final_norm(layers: usize) -> usize {
        FIRST_LAYER + layers * PER_LAYER
    }
    /// The output head, where it is not tied.
    pub const fn head(layers: usize) -> usize {
        final_norm(layers) + 1
    }
    /// A tensor of layer `l` that not every model has, if this one has it: they are the last ones.
    pub fn extra(config: &ModelConfig, l: usize, extra: Extra) -> Option<usize> {
        let first = head(config.num_hidden_layers) + usize::from(!config.tie_word_embeddings);
        let place = Extra::of(config).position(|e| e == extra)?;
        Some(first + l * Extra::of(config).count() + place)
    }
}

/// Every tensor of a model: those of [`base_specs`], which are frozen where it has adapters, and those of the adapters.
pub fn specs(config: &ModelConfig) -> Vec<TensorSpec> {
    let mut specs = base_specs(config);
    if let Some(lora) = &config.lora {
        specs.iter_mut().for_each(|spec| spec.frozen = true);
        specs.extend(lora.specs());
    }
    specs
}

/// The tensors of a model without its adapters, in the order of [`index`]. Where a configuration is a part of a model,
/// what stands before or behind its layers is absent: without names and elements.
pub fn base_specs(config: &ModelConfig) -> Vec<TensorSpec> {
    let (hidden, vocab) = (config.hidden_size, config.vocab_size);
    let (names, part) = (&config.family.names, &config.part);
    let embedding = "model.embed_tokens.weight".to_owned();
    let is_used = part.begins || part.ends && config.tie_word_embeddings;
    let mut specs = vec![match is_used {
        true => matrix(&[embedding], &[vocab], hidden),
        false => TensorSpec::ABSENT,
    }];
    for layer in 0..config.num_hidden_layers {
        let number = part.first_layer + layer;
        let name = |part: &str| format!("model.layers.{number}.{part}");
        let weight = |part: &str| name(&format!("{part}.weight"));
        let weights = |parts: &[&str]| parts.iter().map(|p| weight(p)).collect::<Vec<_>>();
        specs.push(vector(
            &[weight(names.norms[0])],
            &[hidden],
            Role::Norm { len: hidden },
        ));
        specs.push(TensorSpec {
            heads: HeadOrder::of_qkv(config, hidden),
            role: Role::Matrix {
                out: config.q_dim() + 2 * config.kv_dim(),
                inner: hidden,
            },
            ..matrix(&weights(names.qkv), &qkv_rows(config), hidden)
        });
        let (output, [columns, _, _]) = (weight("self_attn.o_proj"), qkv_rows(config));
        specs.push(TensorSpec {
            heads: HeadOrder::of_columns(config, hidden),
            role: Role::Matrix {
                out: hidden,
                inner: config.q_dim(),
            },
            ..matrix(&[output], &[hidden], columns)
        });
        specs.push(vector(
            &[weight(names.norms[1])],
            &[hidden],
            Role::Norm { len: hidden },
        ));
        let inner = config.intermediate_size;
        specs.push(matrix(&weights(names.gate_up), &[inner; 2], hidden));
        specs.push(matrix(&[weight("mlp.down_proj")], &[hidden], inner));
        let heads = config.num_attention_heads;
        let gate = Role::Gate { len: heads };
        specs.push(vector(&[name("self_attn.past_gate")], &[heads], gate));
    }
    let role = Role::Norm { len: hidden };
    let mut last = vec![vector(&["model.norm.weight".into()], &[hidden], role)];
    if !config.tie_word_embeddings {
        last.push(matrix(&["lm_head.weight".into()], &[vocab], hidden));
    }
    if !part.ends {
        last.fill(TensorSpec::ABSENT);
    }
    specs.extend(last);
    for layer in 0..config.num_hidden_layers {
        specs.extend(Extra::of(config).map(|extra| extra_spec(config, layer, extra)));
    }
    specs
}

/// Rows of the projections to queries, keys and values in files.
fn qkv_rows(config: &ModelConfig) -> [usize; 3] {
    let (heads, kv_heads) = (config.num_attention_heads, config.num_key_value_heads);
    [heads, kv_heads, kv_heads].map(|heads| heads * config.file_head_dim)
}

fn extra_spec(config: &ModelConfig, layer: usize, extra: Extra) -> TensorSpec {
    let (names, hidden, dim) = (&config.family.names, config.hidden_size, config.head_dim);
    let (heads, kv_heads) = (config.num_attention_heads, config.num_key_value_heads);
    let full = config.switches.qk_norm == QkNorm::Full;
    let norm = |name: &str, heads: usize| {
        let heads = if full { heads } else { 1 };
        let order = HeadOrder::of(config, heads, 1);
        (vec![name.to_owned()], vec![heads * dim], order)
    };
    let named = |parts: &[&str]| parts.iter().map(|p| (*p).to_owned()).collect::<Vec<_>>();
    let (parts, rows, order) = match extra {
        Extra::QkvBias => (
            named(names.qkv),
            qkv_rows(config).to_vec(),
            HeadOrder::of_qkv(config, 1),
        ),
        Extra::OutputBias => (named(&["self_attn.o_proj"]), vec![hidden], None),
        Extra::GateUpBias => (
            named(names.gate_up),
            vec![config.intermediate_size; 2],
            None,
        ),
        Extra::DownBias => (named(&["mlp.down_proj"]), vec![hidden], None),
        Extra::QueryNorm => norm("self_attn.q_norm", heads),
        Extra::KeyNorm => norm("self_attn.k_norm", kv_heads),
        Extra::SinkLogits => (named(&["self_attn.sink_logits"]), vec![heads], None),
    };
    let len = match extra {
        Extra::QkvBias => config.q_dim() + 2 * config.kv_dim(),
        _ => rows.iter().sum(),
    };
    let (end, role) = match extra {
        Extra::QueryNorm | Extra::KeyNorm => (".weight", Role::Norm { len }),
        Extra::SinkLogits => ("", Role::Sink { len }),
        _ => (".bias", Role::Bias { len }),
    };
    let number = config.part.first_layer + layer;
    let parts = parts
        .iter()
        .map(|part| format!("model.layers.{number}.{part}{end}"));
    TensorSpec {
        heads: order,
        role,
        ..vector(&parts.collect::<Vec<_>>(), &rows, role)
    }
}

/// Stacked matrices of so many rows each, or one of all of them.
pub(super) fn matrix(names: &[String], rows: &[usize], inner: usize) -> TensorSpec {
    let out = rows.iter().sum();
    let shape = |rows: usize| vec![rows, inner];
    TensorSpec {
        parts: parts(names, rows, shape),
        role: Role::Matrix { out, inner },
        heads: None,
        factor: 1.0,
        frozen: false,
    }
}

/// Vectors of so many elements, one after the other.
fn vector(names: &[String], lens: &[usize], role: Role) -> TensorSpec {
    TensorSpec {
        parts: parts(names, lens, |len| vec![len]),
        role,
        heads: None,
        factor: 1.0,
        frozen: false,
    }
}

/// Names with shapes: one for each number of rows, or one for all rows.
fn parts(
    names: &[String],
    rows: &[usize],
    shape: impl Fn(usize) -> Vec<usize>,
) -> Vec<(String, Vec<usize>)> {
    match names {
        [fused] => vec![(fused.clone(), shape(rows.iter().sum()))],
        names => (names.iter().zip(rows))
            .map(|(name, rows)| (name.clone(), shape(*rows)))
            .collect(),
    }
}

/// A named tensor of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parameter {
    /// Its name in Hugging Face files.
    pub name: String,
    /// Row-major shape; linear maps are `[out, in]`.
    pub shape: Vec<usize>,
}

impl Parameter {
    /// Numbers in the tensor. Cannot overflow for a validated configuration.
    pub fn numel(&self) -> usize {
        self.shape.iter().product()
    }
}

/// The named tensors of a model without its adapters: the parts of [`base_specs`], in their order, less the gates of
/// layers in which no head reads the past.
pub fn parameters(config: &ModelConfig) -> Vec<Parameter> {
    let reads_past = |l| (0..config.num_key_value_heads).any(|head| config.reads_past(l, head));
    let unused: Vec<usize> = (0..config.num_hidden_layers)
        .filter(|l| !reads_past(*l))
        .map(index::past_gate)
        .collect();
    let specs = base_specs(config).into_iter().enumerate();
    specs
        .filter(|(i, _)| !unused.contains(i))
        .flat_map(|(_, spec)| spec.parts)
        .map(|(name, shape)| Parameter { name, shape })
        .collect()
}
