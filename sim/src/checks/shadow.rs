//! Shadow memory: a cell for every two bytes, with the state that a race detector and an initialisation check need.
//!
//! The races are those of FastTrack (Flanagan and Freund, PLDI 2009): a cell remembers its last write and its reads
//! since as epochs (actor, clock). An access that is not ordered after them by a barrier, a fence or an atomic is a
//! race, whatever values were seen in this schedule. As in Valgrind's Memcheck the same cell says whether the memory
//! holds a value: memory that was never written, or whose asynchronous copy has not been waited for, cannot be read.

use super::clock::Foreign;

/// Bytes covered by one cell: the smallest element that kernels share between threads.
pub(crate) const GRANULE: usize = 2;

/// The cell holds a value.
pub(crate) const INITIALIZED: u16 = 1;
/// An asynchronous copy into the cell has been issued and not yet waited for.
pub(crate) const PENDING: u16 = 2;
/// The last write (or read) was atomic.
pub(crate) const ATOMIC: u16 = 4;
/// The last write went through the async proxy: a bulk copy, not an ordinary store.
pub(crate) const ASYNC: u16 = 8;
/// The cell belongs to an mbarrier object.
pub(crate) const BARRIER: u16 = 16;
/// `read.clock` is an index into the pool of reader lists.
const MANY_READERS: u16 = 32;

/// How memory is touched.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Mode {
    Read,
    Write,
    /// The write of an asynchronous copy becomes its thread's own.
    Land,
}

/// One access in time and space: clock of actor `id` of block `block`, at code site `site`.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct Epoch {
    pub clock: u32,
    pub block: u32,
    pub site: u32,
    pub id: u16,
    pub flags: u16,
}

/// Shadow of `GRANULE` bytes. All zero means: never touched.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct Cell {
    pub write: Epoch,
    pub read: Epoch,
}

/// Who accesses memory: an epoch to record, and what its actor knows.
pub(crate) struct Actor<'a> {
    pub epoch: Epoch,
    pub local: &'a [u32],
    pub foreign: &'a Foreign,
    /// For the async proxy: the part of `local` that proxy fences have carried over.
    pub proxied: Option<&'a [u32]>,
    /// Blocks with a smaller serial number belong to launches that have ended.
    pub first_block: u32,
}

impl Actor<'_> {
    /// Whether `past` is ordered before everything this actor does now.
    #[inline]
    pub fn knows(&self, past: &Epoch) -> bool {
        if past.clock == 0 || past.block < self.first_block {
            true
        } else if past.block == self.epoch.block {
            past.clock <= self.local[past.id as usize]
        } else {
            past.clock <= self.foreign.known(past.block, past.id as usize)
        }
    }

    /// Whether this is the async proxy and `write` an ordinary store of its block that no proxy fence followed.
    fn lacks_fence(&self, write: &Epoch) -> bool {
        let Some(proxied) = self.proxied else {
            return false;
        };
        let ordinary = write.flags & ASYNC == 0 && write.clock > 0;
        ordinary
            && write.block == self.epoch.block
            && write.clock > proxied.get(write.id as usize).copied().unwrap_or(0)
    }
}

/// What is wrong with an access to a cell.
#[derive(Clone, Copy)]
pub(crate) enum Conflict {
    /// Read or write not ordered after that write.
    AfterWrite(Epoch),
    /// Write not ordered after that read.
    AfterRead(Epoch),
    /// The cell is the destination of a copy that was issued there and never waited for.
    Pending(Epoch),
    /// Read of a cell that was never written.
    Uninitialized,
    /// Plain access to an mbarrier.
    Barrier(Epoch),
    /// The async proxy touches what an ordinary store wrote, with no proxy fence between.
    Unfenced(Epoch),
}

/// The readers of cells since their last write, by actor: a hash table with open addressing, so that a read costs the
/// same whether two threads or a thousand have read the cells. A clock of 0 is an empty slot.
#[derive(Default)]
struct ReaderSet {
    slots: Vec<Epoch>,
    used: usize,
    /// Cells that have this set.
    cells: usize,
}

impl ReaderSet {
    /// Slots of a small set; a power of two.
    const LEAST: usize = 4;

