//! How much of what a question asks for retrieval has selected, head by head.

use std::ops::Range;

use crate::model::session::SelectedTokens;
use serde::{Deserialize, Serialize};

/// Share of the needles' tokens that one head has selected.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HeadRecall {
    /// The layer.
    pub layer: usize,
    /// The KV head.
    pub kv_head: usize,
    /// Share of the needles' tokens that were eligible, 0 to 1. Of several samples the mean.
    pub share: f64,
    /// Samples in which some of these tokens were eligible.
    pub samples: usize,
}

/// The recall of every head that could select a part of the needles, which are ranges of the prompt's tokens.
pub(super) fn recall(selected: &[SelectedTokens], needles: &[Range<usize>]) -> Vec<HeadRecall> {
    let of_head = |head: &SelectedTokens| {
        let wanted = needles.iter().cloned().flatten();
        let wanted: Vec<usize> = wanted.filter(|t| head.eligible.contains(t)).collect();
        let found = wanted
            .iter()
            .filter(|t| head.tokens.binary_search(t).is_ok())
            .count();
        (!wanted.is_empty()).then(|| HeadRecall {
            layer: head.layer,
            kv_head: head.kv_head,
            share: found as f64 / wanted.len() as f64,
            samples: 1,
        })
    };
    selected.iter().filter_map(of_head).collect()
}

/// Means over samples, by layer and head.
pub(super) fn mean(samples: &[&[HeadRecall]]) -> Vec<HeadRecall> {
    let mut sums: Vec<HeadRecall> = Vec::new();
    for one in samples.iter().copied().flatten() {
        let key = |h: &HeadRecall| (h.layer, h.kv_head);
        match sums.binary_search_by_key(&key(one), key) {
            Ok(i) => {
                sums[i].share += one.share;
                sums[i].samples += 1;
            }
            Err(i) => sums.insert(i, *one),
        }
    }
    sums.iter_mut().for_each(|h| h.share /= h.samples as f64);
    sums
}

/// Which past rows an oracle gives to the heads after a prompt's break. It gives only what is eligible there. With the
/// statements asked for it shows what a model would find if retrieval never missed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Oracle {
    /// The statements asked for alone: what is missing then, the model cannot read.
    Alone,
    /// They, and what the head has selected, less the last of it where it has no room: what is missing then, the model
    /// cannot tell from the rest.
    Added,
    /// What the head selects once the prompt is read to its end: the suffix (`segment.prompt_suffix_len`) is read with
    /// the rows that its own queries ask for.
    Prompt,
}

impl Oracle {
    /// Tokens for a head that has selected `own` at the break and `at_end` at the prompt's end.
    pub(super) fn tokens(
        self,
        needles: &[Range<usize>],
        own: &SelectedTokens,
        at_end: &[usize],
        [block_len, past_len]: [usize; 2],
    ) -> Vec<usize> {
        if self == Self::Prompt {
            let tokens = at_end.iter().copied();
            return tokens
                .filter(|t| is_whole(t / block_len, &own.eligible, block_len))
                .collect();
        }
        let mut tokens = needle_blocks(needles, &own.eligible, [block_len, past_len]);
        if self == Self::Added {
            let room = past_len / block_len * block_len - tokens.len();
            let others = own.tokens.iter().filter(|t| !tokens.contains(t));
            let others: Vec<usize> = others.copied().take(room).collect();
            tokens.extend(others);
            tokens.sort_unstable();
        }
        tokens
    }
}

/// Whether all tokens of a block are eligible.
fn is_whole(block: usize, eligible: &Range<usize>, block_len: usize) -> bool {
    eligible.start <= block * block_len && (block + 1) * block_len <= eligible.end
}

/// The needles, widened to whole blocks of `block_len`, as many as are eligible and fit into `past_len` rows.
fn needle_blocks(
    needles: &[Range<usize>],
    eligible: &Range<usize>,
    [block_len, past_len]: [usize; 2],
) -> Vec<usize> {
    let blocks = |r: &Range<usize>| r.start / block_len..r.end.div_ceil(block_len);
    let mut blocks: Vec<usize> = needles
        .iter()
        .flat_map(blocks)
        .filter(|b| is_whole(*b, eligible, block_len))
        .collect();
    blocks.sort_unstable();
    blocks.dedup();
    blocks.truncate(past_len / block_len);
    let tokens = |b: usize| b * block_len..(b + 1) * block_len;
    blocks.into_iter().flat_map(tokens).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(kv_head: usize, tokens: &[usize], eligible: Range<usize>) -> SelectedTokens {
        SelectedTokens {
            layer: 1,
            kv_head,
            tokens: tokens.to_vec(),
            eligible,
        }
    }

    #[test]
    fn the_share_counts_eligible_tokens_of_the_needles() {
        let selected = [
            head(0, &[3, 4, 9], 0..10),
            head(1, &[1], 0..5),
            head(2, &[1], 0..4),
        ];
        let recall = recall(&selected, &[4..6, 9..12]);
        let shares: Vec<(usize, f64)> = recall.iter().map(|h| (h.kv_head, h.share)).collect();
        // Of tokens 4, 5 and 9 two; of token 4 none; head 2 can select none of them.
        assert_eq!(shares, [(0, 2.0 / 3.0), (1, 0.0)]);
        let other = [HeadRecall {
            share: 1.0,
            ..recall[1]
        }];
        let means = mean(&[&recall, &other]);
        assert_eq!(means[1].share, 0.5);
        assert_eq!((means[0].samples, means[1].samples), (1, 2));
    }

    #[test]
    fn needles_are_widened_to_whole_eligible_blocks() {
        assert_eq!(
            needle_blocks(&[5..7, 13..15], &(0..16), [4, 16]),
            [4, 5, 6, 7, 12, 13, 14, 15]
        );
        assert_eq!(
            needle_blocks(&[5..7, 13..15], &(0..15), [4, 16]),
            [4, 5, 6, 7]
        );
        assert_eq!(
            needle_blocks(&[5..7, 13..15], &(0..16), [4, 4]),
            [4, 5, 6, 7]
        );
        assert_eq!(needle_blocks(&[5..7, 5..8], &(6..16), [1, 16]), [6, 7]);
    }

    #[test]
    fn an_oracle_adds_the_needles_to_what_a_head_has_selected() {
        let own = head(0, &[2, 3, 6, 7, 12, 13], 0..16);
        let tokens = |oracle: Oracle, sizes| oracle.tokens(&[6..7, 9..10], &own, &[], sizes);
        assert_eq!(tokens(Oracle::Alone, [2, 9]), [6, 7, 8, 9]);
        assert_eq!(tokens(Oracle::Added, [2, 9]), [2, 3, 6, 7, 8, 9, 12, 13]);
        assert_eq!(tokens(Oracle::Added, [2, 7]), [2, 3, 6, 7, 8, 9]);
        assert_eq!(tokens(Oracle::Added, [2, 4]), [6, 7, 8, 9]);
    }

    #[test]
    fn an_oracle_takes_over_what_the_prompts_end_selects_as_far_as_it_is_eligible_in_whole_blocks()
    {
        let own = head(0, &[2, 3, 6, 7], 2..11);
        let at_end = [0, 1, 4, 5, 10, 11, 20, 21];
        let tokens =
            |block_len| Oracle::Prompt.tokens(&[6..7, 9..10], &own, &at_end, [block_len, 8]);
        assert_eq!(tokens(2), [4, 5]);
        assert_eq!(tokens(1), [4, 5, 10]);
    }
}
