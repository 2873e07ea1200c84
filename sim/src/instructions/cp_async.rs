//! cp.async: copies that are issued now and land later, at a random moment, at the latest when waited for.

use std::collections::VecDeque;

use super::context::Context;
use crate::checks::access::Access;
use crate::checks::report::Kind;
use crate::checks::shadow::{INITIALIZED, Mode, PENDING};
use crate::checks::symbols::Site;

/// One copy into shared memory.
#[derive(Clone, Copy)]
struct Copy {
    operands: Operands,
    site: Site,
    landed: bool,
}

/// Source, destination and size of a copy, of which only the first `valid` bytes are read.
#[derive(Clone, Copy)]
pub(crate) struct Operands {
    pub destination: usize,
    pub source: usize,
    pub size: usize,
    pub valid: usize,
}

/// The copies a thread has issued and not waited for.
#[derive(Default)]
pub(crate) struct ThreadCopies {
    open: Vec<Copy>,
    groups: VecDeque<Vec<Copy>>,
}

impl ThreadCopies {
    /// cp.async by the running thread. The destination is unreadable until the thread has waited; the data are there at
    /// once where `lands_early`.
    pub fn issue(&mut self, cx: &mut Context, operands: Operands, lands_early: bool, site: Site) {
        let Operands {
            destination,
            source,
            size,
            valid,
        } = operands;
        let action = "issued cp.async";
        if !matches!(size, 4 | 8 | 16) || valid > size {
            let place = format!("copying {valid} of {size} bytes");
            return cx.report(Kind::Operand, action, site, place);
        }
        if !source.is_multiple_of(size) && valid != 0 {
            let place = format!("source {source:#x}, size {size}");
            cx.report(Kind::Misaligned, action, site, place);
        }
        if !cx.is_shared(destination) {
            let place = cx.describe(destination);
            return cx.refuse(Kind::OutOfBounds, action, site, place);
        }
        let write = Access {
            flags: PENDING,
            ..Access::new(destination, size, Mode::Write, "issued cp.async into")
        };
        let read = Access::new(source, valid, Mode::Read, "issued cp.async from");
        if !cx.access(write, site) || valid > 0 && !cx.access(read, site) {
            return;
        }
        // SAFETY: the destination lies in the block's shared memory.
        unsafe { std::ptr::write_bytes(destination as *mut u8, 0xff, size) };
        let mut copy = Copy {
            operands,
            site,
            landed: false,
        };
        if lands_early {
            copy.land();
        }
        self.open.push(copy);
    }

    /// cp.async.commit_group.
    pub fn commit(&mut self) {
        self.groups.push_back(std::mem::take(&mut self.open));
    }

    /// cp.async.wait_group: all groups but the newest `newest_left` have landed and are this thread's writes.
    pub fn wait(&mut self, cx: &mut Context, newest_left: usize, site: Site) {
        while self.groups.len() > newest_left {
            for mut copy in self.groups.pop_front().into_iter().flatten() {
                let Operands {
                    destination,
                    source,
                    size,
                    valid,
                } = copy.operands;
                if valid > 0 {
                    let read = Access::new(source, valid, Mode::Read, "waited for a copy from");
                    cx.access(read, site);
                }
                copy.land();
                let write = Access::new(destination, size, Mode::Land, "waited for a copy into");
                let flags = INITIALIZED;
                cx.access(Access { flags, ..write }, site);
            }
        }
    }

    /// Lands the oldest copy that is still in flight.
    pub fn land_one(&mut self) {
        let copies = self.groups.iter_mut().chain([&mut self.open]).flatten();
        if let Some(copy) = copies.into_iter().find(|copy| !copy.landed) {
            copy.land();
        }
    }

    /// Reports a copy that the thread, which ends, has not waited for.
    pub fn check_at_end(&self, cx: &mut Context) {
        let left = self.groups.iter().chain([&self.open]).flatten().next();
        if let (true, Some(copy)) = (cx.checker.enabled(), left) {
            let place = "which nobody waited for before the thread ended".to_string();
            cx.report(Kind::Leak, "issued cp.async", copy.site, place);
        }
    }
}

impl Copy {
    fn land(&mut self) {
        if std::mem::replace(&mut self.landed, true) {
            return;
        }
        let Operands {
            destination,
            source,
            size,
            valid,
        } = self.operands;
        // SAFETY: both ranges were checked when the copy was issued (with checks on), or are the kernel's own
        // addresses as real hardware would use them; shared and global memory never overlap.
        unsafe {
            let to = destination as *mut u8;
            std::ptr::copy_nonoverlapping(source as *const u8, to, valid);
            std::ptr::write_bytes(to.add(valid), 0, size - valid);
        }
    }
}
