//! Cache of freed buffers, reused by later buffers of about the same size.
//!
//! Cached memory plus memory in use never exceeds the peak of memory in use, so the cache does not raise the peak.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytemuck::{Pod, Zeroable};

/// Two cache lines, one row of a panel: gives the allocation its alignment.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(128))]
pub(super) struct Line([f32; 32]);

/// Lines below which the allocator is fast enough (16 KiB).
const SMALL: usize = 128;

static IDLE: Mutex<Idle> = Mutex::new(Idle::new());

/// Returns the cached memory of the CPU device to the allocator.
pub fn release_memory() {
    let released = lock().release();
    drop(released);
}

/// Cached memory of at least this many lines, contents arbitrary. `None` if there is none: the caller then allocates,
/// and calls [`allocated`] or [`failed`].
pub(super) fn take(lines: usize) -> Option<Vec<Line>> {
    if lines < SMALL {
        return None;
    }
    // Memory returns to the allocator after the lock is released.
    let (found, _released) = lock().take(lines);
    found
}

/// The caller of a [`take`] has allocated the lines itself.
pub(super) fn allocated(lines: usize) {
    if lines >= SMALL {
        lock().allocated(lines);
    }
}

/// The caller of a [`take`] could not allocate the lines.
pub(super) fn failed(lines: usize) {
    if lines >= SMALL {
        lock().pending -= lines;
    }
}

/// Puts freed memory into the cache.
pub(super) fn give(lines: Vec<Line>) {
    if lines.len() >= SMALL {
        lock().give(lines);
    }
}

fn lock() -> MutexGuard<'static, Idle> {
    IDLE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Counts are of lines.
struct Idle {
    /// By their number of lines.
    kept: BTreeMap<usize, Vec<Vec<Line>>>,
    kept_lines: usize,
    used: usize,
    /// Being allocated: not in use before that has succeeded.
    pending: usize,
    most_used: usize,
}

impl Idle {
    const fn new() -> Self {
        Idle {
            kept: BTreeMap::new(),
            kept_lines: 0,
            used: 0,
            pending: 0,
            most_used: 0,
        }
    }

    /// The closest fit that wastes at most an eighth, and the buffers to release.
    fn take(&mut self, lines: usize) -> (Option<Vec<Line>>, Vec<Vec<Line>>) {
        let fit = self.kept.range(lines..=lines + lines / 8).next();
        let found = fit.map(|(size, _)| *size).map(|size| self.remove(size));
        match &found {
            Some(found) => self.used += found.len(),
            None => self.pending += lines,
        }
        let soon = self.used + self.pending;
        let most = self.most_used.max(soon);
        let mut released = Vec::new();
        while self.kept_lines + soon > most {
            let (&largest, _) = self.kept.last_key_value().expect("lines are kept");
            released.push(self.remove(largest));
        }
        (found, released)
    }

    fn allocated(&mut self, lines: usize) {
        self.pending -= lines;
        self.used += lines;
        self.most_used = self.most_used.max(self.used);
    }

    fn give(&mut self, lines: Vec<Line>) {
        self.used -= lines.len();
        self.kept_lines += lines.len();
        self.kept.entry(lines.len()).or_default().push(lines);
    }

    /// A cached buffer of this size, of which there is at least one.
    fn remove(&mut self, size: usize) -> Vec<Line> {
        let same = self.kept.get_mut(&size).expect("a size that is kept");
        let lines = same.pop().expect("no empty lists are kept");
        if same.is_empty() {
            self.kept.remove(&size);
        }
        self.kept_lines -= size;
        lines
    }

    fn release(&mut self) -> BTreeMap<usize, Vec<Vec<Line>>> {
        self.kept_lines = 0;
        self.most_used = self.used;
        std::mem::take(&mut self.kept)
    }
}

#[cfg(test)]
mod tests {
    use bytemuck::Zeroable;

    use super::*;

    /// A buffer of `size` lines from `idle` or new, and its address.
    fn buffer(idle: &mut Idle, size: usize) -> Vec<Line> {
        let (found, _) = idle.take(size);
        found.unwrap_or_else(|| {
            idle.allocated(size);
            vec![Line::zeroed(); size]
        })
    }

    #[test]
    fn freed_memory_serves_the_next_buffer_of_about_its_size() {
        let mut idle = Idle::new();
        let first = buffer(&mut idle, 1000);
        let at = first.as_ptr();
        idle.give(first);
        let again = buffer(&mut idle, 950);
        assert!(again.as_ptr() == at && again.len() == 1000);
        assert_eq!([idle.used, idle.kept_lines], [1000, 0]);
        idle.give(again);
        assert!(idle.take(800).0.is_none(), "wastes more than an eighth");
    }

    #[test]
    fn an_allocation_that_fails_does_not_raise_what_may_be_kept() {
        let mut idle = Idle::new();
        let first = buffer(&mut idle, 1000);
        idle.give(first);
        assert!(idle.take(5000).0.is_none());
        idle.pending -= 5000;
        assert_eq!([idle.used, idle.most_used], [0, 1000]);
        let many: Vec<_> = (0..5).map(|_| buffer(&mut idle, 200)).collect();
        many.into_iter().for_each(|lines| idle.give(lines));
        assert_eq!([idle.kept_lines, idle.most_used], [1000, 1000]);
    }

    #[test]
    fn kept_and_used_memory_never_exceed_the_most_that_was_used() {
        let mut idle = Idle::new();
        let mut most = 0;
        for round in 1..50 {
            let alive: Vec<_> = (1..=round % 7 + 1)
                .map(|i| buffer(&mut idle, 128 + 37 * i * (round % 5)))
                .collect();
            most = most.max(alive.iter().map(Vec::len).sum());
            assert!(idle.used + idle.kept_lines <= most, "round {round}");
            alive.into_iter().for_each(|lines| idle.give(lines));
            assert!(idle.kept_lines <= most && idle.used == 0);
        }
        idle.release();
        assert_eq!([idle.kept_lines, idle.most_used], [0, 0]);
    }
}
