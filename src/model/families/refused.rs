//! Well-known families that are refused, and what the decoder lacks for them.

use super::FAMILIES;

/// Beginnings of a `model_type`, and what is missing. The first that fits counts.
const MISSING: &[(&str, &str)] = &[
    (
        "gemma",
        "norms by 1 + weight, GELU, soft caps and sliding windows",
    ),
    ("gpt_oss", "sliding windows and experts"),
    ("mixtral", "experts"),
    ("phimoe", "experts and layer norms"),
    ("granitemoe", "experts"),
    ("deepseek", "latent attention and experts"),
    ("kimi", "latent attention and experts"),
    ("glm4_moe", "experts"),
    (
        "glm",
        "rotation of pairs of neighbours and norms before and after a block",
    ),
    ("chatglm", "rotation of pairs of neighbours"),
    ("qwen3_next", "linear attention and experts"),
    ("qwen3_5", "linear attention"),
    ("llama4", "experts, chunks of attention and scaled queries"),
    ("ministral3", "queries scaled by their position"),
    ("mistral3", "images"),
    ("mistral4", "latent attention and experts"),
    ("olmo3", "sliding windows"),
    ("olmoe", "experts"),
    ("olmo", "layer norms without weights"),
    (
        "cohere2",
        "sliding windows, layer norms and parallel blocks",
    ),
    ("cohere", "layer norms and parallel blocks"),
    ("phi", "layer norms and parallel blocks"),
    ("falcon", "layer norms and parallel blocks"),
    ("gpt_neox", "layer norms and parallel blocks"),
    ("stablelm", "layer norms"),
    ("starcoder2", "layer norms and sliding windows"),
    ("gpt2", "learned positions and layer norms"),
    ("mamba", "state space layers"),
    ("jamba", "state space layers and experts"),
];

/// Families that are supported, in words, and what this one would need.
pub(super) fn supported(name: &str) -> String {
    let families: Vec<&str> = FAMILIES.iter().map(|family| family.model_type).collect();
    let families = families.join(", ");
    let missing = match name {
        _ if name.contains("moe") => Some("experts"),
        _ if name.contains("_vl") || name.contains("vision") => Some("images"),
        _ => MISSING
            .iter()
            .find(|(begin, _)| name.starts_with(begin))
            .map(|(_, what)| *what),
    };
    match missing {
        Some(what) => format!("{families}; this one needs {what}, which are not computed here"),
        None => families,
    }
}
