//! What the checks found: who did what, where, against whom, with source lines.

use std::collections::HashSet;
use std::fmt;
use std::path::Path;

use super::symbols::{self, Site};

/// Reports kept of one launch; more of them are rarely of use.
const MAX_REPORTS: usize = 32;

/// The class of a defect.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Kind {
    /// Two accesses to one location, at least one a write, with nothing that orders them.
    Race,
    /// An access outside every buffer, or outside the block's shared memory.
    OutOfBounds,
    /// A write to a buffer the launch may only read.
    ReadOnly,
    /// An address that is not a multiple of the access size.
    Misaligned,
    /// A read of memory that was never written.
    Uninitialized,
    /// An access to the destination of a copy that was not waited for.
    NotWaited,
    /// Lanes of a warp, or warps of a block, at different collectives.
    Divergence,
    /// Threads that wait for ever.
    Deadlock,
    /// A launch that went on past its limits.
    Endless,
    /// Wrong use of an mbarrier: not initialised, overrun, bytes out of balance, a phase missed.
    Mbarrier,
    /// Generic-proxy writes that reach the async proxy without a proxy fence.
    ProxyFence,
    /// wgmma registers touched without wgmma.fence, or while the product is in flight.
    Wgmma,
    /// An operand that the hardware would refuse: descriptor, coordinate, size.
    Operand,
    /// Asynchronous work still in flight when its thread or block ended.
    Leak,
    /// The kernel gave up (`__trap`).
    Trap,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Kind::Race => "race",
            Kind::OutOfBounds => "out of bounds",
            Kind::ReadOnly => "write to read-only memory",
            Kind::Misaligned => "misaligned access",
            Kind::Uninitialized => "read of memory never written",
            Kind::NotWaited => "asynchronous copy not waited for",
            Kind::Divergence => "divergence",
            Kind::Deadlock => "deadlock",
            Kind::Endless => "endless launch",
            Kind::Mbarrier => "mbarrier misuse",
            Kind::ProxyFence => "missing proxy fence",
            Kind::Wgmma => "wgmma register hazard",
            Kind::Operand => "bad operand",
            Kind::Leak => "unfinished asynchronous work",
            Kind::Trap => "trap",
        })
    }
}

/// One side of a report before its source lines are looked up.
#[derive(Clone, Debug)]
pub(crate) struct RawParty {
    pub who: String,
    pub action: String,
    pub site: Site,
}

/// A report before its source lines are looked up.
#[derive(Clone, Debug)]
pub(crate) struct RawReport {
    pub kind: Kind,
    pub party: RawParty,
    pub place: String,
    pub other: Option<RawParty>,
    /// Two copies of one source line that the compiler made are the same place: no report then.
    pub unless_same_line: bool,
}

/// Someone who took part: a thread or an asynchronous agent.
#[derive(Clone, Debug)]
pub struct Party {
    /// "thread (3,0,0) of block (1,0,0)" and the like.
    pub who: String,
    /// What it did.
    pub action: String,
    /// `file:line`, innermost first, or empty.
    pub location: String,
}

impl fmt::Display for Party {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.who, self.action)?;
        if !self.location.is_empty() {
            write!(f, " at {}", self.location)?;
        }
        Ok(())
    }
}

/// One defect found in a launch.
#[derive(Clone, Debug)]
pub struct Report {
    /// Its class.
    pub kind: Kind,
    /// The kernel's name, as given to the launch.
    pub kernel: String,
    /// Who did it.
    pub party: Party,
    /// The memory concerned, or empty.
    pub place: String,
    /// The other side, if there is one.
    pub other: Option<Party>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} in {}: {}", self.kind, self.kernel, self.party)?;
        if !self.place.is_empty() {
            write!(f, ", {}", self.place)?;
        }
        if let Some(other) = &self.other {
            write!(f, "; against {other}")?;
        }
        Ok(())
    }
}

/// Reports of one launch, each pair of code sites once.
#[derive(Default)]
pub(crate) struct ReportLog {
    reports: Vec<RawReport>,
    seen: HashSet<(Kind, Site, Site)>,
}

impl ReportLog {
    /// Adds a report unless the same pair of places was reported before.
    pub fn add(&mut self, report: RawReport) {
        let other = report
            .other
            .as_ref()
            .map_or(Site::default(), |party| party.site);
        if self.reports.len() < MAX_REPORTS
            && self.seen.insert((report.kind, report.party.site, other))
        {
            self.reports.push(report);
        }
    }

    /// Looks up every source line in the compiled kernel at `image` and hands the reports out.
    pub fn finish(self, kernel: &str, image: &Path) -> Vec<Report> {
        let sites = self
            .reports
            .iter()
            .flat_map(|r| [Some(r.party.site), r.other.as_ref().map(|o| o.site)]);
        let lines = symbols::locations(image, sites.flatten().collect());
        let party = |raw: RawParty| {
            let location = lines.get(&raw.site).cloned().unwrap_or_default();
            Party {
                location,
                who: raw.who,
                action: raw.action,
            }
        };
        let finish = |raw: RawReport| {
            let other = raw.other.map(party);
            let party = party(raw.party);
            let same_line = other
                .as_ref()
                .is_some_and(|other| other.location == party.location);
            let kernel = kernel.to_string();
            let report = Report {
                kind: raw.kind,
                kernel,
                party,
                place: raw.place,
                other,
            };
            (!(raw.unless_same_line && same_line)).then_some(report)
        };
        self.reports.into_iter().filter_map(finish).collect()
    }
}
