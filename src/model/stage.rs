//! A model over several processes: each computes consecutive layers, a *stage*, and hands the residual stream on.
//!
//! Rank 0 has the last stage, whose results are the model's; the highest rank has the first. The neighbour before is
//! the next higher rank. Rank 0 leads: it tells the others what to read ([`follow`](super::session::follow)).

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use super::config::Part;
use crate::device::{Device, Kind, Result};
use crate::ranks::{Mesh, ON_THEIR_WAY, Ranks};

/// What a stage waits for, or sends.
const ROWS: &str = "rows go from stage to stage";

/// What rank 0 tells the others when nothing more comes.
pub(super) const DISMISSAL: &[u8] = b"";

/// A decoder's place among the stages of its model.
#[derive(Debug)]
pub struct Stage<D: Device> {
    part: Part,
    ranks: Ranks<D>,
    /// In a dry run, what would be on its way to the next stage.
    sent: Mutex<VecDeque<D::Buffer>>,
    /// Sessions that were opened.
    sessions: AtomicU64,
}

impl<D: Device> Stage<D> {
    /// Without its neighbours: what would come from them is not said, and what goes to them is dropped. It serves for
    /// dry runs, and is all there is of a whole model.
    pub fn planned(part: &Part) -> Self {
        Self::on(part, Ranks::alone())
    }

    /// A part of a model whose other parts are on other ranks. All of them call it together.
    ///
    /// # Errors
    /// That a neighbour cannot be reached.
    pub fn connected(device: &D, part: &Part, ranks: Ranks<D>) -> Result<Self> {
        let stage = Self::on(part, ranks);
        // The first buffer between two ranks is slow with some engines: it is none that anybody waits for.
        if !part.begins {
            stage.from_before(device, 1)?;
        }
        if !part.ends {
            stage.to_after(device, device.zeros(Kind::Activation, 1)?)?;
        }
        Ok(stage)
    }

    fn on(part: &Part, ranks: Ranks<D>) -> Self {
        Self {
            part: *part,
            ranks,
            sent: Mutex::default(),
            sessions: AtomicU64::new(0),
        }
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
        self.mesh().filter(|mesh| mesh.rank() == 0)
    }

    /// The number of the next session, which all stages give it.
    pub(super) fn next_session(&self) -> u64 {
        self.sessions.fetch_add(1, Ordering::Relaxed)
    }

    /// Activations that the stage before has sent.
    pub fn from_before(&self, device: &D, len: usize) -> Result<D::Buffer> {
        let mut buffer = device.empty(Kind::Activation, len)?;
        let from = self.ranks.rank() + 1;
        self.ranks.receive(device, &mut buffer, from, ROWS)?;
        Ok(buffer)
    }

    /// Sends activations to the stage after this one.
    pub fn to_after(&self, device: &D, buffer: D::Buffer) -> Result<()> {
        if self.ranks.world() > 1 {
            let to = self.ranks.rank() - 1;
            return Ok(self.ranks.send(device, buffer, to, ROWS)?);
        }
        let mut sent = self.sent.lock().unwrap_or_else(PoisonError::into_inner);
        sent.push_back(buffer);
        if sent.len() > ON_THEIR_WAY {
            sent.pop_front();
        }
        Ok(())
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
