//! One access to memory, as the checks are told of it.

use super::shadow::{INITIALIZED, Mode};

/// An access by a thread or an asynchronous agent.
#[derive(Clone, Copy)]
pub(crate) struct Access {
    pub address: usize,
    pub bytes: usize,
    pub mode: Mode,
    /// Flags of the shadow cell, see [`super::shadow`].
    pub flags: u16,
    /// Required alignment, 1 for none.
    pub alignment: usize,
    /// For reports: "read" or "wrote" and the like.
    pub action: &'static str,
}

impl Access {
    /// An access aligned to its size.
    pub fn new(address: usize, bytes: usize, mode: Mode, action: &'static str) -> Access {
        let flags = if mode == Mode::Read { 0 } else { INITIALIZED };
        Access {
            address,
            bytes,
            mode,
            flags,
            alignment: bytes.max(1),
            action,
        }
    }
}
