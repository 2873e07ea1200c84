//! Measures which KV heads read what is asked for, so that `convert` can let these heads read the past.
//!
//! The model runs with full attention over prompts that hide a statement in text and ask for it. While it reads the
//! answer, each head gets two scores:
//!
//! - *mass*: the share of its attention that lies on the statement;
//! - *copy*: how often its most attended key is a token of the statement that equals the next token (the retrieval
//!   score of Wu et al. 2024, arXiv:2404.15574).
//!
//! A KV head's scores are means over its query heads, over the tokens of the answer, and over the prompts.

use super::lookups::Lookup;
use crate::device::{Device, Result};
use crate::model::decoder::{Decoder, Step};
use crate::model::segmentation::End;
use crate::model::state::{Angles, Plan, SequenceState, Slots};

/// A score of each head, `[layer][kv_head]`, from 0 to 1.
pub type Scores = Vec<Vec<f64>>;

/// What was measured.
#[derive(Debug, Clone, PartialEq)]
pub struct HeadScores {
    /// Share of attention on the statement.
    pub mass: Scores,
    /// Share of the answer's tokens that the most attended key holds.
    pub copy: Scores,
}

/// Measures all heads of a model without segments. `progress` hears after each prompt how many are done.
///
/// # Errors
/// Those of the device.
pub fn measure<D: Device>(
    model: &Decoder<D>,
    prompts: &[Lookup],
    mut progress: impl FnMut(usize),
) -> Result<HeadScores> {
    let (layers, heads) = (
        model.config.num_hidden_layers,
        model.config.num_key_value_heads,
    );
    let zeros = vec![vec![0.0; heads]; layers];
    let mut scores = HeadScores {
        mass: zeros.clone(),
        copy: zeros,
    };
    for (done, prompt) in prompts.iter().enumerate() {
        add(model, prompt, prompts.len(), &mut scores)?;
        progress(done + 1);
    }
    Ok(scores)
}

/// Adds one prompt's share of the means.
fn add<D: Device>(
    model: &Decoder<D>,
    prompt: &Lookup,
    prompts: usize,
    scores: &mut HeadScores,
) -> Result<()> {
    let (device, rows) = (&model.device, prompt.tokens.len());
    let plan = Plan::new(&model.config, rows);
    let mut state = SequenceState::new(device, &plan)?;
    let angles = Angles::new(device, &model.config, &plan, rows)?;
    let mut slots = Slots::new(device, &plan, &angles, 1, rows)?;
    let mut step = Step::default();
    step.push(0, 0, 0, &prompt.tokens, End::Open);
    let mut placed = device.step(step.rows(&plan, slots.room))?;
    // The row before a token of the answer predicts it.
    let asking = prompt.answer.start - 1..prompt.answer.end - 1;
    let width = plan.q_width();
    let mut queries = Vec::with_capacity(model.config.num_hidden_layers);
    model.forward(
        &plan,
        &step,
        &mut placed,
        &mut [&mut state],
        &mut slots,
        |_, derived| {
            queries.push(device.read(&derived.q, asking.start * width..asking.end * width));
        },
    )?;
    for (l, queries) in queries.into_iter().enumerate() {
        let keys = device.read(&slots.layers[l].kv.k, 0..rows * plan.kv_width())?;
        let layer = Layer {
            queries: &queries?,
            keys: &keys,
            plan: &plan,
        };
        let group = plan.heads.q / plan.heads.kv;
        let share = 1.0 / (prompts * asking.len() * group) as f64;
        for (i, row) in asking.clone().enumerate() {
            for head in 0..plan.heads.q {
                let weights = layer.attention(i, row, head);
                let mass: f64 = weights[prompt.statement.clone()].iter().sum();
                let top = (0..=row).max_by(|a, b| weights[*a].total_cmp(&weights[*b]));
                let copied = top.is_some_and(|top| {
                    prompt.statement.contains(&top) && prompt.tokens[top] == prompt.tokens[row + 1]
                });
                scores.mass[l][head / group] += share * mass;
                scores.copy[l][head / group] += share * f64::from(u8::from(copied));
            }
        }
    }
    Ok(())
}

/// Rotated queries of the asking rows and rotated keys of all rows.
struct Layer<'a> {
    queries: &'a [f32],
    keys: &'a [f32],
    plan: &'a Plan,
}

