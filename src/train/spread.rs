//! A step spread over ranks: sums of groups on their way to the owners of shards, and weights on their way back.
//!
//! Both go in windows of a shard, so that what is sent needs little memory beside it.

use std::ops::Range;

use super::error::Result;
use super::shards::{Part, Shards};
use super::streams::Gradients;
use super::sums::{Node, Waiting, nodes, share};
use crate::device::{self, Accumulate, Device, Kind, Purpose, Rows, RowsMut};
use crate::ranks::{Piece, RankError, Ranks};

/// Elements of each shard that are exchanged at a time: 64 MiB.
pub(super) const WINDOW: usize = 1 << 24;

/// Gradients of every tensor.
type Set<D> = Vec<<D as Device>::Buffer>;

/// The ranks of a run, and the sums on their way.
#[derive(Debug)]
pub(super) struct Spread<D: Device> {
    pub ranks: Ranks<D>,
    shards: Shards,
    /// Which tensors are updated.
    updated: Vec<bool>,
    /// Sums of this rank's groups that wait for others.
    waiting: Waiting<Set<D>>,
    /// Sets that are not used now.
    spare: Vec<Set<D>>,
    /// A window of each node of all ranks.
    windows: Vec<D::Buffer>,
}

impl<D: Device> Spread<D> {
    /// For tensors of `lens` elements.
    pub fn new(
        device: &D,
        lens: &[usize],
        updated: &[bool],
        ranks: Ranks<D>,
    ) -> device::Result<Self> {
        Ok(Self {
            shards: Shards::new(lens, device.norm_chunk()?, ranks.world()),
            updated: updated.to_vec(),
            ranks,
            waiting: Waiting::default(),
            spare: Vec::new(),
            windows: Vec::new(),
        })
    }

    /// What this rank owns, of all tensors.
    pub fn own(&self) -> &[Part] {
        self.shards.of(self.ranks.rank())
    }

    /// This rank's share of `count` things that lie in a row.
    pub fn share(&self, count: usize) -> Range<usize> {
        share(count, self.ranks.rank(), self.ranks.world())
    }

    /// Whether other ranks have a part in the sums.
    fn is_shared(&self) -> bool {
        self.ranks.world() > 1
    }

    /// Begins a step. What a step that failed has left is dropped.
    pub fn begin(&mut self) {
        self.spare.extend(self.waiting.take());
    }

    /// Makes `gradients` ready for the next group: zeros.
    pub fn clear(&mut self, device: &D, gradients: &mut Gradients<D>) -> Result<()> {
        gradients.renew(device, || self.spare.pop())?;
        Ok(gradients.clear(device)?)
    }

    /// Takes the complete gradients of a group, those of the groups before it first.
    pub fn push(&mut self, device: &D, gradients: &mut Gradients<D>, group: usize) -> Result<()> {
        let (updated, spare) = (&self.updated, &mut self.spare);
        let add = |a: &mut Set<D>, b: &mut Set<D>| add_sets(device, updated, a, b);
        let set = gradients.take(device)?;
        let pushed = self
            .waiting
            .push(Node::leaf(group), set, add, |set| spare.push(set));
        Ok(pushed?)
    }

    /// Leaves in `gradients` the sums over `groups` groups of all ranks, in this rank's shard. What the rest holds is
    /// not said.
    pub fn sum(&mut self, device: &D, gradients: &mut Gradients<D>, groups: usize) -> Result<()> {
        if self.is_shared() {
            let count = |rank| nodes(share(groups, rank, self.ranks.world())).len();
            let all: usize = (0..self.ranks.world()).map(count).sum();
            let longest = self.shards.longest();
            while self.windows.len() < all {
                let window = device.empty(Kind::Exact, longest.min(WINDOW));
                self.windows
                    .push(window.map_err(|e| e.wanted_for(Purpose::Optimizer))?);
            }
            for start in (0..longest).step_by(WINDOW) {
                self.sum_window(device, gradients, groups, &(start..start + WINDOW))?;
            }
        } else {
            let (updated, spare) = (&self.updated, &mut self.spare);
            let add = |a: &mut Set<D>, b: &mut Set<D>| add_sets(device, updated, a, b);
            self.waiting.close(add, |set| spare.push(set))?;
        }
        let mut sets = self.waiting.take();
        if let Some(sum) = sets.next() {
            gradients.give(sum);
        }
        self.spare.extend(sets);
        gradients.renew(device, || self.spare.pop())?;
        Ok(())
    }

