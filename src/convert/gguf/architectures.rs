//! Architectures of GGUF files, each with the family that it is here: names of keys and tensors as llama.cpp's
//! conversion writes them.

/// An architecture, by the value of `general.architecture`.
#[derive(Debug)]
pub(super) struct Architecture {
    /// Its name, which keys begin with.
    pub(super) name: &'static str,
    /// The family's `model_type`.
    pub(super) model_type: &'static str,
    /// The rows of queries and keys are pairs of rotated dimensions side by side.
    pub(super) interleaved: bool,
    /// Further numbers: keys in the file and in `config.json`.
    pub(super) numbers: &'static [(&'static str, &'static str)],
    /// Keys of `config.json` that the files do not say, and the only values that llama.cpp computes with.
    pub(super) constants: &'static [(&'static str, u32)],
    /// A head may rotate in part.
    pub(super) partly_rotated: bool,
    /// Beginnings of names in a layer that differ from [`LAYER`].
    names: &'static [(&'static str, &'static str)],
}

/// What most of them are.
const USUAL: Architecture = Architecture {
    name: "",
    model_type: "",
    interleaved: false,
    numbers: &[],
    constants: &[],
    partly_rotated: false,
    names: &[],
};

/// Every architecture that is read.
pub(super) const ALL: [Architecture; 7] = [
    Architecture {
        name: "llama",
        model_type: "llama",
        interleaved: true,
        ..USUAL
    },
    Architecture {
        name: "qwen2",
        model_type: "qwen2",
        ..USUAL
    },
    Architecture {
        name: "qwen3",
        model_type: "qwen3",
        ..USUAL
    },
    Architecture {
        name: "granite",
        model_type: "granite",
        interleaved: true,
        numbers: &[
            ("attention.scale", "attention_multiplier"),
            ("embedding_scale", "embedding_multiplier"),
            ("residual_scale", "residual_multiplier"),
            ("logit_scale", "logits_scaling"),
        ],
        ..USUAL
    },
    Architecture {
        name: "phi3",
        model_type: "phi3",
        partly_rotated: true,
        names: &[
            ("self_attn.qkv_proj", "attn_qkv"),
            ("mlp.gate_up_proj", "ffn_up"),
        ],
        ..USUAL
    },
    Architecture {
        name: "olmo2",
        model_type: "olmo2",
        names: &[
            ("post_attention_layernorm", "post_attention_norm"),
            ("post_feedforward_layernorm", "post_ffw_norm"),
        ],
        ..USUAL
    },
    Architecture {
        name: "smollm3",
        model_type: "smollm3",
        interleaved: true,
        constants: &[("no_rope_layer_interval", 4)],
        ..USUAL
    },
];

/// Names of a layer's tensors, up to `.weight` or `.bias`.
const LAYER: [(&str, &str); 11] = [
    ("input_layernorm", "attn_norm"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("self_attn.q_norm", "attn_q_norm"),
    ("self_attn.k_norm", "attn_k_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
];

impl Architecture {
    /// The architecture of that name.
    pub(super) fn of(name: &str) -> Option<&'static Self> {
        const ARCHITECTURES: &[Architecture] = &ALL;
        ARCHITECTURES.iter().find(|known| known.name == name)
    }

    /// The name in GGUF of a tensor of a model folder; `None` for those that GGUF does not have (past gates).
    pub(super) fn tensor(&self, name: &str) -> Option<String> {
        let fixed = [
            ("model.embed_tokens.weight", "token_embd.weight"),
            ("model.norm.weight", "output_norm.weight"),
            ("lm_head.weight", "output.weight"),
        ];
        if let Some((_, stored)) = fixed.iter().find(|(ours, _)| *ours == name) {
            return Some((*stored).to_owned());
        }
        let (layer, part) = name.strip_prefix("model.layers.")?.split_once('.')?;
        let (part, end) = part.rsplit_once('.')?;
        let mut known = self.names.iter().chain(&LAYER);
        let (_, stored) = known.find(|(ours, _)| *ours == part)?;
        Some(format!("blk.{layer}.{stored}.{end}"))
    }
}
