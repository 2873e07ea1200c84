//! The host's memory, as far as the system tells.

use std::fs;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde::Serialize;

use super::OutOfMemory;

/// Bytes that may be asked for before the system is asked again what is left; so much is never taken.
const UNSEEN: usize = 64 << 20;

/// Bytes of the host's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct HostMemory {
    /// All of it.
    pub total: Option<u64>,
    /// What programs can still have of it.
    pub available: Option<u64>,
    /// Limit of the container or service, where that is less than all.
    pub limit: Option<u64>,
}

impl HostMemory {
    /// As it is now.
    pub fn now() -> Self {
        let info = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let limit = [
            "/sys/fs/cgroup/memory.max",
            "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        ]
        .iter()
        .find_map(|path| fs::read_to_string(path).ok()?.trim().parse().ok());
        let total = kib(&info, "MemTotal:");
        Self {
            total,
            available: kib(&info, "MemAvailable:"),
            // Without a limit some systems report a number beyond all memory.
            limit: limit.filter(|limit| total.is_none_or(|total| *limit < total)),
        }
    }

    /// Refuses `bytes` that are about to be allocated where this program cannot have them. A system that promises more
    /// memory than it has would end the program when it writes there.
    ///
    /// # Errors
    /// [`OutOfMemory`].
    pub(crate) fn check(bytes: usize) -> Result<(), OutOfMemory> {
        static ASKED: AtomicUsize = AtomicUsize::new(0);
        let counted = bytes.min(UNSEEN);
        if ASKED.fetch_add(counted, Ordering::Relaxed) + counted < UNSEEN {
            return Ok(());
        }
        ASKED.store(0, Ordering::Relaxed);
        match Self::now().left() {
            Some(left) if bytes.saturating_add(UNSEEN) > left => Err(OutOfMemory {
                free: Some(left),
                ..OutOfMemory::device(bytes)
            }),
            _ => Ok(()),
        }
    }

    /// Bytes that this program can still have, where the system says so.
    pub fn left(&self) -> Option<usize> {
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        let own = kib(&status, "VmRSS:").unwrap_or(0);
        let of_group = self.limit.map(|limit| limit.saturating_sub(own));
        let left = self.available.into_iter().chain(of_group).min()?;
        usize::try_from(left).ok()
    }
}

/// The bytes on a line `name: number kB`.
fn kib(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}
