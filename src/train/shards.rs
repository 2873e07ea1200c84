//! Which rank owns which elements of the parameters: it adds up their gradients, keeps their moments and updates them.
//!
//! The elements of all tensors lie in a row, in the order of the model's specs, and each rank owns about as many as
//! each other one. A shard begins and ends where a chunk of the gradients' norm does, so that the sums of chunks are
//! those of one rank.

use std::ops::Range;

/// Elements of a tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Part {
    /// Index of the tensor.
    pub tensor: usize,
    /// Its elements.
    pub range: Range<usize>,
}

/// The shards of all ranks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Shards(Vec<Vec<Part>>);

impl Shards {
    /// Cuts tensors of `lens` elements for `world` ranks, at multiples of `chunk`.
    pub fn new(lens: &[usize], chunk: usize, world: usize) -> Self {
        let total: usize = lens.iter().sum::<usize>().max(1);
        let (mut shards, mut before) = (vec![Vec::<Part>::new(); world], 0);
        for (tensor, len) in lens.iter().enumerate() {
            for start in (0..*len).step_by(chunk) {
                let end = (start + chunk).min(*len);
                let rank = (before as u128 * world as u128 / total as u128) as usize;
                match shards[rank].last_mut() {
                    Some(part) if part.tensor == tensor => part.range.end = end,
                    _ => shards[rank].push(Part {
                        tensor,
                        range: start..end,
                    }),
                }
                before += end - start;
            }
        }
        Self(shards)
    }

    /// The parts that a rank owns, in order.
    pub fn of(&self, rank: usize) -> &[Part] {
        &self.0[rank]
    }

    /// Elements of the largest shard.
    pub fn longest(&self) -> usize {
        let len = |parts: &Vec<Part>| parts.iter().map(|part| part.range.len()).sum();
        self.0.iter().map(len).max().unwrap_or(0)
    }

    /// What lies in `window` of the row of all elements of a rank's shard.
    pub fn window(&self, rank: usize, window: &Range<usize>) -> Vec<Part> {
        let mut before = 0;
        let mut cut = |part: &Part| {
            let Range { start, end } = part.range;
            let first = window.start.saturating_sub(before).min(end - start);
            let last = window.end.saturating_sub(before).min(end - start);
            before += end - start;
            (first < last).then_some(Part {
                tensor: part.tensor,
                range: start + first..start + last,
            })
        };
        self.0[rank].iter().filter_map(&mut cut).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::{Part, Shards};

    #[test]
    fn every_element_has_one_owner_and_shards_are_cut_at_chunks() {
        let lens = [10, 100, 1, 0, 37, 64];
        for world in [1, 2, 3, 5, 40] {
            let shards = Shards::new(&lens, 8, world);
            let mut seen: Vec<Vec<u32>> = lens.iter().map(|len| vec![0; *len]).collect();
            let mut order = Vec::new();
            for rank in 0..world {
                for Part { tensor, range } in shards.of(rank) {
                    assert_eq!(range.start % 8, 0);
                    seen[*tensor][range.clone()]
                        .iter_mut()
                        .for_each(|n| *n += 1);
                    order.push((*tensor, range.start));
                }
            }
            assert!(seen.iter().flatten().all(|n| *n == 1));
            assert!(order.is_sorted());
            assert!(shards.longest() <= lens.iter().sum::<usize>().div_ceil(world) + 8);
        }
    }

    #[test]
    fn windows_of_a_shard_cover_it_in_order() {
        let shards = Shards::new(&[10, 100, 1, 37], 8, 2);
        for rank in 0..2 {
            let mut parts: Vec<Part> = Vec::new();
            for start in (0..shards.longest()).step_by(7) {
                for part in shards.window(rank, &(start..start + 7)) {
                    match parts.last_mut() {
                        Some(last) if last.tensor == part.tensor => {
                            assert_eq!(last.range.end, part.range.start);
                            last.range.end = part.range.end;
                        }
                        _ => parts.push(part),
                    }
                }
            }
            assert_eq!(parts, shards.of(rank));
        }
    }
}
