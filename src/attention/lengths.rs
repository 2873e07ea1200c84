//! How many rows of each source are valid.

/// `[batch]` numbers of rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Len<'a> {
    /// Host values; validated, and copied with the call to a GPU.
    Host(&'a [i32]),
    /// The device address of i32. The host does not read them: they must be values that validation would accept, and
    /// every row of the tensors must lie inside its memory. Work is planned for all rows of the tensors, so that a plan
    /// stays valid while the lengths change.
    Device(u64),
}

/// Numbers of past rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PastLen<'a> {
    /// `[batch]`: the same for every KV head.
    PerBatch(Len<'a>),
    /// `[batch, kv_heads]`: each KV head has its own number of rows.
    PerHead(Len<'a>),
}

/// How many rows of each batch element are valid. The default is all rows of every tensor.
///
/// ```
/// use segattn::attention::Lengths;
///
/// // Decoding: the last token of each of two segments of 5 and 3 tokens is the query.
/// let lengths = Lengths::segment(&[5, 3]).query_start(&[4, 2]);
/// ```
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Lengths<'a> {
    /// `[batch]`: valid rows of `k` and `v`.
    pub segment_len: Option<Len<'a>>,
    /// `[batch]`: valid rows of the prior.
    pub prior_len: Option<Len<'a>>,
    /// Valid rows of the past.
    pub past_len: Option<PastLen<'a>>,
    /// The first rows of the past that are sinks, at most `past_len`; `None` is 0. Every query head reads them,
    /// whatever its gate, and without it.
    pub sink_len: Option<PastLen<'a>>,
    /// `[batch]`: the position of each batch element's first query row in its segment; `None` is 0. Query rows are
    /// those from there to `segment_len`. Decoding passes one query row at position `segment_len - 1`.
    pub query_start: Option<Len<'a>>,
}

impl<'a> Lengths<'a> {
    /// `[batch]` valid rows of the segment.
    pub fn segment(len: impl Into<Len<'a>>) -> Self {
        Lengths {
            segment_len: Some(len.into()),
            ..Lengths::default()
        }
    }

    /// `[batch]` valid rows of the prior.
    pub fn prior(self, len: impl Into<Len<'a>>) -> Self {
        Lengths {
            prior_len: Some(len.into()),
            ..self
        }
    }

    /// `[batch]` valid rows of the past.
    pub fn past(self, len: impl Into<Len<'a>>) -> Self {
        Lengths {
            past_len: Some(PastLen::PerBatch(len.into())),
            ..self
        }
    }

    /// `[batch, kv_heads]` valid rows of the past.
    pub fn past_per_head(self, len: impl Into<Len<'a>>) -> Self {
        Lengths {
            past_len: Some(PastLen::PerHead(len.into())),
            ..self
        }
    }

    /// `[batch]` first rows of the past that are sinks.
    pub fn sinks(self, len: impl Into<Len<'a>>) -> Self {
        Lengths {
            sink_len: Some(PastLen::PerBatch(len.into())),
            ..self
        }
    }

    /// `[batch, kv_heads]` first rows of the past that are sinks.
    pub fn sinks_per_head(self, len: impl Into<Len<'a>>) -> Self {
        Lengths {
            sink_len: Some(PastLen::PerHead(len.into())),
            ..self
        }
    }

    /// `[batch]` positions of the first query row.
    pub fn query_start(self, start: impl Into<Len<'a>>) -> Self {
        Lengths {
            query_start: Some(start.into()),
            ..self
        }
    }

    /// The lengths that are given, by name.
    pub(super) fn named(&self) -> impl Iterator<Item = (&'static str, Len<'a>)> {
        [
            ("segment_len", self.segment_len),
            ("prior_len", self.prior_len),
            ("past_len", self.past_len.map(PastLen::values)),
            ("sink_len", self.sink_len.map(PastLen::values)),
            ("query_start", self.query_start),
        ]
        .into_iter()
        .filter_map(|(name, len)| Some((name, len?)))
    }
}

impl<'a> PastLen<'a> {
    pub(super) fn values(self) -> Len<'a> {
        let (PastLen::PerBatch(len) | PastLen::PerHead(len)) = self;
        len
    }

    /// Index of a head's number in the values.
    pub(super) fn index(self, batch_index: usize, kv_head: usize, kv_heads: usize) -> usize {
        match self {
            PastLen::PerBatch(_) => batch_index,
            PastLen::PerHead(_) => batch_index * kv_heads + kv_head,
        }
    }
}

/// Slices, arrays and vectors.
impl<'a, X: AsRef<[i32]> + ?Sized> From<&'a X> for Len<'a> {
    fn from(values: &'a X) -> Self {
        Len::Host(values.as_ref())
    }
}
