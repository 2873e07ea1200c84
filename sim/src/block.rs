//! A resident block: its threads, warps, barriers and shared memory.

use crate::barrier::Barrier;
use crate::memory::Region;
use crate::thread::Thread;
use crate::warp::Warp;

/// A block that is running.
pub(crate) struct Block {
    /// Counts blocks over all launches, from 1.
    pub serial: u32,
    pub threads: Vec<Thread>,
    pub warps: Vec<Warp>,
    pub barriers: [Barrier; 16],
    pub shared: Region,
    pub unfinished: usize,
}

impl Block {
    /// The warps of a block of `threads` threads, the last one perhaps not full.
    pub fn warps(threads: usize) -> Vec<Warp> {
        let lanes = |warp: usize| match threads - warp * 32 {
            left if left >= 32 => u32::MAX,
            left => (1 << left) - 1,
        };
        let warp = |index| Warp {
            meetings: Vec::new(),
            lanes: lanes(index),
            live: lanes(index),
        };
        (0..threads.div_ceil(32)).map(warp).collect()
    }
}
