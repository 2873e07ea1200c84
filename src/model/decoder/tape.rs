//! Activations that a layer leaves for its backward pass.

use crate::device::Device;

/// Activations of a layer that its backward pass needs and that cannot be recomputed without attention.
#[derive(Debug)]
pub struct LayerTape<D: Device> {
    /// The layer's input `[rows, hidden]`.
    pub x: D::Buffer,
    /// Attention's output `[rows, q_heads * head_dim]`, before sink logits scale it.
    pub attended: D::Buffer,
    /// Attention's log-sum-exp, `[q_heads, rows]` for each span, spans packed.
    pub lse: D::Buffer,
}

/// The other activations that the backward pass needs. `Decoder::derive` recomputes them from the tape.
#[derive(Debug)]
pub struct Derived<D: Device> {
    /// The norm of attention: of the layer's input, or of what attention adds to it.
    pub attention_norm: Normed<D>,
    /// Rotated queries.
    pub q: D::Buffer,
    /// Queries and keys before their norm, where they have one.
    pub qk: Option<QkNormed<D>>,
    /// Attention's output as sink logits scale it, where the model has them.
    pub scaled: Option<D::Buffer>,
    /// The residual stream between attention and MLP.
    pub mid: D::Buffer,
    /// The norm of the MLP: of `mid`, or of what the MLP adds to it.
    pub mlp_norm: Normed<D>,
    /// Gate and up `[rows, 2 * inner]`.
    pub gate_up: D::Buffer,
}

/// A norm of rows as wide as the residual stream.
#[derive(Debug)]
pub struct Normed<D: Device> {
    /// What is normed, where it is kept nowhere else: where the norm stands after the block.
    pub x: Option<D::Buffer>,
    /// Its norm; `None` where it was added to the residual stream and is not needed any more.
    pub y: Option<D::Buffer>,
    /// Reciprocal root mean square of each row.
    pub rstd: D::Buffer,
}

/// The input of the norms of queries and keys.
#[derive(Debug)]
pub struct QkNormed<D: Device> {
    /// Rows `[q | k | v]` before the norms.
    pub raw: D::Buffer,
    /// Reciprocal root mean squares of the queries and of the keys, `[rows, groups]`.
    pub rstd: [D::Buffer; 2],
}
