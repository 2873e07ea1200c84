//! mbarriers: phases that complete when every expected arrival and every expected byte has come.

use std::collections::HashMap;

use super::context::Context;
use crate::checks::access::Access;
use crate::checks::clock::Clock;
use crate::checks::report::Kind;
use crate::checks::shadow::{BARRIER, INITIALIZED, Mode};
use crate::checks::symbols::Site;

/// The mbarriers of a block, by address.
#[derive(Default)]
pub(crate) struct Mbarriers(HashMap<usize, Mbarrier>);

/// One mbarrier object.
struct Mbarrier {
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

impl Mbarriers {
    /// mbarrier.init.
    pub fn init(&mut self, cx: &mut Context, address: usize, count: u32, site: Site) {
        let action = "initialised an mbarrier";
        if !cx.is_shared(address) || count == 0 {
            let place = format!("count {count}, {}", cx.describe(address));
            return cx.report(Kind::Operand, action, site, place);
        }
        let access = Access {
            flags: BARRIER | INITIALIZED,
            ..Access::new(address, 8, Mode::Write, action)
        };
        if !cx.access(access, site) {
            return;
        }
        let id = cx.thread;
        let actors = cx.actors.count();
        let barrier = Mbarrier {
            count,
            pending: count,
            bytes: 0,
            phase: 0,
            arriving: Clock::new(actors),
            released: Clock::new(actors),
            waiting: Vec::new(),
            owner: (id, cx.own_clocks().now.local[id as usize]),
            fenced: false,
            site,
        };
        self.0.insert(address, barrier);
    }

    /// mbarrier.inval: the memory may be used for other things.
    pub fn invalidate(&mut self, cx: &mut Context, address: usize, site: Site) {
        if !self.usable(cx, address, "invalidated", site) {
            return;
        }
        self.0.remove(&address);
        let access = Access {
            flags: BARRIER | INITIALIZED,
            ..Access::new(address, 8, Mode::Write, "invalidated an mbarrier")
        };
        cx.access(access, site);
        let cells = cx.shared.cells(address, 8);
        cells.iter_mut().for_each(|cell| cell.write.flags = 0);
    }

    /// fence.mbarrier_init by the running thread.
    pub fn fence_init(&mut self, cx: &Context) {
        let own = self.0.values_mut().filter(|b| b.owner.0 == cx.thread);
        own.for_each(|barrier| barrier.fenced = true);
    }

    /// Whether the running thread may use the barrier: it was initialised, and that is known to the thread.
    fn usable(&self, cx: &mut Context, address: usize, action: &str, site: Site) -> bool {
        let Some(barrier) = self.0.get(&address) else {
            let place = format!("never initialised, {}", cx.describe(address));
            cx.refuse(Kind::Mbarrier, action, site, place);
            return false;
        };
        let (owner, clock) = barrier.owner;
        if cx.checker.enabled() && cx.own_clocks().now.local[owner as usize] < clock {
            let place = cx.describe(address);
            let place = format!("whose initialisation is not ordered before, {place}");
            cx.report(Kind::Race, action, site, place);
        }
        true
    }

    /// Whether a bulk copy may signal the barrier.
    pub fn usable_by_copies(&self, cx: &mut Context, address: usize, site: Site) -> bool {
        let action = "issued a bulk copy on an mbarrier";
        if !self.usable(cx, address, action, site) {
            return false;
        }
        let fenced = self.0.get(&address).is_none_or(|barrier| barrier.fenced);
        if cx.checker.enabled() && !fenced {
            let place = cx.describe(address);
            let place = format!("initialised with no fence.mbarrier_init after, {place}");
            cx.report(Kind::ProxyFence, action, site, place);
        }
        true
    }

    /// mbarrier.arrive, with or without announced bytes, by the running thread.
    pub fn arrive(&mut self, cx: &mut Context, address: usize, arrival: Arrival, site: Site) {
        let action = "arrived at an mbarrier";
        if !self.usable(cx, address, action, site) {
            return;
        }
        let Some(barrier) = self.0.get_mut(&address) else {
            return;
        };
        if arrival.count > barrier.pending {
            let (count, place) = (barrier.count, cx.describe(address));
            let place = format!("one arrival more than the {count} of its phase, {place}");
            return cx.report(Kind::Mbarrier, action, site, place);
        }
        let id = cx.thread as usize;
        let clock = &mut cx.own_clocks().now;
        barrier.arriving.join(clock);
        clock.local[id] += 1;
        barrier.pending -= arrival.count;
        barrier.bytes += i64::from(arrival.expected_bytes);
        barrier.complete_phase(cx);
    }

    /// A bulk copy has delivered `bytes`.
    pub fn deliver(&mut self, cx: &mut Context, address: usize, bytes: usize, clock: &Clock) {
        if let Some(barrier) = self.0.get_mut(&address) {
            barrier.arriving.join(clock);
            barrier.bytes -= bytes as i64;
            barrier.complete_phase(cx);
        }
    }

    /// Whether the phase of that parity has completed; the running thread then knows what the arrivals knew.
    pub fn test(&self, cx: &mut Context, address: usize, parity: u32, site: Site) -> bool {
        if !self.usable(cx, address, "waited at an mbarrier", site) {
            return true;
        }
        let Some(barrier) = self.0.get(&address) else {
            return true;
        };
        let done = barrier.phase & 1 != parity & 1;
        if done {
            cx.own_clocks().now.join(&barrier.released);
        }
        done
    }

    /// Puts the running thread, about to be suspended, among those that wait.
    pub fn enqueue(&mut self, cx: &Context, address: usize) {
        if let Some(barrier) = self.0.get_mut(&address) {
            barrier.waiting.push(cx.thread);
        }
    }

    /// The first thread that waits at each barrier, and what the barrier's phase lacks.
    pub fn stuck(&self) -> impl Iterator<Item = (u16, String)> {
        self.0.values().filter_map(|barrier| {
            let Mbarrier {
                phase,
                pending,
                count,
                bytes,
                ..
            } = barrier;
            let what = format!(
                "for phase {phase}, which lacks {pending} of {count} arrivals and {bytes} bytes"
            );
            barrier.waiting.first().map(|&thread| (thread, what))
        })
    }

    /// Reports barriers of a block at its end whose announced bytes never came, or came unannounced.
    pub fn check_at_end(&self, cx: &mut Context) {
        for (&address, barrier) in self.0.iter().filter(|(_, barrier)| barrier.bytes != 0) {
            let (bytes, place) = (barrier.bytes, cx.describe(address));
            let place = format!("{bytes} bytes out of balance when the block ended, {place}");
            let action = "initialised an mbarrier";
            cx.report_by(Kind::Mbarrier, barrier.owner.0, action, barrier.site, place);
        }
    }
}

impl Mbarrier {
    /// Begins the next phase if every arrival and every byte of this one has come.
    fn complete_phase(&mut self, cx: &mut Context) {
        if self.pending == 0 && self.bytes == 0 {
            self.pending = self.count;
            self.phase += 1;
            let arriving = std::mem::take(&mut self.arriving);
            self.released.join(&arriving);
            self.arriving = Clock::new(arriving.local.len());
            self.waiting.drain(..).for_each(|thread| cx.wake(thread));
        }
    }
}
