//! What an instruction sees of the machine: memory, the clocks of its block's threads, and the checks.
//!
//! It sees neither coroutines nor the scheduler: an instruction that lets threads go on says which.

use crate::checks::access::Access;
use crate::checks::actors::{Actors, Who};
use crate::checks::checker::{By, Checker};
use crate::checks::clock::Clock;
use crate::checks::happens_before::ThreadClocks;
use crate::checks::report::Kind;
use crate::checks::shadow::{GRANULE, Mode};
use crate::checks::symbols::Site;
use crate::memory::global::{GlobalMemory, Refusal};
use crate::memory::region::{GUARD, Region};

/// What a launch did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Matrix products of one warp (mma.sync).
    pub products: u64,
    /// Block barriers completed.
    pub barriers: u64,
    /// Checked memory accesses.
    pub accesses: u64,
    /// Times a thread was given control.
    pub switches: u64,
    /// Steps of all threads, as limits count them.
    pub steps: u64,
}

/// The block in which an instruction is executed.
pub(crate) struct Context<'a> {
    /// Serial number of the block.
    pub serial: u32,
    /// The running thread.
    pub thread: u16,
    pub actors: Actors,
    pub shared: &'a mut Region,
    pub global: &'a mut GlobalMemory,
    /// By thread of the block.
    pub clocks: &'a mut [ThreadClocks],
    pub checker: &'a mut Checker,
    pub stats: &'a mut Stats,
    /// Threads of the block that go on.
    pub woken: &'a mut Vec<u16>,
}

impl Context<'_> {
    /// Lets a thread of the block go on.
    pub fn wake(&mut self, thread: u16) {
        self.woken.push(thread);
    }

    /// The clocks of the running thread.
    pub fn own_clocks(&mut self) -> &mut ThreadClocks {
        &mut self.clocks[self.thread as usize]
    }

    /// Whether the address lies in the block's shared memory.
    pub fn is_shared(&self, address: usize) -> bool {
        self.shared.contains(address, 1)
    }

    /// Checks one access of the running thread. False if it must not be carried out; the launch then ends.
    #[inline]
    pub fn access(&mut self, access: Access, site: Site) -> bool {
        self.access_as(self.thread, access, site)
    }

    /// Checks one access of a thread of the block.
    #[inline]
    pub fn access_as(&mut self, thread: u16, access: Access, site: Site) -> bool {
        if !self.checker.enabled() {
            return true;
        }
        let clock = std::mem::take(&mut self.clocks[thread as usize].now);
        let allowed = self.access_by(thread, &clock, access, site);
        self.clocks[thread as usize].now = clock;
        allowed
    }

    /// Checks one access of an actor of the block that knows `clock`.
    #[inline]
    pub fn access_by(&mut self, id: u16, clock: &Clock, access: Access, site: Site) -> bool {
        if !self.checker.enabled() {
            return true;
        }
        self.stats.accesses += 1;
        let (address, bytes) = (access.address, access.bytes);
        if !address.is_multiple_of(access.alignment) {
            let place = format!("{}, {bytes} bytes", self.describe(address));
            self.report_by(Kind::Misaligned, id, access.action, site, place);
        }
        let shared = self.shared.contains(address, bytes);
        let cells = if shared {
            Ok(self.shared.cells(address, bytes))
        } else {
            let write = access.mode != Mode::Read;
            self.global.cells(address, bytes, write)
        };
        let cells = match cells {
            Ok(cells) => cells,
            Err(refusal) => {
                let kind = match refusal {
                    Refusal::ReadOnly => Kind::ReadOnly,
                    Refusal::OutOfBounds => Kind::OutOfBounds,
                };
                let place = format!("{bytes} bytes at {}", self.describe(address));
                self.report_by(kind, id, access.action, site, place);
                self.checker.stop();
                return false;
            }
        };
        let by = By {
            who: Who {
                serial: self.serial,
                id,
            },
            clock,
            is_agent: self.actors.is_agent(id),
        };
        if let Some((cell, conflict)) = self.checker.access(cells, shared, by, &access, site) {
            let place = self.describe(address / GRANULE * GRANULE + cell * GRANULE);
            let side = (by.who, access.action, site);
            self.checker.report_conflict(side, conflict, place);
        }
        true
    }

    /// Where an address lies, in words.
    pub fn describe(&self, address: usize) -> String {
        let shared = &self.shared;
        if (shared.base..shared.base + shared.len + GUARD).contains(&address) {
            shared.describe(address)
        } else {
            self.global.describe(address)
        }
    }

    /// An actor of the block.
    pub fn who(&self, id: u16) -> Who {
        Who {
            serial: self.serial,
            id,
        }
    }

    /// Reports something the running thread did.
    pub fn report(&mut self, kind: Kind, action: &str, site: Site, place: String) {
        self.report_by(kind, self.thread, action, site, place);
    }

    /// Reports something an actor of the block did.
    pub fn report_by(&mut self, kind: Kind, id: u16, action: &str, site: Site, place: String) {
        let side = (self.who(id), action, site);
        self.checker.report(kind, side, place);
    }

    /// Reports something the running thread did that makes going on pointless.
    pub fn refuse(&mut self, kind: Kind, action: &str, site: Site, place: String) {
        self.report(kind, action, site, place);
        self.checker.stop();
    }

    /// Reports two threads at different places that should have been at one.
    pub fn report_divergence(&mut self, what: &str, thread: (u16, Site), other: (u16, Site)) {
        let (thread, other) = ((self.who(thread.0), thread.1), (self.who(other.0), other.1));
        self.checker.report_divergence(what, thread, other);
    }
}
