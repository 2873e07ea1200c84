//! Which thread runs next: a random one of those that are ready, by a seed.

use super::rng::Rng;

/// A thread of a resident block.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct ThreadRef {
    /// The place of the block among those that are resident.
    pub slot: u16,
    pub thread: u16,
}

/// The threads that are ready, and the random numbers that choose among them.
pub(crate) struct Scheduler {
    rng: Rng,
    /// Prefer threads that became ready last, so that warps stay together: another family of schedules.
    sticky: bool,
    ready: Vec<ThreadRef>,
    /// Turns of spinning threads since the last progress.
    spins: u64,
}

impl Scheduler {
    /// Nobody is ready yet.
    pub fn new(seed: u64) -> Scheduler {
        let mut rng = Rng::new(seed);
        let sticky = rng.below(2) == 0;
        Scheduler {
            rng,
            sticky,
            ready: Vec::new(),
            spins: 0,
        }
    }

    /// Makes a thread ready.
    pub fn wake(&mut self, thread: ThreadRef) {
        self.progress();
        self.ready.push(thread);
    }

    /// A thread that spins stays ready but lets others go first.
    pub fn step_back(&mut self, thread: ThreadRef) {
        self.spins += 1;
        self.ready.push(thread);
    }

    /// Something happened that threads can have waited for.
    pub fn progress(&mut self) {
        self.spins = 0;
    }

    /// Turns of spinning threads since the last progress.
    pub fn spins(&self) -> u64 {
        self.spins
    }

    /// Whether no thread is ready.
    pub fn is_idle(&self) -> bool {
        self.ready.is_empty()
    }

    /// Takes one of the ready threads.
    pub fn pick(&mut self) -> Option<ThreadRef> {
        let count = self.ready.len();
        if count == 0 {
            return None;
        }
        let window = if self.sticky && !self.one_in(16) {
            count.min(32)
        } else {
            count
        };
        let index = count - 1 - self.rng.below(window);
        Some(self.ready.swap_remove(index))
    }

    /// True once in so many times, at random.
    pub fn one_in(&mut self, times: usize) -> bool {
        self.below(times) == 0
    }

    /// A random number below `n`, which is not 0.
    pub fn below(&mut self, n: usize) -> usize {
        self.rng.below(n)
    }
}
