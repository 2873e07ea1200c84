//! Where a key comes from.

use std::ops::{Index, IndexMut};

/// Where a key row comes from, in the order in which a query reads its keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Source {
    /// Rows retrieved from earlier segments, weighted by the head's gate; they get no gradient.
    Past,
    /// The KV tail of the segment before.
    Prior,
    /// The segment itself, causal.
    Current,
}

impl Source {
    /// All sources, in reading order.
    pub const ALL: [Source; 3] = [Source::Past, Source::Prior, Source::Current];
}

/// The keys of a query head in the order in which it reads them: the sources, the past in two parts. Key tiles are
/// counted from the first row of a part (docs/contract.md, section 4).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    /// The first rows of the past, which every head reads with weight 1.
    Sinks,
    /// The other rows of the past, weighted by the head's gate.
    Gated,
    Prior,
    Current,
}

impl Part {
    /// All parts, in reading order.
    pub const ALL: [Part; 4] = [Part::Sinks, Part::Gated, Part::Prior, Part::Current];

    /// Where the rows lie.
    pub fn source(self) -> Source {
        match self {
            Part::Sinks | Part::Gated => Source::Past,
            Part::Prior => Source::Prior,
            Part::Current => Source::Current,
        }
    }
}

/// One value for each source.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PerSource<T> {
    /// That of [`Source::Past`].
    pub past: T,
    /// That of [`Source::Prior`].
    pub prior: T,
    /// That of [`Source::Current`].
    pub current: T,
}

impl<T> PerSource<T> {
    /// The value of each source, computed in reading order.
    pub fn from_fn(mut f: impl FnMut(Source) -> T) -> Self {
        let [past, prior, current] = Source::ALL.map(&mut f);
        PerSource {
            past,
            prior,
            current,
        }
    }

    /// The values, each replaced.
    pub fn map<U>(self, mut f: impl FnMut(T) -> U) -> PerSource<U> {
        PerSource {
            past: f(self.past),
            prior: f(self.prior),
            current: f(self.current),
        }
    }
}

impl<T> Index<Source> for PerSource<T> {
    type Output = T;

    fn index(&self, source: Source) -> &T {
        match source {
            Source::Past => &self.past,
            Source::Prior => &self.prior,
            Source::Current => &self.current,
        }
    }
}

impl<T> IndexMut<Source> for PerSource<T> {
    fn index_mut(&mut self, source: Source) -> &mut T {
        match source {
            Source::Past => &mut self.past,
            Source::Prior => &mut self.prior,
            Source::Current => &mut self.current,
        }
    }
}
