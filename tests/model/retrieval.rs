//! Pools of past tokens and retrieval from them (docs/contract.md, section 2), on the CPU and in the f64 reference.

use std::collections::BTreeSet;
use std::ops::Range;

use crate::retrieval_cases::{
    GROUP, HEADS, Tokens, a_device_drops_what_the_reference_does,
    a_device_selects_what_the_reference_does, calls_together_are_calls_alone,
    keys_of_any_finite_size_give_a_selection, length::lowest, pool,
    pools_of_fewer_bits_select_by_what_they_hold, pools_round_to_their_bits, pools_take_any_runs,
    select, selections_do_not_depend_on_chunks_and_rings, what_cannot_be_dropped_is_refused,
    what_is_left_is_what_it_was,
};
use proptest::prelude::*;
use segattn::device::SelectionRule;
use segattn::device::cpu::Cpu;
use segattn::device::reference::Reference;

#[test]
fn a_pool_holds_the_same_tokens_however_it_was_filled() {
    pools_take_any_runs(&Reference);
    pools_take_any_runs(&Cpu);
}

#[test]
fn a_pool_of_fewer_bits_holds_multiples_of_a_step() {
    pools_round_to_their_bits(&Reference);
    pools_round_to_their_bits(&Cpu);
    pools_of_fewer_bits_select_by_what_they_hold(&Cpu);
}

#[test]
fn what_is_selected_does_not_depend_on_chunks_and_rings() {
    selections_do_not_depend_on_chunks_and_rings(&Reference);
    selections_do_not_depend_on_chunks_and_rings(&Cpu);
}

#[test]
fn the_cpu_selects_what_the_reference_does() {
    a_device_selects_what_the_reference_does(&Cpu, 0..30);
}

#[test]
fn keys_of_any_finite_size_give_a_selection_on_the_cpu() {
    keys_of_any_finite_size_give_a_selection(&Reference);
    keys_of_any_finite_size_give_a_selection(&Cpu);
}

#[test]
fn calls_for_several_pools_have_the_bits_of_one_call_each() {
    calls_together_are_calls_alone(&Reference);
    calls_together_are_calls_alone(&Cpu);
}

#[test]
fn the_cpu_drops_what_the_reference_does() {
    a_device_drops_what_the_reference_does(&Reference, 0..2);
    a_device_drops_what_the_reference_does(&Cpu, 0..20);
}

#[test]
fn what_is_left_of_a_pool_is_what_it_was() {
    what_is_left_is_what_it_was(&Reference);
    what_is_left_is_what_it_was(&Cpu);
}

#[test]
fn what_a_pool_cannot_drop_is_refused() {
    what_cannot_be_dropped_is_refused(&Reference);
    what_cannot_be_dropped_is_refused(&Cpu);
}

fn product(q: &[f32], k: &[f32]) -> f64 {
    let terms = q.iter().zip(k);
    terms.map(|(q, k)| f64::from(*q) * f64::from(*k)).sum()
}

/// The largest share of each eligible token, of all probes of a head.
fn shares(tokens: &Tokens, head: usize, eligible: &Range<usize>) -> Vec<f64> {
    let mut best = vec![0f64; eligible.len()];
    for q_head in HEADS[head] * GROUP..(HEADS[head] + 1) * GROUP {
        for t in 0..tokens.queries {
            let weight = |token| {
                let s = product(tokens.query(t, q_head), tokens.key(token, HEADS[head]));
                (s / (tokens.dim as f64).sqrt()).exp()
            };
            let weights: Vec<f64> = eligible.clone().map(weight).collect();
            let sum: f64 = weights.iter().sum();
            let shares = weights.iter().map(|w| w / sum);
            best.iter_mut()
                .zip(shares)
                .for_each(|(best, s)| *best = best.max(s));
        }
    }
    best
}

/// The second rule, told token by token: a token is in the window of the best one if it is among the `width` around it
/// and no token between them is in another window.
fn windows(
    scores: &[f64],
    rows: usize,
    [window_len, window_before]: [usize; 2],
) -> BTreeSet<usize> {
    let (len, mut taken) = (scores.len(), BTreeSet::new());
    let rows = rows.min(len);
    while taken.len() < rows {
        let mut best = None;
        for token in (0..len).filter(|t| !taken.contains(t)) {
            if best.is_none_or(|best: usize| scores[token] > scores[best]) {
                best = Some(token);
            }
        }
        let best = best.expect("a token that is left");
        let width = window_len.min(rows - taken.len());
        let mut begin = best as isize - (width * window_before / window_len) as isize;
        while begin + (width as isize) > len as isize {
            begin -= 1;
        }
        while begin < 0 {
            begin += 1;
        }
        let begin = begin as usize;
        let free = |token: &usize| {
            let (low, high) = (best.min(*token), best.max(*token));
            (low..=high).all(|between| !taken.contains(&between))
        };
        let window: Vec<usize> = (begin..begin + width).filter(free).collect();
        taken.extend(window);
    }
    taken
}

