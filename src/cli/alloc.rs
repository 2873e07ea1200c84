//! Counts the bytes that are allocated, so that commands can show how much memory a computation takes
//! at its highest, whatever the operating system keeps for itself.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicBool, AtomicIsize, Ordering::Relaxed};

/// Whether [`peak_of`] counts. Otherwise nobody writes to memory that all threads share: they would wait for each
/// other at every allocation.
static COUNTING: AtomicBool = AtomicBool::new(false);
/// Bytes beyond those of when it began, now and at their highest.
static NOW: AtomicIsize = AtomicIsize::new(0);
static PEAK: AtomicIsize = AtomicIsize::new(0);

/// The system's allocator with a count.
struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

// SAFETY: every call goes to the system's allocator with the same arguments.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if COUNTING.load(Relaxed) {
            let size = layout.size() as isize;
            let now = NOW.fetch_add(size, Relaxed) + size;
            PEAK.fetch_max(now, Relaxed);
        }
        // SAFETY: the caller's obligations are those of the system's allocator.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        if COUNTING.load(Relaxed) {
            NOW.fetch_sub(layout.size() as isize, Relaxed);
        }
        // SAFETY: as above.
        unsafe { System.dealloc(place, layout) }
    }
}

/// Keeps freed memory in the process: a step frees what the next one needs again, and to get those pages
/// anew from the system costs a fifth of a small model's training step.
pub fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    for setting in [libc::M_MMAP_THRESHOLD, libc::M_TRIM_THRESHOLD] {
        // SAFETY: mallopt takes any numbers; what it does not accept changes nothing.
        unsafe { libc::mallopt(setting, 1 << 30) };
    }
}

/// Bytes that `work` needs at its highest beyond what is allocated when it begins.
pub fn peak_of<T>(work: impl FnOnce() -> T) -> (T, usize) {
    // What the CPU device keeps from before would serve this work uncounted.
    segattn::device::cpu::release_memory();
    for count in [&NOW, &PEAK] {
        count.store(0, Relaxed);
    }
    COUNTING.store(true, Relaxed);
    let result = work();
    COUNTING.store(false, Relaxed);
    (result, PEAK.load(Relaxed).unsigned_abs())
}
