//! Bulk copies (TMA and cp.async.bulk): issued by one thread, carried out at a random moment by the async proxy,
//! with clocks of their own.

use std::collections::VecDeque;

use crate::checks::clock::Clock;
use crate::checks::report::{Kind, Site};
use crate::checks::shadow::{ASYNC, ATOMIC, INITIALIZED, PENDING};
use crate::instructions::access::{Access, Mode};
use crate::instructions::tensor_map::{CHUNK, Chunk, TensorMap};
use crate::machine::launch::Launch;

/// Bulk copies of a block that have clocks of their own; more share them in turn.
pub(crate) const COPY_SLOTS: usize = 16;

/// What a bulk copy does.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Direction {
    /// Into shared memory; the mbarrier at that address counts the bytes.
    Load {
        barrier: usize,
    },
    Store,
    /// Adds f32.
    ReduceAdd,
}

/// A bulk copy in flight.
pub(crate) struct BulkCopy {
    pub slot: u16,
    agent: u16,
    clock: Clock,
    direction: Direction,
    /// Chunks with `offset` an address in shared memory.
    chunks: Vec<Chunk>,
    site: Site,
    issuer: u16,
    serial: u64,
}

/// The bulk stores a thread has issued and not waited for: serial number, agent, clock of its reads.
#[derive(Default)]
pub(crate) struct ThreadBulk {
    open: Vec<(u64, u16, u32)>,
    groups: VecDeque<Vec<(u64, u16, u32)>>,
}

impl Launch {
    /// cp.async.bulk.tensor by the running thread.
    pub fn tensor_copy(
        &mut self,
        shared: usize,
        map: &TensorMap,
        at: &[i32],
        direction: Direction,
        site: Site,
    ) {
        let alignment = if map.swizzled() { 1024 } else { 128 };
        let base = self.block().shared.base;
        if !shared.is_multiple_of(alignment) || (direction == Direction::ReduceAdd && !map.is_f32())
        {
            let place = format!(
                "{}: a multiple of {alignment} and f32 for reductions",
                self.describe(shared)
            );
            return self.report(Kind::Operand, "issued a tensor copy", site, place);
        }
        let mut chunks = map.chunks(at);
        for chunk in &mut chunks {
            let offset = (shared - base).wrapping_add(chunk.offset);
            let swizzle = if map.swizzled() {
                (offset >> 7 & 7) << 4
            } else {
                0
            };
            chunk.offset = base.wrapping_add(offset ^ swizzle);
        }
        self.issue(chunks, direction, site);
    }

    /// cp.async.bulk of plain bytes by the running thread.
    pub fn bulk_copy(
        &mut self,
        shared: usize,
        global: usize,
        bytes: u32,
        direction: Direction,
        site: Site,
    ) {
        if !(shared | global | bytes as usize).is_multiple_of(CHUNK) {
            let place = format!("{bytes} bytes, {}: multiples of 16", self.describe(shared));
            return self.report(Kind::Operand, "issued a bulk copy", site, place);
        }
        let chunk = |at| Chunk {
            offset: shared + at,
            skip: 0,
            valid: CHUNK,
            global: global + at,
        };
        self.issue(
            (0..bytes as usize).step_by(CHUNK).map(chunk).collect(),
            direction,
            site,
        );
    }

    fn issue(&mut self, chunks: Vec<Chunk>, direction: Direction, site: Site) {
        if let Direction::Load { barrier } = direction
            && !self.usable_by_copies(barrier, site)
        {
            return;
        }
        let issuer = self.current.thread;
        let block = self.block_mut();
        let serial = block.copies_issued;
        block.copies_issued += 1;
        let agent = block.threads.len() + serial as usize % COPY_SLOTS;
        let thread = &mut block.threads[issuer as usize];
        let mut clock = thread.clock.clone();
        thread.clock.local[issuer as usize] += 1;
        // One tick for what is read now, the next for what is written when the copy lands.
        clock.local[agent] = 2 * serial as u32 + 1;
        if !matches!(direction, Direction::Load { .. }) {
            thread
                .bulk
                .open
                .push((serial, agent as u16, clock.local[agent]));
        }
        for chunk in &chunks {
            if !self.touch(agent as u16, &clock, chunk, direction, site) {
                return;
            }
        }
        let slot = self.current.slot;
        let agent = agent as u16;
        self.in_flight.push(BulkCopy {
            slot,
            agent,
            clock,
            direction,
            chunks,
            site,
            issuer,
            serial,
        });
    }