    /// [`Spread::sum`] for a window of each shard.
    fn sum_window(
        &mut self,
        device: &D,
        gradients: &mut Gradients<D>,
        groups: usize,
        window: &Range<usize>,
    ) -> Result<()> {
        let (rank, world) = (self.ranks.rank(), self.ranks.world());
        let parts: Vec<Vec<Part>> = (0..world).map(|rank| self.parts(rank, window)).collect();
        let mine: Vec<(&Part, usize)> = placed(&parts[rank]).collect();
        let len = mine.last().map_or(0, |(part, at)| at + part.range.len());
        let tensors = self.updated.len();
        let owned: Vec<Vec<Node>> = (0..world).map(|r| nodes(share(groups, r, world))).collect();
        let before: Vec<usize> = (0..world)
            .map(|r| owned[..r].iter().map(Vec::len).sum())
            .collect();
        let (mut sends, mut receives) = (Vec::new(), Vec::new());
        for peer in (0..world).filter(|peer| *peer != rank) {
            for node in 0..owned[rank].len() {
                sends.extend(parts[peer].iter().map(|part| Piece {
                    peer,
                    buffer: node * tensors + part.tensor,
                    range: part.range.clone(),
                }));
            }
            for node in 0..owned[peer].len() {
                receives.extend(mine.iter().map(|(part, at)| Piece {
                    peer,
                    buffer: owned[rank].len() * tensors + before[peer] + node,
                    range: *at..at + part.range.len(),
                }));
            }
        }
        let sets = self.waiting.iter_mut().flatten();
        let mut buffers: Vec<&mut D::Buffer> = sets.chain(&mut self.windows).collect();
        let doing = "gradients are added up";
        self.ranks
            .exchange(device, &mut buffers, &sends, &receives, doing)?;
        for (set, window) in self
            .waiting
            .iter_mut()
            .zip(&mut self.windows[before[rank]..])
        {
            for (part, at) in &mine {
                let (src, dst) = (
                    Rows::packed(&set[part.tensor], part.range.start, 1),
                    RowsMut::packed(window, *at, 1),
                );
                copy(device, src, dst, part.range.len(), Accumulate::No)?;
            }
        }
        let Some(sum) = self.add_windows(device, &owned.concat(), len)? else {
            return Ok(());
        };
        // Nothing of this rank's own shard is sent: the sum may take its place.
        let target = match self.waiting.iter_mut().next() {
            Some(set) => set,
            None => gradients.renew(device, || self.spare.pop())?,
        };
        for (part, at) in &mine {
            let (src, dst) = (
                Rows::packed(&self.windows[sum], *at, 1),
                RowsMut::packed(&mut target[part.tensor], part.range.start, 1),
            );
            copy(device, src, dst, part.range.len(), Accumulate::No)?;
        }
        Ok(())
    }

    /// Adds up the windows of these nodes, and says in which one the sum is.
    fn add_windows(&mut self, device: &D, nodes: &[Node], len: usize) -> Result<Option<usize>> {
        let (mut waiting, windows) = (Waiting::default(), &mut self.windows);
        let mut add = |a: &mut usize, b: &mut usize| {
            let (left, right) = windows.split_at_mut(*b);
            let (src, dst) = (
                Rows::packed(&right[0], 0, 1),
                RowsMut::packed(&mut left[*a], 0, 1),
            );
            copy(device, src, dst, len, Accumulate::Yes)
        };
        for (window, node) in nodes.iter().enumerate() {
            waiting.push(*node, window, &mut add, drop)?;
        }
        waiting.close(&mut add, drop)?;
        let sum = waiting.take().next();
        Ok(sum)
    }

