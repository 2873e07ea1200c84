//! One access to memory, as the checks are told of it.

use super::shadow::INITIALIZED;

/// How memory is touched.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Mode {
    Read,
    Write,
    /// The write of an asynchronous copy becomes its thread's own.
    Land,
}

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
