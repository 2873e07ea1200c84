//! mbarriers: phases that complete when every expected arrival and every expected byte has come.

use std::collections::HashMap;

use crate::checks::clock::Clock;
use crate::checks::report::{Kind, Site};
use crate::checks::shadow::{BARRIER, INITIALIZED};
use crate::instructions::access::{Access, Mode};
use crate::machine::launch::Launch;
use crate::machine::thread::Wait;

/// The mbarriers of a block, by address.
pub(crate) type Barriers = HashMap<usize, Mbarrier>;

/// One mbarrier object.
pub(crate) struct Mbarrier {
    count: u32,
    pending: u32,
    /// Bytes expected and not yet arrived; negative where they came before they were announced.
    bytes: i64,
    phase: u32,
    /// What those knew that arrived in the current phase, and in all completed ones.
    arriving: Clock,
    released: Clock,
    waiting: Vec<u16>,
    /// Thread and clock of the initialisation, and whether fence.mbarrier_init followed it.
    owner: (u16, u32),
    fenced: bool,
    site: Site,
}

/// One arrival: of threads, or announced bytes, or both.
#[derive(Clone, Copy, Default)]
pub(crate) struct Arrival {
    pub count: u32,
    pub expected_bytes: u32,
}

impl Launch {
    /// mbarrier.init.
    pub fn mbarrier_init(&mut self, address: usize, count: u32, site: Site) {
        if !self.is_shared(address) || count == 0 {
            let place = format!("count {count}, {}", self.describe(address));
            return self.report(Kind::Operand, "initialised an mbarrier", site, place);
        }
        let flags = BARRIER | INITIALIZED;
        let access = Access {
            flags,
            ..Access::new(address, 8, Mode::Write, "initialised an mbarrier")
        };
        if !self.access(access, site) {
            return;
        }
        let id = self.current.thread;
        let actors = self.block().num_actors();
        let clock = self.thread_mut().clock.local[id as usize];
        let barrier = Mbarrier {
            count,
            pending: count,
            bytes: 0,
            phase: 0,
            arriving: Clock::new(actors),
            released: Clock::new(actors),
            waiting: Vec::new(),
            owner: (id, clock),
            fenced: false,
            site,
        };
        self.block_mut().mbarriers.insert(address, barrier);
    }

    /// mbarrier.inval: the memory may be used for other things.
    pub fn mbarrier_invalidate(&mut self, address: usize, site: Site) {
        if self.usable(address, "invalidated", site) {
            self.block_mut().mbarriers.remove(&address);
            let flags = BARRIER | INITIALIZED;
            self.access(
                Access {
                    flags,
                    ..Access::new(address, 8, Mode::Write, "invalidated an mbarrier")
                },
                site,
            );
            self.block_mut()
                .shared
                .cells(address, 8)
                .iter_mut()
                .for_each(|cell| cell.write.flags = 0);
        }
    }

    /// fence.mbarrier_init by the running thread.
    pub fn fence_mbarrier_init(&mut self) {
        let id = self.current.thread;
        let own = self
            .block_mut()
            .mbarriers
            .values_mut()
            .filter(|barrier| barrier.owner.0 == id);
        own.for_each(|barrier| barrier.fenced = true);
    }

    /// Whether the running thread may use the barrier: it was initialised, and that is known to the thread.
    fn usable(&mut self, address: usize, action: &str, site: Site) -> bool {
        let block = self.block();
        let Some(barrier) = block.mbarriers.get(&address) else {
            let place = format!("never initialised, {}", self.describe(address));
            self.report(Kind::Mbarrier, action, site, place);
            self.fatal = true;
            return false;
        };
        let (owner, clock) = barrier.owner;
        if self.checks
            && block.threads[self.current.thread as usize].clock.local[owner as usize] < clock
        {
            let place = format!(
                "whose initialisation is not ordered before, {}",
                self.describe(address)
            );
            self.report(Kind::Race, action, site, place);
        }
        true
    }

