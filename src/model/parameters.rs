//! The model's weights on a device: which tensors there are, in which order, and which named tensors
//! of a checkpoint each is made of.
//!
//! Products that read the same input are one tensor: q, k and v are stacked, and so are gate and up.
//! Row-major weights stack by concatenation, so a stacked tensor is its parts one after the other.

use super::config::ModelConfig;
use crate::device::{Device, Purpose, Result};

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
    /// Past gates of a layer, one for each query head.
    Gate {
        /// Query heads.
        len: usize,
    },
}

impl Role {
    /// Number of elements.
    pub fn len(self) -> usize {
        match self {
            Role::Matrix { out, inner } => out * inner,
            Role::Norm { len } | Role::Gate { len } => len,
        }
    }

    /// Whether the tensor has no elements.
    pub fn is_empty(self) -> bool {
        self.len() == 0
    }
}

/// One tensor of the model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    /// Checkpoint names and shapes of the parts it is stacked from.
    pub parts: Vec<(String, Vec<usize>)>,
    /// Its use.
    pub role: Role,
}

/// Positions of the tensors in [`specs`].
pub mod index {
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
}

/// Every tensor of a model, in the order of [`index`].
pub fn specs(config: &ModelConfig) -> Vec<TensorSpec> {
    let (hidden, inner, vocab) = (
        config.hidden_size,
        config.intermediate_size,
        config.vocab_size,
    );
    let (q, kv) = (config.q_dim(), config.kv_dim());
    let matrix = |parts: &[(String, usize)], inner: usize| TensorSpec {
        parts: parts
            .iter()
            .map(|(name, out)| (name.clone(), vec![*out, inner]))
            .collect(),
        role: Role::Matrix {
            out: parts.iter().map(|p| p.1).sum(),
            inner,
        },
    };
    let norm = |name: String| TensorSpec {
        parts: vec![(name, vec![hidden])],
        role: Role::Norm { len: hidden },
    };
    let mut specs = vec![matrix(
        &[("model.embed_tokens.weight".into(), vocab)],
        hidden,
    )];
    for layer in 0..config.num_hidden_layers {
        let name = |part: &str| format!("model.layers.{layer}.{part}");
        let weight = |part: &str| name(&format!("{part}.weight"));
        specs.push(norm(weight("input_layernorm")));
        specs.push(matrix(
            &[
                (weight("self_attn.q_proj"), q),
                (weight("self_attn.k_proj"), kv),
                (weight("self_attn.v_proj"), kv),
            ],
            hidden,
        ));
        specs.push(matrix(&[(weight("self_attn.o_proj"), hidden)], q));
        specs.push(norm(weight("post_attention_layernorm")));
        specs.push(matrix(
            &[
                (weight("mlp.gate_proj"), inner),
                (weight("mlp.up_proj"), inner),
            ],
            hidden,
        ));
        specs.push(matrix(&[(weight("mlp.down_proj"), hidden)], inner));
        let heads = config.num_attention_heads;
        specs.push(TensorSpec {
            parts: vec![(name("self_attn.past_gate"), vec![heads])],
            role: Role::Gate { len: heads },
        });
    }
    specs.push(norm("model.norm.weight".into()));
    if !config.tie_word_embeddings {
        specs.push(matrix(&[("lm_head.weight".into(), vocab)], hidden));
    }
    specs
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

/// The named tensors of a model: the parts of [`specs`], in their order, less the gates of layers in
/// which no head reads the past.
pub fn parameters(config: &ModelConfig) -> Vec<Parameter> {
    let reads_past = |l| (0..config.num_key_value_heads).any(|head| config.reads_past(l, head));
    let unused: Vec<usize> = (0..config.num_hidden_layers)
        .filter(|l| !reads_past(*l))
        .map(index::past_gate)
        .collect();
    let specs = specs(config).into_iter().enumerate();
    specs
        .filter(|(i, _)| !unused.contains(i))
        .flat_map(|(_, spec)| spec.parts)
        .map(|(name, shape)| Parameter { name, shape })
        .collect()
}

/// A weight as the forward uses it.
#[derive(Debug)]
pub enum Weight<D: Device> {
    /// Packed for GEMMs.
    Matrix(D::Matrix),
    /// A norm's weight.
    Vector(D::Buffer),
    /// Past gates, on the host too since they decide which work is done.
    Gate(Vec<f32>),
}

/// All weights of a model on a device, in the order of [`specs`].
#[derive(Debug)]
pub struct Weights<D: Device> {
    weights: Vec<Weight<D>>,
}

impl<D: Device> Weights<D> {
    /// Prepares every tensor's values; `training` also prepares gradients of inputs.
    pub fn prepare<E: From<crate::device::DeviceError>>(
        device: &D,
        specs: &[TensorSpec],
        mut values: impl FnMut(usize) -> std::result::Result<D::Buffer, E>,
        training: bool,
    ) -> std::result::Result<Self, E> {
        let prepare = |(i, spec): (usize, &TensorSpec)| -> std::result::Result<_, E> {
            let buffer = values(i)?;
            Ok(match spec.role {
                Role::Matrix { out, inner } => {
                    let matrix = device.matrix(&buffer, out, inner, training);
                    Weight::Matrix(matrix.map_err(|e| e.wanted_for(Purpose::Weights))?)
                }
                Role::Norm { .. } => Weight::Vector(buffer),
                Role::Gate { len } => Weight::Gate(device.read(&buffer, 0..len)?),
            })
        };
        Ok(Self {
            weights: specs
                .iter()
                .enumerate()
                .map(prepare)
                .collect::<std::result::Result<_, E>>()?,
        })
    }

    /// Takes over the values of tensor `i`.
    pub fn refresh(&mut self, device: &D, i: usize, values: &D::Buffer) -> Result<()> {
        match &mut self.weights[i] {
            Weight::Matrix(matrix) => device.refresh(matrix, values),
            Weight::Vector(vector) => {
                let len = device.len(vector);
                let rows = crate::device::Rows::packed(values, 0, len);
                let target = crate::device::RowsMut::packed(vector, 0, len);
                device.copy(rows, target, 1, len, crate::device::Accumulate::No)
            }
            Weight::Gate(gate) => {
                *gate = device.read(values, 0..gate.len())?;
                Ok(())
            }
        }
    }

    /// The matrix at `i`; the index functions name only matrices here.
    pub(crate) fn matrix(&self, i: usize) -> &D::Matrix {
        match &self.weights[i] {
            Weight::Matrix(matrix) => matrix,
            _ => unreachable!("tensor {i} is a matrix by its spec"),
        }
    }

    /// The norm weight at `i`.
    pub(crate) fn vector(&self, i: usize) -> &D::Buffer {
        match &self.weights[i] {
            Weight::Vector(vector) => vector,
            _ => unreachable!("tensor {i} is a norm by its spec"),
        }
    }

    /// The past gates at `i`.
    pub(crate) fn gate(&self, i: usize) -> &[f32] {
        match &self.weights[i] {
            Weight::Gate(gate) => gate,
            _ => unreachable!("tensor {i} is a gate by its spec"),
        }
    }
}
