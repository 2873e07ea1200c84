//! A model over several processes: each computes consecutive layers, a *stage*, and hands the residual stream on.
//!
//! Rank 0 has the last stage, whose results are the model's; the highest rank has the first. The neighbour before is
//! the next higher rank. Gradients go the other way. Rank 0 leads: it tells the others what to read
//! ([`follow`](super::session::follow)). In training all ranks know.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use super::config::{ModelConfig, Part};
use crate::device::{Device, Kind, Result};
use crate::ranks::{Mesh, ON_THEIR_WAY, Ranks};

/// What a stage waits for, or sends.
const ROWS: &str = "rows go from stage to stage";
/// The same in training's backward pass.
const GRADIENTS: &str = "gradients go from stage to stage";

/// What rank 0 tells the others when nothing more comes.
pub(super) const DISMISSAL: &[u8] = b"";

/// A decoder's place among the stages of its model.
#[derive(Debug)]
pub struct Stage<D: Device> {
    part: Part,
    ranks: Ranks<D>,
    /// Where rank 0 tells the others what to do, the whole model.
    whole: Option<Box<ModelConfig>>,
    /// In a dry run, what would be on its way to the stage behind, to the one before, and from the last to the first.
    sent: [Mutex<VecDeque<D::Buffer>>; 3],
    /// Sessions that were opened.
    sessions: AtomicU64,
}

impl<D: Device> Stage<D> {
    /// Without its neighbours: zeros come from the one before, and what goes to them is dropped. It serves for dry runs
    /// and rehearsals, and is all there is of a whole model.
    pub fn planned(part: &Part) -> Self {
        Self::on(part, Ranks::alone(), None)
    }

    /// A part of the model `whole` whose other parts are on other ranks. All of them call it together.
    ///
    /// # Errors
    /// That a neighbour cannot be reached.
    pub fn connected(device: &D, part: &Part, whole: ModelConfig, ranks: Ranks<D>) -> Result<Self> {
        let stage = Self::on(part, ranks, Some(whole));
        stage.try_forwards(device)?;
        Ok(stage)
    }

    /// [`Stage::connected`] for training, where gradients go back and all ranks know what to do. With the ranks of a
    /// plan it has no neighbours, as [`Stage::planned`].
    ///
    /// # Errors
    /// As [`Stage::connected`].
    pub fn in_training(device: &D, part: &Part, ranks: Ranks<D>) -> Result<Self> {
        let stage = Self::on(part, ranks, None);
        if stage.mesh().is_some() {
            stage.try_forwards(device)?;
            if !part.ends {
                stage.from_after(device, 1)?;
            }
            if !part.begins {
                stage.to_before(device, Some(device.zeros(Kind::Activation, 1)?))?;
            }
        }
        Ok(stage)
    }

    fn on(part: &Part, ranks: Ranks<D>, whole: Option<ModelConfig>) -> Self {
        Self {
            part: *part,
            ranks,
            whole: whole.map(Box::new),
            sent: Default::default(),
            sessions: AtomicU64::new(0),
        }
    }

    /// The first buffer between two ranks is slow with some engines: it is none that anybody waits for.
    fn try_forwards(&self, device: &D) -> Result<()> {
        if !self.part.begins {
            self.from_before(device, 1)?;
        }
        if !self.part.ends {
            self.to_after(device, device.zeros(Kind::Activation, 1)?)?;
        }
        Ok(())
    }

    /// The stage of a rank.
    pub fn of_rank(rank: usize, world: usize) -> usize {
        world - 1 - rank
    }

    /// Whether the whole model is here.
    pub fn is_whole(&self) -> bool {
        self.part == Part::WHOLE
    }

    /// Number of stages behind this one.
    pub fn behind(&self) -> usize {
        self.ranks.rank()
    }

    /// The processes that have the stages.
    pub fn ranks(&self) -> &Ranks<D> {
        &self.ranks
    }

    /// The connections to the other stages, where there are any.
    pub fn mesh(&self) -> Option<&Mesh> {
        self.ranks.mesh()
    }