    /// Whether a bulk copy may signal the barrier.
    pub fn usable_by_copies(&mut self, address: usize, site: Site) -> bool {
        if !self.usable(address, "issued a bulk copy on an mbarrier", site) {
            return false;
        }
        if self.checks
            && self
                .block()
                .mbarriers
                .get(&address)
                .is_some_and(|barrier| !barrier.fenced)
        {
            let place = format!(
                "initialised with no fence.mbarrier_init after, {}",
                self.describe(address)
            );
            self.report(
                Kind::ProxyFence,
                "issued a bulk copy on an mbarrier",
                site,
                place,
            );
        }
        true
    }

    /// mbarrier.arrive, with or without announced bytes, by the running thread.
    pub fn mbarrier_arrive(&mut self, address: usize, arrival: Arrival, site: Site) {
        if !self.usable(address, "arrived at an mbarrier", site) {
            return;
        }
        let id = self.current.thread as usize;
        let block = self.block_mut();
        let (Some(barrier), clock) = (
            block.mbarriers.get_mut(&address),
            &mut block.threads[id].clock,
        ) else {
            return;
        };
        if arrival.count > barrier.pending {
            let count = barrier.count;
            let place = format!(
                "one arrival more than the {count} of its phase, {}",
                self.describe(address)
            );
            return self.report(Kind::Mbarrier, "arrived at an mbarrier", site, place);
        }
        barrier.arriving.join(clock);
        clock.local[id] += 1;
        barrier.pending -= arrival.count;
        barrier.bytes += i64::from(arrival.expected_bytes);
        self.complete_phase(address);
    }

    /// A bulk copy has delivered `bytes`.
    pub fn mbarrier_deliver(&mut self, address: usize, bytes: usize, clock: &Clock) {
        if let Some(barrier) = self.block_mut().mbarriers.get_mut(&address) {
            barrier.arriving.join(clock);
            barrier.bytes -= bytes as i64;
            self.complete_phase(address);
        }
    }

    fn complete_phase(&mut self, address: usize) {
        let Some(barrier) = self.block_mut().mbarriers.get_mut(&address) else {
            return;
        };
        if barrier.pending == 0 && barrier.bytes == 0 {
            barrier.pending = barrier.count;
            barrier.phase += 1;
            let arriving = std::mem::take(&mut barrier.arriving);
            barrier.released.join(&arriving);
            barrier.arriving = Clock::new(arriving.local.len());
            let waiting = std::mem::take(&mut barrier.waiting);
            waiting.into_iter().for_each(|thread| self.wake(thread));
        }
    }

    /// Whether the phase of that parity has completed; the running thread then knows what the arrivals knew.
    pub fn mbarrier_test(&mut self, address: usize, parity: u32, site: Site) -> bool {
        if !self.usable(address, "waited at an mbarrier", site) {
            return true;
        }
        let id = self.current.thread as usize;
        let block = self.block_mut();
        let Some(barrier) = block.mbarriers.get(&address) else {
            return true;
        };
        let done = barrier.phase & 1 != parity & 1;
        if done {
            block.threads[id].clock.join(&barrier.released);
        }
        done
    }

    /// Puts the running thread, about to be suspended, among those that wait.
    pub fn mbarrier_enqueue(&mut self, address: usize, site: Site) {
        let id = self.current.thread;
        self.thread_mut().wait = Some(Wait {
            what: "an mbarrier wait",
            site,
        });
        if let Some(barrier) = self.block_mut().mbarriers.get_mut(&address) {
            barrier.waiting.push(id);
        }
    }

    /// Reports barriers of a block at its end whose announced bytes never came, or came unannounced.
    pub fn check_mbarriers_at_end(&mut self) {
        let unbalanced = self
            .block()
            .mbarriers
            .iter()
            .filter(|(_, barrier)| barrier.bytes != 0);
        let found: Vec<_> = unbalanced
            .map(|(&at, b)| (at, b.bytes, b.owner.0, b.site))
            .collect();
        for (address, bytes, owner, site) in found {
            let place = format!(
                "{bytes} bytes out of balance when the block ended, {}",
                self.describe(address)
            );
            self.report_by(
                Kind::Mbarrier,
                owner,
                "initialised an mbarrier",
                site,
                place,
            );
        }
    }
}
