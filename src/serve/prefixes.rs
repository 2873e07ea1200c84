//! States of sequences, kept by the tokens that were read: what a request begins with is read once.
//!
//! States of one text share the tokens of their pools. Those least recently used go when the budget is spent.

use std::collections::HashMap;
use std::sync::Arc;

use crate::model::segmentation::{Sequence, Tokens};
use crate::model::session_file::SavedSequence;

/// A state, and the tokens that lead to it.
#[derive(Debug)]
struct Entry {
    read: Tokens,
    state: Arc<SavedSequence>,
    used: u64,
}

/// States within a budget.
#[derive(Debug)]
pub(super) struct Prefixes {
    budget: usize,
    entries: Vec<Entry>,
    /// Blocks of memory by address: bytes, and how many states hold them.
    blocks: HashMap<usize, (usize, usize)>,
    bytes: usize,
    clock: u64,
}

/// A state that a prompt can begin from.
#[derive(Debug, Clone)]
pub(super) struct Hit {
    pub state: Arc<SavedSequence>,
    /// After so many tokens of the prompt.
    pub tokens: usize,
}

impl Prefixes {
    /// Without any state.
    pub fn new(budget: usize) -> Self {
        Self {
            budget,
            entries: Vec::new(),
            blocks: HashMap::new(),
            bytes: 0,
            clock: 0,
        }
    }

    /// Whether states are kept at all.
    pub fn enabled(&self) -> bool {
        self.budget > 0
    }

    /// Bytes and number of the states.
    pub fn size(&self) -> [usize; 2] {
        [self.bytes, self.entries.len()]
    }

    /// The state from which the least of a prompt is left to read. At least one token is, unless the state is that
    /// after the whole prompt.
    pub fn find(&mut self, prompt: Sequence<'_>) -> Option<Hit> {
        let usable = |entry: &Entry| {
            let common = common(&entry.read, prompt);
            let whole = entry.state.position();
            let tokens = match common == whole {
                true => common,
                // The logits are those after all of its tokens.
                false => common.min(prompt.tokens.len() - 1),
            };
            (tokens > 0 && tokens >= entry.state.least()).then_some(tokens)
        };
        let each = self.entries.iter_mut();
        let usable = each.filter_map(|entry| Some((usable(entry)?, entry)));
        let (tokens, entry) = usable.max_by_key(|(tokens, _)| *tokens)?;
        self.clock += 1;
        entry.used = self.clock;
        let state = entry.state.clone();
        Some(Hit { state, tokens })
    }

    /// The most tokens that a prompt shares with what led to a state.
    pub fn shared(&self, prompt: Sequence<'_>) -> usize {
        let each = self.entries.iter().map(|entry| common(&entry.read, prompt));
        each.max().unwrap_or(0)
    }

    /// Keeps a state. One that alone is larger than the budget is not kept.
    pub fn keep(&mut self, read: Tokens, state: Arc<SavedSequence>) {
        let alone: usize = state.blocks().map(|(_, bytes)| bytes).sum();
        if alone > self.budget {
            return;
        }
        if let Some(same) = self.entries.iter().position(|entry| entry.read == read) {
            self.remove(same);
        }
        for (address, bytes) in state.blocks() {
            let (_, holders) = self.blocks.entry(address).or_insert((bytes, 0));
            *holders += 1;
            if *holders == 1 {
                self.bytes += bytes;
            }
        }
        self.clock += 1;
        let used = self.clock;
        self.entries.push(Entry { read, state, used });
        while self.bytes > self.budget {
            let oldest = self.entries.iter().enumerate().min_by_key(|(_, e)| e.used);
            let Some((oldest, _)) = oldest else { return };
            self.remove(oldest);
        }
    }

    fn remove(&mut self, index: usize) {
        let entry = self.entries.swap_remove(index);
        for (address, bytes) in entry.state.blocks() {
            let Some((_, holders)) = self.blocks.get_mut(&address) else {
                continue;
            };
            *holders -= 1;
            if *holders == 0 {
                self.blocks.remove(&address);
                self.bytes -= bytes;
            }
        }
    }
}

/// Tokens that both begin with, up to the first place where only one of them has a break or a reread.
fn common(read: &Tokens, prompt: Sequence<'_>) -> usize {
    let pairs = read.ids.iter().zip(prompt.tokens);
    let tokens = pairs.take_while(|(a, b)| a == b).count();
    let both = [
        (&read.breaks[..], prompt.breaks),
        (&read.rereads, prompt.rereads),
    ];
    let alike = both.map(|(a, b)| alike(a, b));
    alike.into_iter().fold(tokens, usize::min)
}

/// Tokens before the first that has a position of only one of these behind it.
fn alike(a: &[usize], b: &[usize]) -> usize {
    let same = a.iter().zip(b).take_while(|(a, b)| a == b).count();
    let next = [a.get(same), b.get(same)].into_iter().flatten().min();
    next.map_or(usize::MAX, |position| position.saturating_sub(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_alike_up_to_a_break_that_only_one_has() {
        let read = |ids: &[u32], breaks: &[usize]| Tokens {
            ids: ids.to_vec(),
            breaks: breaks.to_vec(),
            rereads: Vec::new(),
        };
        let long = [1, 2, 3, 4, 5];
        for (entry, prompt, expected) in [
            (read(&long, &[]), read(&long, &[]), 5),
            (read(&[1, 2, 9], &[]), read(&long, &[]), 2),
            (read(&long, &[2]), read(&long, &[2]), 5),
            // After the second token one of them has ended a segment: only what is before it is the same.
            (read(&long, &[2]), read(&long, &[]), 1),
            (read(&long, &[]), read(&long, &[2, 4]), 1),
            (read(&long, &[2]), read(&long, &[2, 4]), 3),
            // A break behind what was read says nothing of it.
            (read(&long[..3], &[]), read(&long, &[4]), 3),
            (read(&long[..3], &[]), read(&long, &[3]), 2),
        ] {
            assert_eq!(
                common(&entry, (&prompt).into()),
                expected,
                "{entry:?} {prompt:?}"
            );
        }
    }
}
