//! What a decoder computes differently from a plain Llama. A family of models sets these from its `config.json`
//! (`model::families`); the decoder reads nothing else of a family.

/// Which norm queries and keys have before their rotation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QkNorm {
    /// None.
    None,
    /// Each head by itself, by one weight `[head_dim]` for all heads.
    Head,
    /// All heads of a token together, by a weight as wide as they are.
    Full,
}

/// The switches of a decoder.
#[derive(Clone, Debug, PartialEq)]
pub struct Switches {
    /// The projections to queries, keys and values have biases.
    pub qkv_bias: bool,
    /// Attention's output projection has a bias.
    pub output_bias: bool,
    /// The projections of the MLP have biases.
    pub mlp_bias: bool,
    /// Norm of queries and keys.
    pub qk_norm: QkNorm,
    /// The norms of a layer stand behind attention and MLP, before their sum with the residual stream, instead of
    /// before them.
    pub norm_after: bool,
    /// First elements of a head that rotate, an even number; `None`: all.
    pub rotary_dim: Option<usize>,
    /// Layers whose queries and keys do not rotate, ascending.
    pub unrotated: Vec<usize>,
    /// A logit of each query head joins the softmax's denominator (docs/contract.md, section 2).
    pub sink_logits: bool,
    /// Factor on the embeddings.
    pub embedding_multiplier: f64,
    /// Factor on what attention and MLP add to the residual stream.
    pub residual_multiplier: f64,
    /// Scale of attention's scores; `None`: `1 / sqrt(head_dim)`.
    pub attention_scale: Option<f64>,
    /// Divisor of the logits.
    pub logits_divisor: f64,
}

impl Switches {
    /// Those of a plain Llama.
    pub const PLAIN: Self = Self {
        qkv_bias: false,
        output_bias: false,
        mlp_bias: false,
        qk_norm: QkNorm::None,
        norm_after: false,
        rotary_dim: None,
        unrotated: Vec::new(),
        sink_logits: false,
        embedding_multiplier: 1.0,
        residual_multiplier: 1.0,
        attention_scale: None,
        logits_divisor: 1.0,
    };
}
