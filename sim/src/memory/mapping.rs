//! Zeroed anonymous memory that costs nothing until it is touched.

use std::io;

/// A private anonymous mapping without swap reservation: terabytes of addresses, paid for by the page touched.
pub(crate) struct Mapping {
    base: *mut u8,
    len: usize,
}

// SAFETY: the memory belongs to this value alone, whatever thread it is on.
unsafe impl Send for Mapping {}

impl Mapping {
    /// Maps `len` zeroed bytes (at least one page).
    pub fn new(len: usize) -> io::Result<Mapping> {
        let len = len.max(1);
        // SAFETY: a fresh anonymous private mapping; no existing memory is touched.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Mapping {
            base: base.cast(),
            len,
        })
    }

    /// Gives the memory back and keeps the addresses; the bytes are zero again.
    pub fn discard(&mut self) {
        // SAFETY: a mapping that this value owns, with no reference into it alive.
        unsafe { libc::madvise(self.base.cast(), self.len, libc::MADV_DONTNEED) };
    }

    /// First address; page aligned.
    pub fn base(&self) -> *mut u8 {
        self.base
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: `base` and `len` are those of a mapping this value owns alone.
        unsafe { libc::munmap(self.base.cast(), self.len) };
    }
}
