//! Gradients of a segment's prior rows on their way to the segments that computed these rows.

use std::collections::HashMap;
use std::ops::Range;

use crate::device::Device;
use crate::model::segmentation::Segment;

/// Which stream a prior gradient belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum StreamId {
    /// The losses of segments 0..=K, which are never truncated, together.
    Head,
    /// Stream `r`: its gradient goes back `r` more segments.
    Stream(usize),
}

impl StreamId {
    /// The stream to which this one belongs `segments` earlier; `None` where it is truncated.
    pub fn back(self, segments: usize) -> Option<Self> {
        match self {
            Self::Head => Some(Self::Head),
            Self::Stream(r) => r.checked_sub(segments).map(Self::Stream),
        }
    }
}

/// The gradient of the last rows of one segment in one layer, as far as they were prior rows of one later segment.
#[derive(Debug)]
pub struct Piece<D: Device> {
    /// The later segment's distance. Pieces are added in its order, so that the bits do not depend on which came first.
    pub back: usize,
    /// Number of rows.
    pub rows: usize,
    /// Of the keys before rotation `[rows, kv width]`.
    pub k: D::Buffer,
    /// Of the values.
    pub v: D::Buffer,
}

/// Prior gradients of the layer that no pass has received yet, by receiving stream, segment and sequence.
pub type Arrivals<D> = HashMap<(StreamId, usize, usize), Vec<Piece<D>>>;

/// The segments that computed the tail before the last of `segments`, the nearest first: how many segments back each
/// is, and its rows of the tail.
pub fn tail_pieces(
    segments: &[Segment],
    prior_len: usize,
) -> impl Iterator<Item = (usize, Range<usize>)> {
    let (last, before) = segments.split_last().expect("a segment and those before");
    let mut end = prior_len.min(last.tokens.start);
    let pieces = before.iter().rev().enumerate().map(move |(i, segment)| {
        let start = end.saturating_sub(segment.tokens.len());
        let rows = start..end;
        end = start;
        (i + 1, rows)
    });
    pieces.take_while(|(_, rows)| !rows.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tail_is_cut_where_its_segments_are() {
        let segments: Vec<Segment> = [0..3, 3..4, 4..6, 6..10, 10..11]
            .map(|tokens| Segment {
                tokens,
                closes: true,
            })
            .into();
        let pieces = |segment, prior_len| -> Vec<(usize, Range<usize>)> {
            tail_pieces(&segments[..=segment], prior_len).collect()
        };
        assert_eq!(pieces(0, 4), []);
        assert_eq!(pieces(1, 4), [(1, 0..3)]);
        assert_eq!(pieces(1, 2), [(1, 0..2)]);
        assert_eq!(pieces(3, 4), [(1, 2..4), (2, 1..2), (3, 0..1)]);
        assert_eq!(pieces(3, 9), [(1, 4..6), (2, 3..4), (3, 0..3)]);
        assert_eq!(pieces(4, 4), [(1, 0..4)]);
        assert_eq!(pieces(4, 0), []);
    }
}
