//! The block's sixteen hardware barriers.

use crate::checks::clock::Clock;
use crate::checks::report::{Kind, Site};
use crate::machine::launch::Launch;

/// One barrier: who has arrived in the current round.
#[derive(Default)]
pub(crate) struct Barrier {
    /// Threads expected in this round; 0 before the first arrival.
    pub expected: u32,
    pub arrived: u32,
    pub waiting: Vec<u16>,
    /// What the threads that arrived knew.
    joined: Option<Clock>,
    /// The first to arrive.
    pub first: Option<(u16, Site)>,
}

impl Launch {
    /// A warp's threads arrive at a barrier, and wait there or not.
    pub fn arrive_at_barrier(
        &mut self,
        id: u32,
        count: u32,
        wait: bool,
        threads: &[u16],
        site: Site,
    ) {
        let bad = id > 15 || !count.is_multiple_of(32) && id != 0 || count == 0;
        if bad {
            let place = format!("barrier {id} for {count} threads");
            return self.report_by(Kind::Operand, threads[0], "used a barrier", site, place);
        }
        let checks = self.checks;
        let block = self.block_mut();
        let barrier = &mut block.barriers[id as usize];
        let first = *barrier.first.get_or_insert((threads[0], site));
        let expected_before = std::mem::replace(&mut barrier.expected, count);
        barrier.arrived += threads.len() as u32;
        for &thread in threads {
            let clock = &mut block.threads[thread as usize].clock;
            if checks {
                match &mut barrier.joined {
                    Some(joined) => joined.join(clock),
                    None => barrier.joined = Some(clock.clone()),
                }
            }
            if wait {
                barrier.waiting.push(thread);
            } else {
                clock.local[thread as usize] += 1;
            }
        }
        let arrived = barrier.arrived;
        if expected_before != 0 && expected_before != count {
            let place =
                format!("barrier {id} for {count} threads, where others expect {expected_before}");
            self.report_by(Kind::Divergence, threads[0], "arrived", site, place);
        }
        if id == 0 && checks && first.1 != site {
            self.report_divergence("__syncthreads", (threads[0], site), first);
        }
        if arrived > count {
            let place = format!("barrier {id} of {count} threads, as number {arrived}");
            self.report_by(Kind::Divergence, threads[0], "arrived", site, place);
        }
        if arrived >= count {
            self.release_barrier(id as usize);
        }
    }

    fn release_barrier(&mut self, id: usize) {
        self.stats.barriers += 1;
        let block = self.block_mut();
        let barrier = std::mem::take(&mut block.barriers[id]);
        for &thread in &barrier.waiting {
            if let Some(joined) = &barrier.joined {
                let clock = &mut block.threads[thread as usize].clock;
                clock.clone_from(joined);
                clock.local[thread as usize] += 1;
            }
        }
        barrier.waiting.iter().for_each(|&thread| self.wake(thread));
    }
}
