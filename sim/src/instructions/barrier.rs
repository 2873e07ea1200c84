//! The block's sixteen hardware barriers.

use super::context::Context;
use crate::checks::clock::Clock;
use crate::checks::report::Kind;
use crate::checks::symbols::Site;

/// The barriers of a block.
#[derive(Default)]
pub(crate) struct Barriers([Barrier; 16]);

/// One barrier: who has arrived in the current round.
#[derive(Default)]
struct Barrier {
    /// Threads expected in this round; 0 before the first arrival.
    expected: u32,
    arrived: u32,
    waiting: Vec<u16>,
    /// What the threads that arrived knew.
    joined: Option<Clock>,
    /// The first to arrive.
    first: Option<(u16, Site)>,
}

/// The barrier that threads arrive at, for how many threads, and whether they wait there.
#[derive(Clone, Copy)]
pub(crate) struct Arrival {
    pub id: u32,
    pub count: u32,
    pub wait: bool,
}

impl Barriers {
    /// A warp's threads arrive at a barrier, and wait there or not.
    pub fn arrive(&mut self, cx: &mut Context, at: Arrival, threads: &[u16], site: Site) {
        let Arrival { id, count, wait } = at;
        let bad = id > 15 || !count.is_multiple_of(32) && id != 0 || count == 0;
        if bad {
            let place = format!("barrier {id} for {count} threads");
            return cx.report_by(Kind::Operand, threads[0], "used a barrier", site, place);
        }
        let checks = cx.checker.enabled();
        let barrier = &mut self.0[id as usize];
        let first = *barrier.first.get_or_insert((threads[0], site));
        let expected_before = std::mem::replace(&mut barrier.expected, count);
        barrier.arrived += threads.len() as u32;
        for &thread in threads {
            let clock = &mut cx.clocks[thread as usize].now;
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
            cx.report_by(Kind::Divergence, threads[0], "arrived", site, place);
        }
        if id == 0 && checks && first.1 != site {
            cx.report_divergence("__syncthreads", (threads[0], site), first);
        }
        if arrived > count {
            let place = format!("barrier {id} of {count} threads, as number {arrived}");
            cx.report_by(Kind::Divergence, threads[0], "arrived", site, place);
        }
        if arrived >= count {
            self.release(cx, id as usize);
        }
    }

    fn release(&mut self, cx: &mut Context, id: usize) {
        cx.stats.barriers += 1;
        let barrier = std::mem::take(&mut self.0[id]);
        for &thread in &barrier.waiting {
            if let Some(joined) = &barrier.joined {
                let clock = &mut cx.clocks[thread as usize].now;
                clock.clone_from(joined);
                clock.local[thread as usize] += 1;
            }
            cx.wake(thread);
        }
    }

    /// A thread that waits and one of `threads` that does not, of every barrier with arrivals.
    pub fn stuck(&self, threads: usize) -> impl Iterator<Item = (u16, Option<u16>)> {
        self.0.iter().filter_map(move |barrier| {
            let missing = (0..threads as u16).find(|thread| !barrier.waiting.contains(thread));
            barrier.waiting.first().map(|&waiting| (waiting, missing))
        })
    }
}
