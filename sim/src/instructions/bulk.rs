//! Bulk copies (TMA and cp.async.bulk): issued by one thread, carried out at a random moment by the async proxy,
//! with clocks of their own.

use std::collections::VecDeque;

use super::context::Context;
use super::tensor_map::{CHUNK, Chunk, TensorMap};
use crate::checks::access::Access;
use crate::checks::clock::Clock;
use crate::checks::report::Kind;
use crate::checks::shadow::{ASYNC, ATOMIC, INITIALIZED, Mode, PENDING};
use crate::checks::symbols::Site;

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

impl Direction {
    fn is_load(self) -> bool {
        matches!(self, Direction::Load { .. })
    }
}

/// A bulk copy in flight.
struct BulkCopy {
    agent: u16,
    clock: Clock,
    direction: Direction,
    /// Chunks with `offset` an address in shared memory.
    chunks: Vec<Chunk>,
    site: Site,
    issuer: u16,
    serial: u64,
}

/// A load that has landed: its mbarrier gets the bytes.
pub(crate) struct Delivery {
    pub barrier: usize,
    pub bytes: usize,
    pub clock: Clock,
}

/// The bulk copies of a block.
pub(crate) struct BulkCopies {
    in_flight: Vec<BulkCopy>,
    issued: u64,
    stores: Vec<ThreadStores>,
}

/// The bulk stores a thread has issued and not waited for.
#[derive(Clone, Default)]
struct ThreadStores {
    open: Vec<Store>,
    groups: VecDeque<Vec<Store>>,
}

/// A store: its number, its agent, and the agent's clock when it reads its source.
#[derive(Clone, Copy)]
struct Store {
    serial: u64,
    agent: u16,
    clock: u32,
}

