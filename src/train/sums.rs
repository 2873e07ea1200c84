//! The order in which the gradients of a step are added, whatever the number of ranks (docs/contract.md, section 4).
//!
//! The sequences of a step are cut into groups. The groups are the leaves of a binary tree over their numbers: the node
//! `index` of level `l` is the sum of the groups from `index * 2^l` on, `2^l` of them or as many as there are. A node
//! is its left child plus its right child, or its left child alone.
//!
//! A rank has consecutive groups. It adds up whatever nodes lie wholly in them; what is left is added where the parts
//! of all ranks meet.

use std::ops::Range;

/// A node of the tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Node {
    level: u32,
    index: usize,
}

impl Node {
    /// The leaf of a group.
    pub fn leaf(group: usize) -> Self {
        let level = 0;
        Self {
            level,
            index: group,
        }
    }

    /// The parent, if `right` is its other child.
    fn with(self, right: Self) -> Option<Self> {
        let siblings = self.level == right.level
            && self.index.is_multiple_of(2)
            && right.index == self.index + 1;
        siblings.then_some(Self {
            level: self.level + 1,
            index: self.index / 2,
        })
    }
}

/// Sums of consecutive nodes that still wait for others.
#[derive(Debug)]
pub(super) struct Waiting<T>(Vec<(Node, T)>);

impl<T> Default for Waiting<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T> Waiting<T> {
    /// Takes the node behind those that wait, and adds as far as can be: `add(left, right)` adds `right` to `left`.
    pub fn push<E>(
        &mut self,
        node: Node,
        sum: T,
        mut add: impl FnMut(&mut T, &mut T) -> Result<(), E>,
        mut spare: impl FnMut(T),
    ) -> Result<(), E> {
        self.0.push((node, sum));
        while let [.., (left, a), (right, b)] = &mut self.0[..] {
            let Some(parent) = left.with(*right) else {
                break;
            };
            add(a, b)?;
            *left = parent;
            spare(self.0.pop().expect("two nodes").1);
        }
        Ok(())
    }

    /// Adds up what waits, where no more nodes come: the root.
    pub fn close<E>(
        &mut self,
        mut add: impl FnMut(&mut T, &mut T) -> Result<(), E>,
        mut spare: impl FnMut(T),
    ) -> Result<(), E> {
        while let [.., (_, a), (_, b)] = &mut self.0[..] {
            add(a, b)?;
            spare(self.0.pop().expect("two nodes").1);
        }
        Ok(())
    }

    /// What waits, in order. Nothing does any more then.
    pub fn take(&mut self) -> impl Iterator<Item = T> + use<'_, T> {
        self.0.drain(..).map(|(_, sum)| sum)
    }

    /// The sums that wait, in order.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.0.iter_mut().map(|(_, sum)| sum)
    }
}

/// The nodes that a rank with these groups is left with.
pub(super) fn nodes(groups: Range<usize>) -> Vec<Node> {
    let mut waiting = Waiting::default();
    for group in groups {
        let add = |(): &mut (), (): &mut ()| Ok::<(), std::convert::Infallible>(());
        let Ok(()) = waiting.push(Node::leaf(group), (), add, |()| {});
    }
    waiting.0.into_iter().map(|(node, ())| node).collect()
}

/// Sets of gradients that a rank of `world` holds at most, if a step has so many groups and a rank computes `at_once`
/// of its own side by side: one each, and one for each node that waits. Windows of other ranks' sums are not counted.
pub fn gradient_sets(groups: usize, at_once: usize, world: usize) -> usize {
    let of_rank = |rank: usize| {
        let own = share(groups, rank, world);
        let starts = own.clone().step_by(at_once.max(1));
        let held = starts.map(|at| nodes(own.start..at).len() + at_once.max(1).min(own.end - at));
        held.max().unwrap_or(1)
    };
    (0..world).map(of_rank).max().unwrap_or(1)
}

/// The share of `rank` in `count` things that lie in a row.
pub(super) fn share(count: usize, rank: usize, world: usize) -> Range<usize> {
    let start = |rank: usize| (count as u128 * rank as u128 / world as u128) as usize;
    start(rank)..start(rank + 1)
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::{Node, Waiting, nodes, share};

    type Text = Waiting<String>;

    fn add(a: &mut String, b: &mut String) -> Result<(), Infallible> {
        *a = format!("({a}{b})");
        Ok(())
    }

    /// The tree by its definition: groups from `first` on under a node of this level.
    fn tree(first: usize, level: u32, count: usize) -> Option<String> {
        if first >= count {
            return None;
        }
        if level == 0 {
            return Some(format!("{first:x}"));
        }
        let (left, right) = (
            tree(first, level - 1, count)?,
            tree(first + (1 << (level - 1)), level - 1, count),
        );
        Some(right.map_or(left.clone(), |right| format!("({left}{right})")))
    }

    #[test]
    fn any_number_of_ranks_adds_in_the_order_of_the_tree() {
        for count in 1..=16 {
            let expected = tree(0, 4, count).unwrap();
            for world in 1..=count + 2 {
                let mut all = Text::default();
                for rank in 0..world {
                    let groups = share(count, rank, world);
                    let mut own = Text::default();
                    for group in groups.clone() {
                        let Ok(()) = own.push(Node::leaf(group), format!("{group:x}"), add, drop);
                    }
                    let own: Vec<String> = own.take().collect();
                    let nodes = nodes(groups);
                    assert_eq!(own.len(), nodes.len());
                    for (node, sum) in nodes.into_iter().zip(own) {
                        let Ok(()) = all.push(node, sum, add, drop);
                    }
                }
                let Ok(()) = all.close(add, drop);
                let sums: Vec<String> = all.take().collect();
                assert_eq!(
                    sums,
                    std::slice::from_ref(&expected),
                    "{count} groups, {world} ranks"
                );
            }
        }
    }

    #[test]
    fn sets_are_those_at_work_and_those_that_wait() {
        assert_eq!(super::gradient_sets(1, 1, 1), 1);
        assert_eq!(super::gradient_sets(1, 1, 4), 1);
        // The last of eight finds sums of 4, 2 and 1.
        assert_eq!(super::gradient_sets(8, 1, 1), 4);
        assert_eq!(super::gradient_sets(8, 4, 1), 5);
        assert_eq!(super::gradient_sets(8, 4, 2), 4);
        assert_eq!(super::gradient_sets(8, 1, 8), 1);
    }

    #[test]
    fn shares_follow_each_other_and_leave_nothing() {
        for (count, world) in [(0, 3), (1, 4), (7, 3), (8, 8), (usize::MAX, 7)] {
            let mut end = 0;
            for rank in 0..world {
                let share = share(count, rank, world);
                assert_eq!(share.start, end);
                end = share.end;
            }
            assert_eq!(end, count);
        }
    }
}
