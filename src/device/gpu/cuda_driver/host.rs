//! Pinned host memory, which the GPU reads over the bus.
//!
//! The driver's own allocation touches pages on one thread: 1.8 GiB/s were measured. Where the system allows it, all
//! threads touch huge pages first (28 GiB/s with eight), and the driver then pins them (40 GiB/s).

use std::ffi::c_void;

use cudarc::driver::{DriverError, sys};

use crate::device::HostMemory;

/// Why an allocation failed.
pub(super) enum Refused {
    /// The host has too little memory.
    Full,
    /// What the driver says.
    Driver(DriverError),
}

/// Pinned memory of the current context, at a multiple of 4096 bytes; contents arbitrary.
pub(super) fn allocate(bytes: usize) -> Result<u64, Refused> {
    // Pages that are touched and not there would end the program.
    if HostMemory::now().left().is_some_and(|left| bytes > left) {
        return Err(Refused::Full);
    }
    pages::allocate(bytes)
}

/// Frees memory.
///
/// # Safety
/// `address` came from [`allocate`] with the same `bytes`, and nothing uses it any more.
pub(super) unsafe fn free(address: u64, bytes: usize) -> Result<(), DriverError> {
    // SAFETY: the caller's promise.
    unsafe { pages::free(address as *mut c_void, bytes) }
}

#[cfg(all(target_os = "linux", target_env = "gnu"))]
mod pages {
    use super::*;
    use rayon::prelude::*;

    /// Bytes that a task touches, and of the smallest page.
    const PIECE: usize = 2 << 20;
    const PAGE: usize = 4096;

    pub fn allocate(bytes: usize) -> Result<u64, Refused> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: new pages, of nobody else.
        let pages = unsafe { libc::mmap(std::ptr::null_mut(), bytes, access, flags, -1, 0) };
        if pages == libc::MAP_FAILED {
            return Err(Refused::Full);
        }
        // SAFETY: the pages are there, zeroed by the system, and ours alone.
        let all = unsafe {
            // Small pages do as well, only slower.
            libc::madvise(pages, bytes, libc::MADV_HUGEPAGE);
            std::slice::from_raw_parts_mut(pages.cast::<u8>(), bytes)
        };
        all.par_chunks_mut(PIECE).for_each(|piece| {
            for page in piece.chunks_mut(PAGE) {
                // SAFETY: the first byte of a slice that has one; volatile, since nobody reads it here.
                unsafe { std::ptr::from_mut(&mut page[0]).write_volatile(0) };
            }
        });
        let flags = sys::CU_MEMHOSTREGISTER_PORTABLE | sys::CU_MEMHOSTREGISTER_DEVICEMAP;
        // SAFETY: as above; they stay until `free`.
        let pinned = unsafe { sys::cuMemHostRegister_v2(pages, bytes, flags) }.result();
        if let Err(error) = pinned {
            // SAFETY: mapped above.
            unsafe { libc::munmap(pages, bytes) };
            return Err(Refused::Driver(error));
        }
        Ok(pages as u64)
    }

    pub unsafe fn free(pages: *mut c_void, bytes: usize) -> Result<(), DriverError> {
        // SAFETY: the caller's promise.
        unsafe {
            let unpinned = sys::cuMemHostUnregister(pages).result();
            // Also after an error, or the pages would be lost: nobody else knows of them.
            libc::munmap(pages, bytes);
            unpinned
        }
    }
}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
mod pages {
    use super::*;
    use cudarc::driver::result;

    pub fn allocate(bytes: usize) -> Result<u64, Refused> {
        let flags = sys::CU_MEMHOSTALLOC_PORTABLE | sys::CU_MEMHOSTALLOC_DEVICEMAP;
        // SAFETY: contents may be anything.
        let allocated = unsafe { result::malloc_host(bytes, flags) };
        allocated.map(|pages| pages as u64).map_err(Refused::Driver)
    }

    pub unsafe fn free(pages: *mut c_void, _: usize) -> Result<(), DriverError> {
        // SAFETY: the caller's promise.
        unsafe { result::free_host(pages) }
    }
}
