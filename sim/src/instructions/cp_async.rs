//! cp.async: copies that are issued now and land later, at a random moment, at the latest when waited for.

use std::collections::VecDeque;

use crate::checks::report::{Kind, Site};
use crate::checks::shadow::{INITIALIZED, PENDING};
use crate::instructions::access::{Access, Mode};
use crate::machine::launch::Launch;

/// One copy into shared memory.
#[derive(Clone, Copy)]
pub(crate) struct Copy {
    destination: usize,
    source: usize,
    size: usize,
    valid: usize,
    site: Site,
    landed: bool,
}

/// The copies a thread has issued and not waited for.
#[derive(Default)]
pub(crate) struct ThreadCopies {
    open: Vec<Copy>,
    groups: VecDeque<Vec<Copy>>,
}

impl ThreadCopies {
    /// A copy nobody waited for.
    pub fn unfinished(&self) -> Option<Site> {
        self.groups
            .iter()
            .chain([&self.open])
            .flatten()
            .next()
            .map(|copy| copy.site)
    }

    /// Lands the oldest copy that is still in flight.
    pub fn land_one(&mut self) {
        let copies = self.groups.iter_mut().chain([&mut self.open]).flatten();
        if let Some(copy) = copies.into_iter().find(|copy| !copy.landed) {
            land(copy);
        }
    }
}

fn land(copy: &mut Copy) {
    if !std::mem::replace(&mut copy.landed, true) {
        // SAFETY: both ranges were checked when the copy was issued (with checks on), or are the kernel's own
        // addresses as real hardware would use them; shared and global memory never overlap.
        unsafe {
            std::ptr::copy_nonoverlapping(
                copy.source as *const u8,
                copy.destination as *mut u8,
                copy.valid,
            );
            std::ptr::write_bytes(
                (copy.destination + copy.valid) as *mut u8,
                0,
                copy.size - copy.valid,
            );
        }
    }
}

impl Launch {
    /// cp.async by the running thread. The destination is unreadable until the thread has waited.
    pub fn cp_async(
        &mut self,
        destination: usize,
        source: usize,
        size: u32,
        valid: u32,
        site: Site,
    ) {
        let (size, valid) = (size as usize, valid as usize);
        if !matches!(size, 4 | 8 | 16) || valid > size {
            self.report(
                Kind::Operand,
                "issued cp.async",
                site,
                format!("copying {valid} of {size} bytes"),
            );
            return;
        }
        let write = Access {
            flags: PENDING,
            ..Access::new(destination, size, Mode::Write, "issued cp.async into")
        };
        let read = Access::new(source, valid, Mode::Read, "issued cp.async from");
        let aligned = source.is_multiple_of(size) || valid == 0;
        if !aligned {
            self.report(
                Kind::Misaligned,
                "issued cp.async",
                site,
                format!("source {source:#x}, size {size}"),
            );
        }
        if !self.is_shared(destination) {
            self.report(
                Kind::OutOfBounds,
                "issued cp.async",
                site,
                self.describe(destination),
            );
            self.fatal = true;
            return;
        }
        if !self.access(write, site) || valid > 0 && !self.access(read, site) {
            return;
        }
        // SAFETY: the destination lies in the block's shared memory.
        unsafe { std::ptr::write_bytes(destination as *mut u8, 0xff, size) };
        let mut copy = Copy {
            destination,
            source,
            size,
            valid,
            site,
            landed: false,
        };
        if self.rng.below(4) == 0 {
            land(&mut copy);
        }
        self.thread_mut().copies.open.push(copy);
    }

    /// cp.async.commit_group.
    pub fn cp_async_commit(&mut self) {
        let copies = &mut self.thread_mut().copies;
        let group = std::mem::take(&mut copies.open);
        copies.groups.push_back(group);
    }

    /// cp.async.wait_group: all groups but the newest `newest_left` have landed and are this thread's writes.
    pub fn cp_async_wait(&mut self, newest_left: usize, site: Site) {
        while self.thread_mut().copies.groups.len() > newest_left {
            for mut copy in self
                .thread_mut()
                .copies
                .groups
                .pop_front()
                .into_iter()
                .flatten()
            {
                if copy.valid > 0 {
                    self.access(
                        Access::new(
                            copy.source,
                            copy.valid,
                            Mode::Read,
                            "waited for a copy from",
                        ),
                        site,
                    );
                }
                land(&mut copy);
                let write = Access::new(
                    copy.destination,
                    copy.size,
                    Mode::Land,
                    "waited for a copy into",
                );
                self.access(
                    Access {
                        flags: INITIALIZED,
                        ..write
                    },
                    site,
                );
            }
        }
    }
}
