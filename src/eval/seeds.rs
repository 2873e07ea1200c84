//! What makes a sample the same sample again.

use super::kind::TaskKind;
use super::text::Random;

/// All that a sample's content depends on.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Seeds {
    pub(crate) seed: u64,
    pub(crate) task: TaskKind,
    pub(crate) length: usize,
    pub(crate) index: usize,
}

impl Seeds {
    pub(crate) fn random(&self, purpose: u8) -> Random {
        Random::new(
            self.seed,
            self.task.code(),
            self.length,
            self.index,
            purpose,
        )
    }
}