    /// Sends this rank's shard of `values` to the others, and takes over theirs.
    pub fn share_values(&self, device: &D, values: &mut [D::Buffer]) -> Result<()> {
        if !self.is_shared() {
            return Ok(());
        }
        let rank = self.ranks.rank();
        let mut buffers: Vec<&mut D::Buffer> = values.iter_mut().collect();
        for start in (0..self.shards.longest()).step_by(WINDOW) {
            let window = start..start + WINDOW;
            let (mut sends, mut receives) = (Vec::new(), Vec::new());
            let mine = self.parts(rank, &window);
            for peer in (0..self.ranks.world()).filter(|peer| *peer != rank) {
                let piece = |part: Part| Piece {
                    peer,
                    buffer: part.tensor,
                    range: part.range,
                };
                sends.extend(mine.iter().cloned().map(piece));
                receives.extend(self.parts(peer, &window).into_iter().map(piece));
            }
            let doing = "weights are shared";
            self.ranks
                .exchange(device, &mut buffers, &sends, &receives, doing)?;
        }
        Ok(())
    }

    /// Puts the parts of all ranks into `whole` on rank 0, and this rank's own ones on the others.
    pub fn collect(&self, device: &D, own: &[D::Buffer], whole: &mut [Vec<f32>]) -> Result<()> {
        let mut place = |part: &Part, bytes: &[u8]| {
            let values = bytemuck::pod_collect_to_vec::<u8, f32>(bytes);
            whole[part.tensor][part.range.clone()].copy_from_slice(&values);
        };
        let (rank, doing) = (self.ranks.rank(), "the state is collected");
        let mut mine = Vec::new();
        for (part, buffer) in self.own().iter().zip(own) {
            let values = device.read(buffer, 0..part.range.len())?;
            let bytes: &[u8] = bytemuck::cast_slice(&values);
            place(part, bytes);
            if self.is_shared() && rank > 0 {
                mine.extend_from_slice(bytes);
            }
        }
        let Some(mesh) = self.ranks.mesh() else {
            return Ok(());
        };
        for (other, bytes) in mesh
            .collect(&mine, doing)?
            .iter()
            .flatten()
            .enumerate()
            .skip(1)
        {
            let mut rest = &bytes[..];
            for part in self.shards.of(other) {
                let len = part.range.len() * size_of::<f32>();
                let (bytes, after) =
                    rest.split_at_checked(len)
                        .ok_or_else(|| RankError::Message {
                            rank: other,
                            doing,
                            expected: format!("{len} bytes more"),
                            got: rest.len().to_string(),
                        })?;
                place(part, bytes);
                rest = after;
            }
        }
        Ok(())
    }

    /// What lies in a window of a shard, of the tensors that are updated.
    fn parts(&self, rank: usize, window: &Range<usize>) -> Vec<Part> {
        let parts = self.shards.window(rank, window).into_iter();
        parts.filter(|part| self.updated[part.tensor]).collect()
    }
}

/// Parts with their places where they lie in a row.
fn placed(parts: &[Part]) -> impl Iterator<Item = (&Part, usize)> {
    let mut end = 0;
    parts.iter().map(move |part| {
        let at = end;
        end += part.range.len();
        (part, at)
    })
}

fn copy<D: Device>(
    device: &D,
    src: Rows<'_, D::Buffer>,
    dst: RowsMut<'_, D::Buffer>,
    len: usize,
    accumulate: Accumulate,
) -> device::Result<()> {
    if len == 0 {
        return Ok(());
    }
    device.copy(src, dst, 1, len, accumulate)
}

/// `a += b`.
fn add_sets<D: Device>(
    device: &D,
    updated: &[bool],
    a: &mut Set<D>,
    b: &Set<D>,
) -> device::Result<()> {
    let wanted = a
        .iter_mut()
        .zip(b)
        .zip(updated)
        .filter(|(_, updated)| **updated);
    for ((a, b), _) in wanted {
        let len = device.len(b);
        let (src, dst) = (Rows::packed(b, 0, 1), RowsMut::packed(a, 0, 1));
        copy(device, src, dst, len, Accumulate::Yes)?;
    }
    Ok(())
}