    /// The connections to the stages that do what this one tells them.
    pub(super) fn followers(&self) -> Option<&Mesh> {
        let leads = |mesh: &&Mesh| self.whole.is_some() && mesh.rank() == 0;
        self.mesh().filter(leads)
    }

    /// The whole model, where this is a part of it that is led or leads.
    pub(super) fn whole(&self) -> Option<&ModelConfig> {
        self.whole.as_deref()
    }

    /// The number of the next session, which all stages give it.
    pub(super) fn next_session(&self) -> u64 {
        self.sessions.fetch_add(1, Ordering::Relaxed)
    }

    /// Activations that the stage before has sent; zeros without neighbours.
    pub fn from_before(&self, device: &D, len: usize) -> Result<D::Buffer> {
        if self.mesh().is_none() {
            return device.zeros(Kind::Activation, len);
        }
        let mut buffer = device.empty(Kind::Activation, len)?;
        let from = self.ranks.rank() + 1;
        self.ranks.receive(device, &mut buffer, from, ROWS)?;
        Ok(buffer)
    }

    /// Sends activations to the stage after this one.
    pub fn to_after(&self, device: &D, buffer: D::Buffer) -> Result<()> {
        match self.mesh() {
            Some(mesh) => Ok(self.ranks.send(device, buffer, mesh.rank() - 1, ROWS)?),
            None => {
                keep_sent(&self.sent[0], buffer);
                Ok(())
            }
        }
    }

    /// The gradient of activations that the stage after has sent; `None` where it is zero.
    pub fn from_after(&self, device: &D, len: usize) -> Result<Option<D::Buffer>> {
        let from = self.ranks.rank().saturating_sub(1);
        if !self.ranks.hear(from, GRADIENTS)? {
            return Ok(None);
        }
        let mut buffer = device.empty(Kind::Activation, len)?;
        self.ranks.receive(device, &mut buffer, from, GRADIENTS)?;
        Ok(Some(buffer))
    }

    /// Sends the gradient of activations to the stage before this one; `None` where it is zero.
    pub fn to_before(&self, device: &D, gradient: Option<D::Buffer>) -> Result<()> {
        let to = self.ranks.rank() + 1;
        self.ranks.tell(to, gradient.is_some(), GRADIENTS)?;
        match (gradient, self.mesh()) {
            (Some(buffer), Some(_)) => Ok(self.ranks.send(device, buffer, to, GRADIENTS)?),
            (Some(buffer), None) => {
                keep_sent(&self.sent[1], buffer);
                Ok(())
            }
            (None, _) => Ok(()),
        }
    }

    /// Waits until nothing that was sent takes memory of the device any more.
    pub(crate) fn finish(&self) -> Result<()> {
        for sent in &self.sent {
            sent.lock().unwrap_or_else(PoisonError::into_inner).clear();
        }
        Ok(self.ranks.finish(ROWS)?)
    }

    /// Sends the head's share of a tied embedding's gradient from the last stage to the first, where it is added.
    pub(crate) fn head_to_first(&self, device: &D, share: D::Buffer) -> Result<()> {
        if self.mesh().is_none() {
            keep_sent(&self.sent[2], share);
            return Ok(());
        }
        let to = self.ranks.world() - 1;
        Ok(self.ranks.send(device, share, to, GRADIENTS)?)
    }

    /// Fills `share` with what the last stage sends by [`Stage::head_to_first`].
    pub(crate) fn head_from_last(&self, device: &D, share: &mut D::Buffer) -> Result<()> {
        Ok(self.ranks.receive(device, share, 0, GRADIENTS)?)
    }
}

/// Keeps as many buffers as are on their way where there is somebody to send them to.
fn keep_sent<B>(sent: &Mutex<VecDeque<B>>, buffer: B) {
    let mut sent = sent.lock().unwrap_or_else(PoisonError::into_inner);
    sent.push_back(buffer);
    if sent.len() > ON_THEIR_WAY {
        sent.pop_front();
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
