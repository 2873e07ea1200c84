//! One access to memory: which memory it is, whether it lies inside, and whether it is ordered after the others.

use crate::checks::clock::Clock;
use crate::checks::report::{Kind, RawParty, RawReport, Site};
use crate::checks::shadow::{ATOMIC, Actor, Cell, Conflict, Epoch, INITIALIZED, Readers};
use crate::host::module::image_base;
use crate::machine::launch::Launch;
use crate::memory::global::{GUARD, Region};

/// How memory is touched.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Mode {
    Read,
    Write,
    /// The write of an asynchronous copy becomes its thread's own.
    Land,
}

/// An access by the running thread.
#[derive(Clone, Copy)]
pub(crate) struct Access {
    pub address: usize,
    pub bytes: usize,
    pub mode: Mode,
    pub flags: u16,
    /// Required alignment, 1 for none.
    pub alignment: usize,
    /// For reports: "read" or "wrote" and the like.
    pub action: &'static str,
}

impl Access {
    pub fn new(address: usize, bytes: usize, mode: Mode, action: &'static str) -> Access {
        let flags = if mode == Mode::Read { 0 } else { INITIALIZED };
        Access {
            address,
            bytes,
            mode,
            flags,
            alignment: bytes.max(1),
            action,
        }
    }
}

/// Checks and records an access cell by cell; the first conflict with the index of its cell.
fn check(
    cells: &mut [Cell],
    actor: &Actor,
    mode: Mode,
    shared_by: Option<u32>,
    readers: &mut Readers,
) -> Option<(usize, Conflict)> {
    let mut first = None;
    for (i, cell) in cells.iter_mut().enumerate() {
        if let Some(serial) = shared_by {
            cell.claim_for_block(serial, actor.first_block, readers);
        }
        let conflict = match mode {
            Mode::Read => cell.on_read(actor, readers),
            Mode::Write => cell.on_write(actor, readers),
            Mode::Land => cell.on_land(actor),
        };
        if let (None, Some(conflict)) = (&first, conflict) {
            first = Some((i, conflict));
        }
    }
    first
}

impl Launch {
    /// Whether the address lies in the running thread's shared memory.
    pub fn is_shared(&self, address: usize) -> bool {
        self.block().shared.contains(address, 1)
    }

    /// Checks one access of the running thread. False if it must not be carried out; the launch then ends.
    pub fn access(&mut self, access: Access, site: Site) -> bool {
        if !self.checks {
            return true;
        }
        let id = self.current.thread;
        let clock = std::mem::take(&mut self.thread_mut().clock);
        let allowed = self.access_by(id, &clock, access, site);
        self.thread_mut().clock = clock;
        allowed
    }

    /// Checks one access of actor `id` of the running block, a thread or an asynchronous agent.
    pub fn access_by(&mut self, id: u16, clock: &Clock, access: Access, site: Site) -> bool {
        self.stats.accesses += 1;
        if !access.address.is_multiple_of(access.alignment) {
            let place = self.describe(access.address);
            let place = format!("{place}, {} bytes", access.bytes);
            self.report_by(Kind::Misaligned, id, access.action, site, place);
        }
        let slot = self.current.slot as usize;
        let Launch {
            blocks,
            memory,
            readers,
            first_block,
            image_base: own_image,
            ..
        } = self;
        let Some(block) = &mut blocks[slot] else {
            return false;
        };
        let (serial, flags) = (block.serial, access.flags);
        let epoch = Epoch {
            clock: clock.local[id as usize],
            block: serial,
            site: site.0,
            id,
            flags,
        };
        let actor = Actor {
            epoch,
            local: &clock.local,
            foreign: &clock.foreign,
            proxied: (id as usize >= block.threads.len()).then_some(&clock.proxied[..]),
            first_block: *first_block,
        };
        let (address, bytes) = (access.address, access.bytes);
        let found = if block.shared.contains(address, bytes) {
            let cells = block.shared.cells(address, bytes);
            check(cells, &actor, access.mode, Some(serial), readers)
        } else {
            match memory.find(address, bytes) {
                Some(Region {
                    read_only: true, ..
                }) if access.mode != Mode::Read => {
                    return self.fault(Kind::ReadOnly, id, access, site);
                }
                Some(Region {
                    read_only: true,
                    filled: true,
                    ..
                }) => return true,
                Some(region) => check(
                    region.cells(address, bytes),
                    &actor,
                    access.mode,
                    None,
                    readers,
                ),
                // A constant that the compiler keeps in the kernel's image.
                None if access.mode == Mode::Read && image_base(address) == Some(*own_image) => {
                    return true;
                }
                None => return self.fault(Kind::OutOfBounds, id, access, site),
            }
        };
        if let Some((cell, conflict)) = found {
            self.report_conflict(id, access, cell, conflict, site);
        }
        true
    }

    /// Reports an access that cannot be carried out and ends the launch.
    fn fault(&mut self, kind: Kind, id: u16, access: Access, site: Site) -> bool {
        let place = format!(
            "{} bytes at {}",
            access.bytes,
            self.describe(access.address)
        );
        self.report_by(kind, id, access.action, site, place);
        self.fatal = true;
        false
    }

    fn report_conflict(
        &mut self,
        id: u16,
        access: Access,
        cell: usize,
        conflict: Conflict,
        site: Site,
    ) {
        let (kind, other, did) = match conflict {
            Conflict::AfterWrite(old) => (Kind::Race, Some(old), "wrote it"),
            Conflict::AfterRead(old) => (Kind::Race, Some(old), "read it"),
            Conflict::Pending(old) => (Kind::NotWaited, Some(old), "copies into it"),
            Conflict::Uninitialized => (Kind::Uninitialized, None, ""),
            Conflict::Unfenced(old) => (
                Kind::ProxyFence,
                Some(old),
                "wrote it with no proxy fence after",
            ),
            Conflict::Barrier(old) => (Kind::Mbarrier, Some(old), "made it an mbarrier"),
        };
        let atomic = |epoch: &Epoch| {
            if epoch.flags & ATOMIC != 0 {
                " by an atomic operation"
            } else {
                ""
            }
        };
        let other = other.map(|old| RawParty {
            who: self.who(old.block, old.id),
            action: format!("{did}{}", atomic(&old)),
            site: Site(old.site),
        });
        let place = self.describe(access.address / 2 * 2 + cell * crate::checks::shadow::GRANULE);
        let party = self.party_of(id, access.action, site);
        self.log.add(RawReport {
            kind,
            party,
            place,
            other,
            unless_same_line: false,
        });
    }

    /// Where an address lies, in words.
    pub fn describe(&self, address: usize) -> String {
        let shared = &self.block().shared;
        if (shared.base..shared.base + shared.len + GUARD).contains(&address) {
            shared.describe(address)
        } else {
            self.memory.describe(address)
        }
    }
}