    fn same_actor(a: &Epoch, b: &Epoch) -> bool {
        (a.block, a.id, a.flags & ATOMIC) == (b.block, b.id, b.flags & ATOMIC)
    }

    /// Where an actor's epoch is, or would be put.
    fn find(&self, epoch: &Epoch) -> usize {
        let hash = (u32::from(epoch.id) ^ epoch.block << 7).wrapping_mul(0x9e37_79b1) >> 7;
        let mask = self.slots.len() - 1;
        let mut at = hash as usize & mask;
        while self.slots[at].clock != 0 && !Self::same_actor(&self.slots[at], epoch) {
            at = (at + 1) & mask;
        }
        at
    }

    /// Adds a read in place of its actor's last one. What `is_known` may be forgotten. `left` is used for a moment.
    fn insert(&mut self, epoch: Epoch, is_known: impl Fn(&Epoch) -> bool, left: &mut Vec<Epoch>) {
        if 2 * self.used >= self.slots.len() {
            left.clear();
            let kept = |read: &&Epoch| read.clock != 0 && !is_known(read);
            left.extend(self.slots.iter().filter(kept));
            let slots = (4 * left.len()).next_power_of_two().max(Self::LEAST);
            self.slots.clear();
            self.slots.resize(slots, Epoch::default());
            self.used = left.len();
            for read in &*left {
                let at = self.find(read);
                self.slots[at] = *read;
            }
        }
        let at = self.find(&epoch);
        self.used += usize::from(self.slots[at].clock == 0);
        self.slots[at] = epoch;
    }

    fn clear(&mut self) {
        self.slots.truncate(Self::LEAST);
        self.slots.fill(Epoch::default());
        self.used = 0;
    }
}

/// Readers of cells that several unordered actors have read since the last write. Cells with the same readers share a
/// set: those of one row of a tile, say, which are read together.
#[derive(Default)]
pub(crate) struct Readers {
    sets: Vec<ReaderSet>,
    free: Vec<u32>,
    /// Of a set that is laid out anew: kept, since that happens at every few reads.
    left: Vec<Epoch>,
}

impl Readers {
    /// An empty set for so many cells.
    fn allocate(&mut self, cells: usize) -> u32 {
        let index = self.free.pop().unwrap_or_else(|| {
            self.sets.push(ReaderSet::default());
            self.sets.len() as u32 - 1
        });
        self.sets[index as usize].cells = cells;
        index
    }

    fn insert(&mut self, index: u32, read: Epoch, is_known: impl Fn(&Epoch) -> bool) {
        self.sets[index as usize].insert(read, is_known, &mut self.left);
    }

    /// A set with the same readers for these of a set's cells alone.
    fn apart(&mut self, index: u32, cells: usize) -> u32 {
        if self.sets[index as usize].cells == cells {
            return index;
        }
        let copy = self.allocate(cells);
        let sets = self.sets.get_disjoint_mut([index as usize, copy as usize]);
        let [from, to] = sets.expect("a set in use and another");
        from.cells -= cells;
        to.slots.clone_from(&from.slots);
        to.used = from.used;
        copy
    }

    /// So many of a set's cells have it no longer.
    fn release(&mut self, index: u32, cells: usize) {
        let set = &mut self.sets[index as usize];
        set.cells -= cells;
        if set.cells == 0 {
            set.clear();
            self.free.push(index);
        }
    }
}

/// Checks and records an access to cells. The first conflict, with the index of its cell.
#[inline]
pub(crate) fn on_access(
    cells: &mut [Cell],
    actor: &Actor,
    mode: Mode,
    readers: &mut Readers,
) -> Option<(usize, Conflict)> {
    let (mut first, mut start) = (None, 0);
    while start < cells.len() {
        let old = cells[start];
        let alike = cells[start..].iter().take_while(|cell| **cell == old);
        let run = start..start + alike.count();
        let (new, conflict) = match mode {
            Mode::Read => old.on_read(actor, readers, run.len()),
            Mode::Write => old.on_write(actor, readers, run.len()),
            Mode::Land => (old.on_land(actor), None),
        };
        if let (None, Some(conflict)) = (&first, conflict) {
            first = Some((start, conflict));
        }
        start = run.end;
        cells[run].fill(new);
    }
    first
}

