//! The checks of one launch behind one face: told of accesses, atomics and findings, it keeps the reports.

use std::path::Path;

use super::access::Access;
use super::actors::{Names, Who};
use super::clock::Clock;
use super::happens_before::{Effect, Order, SyncVariables, ThreadClocks};
use super::report::{Kind, RawParty, RawReport, Report, ReportLog};
use super::shadow::{self, ATOMIC, Actor, Cell, Conflict, Epoch, Readers};
use super::symbols::Site;

/// The checks of a launch.
pub(crate) struct Checker {
    enabled: bool,
    stopped: bool,
    names: Names,
    log: ReportLog,
    readers: Readers,
    variables: SyncVariables,
}

/// Who accesses memory, and what it knows.
#[derive(Clone, Copy)]
pub(crate) struct By<'a> {
    pub who: Who,
    pub clock: &'a Clock,
    /// An asynchronous agent, whose accesses go through the async proxy.
    pub is_agent: bool,
}

/// One side of a finding: who did what, where in the code.
pub(crate) type Side<'a> = (Who, &'a str, Site);

impl Checker {
    /// Checks of a launch of that shape; if not `enabled`, only findings that others make are kept.
    pub fn new(enabled: bool, names: Names) -> Checker {
        Checker {
            enabled,
            stopped: false,
            names,
            log: ReportLog::default(),
            readers: Readers::default(),
            variables: SyncVariables::default(),
        }
    }

    /// Whether memory and order are checked.
    #[inline]
    pub fn enabled(&self) -> bool {
        self.enabled
    }

    /// Whether a finding makes going on pointless.
    #[inline]
    pub fn stopped(&self) -> bool {
        self.stopped
    }

    /// No thread of the launch goes on from here.
    pub fn stop(&mut self) {
        self.stopped = true;
    }

    /// Checks and records an access to cells; the first conflict, with the index of its cell. Cells of shared memory
    /// forget what blocks before this one did to them.
    #[inline]
    pub fn access(
        &mut self,
        cells: &mut [Cell],
        shared: bool,
        by: By,
        access: &Access,
        site: Site,
    ) -> Option<(usize, Conflict)> {
        let first_block = self.names.first_block;
        let By { who, clock, .. } = by;
        let epoch = Epoch {
            clock: clock.local[who.id as usize],
            block: who.serial,
            site: site.0,
            id: who.id,
            flags: access.flags,
        };
        let actor = Actor {
            epoch,
            local: &clock.local,
            foreign: &clock.foreign,
            proxied: by.is_agent.then_some(&clock.proxied[..]),
            first_block,
        };
        if shared {
            for cell in &mut *cells {
                cell.claim_for_block(who.serial, first_block, &mut self.readers);
            }
        }
        shadow::on_access(cells, &actor, access.mode, &mut self.readers)
    }

    /// Passes knowledge between a thread and the location of its atomic operation.
    pub fn synchronize(
        &mut self,
        who: Who,
        thread: &mut ThreadClocks,
        address: usize,
        effect: Effect,
        order: Order,
    ) {
        if self.enabled {
            self.variables
                .synchronize(who, thread, address, effect, order);
        }
    }

    /// Reports what one actor did.
    pub fn report(&mut self, kind: Kind, side: Side, place: String) {
        self.add(kind, side, place, None, false);
    }

    /// Reports what one actor did against another.
    pub fn report_pair(&mut self, kind: Kind, side: Side, place: String, other: Side) {
        self.add(kind, side, place, Some(other), false);
    }

    /// Reports two threads at different places that should have been at one; two copies of one source line that the
    /// compiler made are the same place.
    pub fn report_divergence(&mut self, what: &str, side: (Who, Site), other: (Who, Site)) {
        let reached = format!("reached {what}");
        let was = format!("was at another {what}");
        let side = (side.0, &*reached, side.1);
        let other = (other.0, &*was, other.1);
        self.add(Kind::Divergence, side, String::new(), Some(other), true);
    }

    /// Reports an access that conflicts with an earlier one of the same memory.
    pub fn report_conflict(&mut self, side: Side, conflict: Conflict, place: String) {
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
        let Some(old) = other else {
            return self.report(kind, side, place);
        };
        let by = if old.flags & ATOMIC != 0 {
            " by an atomic operation"
        } else {
            ""
        };
        let who = Who {
            serial: old.block,
            id: old.id,
        };
        let action = format!("{did}{by}");
        let other = (who, &*action, Site(old.site));
        self.add(kind, side, place, Some(other), false);
    }

    fn add(
        &mut self,
        kind: Kind,
        side: Side,
        place: String,
        other: Option<Side>,
        unless_same_line: bool,
    ) {
        let party = |(who, action, site): Side| RawParty {
            who: self.names.of(who),
            action: action.to_string(),
            site,
        };
        let (party, other) = (party(side), other.map(party));
        self.log.add(RawReport {
            kind,
            party,
            place,
            other,
            unless_same_line,
        });
    }

    /// The reports, with source lines from the compiled kernel at `image`.
    pub fn finish(self, kernel: &str, image: &Path) -> Vec<Report> {
        self.log.finish(kernel, image)
    }
}
