//! Recordings of calls, which one call of the driver replays. Decoding steps use them.

use std::sync::Arc;

use super::memory::Recorded;
use super::{Driver, Gpu};
use crate::device::{self, DeviceError, Result};

/// Recorded calls, and the memory that they allocated. It is reserved for them as long as the recording exists.
#[derive(Debug)]
pub struct Recording<D: Driver> {
    gpu: Gpu<D>,
    graph: D::Graph,
    memory: Arc<Recorded<D>>,
}

impl<D: Driver> device::Recording for Recording<D> {
    fn replay(&self) -> Result<()> {
        // SAFETY: the calls were checked when they were recorded; all memory that they use is there, and the tables
        // that they read have been checked against what they rely on (`Step`).
        let replay = || unsafe { self.gpu.driver().replay(&self.graph) };
        match self.gpu.memory.while_kept(&self.memory, replay) {
            Some(replayed) => Ok(replayed?),
            None => {
                let (expected, got) = ("buffers that still exist", "one that was dropped");
                Err(DeviceError::argument("recorded calls", expected, got))
            }
        }
    }
}

/// Ends the recording on drop, also if `work` panics.
struct Recorder<'a, D: Driver> {
    gpu: &'a Gpu<D>,
    open: bool,
}

impl<D: Driver> Recorder<'_, D> {
    fn end(&mut self) -> Result<D::Graph> {
        self.open = false;
        self.gpu.memory.set_recorded(None);
        Ok(self.gpu.driver().recorded()?)
    }
}

impl<D: Driver> Drop for Recorder<'_, D> {
    fn drop(&mut self) {
        if self.open {
            // Only a panic leads here, which says more than the driver's error.
            let _ = self.end();
        }
    }
}

pub(super) fn record<D: Driver, T>(
    gpu: &Gpu<D>,
    work: impl FnOnce() -> Result<T>,
) -> Result<(T, Recording<D>)> {
    let memory = Arc::new(Recorded::default());
    gpu.driver().record()?;
    gpu.memory.set_recorded(Some(memory.clone()));
    let mut recorder = Recorder { gpu, open: true };
    let made = work();
    let graph = recorder.end();
    // What went wrong in `work` says more than what became of the graph.
    let made = made?;
    let recording = Recording {
        gpu: gpu.clone(),
        graph: graph?,
        memory,
    };
    Ok((made, recording))
}
