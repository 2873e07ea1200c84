//! A model over several processes: each computes consecutive layers, a *stage*, and hands the residual stream on.
//!
//! Rank 0 has the last stage, whose results are the model's; the highest rank has the first. The neighbour before is
//! the next higher rank. Either rank 0 leads and tells the others what to read ([`follow`](super::session::follow)),
//! or all ranks make the same calls.

use std::sync::atomic::{AtomicU64, Ordering};

use super::config::Part;
use crate::device::{Device, Kind, Result};
use crate::ranks::{Mesh, Ranks};

/// What a stage waits for, or sends.
const ROWS: &str = "rows go from stage to stage";

/// What rank 0 tells the others when nothing more comes.
pub(super) const DISMISSAL: &[u8] = b"";

/// A decoder's place among the stages of its model.
#[derive(Debug)]
pub struct Stage<D: Device> {
    part: Part,
    ranks: Ranks<D>,
    /// Whether rank 0 leads.
    led: bool,
    /// Sessions that were opened.
    sessions: AtomicU64,
}

impl<D: Device> Stage<D> {
    /// Without its neighbours: what would come from them is not said, and what goes to them is dropped. It serves for
    /// dry runs, and is all there is of a whole model.
    pub fn planned(part: &Part) -> Self {
        Self {
            part: *part,
            ranks: Ranks::alone(),
            led: false,
            sessions: AtomicU64::new(0),
        }
    }

    /// A part of a model whose other parts are on other ranks, which make the same calls.
    pub fn together(part: &Part, ranks: Ranks<D>) -> Self {
        let (part, sessions) = (*part, AtomicU64::new(0));
        Self {
            part,
            ranks,
            led: false,
            sessions,
        }
    }

    /// A part of a model whose other parts are on other ranks, which do what rank 0 tells them.
    pub fn led(part: &Part, ranks: Ranks<D>) -> Self {
        let mut stage = Self::together(part, ranks);
        stage.led = true;
        stage
    }

    /// The stage of a rank.
    pub fn of_rank(rank: usize, world: usize) -> usize {
        world - 1 - rank
    }

    /// Whether the whole model is here.
    pub fn is_whole(&self) -> bool {
        self.part == Part::WHOLE
    }

    /// The connections to the other stages, where there are any.
    pub fn mesh(&self) -> Option<&Mesh> {
        self.ranks.mesh()
    }

    /// The connections to the stages that do what this one tells them.
    pub(super) fn followers(&self) -> Option<&Mesh> {
        self.mesh().filter(|mesh| self.led && mesh.rank() == 0)
    }

    /// The number of the next session, which all stages give it.
    pub(super) fn next_session(&self) -> u64 {
        self.sessions.fetch_add(1, Ordering::Relaxed)
    }

    /// Activations that the stage before has sent.
    pub fn from_before(&self, device: &D, len: usize) -> Result<D::Buffer> {
        self.receive(device, len, self.ranks.rank() + 1)
    }

    /// Sends activations to the stage after this one.
    pub fn to_after(&self, device: &D, buffer: D::Buffer) -> Result<()> {
        let to = self.ranks.rank().saturating_sub(1);
        Ok(self.ranks.send(device, buffer, to, ROWS)?)
    }

    /// Gradients that the stage after this one has sent.
    pub fn from_after(&self, device: &D, len: usize) -> Result<D::Buffer> {
        self.receive(device, len, self.ranks.rank().saturating_sub(1))
    }

    /// Sends gradients to the stage before.
    pub fn to_before(&self, device: &D, buffer: D::Buffer) -> Result<()> {
        let to = self.ranks.rank() + 1;
        Ok(self.ranks.send(device, buffer, to, ROWS)?)
    }

    fn receive(&self, device: &D, len: usize, from: usize) -> Result<D::Buffer> {
        let mut buffer = device.empty(Kind::Activation, len)?;
        self.ranks.receive(device, &mut buffer, from, ROWS)?;
        Ok(buffer)
    }
}

impl<D: Device> Drop for Stage<D> {
    fn drop(&mut self) {
        let Some(mesh) = self.followers() else {
            return;
        };
        for rank in 1..mesh.world() {
            // One that is lost needs no dismissal.
            let _ = mesh.post(rank, DISMISSAL.to_vec(), "rank 0 dismisses the others");
        }
    }
}
