//! Order of the cells of the backward pass. A cell adds to one tile of query gradients and one tile of key gradients.
//! Both sums have a fixed order, independent of the threads.
//!
//! The keys of prior and current form one axis, in tiles as long as the query tiles. Query tile `t` starts at its
//! diagonal and goes left: step `p` is column `t - p`. It may begin when tile `t - 1` has done `p` steps, of which the
//! last was in the same column. So a column is summed in ascending order of `t`, a query tile in descending order of
//! columns. The *walks* of all query tiles can run in parallel.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Progress of one head of one batch element.
pub(super) struct Walks {
    state: Mutex<State>,
    steps_before_diagonal: usize,
}

struct State {
    /// Number of steps done by each walk.
    done: Vec<usize>,
    /// Walks that wait for the walk before them.
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

    /// Number of steps of a walk.
    pub(super) fn steps(&self, walk: usize) -> usize {
        walk + self.steps_before_diagonal
    }

    /// The next step of the walk if it may begin now. Otherwise the walk is parked until the walk before it
    /// [finishes](Self::finish) a step.
    pub(super) fn next(&self, walk: usize) -> Option<usize> {
        let mut state = self.lock();
        let step = state.done[walk];
        // The diagonal is the first cell of its column, and no walk is before the leftmost one.
        if step == 0 || walk == 0 || state.done[walk - 1] >= step {
            return Some(step);
        }
        state.parked[walk] = true;
        None
    }

    /// Marks a step as done. Returns the walk that may continue, if any.
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
