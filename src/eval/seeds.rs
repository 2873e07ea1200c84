//! What makes a sample the same sample again.

use super::kind::TaskKind;
use crate::random::Random;

/// All that a sample's content depends on.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Seeds {
    pub(crate) seed: u64,
    pub(crate) task: TaskKind,
    pub(crate) length: usize,
    pub(crate) index: usize,
}

impl Seeds {
    /// The generator that belongs to one purpose.
    pub(crate) fn random(&self, purpose: u8) -> Random {
        let mut key = [0u8; 32];
        key[..8].copy_from_slice(&self.seed.to_le_bytes());
        key[8..16].copy_from_slice(&(self.length as u64).to_le_bytes());
        key[16..24].copy_from_slice(&(self.index as u64).to_le_bytes());
        key[24] = self.task.code();
        key[25] = purpose;
        Random::from_key(key)
    }
}
