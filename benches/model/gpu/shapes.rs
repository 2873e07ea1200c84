//! The models' shapes, and who reads what.

use segattn::model::config::ModelConfig;
use serde_json::{Value, json};

const SEGMENT: usize = 4096;
const PRIOR: usize = 512;
const PAST: usize = 512;

/// Of a Llama.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    pub name: &'static str,
    pub vocab: usize,
    pub hidden: usize,
    pub inner: usize,
    pub layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub tied: bool,
    pub theta: f64,
    /// KV heads that read the past instead of the prior tail, and the layers in which they do; in the others they
    /// read the segment alone.
    long_range: (&'static [usize], &'static [usize]),
}

/// Llama-2-7B, with the paper's roles (arXiv 2605.11744).
pub const LLAMA_7B: Shape = Shape {
    name: "Llama-2-7B",
    vocab: 32_000,
    hidden: 4096,
    inner: 11_008,
    layers: 32,
    heads: 32,
    kv_heads: 32,
    tied: false,
    theta: 10_000.0,
    long_range: (
        &[0, 1, 2, 4, 9, 12, 14, 15, 16, 18, 19, 22, 23, 26, 29, 30],
        &[6, 8, 11, 18],
    ),
};

/// Llama-3.2-1B, half of the KV heads long-range as in the paper.
pub const LLAMA_1B: Shape = Shape {
    name: "Llama-3.2-1B",
    vocab: 128_256,
    hidden: 2048,
    inner: 8192,
    layers: 16,
    heads: 32,
    kv_heads: 8,
    tied: true,
    theta: 500_000.0,
    long_range: (&[0, 2, 4, 6], &[3, 4, 5, 9]),
};

/// Small enough to be checked, with grouped heads.
pub const SMALL: Shape = Shape {
    name: "small",
    vocab: 1000,
    hidden: 512,
    inner: 1408,
    layers: 4,
    heads: 8,
    kv_heads: 4,
    tied: false,
    theta: 10_000.0,
    long_range: (&[0], &[1]),
};

impl Shape {
    /// The shape whose name ends so.
    pub fn by_name(name: &str) -> Option<Self> {
        [LLAMA_7B, LLAMA_1B]
            .into_iter()
            .find(|s| s.name.ends_with(name))
    }

    /// The same with another number of layers, where there is one.
    pub fn with_layers(self, layers: Option<usize>) -> Self {
        Self {
            layers: layers.unwrap_or(self.layers),
            ..self
        }
    }

    /// `config.json` of a plain Llama; the peers' too.
    pub fn json(&self) -> Value {
        json!({
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.hidden / self.heads,
            "rms_norm_eps": 1e-5,
            "rope_theta": self.theta,
            "tie_word_embeddings": self.tied,
            "max_position_embeddings": 1 << 20,
        })
    }

    /// As `who` computes it: "plain", or with segments.
    pub fn config(&self, who: &str) -> ModelConfig {
        let mut json = self.json();
        if who != "plain" {
            json["segment"] = self.segments();
        }
        ModelConfig::from_json(json).expect("a valid shape")
    }

    fn segments(&self) -> Value {
        let (heads, layers) = self.long_range;
        let reads = |layer: usize, head: usize| match heads.contains(&head) {
            false => json!(["prior"]),
            true if layers.contains(&layer) => json!(["past"]),
            true => json!([]),
        };
        let layer = |l| (0..self.kv_heads).map(|h| reads(l, h)).collect::<Vec<_>>();
        json!({
            "segment_len": SEGMENT,
            "prior_len": PRIOR,
            "past_len": PAST,
            "head_reads": (0..self.layers).map(layer).collect::<Vec<_>>(),
        })
    }
}