    /// Records what an issued copy does to one chunk from now on.
    fn touch(
        &mut self,
        agent: u16,
        clock: &Clock,
        chunk: &Chunk,
        direction: Direction,
        site: Site,
    ) -> bool {
        if !self.checks {
            return true;
        }
        if !self.block().shared.contains(chunk.offset, CHUNK) {
            let place = self.describe(chunk.offset);
            self.report(Kind::OutOfBounds, "issued a bulk copy", site, place);
            self.fatal = true;
            return false;
        }
        let load = matches!(direction, Direction::Load { .. });
        let mode = if load { Mode::Write } else { Mode::Read };
        let flags = if load { PENDING | ASYNC } else { 0 };
        let shared = Access {
            flags,
            ..Access::new(chunk.offset, CHUNK, mode, "touched shared memory")
        };
        let global = Access {
            alignment: 1,
            ..Access::new(chunk.global, chunk.valid, Mode::Read, "read")
        };
        if !self.access_by(agent, clock, shared, site) {
            return false;
        }
        if load {
            // SAFETY: inside the block's shared memory, checked above.
            unsafe { std::ptr::write_bytes(chunk.offset as *mut u8, 0xff, CHUNK) };
        }
        !load || chunk.valid == 0 || self.access_by(agent, clock, global, site)
    }

    /// Carries out one of the copies in flight.
    pub fn land_bulk_copy(&mut self, index: usize) {
        let mut copy = self.in_flight.swap_remove(index);
        let back = self.current;
        self.current.slot = copy.slot;
        self.current.thread = copy.issuer;
        let load = matches!(copy.direction, Direction::Load { .. });
        copy.clock.local[copy.agent as usize] += u32::from(!load);
        for chunk in &copy.chunks {
            let allowed = !self.checks || self.record_landing(&copy, chunk);
            if allowed {
                // SAFETY: the shared side was checked at issue, the global side at issue (loads) or just now.
                unsafe { move_chunk(chunk, copy.direction) };
            }
        }
        if let Direction::Load { barrier } = copy.direction {
            self.mbarrier_deliver(barrier, copy.chunks.len() * CHUNK, &copy.clock);
        }
        self.current = back;
    }

    fn record_landing(&mut self, copy: &BulkCopy, chunk: &Chunk) -> bool {
        let (address, bytes, mode, flags) = match copy.direction {
            Direction::Load { .. } => (chunk.offset, CHUNK, Mode::Land, INITIALIZED | ASYNC),
            _ if chunk.valid == 0 => return true,
            Direction::Store => (chunk.global, chunk.valid, Mode::Write, INITIALIZED | ASYNC),
            Direction::ReduceAdd => (
                chunk.global,
                chunk.valid,
                Mode::Write,
                INITIALIZED | ASYNC | ATOMIC,
            ),
        };
        let access = Access {
            flags,
            alignment: 1,
            ..Access::new(address, bytes, mode, "wrote")
        };
        self.access_by(copy.agent, &copy.clock, access, copy.site)
    }

    /// cp.async.bulk.commit_group by the running thread.
    pub fn bulk_commit(&mut self) {
        let bulk = &mut self.thread_mut().bulk;
        let group = std::mem::take(&mut bulk.open);
        bulk.groups.push_back(group);
    }

    /// cp.async.bulk.wait_group: the older stores have read their source and, unless `read`, written.
    pub fn bulk_wait(&mut self, newest_left: usize, read: bool) {
        while self.thread_mut().bulk.groups.len() > newest_left {
            for (serial, agent, clock) in self
                .thread_mut()
                .bulk
                .groups
                .pop_front()
                .into_iter()
                .flatten()
            {
                let slot = self.current.slot;
                let in_flight = self
                    .in_flight
                    .iter()
                    .position(|c| c.serial == serial && c.slot == slot);
                if let Some(index) = in_flight {
                    self.land_bulk_copy(index);
                }
                let known = &mut self.thread_mut().clock.local[agent as usize];
                *known = (*known).max(clock + u32::from(!read));
            }
        }
    }

    /// Reports copies still in flight when their block ends, and drops them.
    pub fn check_copies_at_end(&mut self) {
        let slot = self.current.slot;
        while let Some(index) = self.in_flight.iter().position(|copy| copy.slot == slot) {
            let copy = self.in_flight.swap_remove(index);
            let place = "in flight when its block ended".to_string();
            self.report_by(
                Kind::Leak,
                copy.issuer,
                "issued a bulk copy",
                copy.site,
                place,
            );
        }
    }
}

/// Moves one chunk.
///
/// # Safety
/// `chunk.offset` is the address of 16 accessible bytes, and `valid` bytes are accessible at `chunk.global`.
unsafe fn move_chunk(chunk: &Chunk, direction: Direction) {
    let inside = (chunk.offset + chunk.skip) as *mut u8;
    let global = chunk.global as *mut u8;
    // SAFETY: by contract; `skip + valid` is at most 16.
    unsafe {
        match direction {
            Direction::Load { .. } => {
                std::ptr::write_bytes(chunk.offset as *mut u8, 0, CHUNK);
                std::ptr::copy_nonoverlapping(global, inside, chunk.valid);
            }
            Direction::Store => std::ptr::copy_nonoverlapping(inside, global, chunk.valid),
            Direction::ReduceAdd => {
                for at in (0..chunk.valid).step_by(4) {
                    let (sum, term) = (global.add(at).cast::<f32>(), inside.add(at).cast::<f32>());
                    sum.write_unaligned(sum.read_unaligned() + term.read_unaligned());
                }
            }
        }
    }
}