/// What is dropped by the second rule, told token by token: a token stays for the best one that would have it in its
/// window.
fn dropped_tokens(
    shares: &[f64],
    rows: usize,
    [window_len, window_before]: [usize; 2],
) -> Vec<usize> {
    let mut stays_for = vec![0f64; shares.len()];
    for (best, share) in shares.iter().enumerate() {
        for place in 0..window_len {
            let token = (best + place).checked_sub(window_before);
            if let Some(stays) = token.and_then(|token| stays_for.get_mut(token)) {
                *stays = stays.max(*share);
            }
        }
    }
    lowest_of(&stays_for, rows)
}

/// The indices of the lowest scores, one after the other, ascending.
fn lowest_of(scores: &[f64], count: usize) -> Vec<usize> {
    let mut left: Vec<usize> = (0..scores.len()).collect();
    let mut lowest = BTreeSet::new();
    for _ in 0..count {
        let mut at = 0;
        for i in 0..left.len() {
            if scores[left[i]] < scores[left[at]] {
                at = i;
            }
        }
        lowest.insert(left.remove(at));
    }
    lowest.into_iter().collect()
}

/// The scores of blocks `blocks` of a head by the first rule, with one query a probe.
fn block_scores(tokens: &Tokens, head: usize, blocks: Range<usize>, block_len: usize) -> Vec<f64> {
    let score = |block: usize| {
        let mut best = f64::NEG_INFINITY;
        for token in block * block_len..(block + 1) * block_len {
            for q_head in HEADS[head] * GROUP..(HEADS[head] + 1) * GROUP {
                for t in 0..tokens.queries {
                    let query = tokens.query(t, q_head);
                    best = best.max(product(query, tokens.key(token, HEADS[head])));
                }
            }
        }
        best
    };
    blocks.map(score).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn the_reference_follows_the_second_rule(
        (count, queries, period) in (1usize..70, 1usize..5, 1usize..40),
        (low, tail, rows) in (0usize..20, 0usize..20, 0usize..50),
        (window_len, before) in (1usize..60, 0.0..1.0f64),
        seed in any::<u64>(),
    ) {
        let tokens = Tokens::new(8, count, queries, seed >> 8).repeated(period);
        let pool = pool(&Reference, &tokens, 1, &[count]);
        let low = low.min(count);
        let eligible = [0..count.saturating_sub(tail), low..count];
        let window_before = (before * window_len as f64) as usize;
        let rule = (rows, SelectionRule::Windows { window_len, window_before });
        let got = select(&Reference, &pool, &tokens, (2, 1), &eligible, rule);
        for (head, eligible) in eligible.iter().enumerate() {
            let expected = windows(&shares(&tokens, head, eligible), rows, [window_len, window_before]);
            let expected: Vec<usize> = expected.iter().map(|t| eligible.start + t).collect();
            prop_assert_eq!(&got[head], &expected);
        }
    }

    #[test]
    fn the_reference_drops_by_the_second_rule(
        (count, queries, period) in (1usize..70, 1usize..5, 1usize..40),
        (low, tail, share) in (0usize..20, 0usize..20, 0.0..=1.0f64),
        (window_len, before) in (1usize..60, 0.0..1.0f64),
        seed in any::<u64>(),
    ) {
        let tokens = Tokens::new(8, count, queries, seed >> 8).repeated(period);
        let pool = pool(&Reference, &tokens, 1, &[count]);
        let eligible = [0..count.saturating_sub(tail), low.min(count)..count];
        let most = eligible.iter().map(Range::len).min().unwrap_or(0);
        let rows = (share * most as f64) as usize;
        let window_before = (before * window_len as f64) as usize;
        let rule = (rows, SelectionRule::Windows { window_len, window_before });
        let got = lowest(&Reference, &pool, &tokens, (2, 1), &eligible, rule);
        for (head, eligible) in eligible.iter().enumerate() {
            let shares = shares(&tokens, head, eligible);
            let expected = dropped_tokens(&shares, rows, [window_len, window_before]);
            let expected: Vec<usize> = expected.iter().map(|t| eligible.start + t).collect();
            prop_assert_eq!(&got[head], &expected);
        }
    }

    #[test]
    fn the_reference_drops_by_the_first_rule(
        (count, queries, period) in (1usize..70, 1usize..5, 1usize..40),
        (low, tail, share) in (0usize..20, 0usize..20, 0.0..=1.0f64),
        block_len in 1usize..9,
        seed in any::<u64>(),
    ) {
        let tokens = Tokens::new(8, count, queries, seed >> 8).repeated(period);
        let pool = pool(&Reference, &tokens, 1, &[count]);
        let eligible = [0..count.saturating_sub(tail), low.min(count)..count];
        let blocks = eligible.clone().map(|range| {
            let first = range.start.div_ceil(block_len);
            first..(range.end / block_len).max(first)
        });
        let most = blocks.iter().map(Range::len).min().unwrap_or(0);
        let count = (share * most as f64) as usize;
        let rule = SelectionRule::Blocks { block_len, probe_window: 1, probe_stride: 1 };
        let rule = (count * block_len, rule);
        let got = lowest(&Reference, &pool, &tokens, (2, 1), &eligible, rule);
        for (head, blocks) in blocks.into_iter().enumerate() {
            let scores = block_scores(&tokens, head, blocks.clone(), block_len);
            let expected = lowest_of(&scores, count).into_iter().flat_map(|block| {
                let first = (blocks.start + block) * block_len;
                first..first + block_len
            });
            prop_assert_eq!(&got[head], &expected.collect::<Vec<_>>());
        }
    }
}
