//! Operations of the model itself, by which runs of different programs are compared.

use super::config::ModelConfig;
use super::parameters::{Role, index, specs};
use super::state::Plan;

/// Floating-point operations that training needs for a token of a sequence of `tokens`, on average: 6 for each weight
/// of a GEMM and 12 for each element of a query and key that it sees (Chowdhery et al. 2022, PaLM, appendix B;
/// forward a third of both); 4 for a frozen weight, which has no gradient. What is computed again, or a second time
/// for another gradient stream, does not count.
pub fn training_flops(config: &ModelConfig, tokens: usize) -> f64 {
    let plan = Plan::new(config, tokens);
    let matrices = specs(config).into_iter().enumerate().map(|(i, spec)| {
        // The embedding is a GEMM only where it is the head too.
        let counts = i != index::EMBEDDING || config.tie_word_embeddings;
        match spec.role {
            Role::Matrix { .. } if counts => spec.role.len() * if spec.frozen { 4 } else { 6 },
            _ => 0,
        }
    });
    let weights: usize = matrices.sum();
    let (mut pairs, mut done) = (0.0, 0);
    while done < tokens {
        let rows = plan.segment_len.min(tokens - done);
        for reads in &plan.reads {
            let current = (rows * (rows + 1) / 2 * plan.heads.kv) as f64;
            let prior = reads.prior.iter().filter(|reads| **reads).count() * plan.prior_len;
            let past = reads.past.len() * plan.past_len;
            let sinks = plan.heads.kv * plan.sink_len;
            let before = if done > 0 {
                rows * (prior + past + sinks)
            } else {
                0
            };
            pairs += current + before as f64;
        }
        done += rows;
    }
    let group = plan.heads.q / plan.heads.kv;
    let attention = 12.0 * pairs * (group * plan.heads.dim) as f64 / tokens.max(1) as f64;
    weights as f64 + attention
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plain_model_costs_what_the_formula_says() {
        let config = serde_json::json!({
            "model_type": "llama", "vocab_size": 50, "hidden_size": 12, "intermediate_size": 20,
            "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6,
            "tie_word_embeddings": false,
        });
        let config = ModelConfig::from_json(config).unwrap();
        let layer = 12 * (24 + 12 + 12) + 24 * 12 + 3 * 12 * 20;
        let weights = 3 * layer + 50 * 12;
        // Token i sees i + 1 keys in each of three layers of four heads.
        let attention = 12.0 * (3 * 4 * 6) as f64 * (100.0 * 101.0 / 2.0) / 100.0;
        assert_eq!(
            training_flops(&config, 100),
            6.0 * f64::from(weights) + attention
        );
    }

    #[test]
    fn segments_bound_what_a_token_costs() {
        let config = |segment: serde_json::Value| {
            ModelConfig::from_json(serde_json::json!({
                "model_type": "llama", "vocab_size": 50, "hidden_size": 16, "intermediate_size": 20,
                "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8,
                "segment": segment,
            }))
            .unwrap()
        };
        let segment = serde_json::json!({
            "segment_len": 16, "prior_len": 8, "past_len": 8, "head_reads": [[["prior"], ["prior", "past"]]],
        });
        let config = config(segment);
        let pairs = |tokens| training_flops(&config, tokens) * tokens as f64;
        // Every segment after the first costs the same.
        assert_eq!(pairs(64) - pairs(48), pairs(48) - pairs(32));
        // 16 rows of two heads: 136 keys of the segment each, and 16 times 8 of three sources beside them.
        let weights = training_flops(&config, 16) - 12.0 * 8.0 * (2.0 * 136.0) / 16.0;
        assert_eq!(
            pairs(48) - pairs(32),
            16.0 * weights + 12.0 * 8.0 * (2.0 * 136.0 + 16.0 * 24.0)
        );
    }
}