impl Layer<'_> {
    /// Attention of one head from asking row `i`, which is row `row` of the prompt, to all rows before and itself;
    /// 0 behind it.
    fn attention(&self, i: usize, row: usize, head: usize) -> Vec<f64> {
        let (heads, kv_width) = (self.plan.heads, self.plan.kv_width());
        let query = &self.queries[i * self.plan.q_width() + head * heads.dim..][..heads.dim];
        let kv_head = head / (heads.q / heads.kv);
        let scale = (self.plan.scale).map_or((heads.dim as f64).sqrt().recip(), f64::from);
        let score = |key: &[f32]| {
            let key = &key[kv_head * heads.dim..][..heads.dim];
            let products = query
                .iter()
                .zip(key)
                .map(|(q, k)| f64::from(*q) * f64::from(*k));
            scale * products.sum::<f64>()
        };
        let mut weights: Vec<f64> = self
            .keys
            .chunks(kv_width)
            .take(row + 1)
            .map(score)
            .collect();
        let max = weights.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        weights.iter_mut().for_each(|w| *w = (*w - max).exp());
        let sum: f64 = weights.iter().sum();
        weights.iter_mut().for_each(|w| *w /= sum);
        weights.resize(self.keys.len() / kv_width, 0.0);
        weights
    }
}

/// The `count` heads with the highest scores, as (layer, KV head), best first; of equal scores the earlier head.
pub fn best(scores: &Scores, count: usize) -> Vec<(usize, usize)> {
    let mut heads: Vec<(usize, usize)> = scores
        .iter()
        .enumerate()
        .flat_map(|(l, heads)| (0..heads.len()).map(move |h| (l, h)))
        .collect();
    heads.sort_by(|a, b| scores[b.0][b.1].total_cmp(&scores[a.0][a.1]));
    heads.truncate(count);
    heads
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::reference::Reference;
    use crate::model::config::ModelConfig;
    use crate::model::parameters::{Role, index, specs};

    /// One layer whose KV head 1 looks for keys equal to the query's token; head 0 attends to all rows alike.
    fn model() -> Decoder<Reference> {
        let config = ModelConfig::from_json(serde_json::json!({
            "model_type": "llama", "vocab_size": 4, "hidden_size": 4, "intermediate_size": 2,
            "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4,
            "rms_norm_eps": 1e-6, "max_position_embeddings": 64, "tie_word_embeddings": true,
            // Angles so small that rotation does not matter.
            "rope_theta": 1e30,
        }))
        .unwrap();
        let one_hot = |i: usize, j: usize| f64::from(u8::from(i == j));
        let values = |i: usize, role: Role| -> Vec<f64> {
            match role {
                Role::Matrix { inner, .. } if i == index::EMBEDDING => (0..4 * inner)
                    .map(|e| one_hot(e / inner, e % inner))
                    .collect(),
                Role::Matrix { out, inner } if i == index::qkv(0) => {
                    // Rows: 4 query heads, 2 key heads, 2 value heads, of 4 elements each. The first pair of
                    // elements turns with the position, so the key is in the others.
                    let strength = |row: usize| match row / 4 {
                        2 | 3 => 30.0,
                        5 => 1.0,
                        _ => 0.0,
                    };
                    let element = |row: usize, c: usize| {
                        strength(row) * f64::from([0, 1, 0, -1][row % 4]) * TURN[c]
                    };
                    (0..out * inner)
                        .map(|e| element(e / inner, e % inner))
                        .collect()
                }
                role => vec![
                    match role {
                        Role::Matrix { .. } => 0.0,
                        _ => 1.0,
                    };
                    role.len()
                ],
            }
        };
        const TURN: [f64; 4] = [1.0, -1.0, 0.5, -0.5];
        let specs = specs(&config);
        Decoder::new(Reference, config, |i| Ok(values(i, specs[i].role)), false).unwrap()
    }

    #[test]
    fn the_head_that_reads_the_statement_is_found() {
        // Token 2 asks, and token 0 scores highest: the statement, which is also the answer.
        let prompt = Lookup {
            tokens: vec![1, 1, 0, 1, 1, 1, 1, 2, 0],
            statement: 2..3,
            answer: 8..9,
        };
        let scores = measure(&model(), &[prompt.clone(), prompt], |_| ()).unwrap();
        // Head 0: uniform over eight rows.
        assert!((scores.mass[0][0] - 1.0 / 8.0).abs() < 1e-9, "{scores:?}");
        assert!((scores.mass[0][1] - 1.0).abs() < 1e-3, "{scores:?}");
        assert_eq!(scores.copy, [[0.0, 1.0]]);
        assert_eq!(best(&scores.mass, 1), [(0, 1)]);
        assert_eq!(best(&scores.mass, 5), [(0, 1), (0, 0)]);
    }
}
