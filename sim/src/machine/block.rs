//! A resident block: its threads, its shared memory, and what its instructions keep.

use super::thread::Thread;
use crate::checks::actors::Actors;
use crate::checks::happens_before::ThreadClocks;
use crate::instructions::units::Units;
use crate::memory::region::Region;

/// A block that is running.
pub(crate) struct Block {
    /// Counts blocks over all launches, from 1.
    pub serial: u32,
    pub actors: Actors,
    pub threads: Vec<Thread>,
    /// By thread.
    pub clocks: Vec<ThreadClocks>,
    pub units: Units,
    pub shared: Region,
    pub unfinished: usize,
}

impl Block {
    /// A block of threads that have not begun.
    pub fn new(serial: u32, threads: Vec<Thread>, shared: Region) -> Block {
        let count = threads.len();
        let actors = Actors::new(count);
        let clocks = (0..count).map(|id| ThreadClocks::new(actors.count(), id));
        Block {
            serial,
            actors,
            clocks: clocks.collect(),
            units: Units::new(count),
            threads,
            shared,
            unfinished: count,
        }
    }
}
