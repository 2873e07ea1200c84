//! The order of backward's cells: each adds to one tile of query gradients and one tile of key
//! gradients, and both sums must have a fixed order whatever the threads do.
//!
//! The keys of prior and current lie on one line, in tiles as long as the query tiles. The query tile
//! `t` walks along it from its diagonal to the left: step `p` is column `t - p`. It may begin when tile
//! `t - 1` has done `p` steps, the last of them in the same column. So a column is always added to by
//! ascending `t`, a query tile by descending column, and all walks can run side by side.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// What one head of one batch element has done so far.
pub(super) struct Walks {
    state: Mutex<State>,
    steps_before_diagonal: usize,
}

struct State {
    /// Steps done by each walk.
    done: Vec<usize>,
    /// Walks that wait for their neighbour.
    parked: Vec<bool>,
}

impl Walks {
    /// Walk `t` has `1 + t + prior_tiles` steps.
    pub(super) fn new(tiles: usize, prior_tiles: usize) -> Self {
        Walks {
            state: Mutex::new(State {
                done: vec![0; tiles],
                parked: vec![false; tiles],
            }),
            steps_before_diagonal: 1 + prior_tiles,
        }
    }

    /// Steps of a walk.
    pub(super) fn steps(&self, walk: usize) -> usize {
        walk + self.steps_before_diagonal
    }

    /// The walk's next step if it may begin now; otherwise the walk is parked until its neighbour
    /// [finishes](Self::finish) a step.
    pub(super) fn next(&self, walk: usize) -> Option<usize> {
        let mut state = self.lock();
        let step = state.done[walk];
        // The diagonal is the first to its column, and the leftmost walk has nobody before it.
        if step == 0 || walk == 0 || state.done[walk - 1] >= step {
            return Some(step);
        }
        state.parked[walk] = true;
        None
    }

    /// Marks a step as done; returns the walk that may go on again.
    pub(super) fn finish(&self, walk: usize) -> Option<usize> {
        let mut state = self.lock();
        state.done[walk] += 1;
        let next = walk + 1;
        let free = *state.parked.get(next)? && state.done[walk] >= state.done[next];
        if free {
            state.parked[next] = false;
        }
        free.then_some(next)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