/// The chunks of cp.async.bulk.tensor between a box of a tensor and the shared memory at an address.
pub(crate) fn tensor_chunks(
    cx: &mut Context,
    shared: usize,
    map: &TensorMap,
    at: &[i32],
    direction: Direction,
    site: Site,
) -> Option<Vec<Chunk>> {
    let alignment = if map.swizzled() { 1024 } else { 128 };
    let base = cx.shared.base;
    if !shared.is_multiple_of(alignment) || (direction == Direction::ReduceAdd && !map.is_f32()) {
        let place = cx.describe(shared);
        let place = format!("{place}: a multiple of {alignment} and f32 for reductions");
        cx.report(Kind::Operand, "issued a tensor copy", site, place);
        return None;
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
    Some(chunks)
}

/// The chunks of cp.async.bulk of plain bytes.
pub(crate) fn plain_chunks(
    cx: &mut Context,
    shared: usize,
    global: usize,
    bytes: u32,
    site: Site,
) -> Option<Vec<Chunk>> {
    if !(shared | global | bytes as usize).is_multiple_of(CHUNK) {
        let place = format!("{bytes} bytes, {}: multiples of 16", cx.describe(shared));
        cx.report(Kind::Operand, "issued a bulk copy", site, place);
        return None;
    }
    let chunk = |at| Chunk {
        offset: shared + at,
        skip: 0,
        valid: CHUNK,
        global: global + at,
    };
    Some((0..bytes as usize).step_by(CHUNK).map(chunk).collect())
}

impl BulkCopies {
    /// None yet, of a block of so many threads.
    pub fn new(threads: usize) -> BulkCopies {
        BulkCopies {
            in_flight: Vec::new(),
            issued: 0,
            stores: vec![ThreadStores::default(); threads],
        }
    }

    /// How many are in flight.
    pub fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// The running thread issues a copy.
    pub fn issue(
        &mut self,
        cx: &mut Context,
        chunks: Vec<Chunk>,
        direction: Direction,
        site: Site,
    ) {
        let issuer = cx.thread;
        let serial = self.issued;
        self.issued += 1;
        let agent = cx.actors.bulk_copy(serial);
        let own = &mut cx.own_clocks().now;
        let mut clock = own.clone();
        own.local[issuer as usize] += 1;
        // One tick for what is read now, the next for what is written when the copy lands.
        let tick = 2 * serial as u32 + 1;
        clock.local[agent as usize] = tick;
        if !direction.is_load() {
            self.stores[issuer as usize].open.push(Store {
                serial,
                agent,
                clock: tick,
            });
        }
        let copy = BulkCopy {
            agent,
            clock,
            direction,
            chunks,
            site,
            issuer,
            serial,
        };
        if copy.chunks.iter().all(|chunk| copy.touch(cx, chunk)) {
            self.in_flight.push(copy);
        }
    }

    /// Carries out one of the copies in flight.
    pub fn land(&mut self, cx: &mut Context, index: usize) -> Option<Delivery> {
        let mut copy = self.in_flight.swap_remove(index);
        copy.clock.local[copy.agent as usize] += u32::from(!copy.direction.is_load());
        for chunk in &copy.chunks {
            if copy.record_landing(cx, chunk) {
                // SAFETY: the shared side was checked at issue, the global side at issue (loads) or just now.
                unsafe { move_chunk(chunk, copy.direction) };
            }
        }
        match copy.direction {
            Direction::Load { barrier } => Some(Delivery {
                barrier,
                bytes: copy.chunks.len() * CHUNK,
                clock: copy.clock,
            }),
            _ => None,
        }
    }

    /// cp.async.bulk.commit_group by the running thread.
    pub fn commit(&mut self, cx: &Context) {
        let stores = &mut self.stores[cx.thread as usize];
        let group = std::mem::take(&mut stores.open);
        stores.groups.push_back(group);
    }

    /// cp.async.bulk.wait_group: the older stores have read their source and, unless `read`, written.
    pub fn wait(&mut self, cx: &mut Context, newest_left: usize, read: bool) {
        let thread = cx.thread as usize;
        while self.stores[thread].groups.len() > newest_left {
            let group = self.stores[thread].groups.pop_front();
            for store in group.into_iter().flatten() {
                let mut copies = self.in_flight.iter();
                if let Some(index) = copies.position(|copy| copy.serial == store.serial) {
                    self.land(cx, index);
                }
                let known = &mut cx.own_clocks().now.local[store.agent as usize];
                *known = (*known).max(store.clock + u32::from(!read));
            }
        }
    }

    /// Reports copies still in flight when their block ends, and drops them.
    pub fn check_at_end(&mut self, cx: &mut Context) {
        for copy in self.in_flight.drain(..) {
            let place = "in flight when its block ended".to_string();
            let action = "issued a bulk copy";
            cx.report_by(Kind::Leak, copy.issuer, action, copy.site, place);
        }
    }
}

impl BulkCopy {
    /// Records what the copy, just issued, does to one chunk from now on. False if it must not be carried out.
    fn touch(&self, cx: &mut Context, chunk: &Chunk) -> bool {
        if !cx.checker.enabled() {
            return true;
        }
        if !cx.shared.contains(chunk.offset, CHUNK) {
            let place = cx.describe(chunk.offset);
            cx.refuse(Kind::OutOfBounds, "issued a bulk copy", self.site, place);
            return false;
        }
        let load = self.direction.is_load();
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
        if !cx.access_by(self.agent, &self.clock, shared, self.site) {
            return false;
        }
        if load {
            // SAFETY: inside the block's shared memory, checked above.
            unsafe { std::ptr::write_bytes(chunk.offset as *mut u8, 0xff, CHUNK) };
        }
        !load || chunk.valid == 0 || cx.access_by(self.agent, &self.clock, global, self.site)
    }

    fn record_landing(&self, cx: &mut Context, chunk: &Chunk) -> bool {
        let (address, bytes, mode, flags) = match self.direction {
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
        cx.access_by(self.agent, &self.clock, access, self.site)
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