/// What follows an access to `alike` cells that are like this one: their new state and what is wrong.
impl Cell {
    /// Forgets what blocks that no longer exist did to a cell of shared memory.
    #[inline]
    pub fn claim_for_block(&mut self, serial: u32, first_block: u32, readers: &mut Readers) {
        if self.write.block != serial {
            if self.read.flags & MANY_READERS != 0 && self.read.block >= first_block {
                readers.release(self.read.clock, 1);
            }
            *self = Cell::default();
            self.write.block = serial;
        }
    }

    #[inline]
    fn on_read(
        mut self,
        actor: &Actor,
        readers: &mut Readers,
        alike: usize,
    ) -> (Self, Option<Conflict>) {
        let new = actor.epoch;
        let last = self.read;
        if (last.clock, last.block, last.id, last.flags)
            == (new.clock, new.block, new.id, new.flags)
        {
            return (self, None);
        }
        let conflict = self.problem_of_read(actor);
        if self.read.flags & MANY_READERS != 0 && self.read.block >= actor.first_block {
            let index = readers.apart(self.read.clock, alike);
            readers.insert(index, new, |old| actor.knows(old));
            self.read.clock = index;
        } else if actor.knows(&self.read) || self.read.flags & MANY_READERS != 0 {
            self.read = new;
        } else {
            let index = readers.allocate(alike);
            for read in [self.read, new] {
                readers.insert(index, read, |_| false);
            }
            self.read = Epoch {
                clock: index,
                flags: MANY_READERS,
                ..new
            };
        }
        (self, conflict)
    }

    fn problem_of_read(&self, actor: &Actor) -> Option<Conflict> {
        let (write, both_atomic) = (
            self.write,
            self.write.flags & actor.epoch.flags & ATOMIC != 0,
        );
        if write.flags & BARRIER != 0 {
            Some(Conflict::Barrier(write))
        } else if write.flags & PENDING != 0 {
            Some(Conflict::Pending(write))
        } else if !both_atomic && !actor.knows(&write) {
            Some(Conflict::AfterWrite(write))
        } else if actor.lacks_fence(&write) {
            Some(Conflict::Unfenced(write))
        } else if write.flags & INITIALIZED == 0 {
            Some(Conflict::Uninitialized)
        } else {
            None
        }
    }

    /// `actor.epoch.flags` become the cell's flags.
    #[inline]
    fn on_write(
        self,
        actor: &Actor,
        readers: &mut Readers,
        alike: usize,
    ) -> (Self, Option<Conflict>) {
        let conflict = self.problem_of_write(actor, readers);
        if self.read.flags & MANY_READERS != 0 && self.read.block >= actor.first_block {
            readers.release(self.read.clock, alike);
        }
        let new = Cell {
            write: actor.epoch,
            read: Epoch::default(),
        };
        (new, conflict)
    }

    /// The copy issued into the cell has landed and is now the actor's own write. A write that came in between
    /// was reported when it was made.
    fn on_land(mut self, actor: &Actor) -> Self {
        if self.write.flags & PENDING != 0 {
            self.write = actor.epoch;
        }
        self
    }

    fn problem_of_write(&self, actor: &Actor, readers: &Readers) -> Option<Conflict> {
        let (write, flags) = (self.write, actor.epoch.flags);
        if write.flags & BARRIER != 0 && flags & BARRIER == 0 {
            return Some(Conflict::Barrier(write));
        }
        if write.flags & PENDING != 0 {
            return Some(Conflict::Pending(write));
        }
        if write.flags & flags & ATOMIC == 0 && !actor.knows(&write) {
            return Some(Conflict::AfterWrite(write));
        }
        if actor.lacks_fence(&write) {
            return Some(Conflict::Unfenced(write));
        }
        let unordered = |read: &Epoch| read.flags & flags & ATOMIC == 0 && !actor.knows(read);
        if self.read.flags & MANY_READERS == 0 {
            return unordered(&self.read).then_some(Conflict::AfterRead(self.read));
        }
        if self.read.block < actor.first_block {
            return None;
        }
        let set = &readers.sets[self.read.clock as usize];
        set.slots
            .iter()
            .find(|read| unordered(read))
            .map(|read| Conflict::AfterRead(*read))
    }
}
