//! A resident block: its threads, warps, barriers and shared memory.

use crate::instructions::barrier::Barrier;
use crate::instructions::bulk::COPY_SLOTS;
use crate::instructions::mbarrier::Barriers;
use crate::instructions::registers::Registers;
use crate::instructions::warp::Warp;
use crate::machine::thread::Thread;
use crate::memory::global::Region;

/// A block that is running.
pub(crate) struct Block {
    /// Counts blocks over all launches, from 1.
    pub serial: u32,
    pub threads: Vec<Thread>,
    pub warps: Vec<Warp>,
    pub barriers: [Barrier; 16],
    pub shared: Region,
    pub unfinished: usize,
    pub mbarriers: Barriers,
    pub registers: Registers,
    pub copies_issued: u64,
}

impl Block {
    /// Threads and asynchronous agents: the entries of a clock.
    pub fn num_actors(&self) -> usize {
        actors(self.threads.len())
    }

    /// The warps of a block of `threads` threads, the last one perhaps not full.
    pub fn warps(threads: usize) -> Vec<Warp> {
        let lanes = |warp: usize| match threads - warp * 32 {
            left if left >= 32 => u32::MAX,
            left => (1 << left) - 1,
        };
        let warp = |index| Warp {
            meetings: Vec::new(),
            wgmma: Default::default(),
            lanes: lanes(index),
            live: lanes(index),
        };
        (0..threads.div_ceil(32)).map(warp).collect()
    }
}

/// Entries of a clock in a block of `threads` threads: those, the bulk copies, the tensor core of each warp.
pub(crate) fn actors(threads: usize) -> usize {
    threads + COPY_SLOTS + threads.div_ceil(32)
}
