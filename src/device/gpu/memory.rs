//! Memory allocator: regions come from the driver and are divided into blocks, lowest fitting address first.
//!
//! There are three arenas: device memory for all buffers except pools, device memory for pools, with a budget, and
//! pinned host memory for the rest of the pools.
//!
//! Work on the stream is in order. So a freed block can be reused at once: its next user runs after its last one.
//!
//! With lowest-address-first allocation, equal requests get equal offsets in every region that is large enough. So the
//! highest offset of a dry run is the size that a region needs, see [`Held::high_water`].

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::driver::Driver;
use crate::device::{DeviceError, OutOfMemory, Result};

/// Alignment of blocks. It suffices for every vector load and tensor map.
const ALIGNMENT: usize = 256;

/// Largest region for chunks of pools, which are smaller.
const POOL_PIECE: usize = 64 << 20;

/// A driver's memory.
#[derive(Debug)]
pub(super) struct Memory<D: Driver> {
    pub driver: D,
    arenas: [Mutex<Regions>; 3],
    /// Whether all memory of the run was reserved before it.
    planned: AtomicBool,
    /// Source of buffers while calls are recorded.
    recorded: Mutex<Option<Arc<Recorded<D>>>>,
}

/// Memory for the calls of a recording only. Blocks that they free return to it.
#[derive(Debug)]
pub(super) struct Recorded<D: Driver> {
    regions: Mutex<Regions>,
    /// The regions' memory.
    held: Mutex<Vec<Block<D>>>,
    /// Other blocks that the recorded calls use, by the address of their `Piece`.
    used: Mutex<BTreeMap<usize, Weak<Piece<D>>>>,
}

/// Bytes of one allocation for a recording.
const RECORDED_BYTES: usize = 4 << 20;

/// The arenas.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Arena {
    /// Device memory.
    Buffers,
    /// Device memory of pools.
    Pool,
    /// Host memory of pools.
    Host,
}

const ARENAS: [Arena; 3] = [Arena::Buffers, Arena::Pool, Arena::Host];

#[derive(Debug)]
struct Regions {
    /// Regions by address: size, and free ranges by offset.
    all: BTreeMap<u64, Region>,
    used: usize,
    peak: usize,
    /// Budget in bytes.
    budget: usize,
    /// Allocated beyond the plan, and how much of it the last warning told of.
    beyond: usize,
    told: usize,
}

#[derive(Debug)]
struct Region {
    bytes: usize,
    /// Offset and length of free ranges; adjacent ranges are merged.
    free: BTreeMap<usize, usize>,
    /// Largest end of a block so far.
    high: usize,
}

impl Region {
    /// Offset of the lowest free range that is large enough.
    fn take(&mut self, bytes: usize) -> Option<usize> {
        let (&offset, &len) = self.free.iter().find(|(_, len)| **len >= bytes)?;
        self.free.remove(&offset);
        if len > bytes {
            self.free.insert(offset + bytes, len - bytes);
        }
        self.high = self.high.max(offset + bytes);
        Some(offset)
    }
}

/// Memory use of a device, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MemoryUse {
    /// Device memory of everything but pools.
    pub buffers: Held,
    /// Device memory of pools: keys and values of completed tokens, for the heads that read the past.
    pub pool: Held,
    /// Pinned host memory of pools.
    pub host: Held,
}

/// Memory use of an arena, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Held {
    /// In use by buffers.
    pub used: usize,
    /// Largest use so far, or since [`Gpu::reset_peaks`](super::Gpu::reset_peaks).
    pub peak: usize,
    /// Allocated from the driver.
    pub reserved: usize,
    /// Largest use so far including free ranges between buffers: the size that a single region needs.
    pub high_water: usize,
}

impl MemoryUse {
    /// Device memory allocated from the driver.
    pub fn on_device(&self) -> usize {
        self.buffers.reserved + self.pool.reserved
    }
}

impl<D: Driver> Memory<D> {
    pub fn new(driver: D) -> Self {
        Self {
            driver,
            arenas: ARENAS.map(|_| Mutex::default()),
            planned: AtomicBool::new(false),
            recorded: Mutex::default(),
        }
    }

    /// Allocates device memory for buffers and for pools in advance, as much as `planned` held.
    pub fn reserve(self: &Arc<Self>, planned: &MemoryUse) -> Result<()> {
        for (arena, held) in [
            (Arena::Buffers, planned.buffers),
            (Arena::Pool, planned.pool),
        ] {
            let mut regions = self.lock(arena);
            let bytes = held.high_water.saturating_sub(regions.held().reserved);
            if bytes > 0 {
                self.grow(&mut regions, arena, bytes)?;
            }
        }
        self.planned.store(true, Ordering::Relaxed);
        Ok(())
    }

    pub fn limit_pool(&self, bytes: usize) {
        self.lock(Arena::Pool).budget = bytes;
    }

    pub fn reset_peaks(&self) {
        for arena in ARENAS {
            let mut regions = self.lock(arena);
            regions.peak = regions.used;
        }
    }

    pub fn memory_use(&self) -> MemoryUse {
        let [buffers, pool, host] = ARENAS.map(|arena| self.lock(arena).held());
        MemoryUse {
            buffers,
            pool,
            host,
        }
    }

    /// Sets the source of later buffers: the memory of a recording, or the arenas.
    pub fn set_recorded(&self, recorded: Option<Arc<Recorded<D>>>) {
        *locked(&self.recorded) = recorded;
    }

    /// A block of at least `bytes` bytes, contents arbitrary; `None` if it would exceed the arena's budget.
    pub fn block(self: &Arc<Self>, arena: Arena, bytes: usize) -> Result<Option<Block<D>>> {
        let recorded = locked(&self.recorded).clone();
        match recorded.filter(|_| arena == Arena::Buffers) {
            Some(recorded) => recorded.block(self, bytes),
            None => self.shared_block(arena, bytes),
        }
    }

    /// Notes that a call uses a block. A recording of the call is valid only as long as the block exists.
    pub fn note_use(&self, block: &Block<D>) {
        if let Some(recorded) = &*locked(&self.recorded) {
            recorded.note_use(block);
        }
    }

    /// Calls `work` if every block that a recording uses still exists.
    pub fn while_kept<T>(&self, recorded: &Recorded<D>, work: impl FnOnce() -> T) -> Option<T> {
        // A block is given back under the lock of its arena: whoever drops one now waits until `work` has put its
        // calls on the stream.
        let _arenas = ARENAS.map(|arena| self.lock(arena));
        let kept = |piece: &Weak<_>| piece.strong_count() > 0;
        let all = locked(&recorded.used).values().all(kept);
        all.then(work)
    }

    fn rounded(&self, bytes: usize) -> Result<usize> {
        let rounded = match self.driver.region_bytes() {
            // Ends exactly where the buffer ends, so that a byte too far is seen.
            0 => Some(bytes.max(1)),
            _ => bytes.max(1).checked_next_multiple_of(ALIGNMENT),
        };
        rounded.ok_or_else(|| OutOfMemory::device(bytes).into())
    }

    fn shared_block(self: &Arc<Self>, arena: Arena, bytes: usize) -> Result<Option<Block<D>>> {
        let bytes = self.rounded(bytes)?;
        let mut regions = self.lock(arena);
        if bytes > regions.budget.saturating_sub(regions.used) {
            return Ok(None);
        }
        let address = match regions.take(bytes) {
            Some(address) => address,
            None => {
                let piece = self.piece(arena, bytes);
                if arena != Arena::Host && self.planned.load(Ordering::Relaxed) {
                    regions.tell_of(piece, bytes);
                }
                self.grow(&mut regions, arena, piece)?;
                regions.take(bytes).expect("a new region has room")
            }
        };
        regions.used += bytes;
        regions.peak = regions.peak.max(regions.used);
        Ok(Some(Block(Arc::new(Piece {
            memory: self.clone(),
            recorded: None,
            arena,
            address,
            bytes,
        }))))
    }

    /// Bytes to allocate when no region has room for a block. Chunks of a pool have one size, so they fill a region.
    fn piece(&self, arena: Arena, block: usize) -> usize {
        let region = self.driver.region_bytes();
        match arena {
            Arena::Buffers => block.max(region),
            Arena::Pool | Arena::Host => block * (region.min(POOL_PIECE) / block).max(1),
        }
    }

    fn grow(&self, regions: &mut Regions, arena: Arena, bytes: usize) -> Result<()> {
        let allocated = match arena {
            Arena::Buffers | Arena::Pool => self.driver.allocate(bytes),
            Arena::Host => self.driver.allocate_host(bytes),
        };
        let address = allocated.map_err(|error| match error {
            DeviceError::OutOfMemory(mut out) => {
                out.held = regions.held().reserved;
                out.free = (arena != Arena::Host)
                    .then(|| self.driver.free_memory().ok())
                    .flatten();
                out.into()
            }
            error => error,
        })?;
        regions.add(address, bytes);
        Ok(())
    }

    /// Returns a region to the driver.
    ///
    /// # Safety
    /// It belonged to the arena, and no block in it is in use.
    unsafe fn release(&self, arena: Arena, address: u64, bytes: usize) {
        // SAFETY: the caller's promise.
        unsafe {
            match arena {
                Arena::Buffers | Arena::Pool => self.driver.free(address, bytes),
                Arena::Host => self.driver.free_host(address, bytes),
            }
        }
    }

    fn lock(&self, arena: Arena) -> MutexGuard<'_, Regions> {
        locked(&self.arenas[arena as usize])
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic elsewhere leaves what is in there as it was: it is changed in one go.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<D: Driver> Default for Recorded<D> {
    fn default() -> Self {
        Self {
            regions: Mutex::default(),
            held: Mutex::default(),
            used: Mutex::default(),
        }
    }
}

impl<D: Driver> Recorded<D> {
    fn note_use(&self, block: &Block<D>) {
        let own = |of: &Arc<Self>| std::ptr::eq(&**of, self);
        // The recording's own memory stays as long as it does.
        if !block.0.recorded.as_ref().is_some_and(own) {
            let number = Arc::as_ptr(&block.0) as usize;
            let mut used = locked(&self.used);
            used.entry(number)
                .or_insert_with(|| Arc::downgrade(&block.0));
        }
    }

    fn block(self: &Arc<Self>, memory: &Arc<Memory<D>>, bytes: usize) -> Result<Option<Block<D>>> {
        let (bytes, mut regions) = (memory.rounded(bytes)?, locked(&self.regions));
        // Where every buffer has a region of its own it has one here too.
        let shared = memory.driver.region_bytes() > 0;
        let found = if shared { regions.take(bytes) } else { None };
        let address = match found {
            Some(address) => address,
            None => {
                let piece = if shared {
                    bytes.max(RECORDED_BYTES)
                } else {
                    bytes
                };
                let Some(held) = memory.shared_block(Arena::Buffers, piece)? else {
                    return Ok(None);
                };
                let address = held.address();
                regions.add(address, piece);
                locked(&self.held).push(held);
                let taken = regions.take_at(address, bytes);
                taken.expect("a new piece has room")
            }
        };
        regions.used += bytes;
        Ok(Some(Block(Arc::new(Piece {
            memory: memory.clone(),
            recorded: Some(self.clone()),
            arena: Arena::Buffers,
            address,
            bytes,
        }))))
    }
}

impl<D: Driver> Drop for Memory<D> {
    fn drop(&mut self) {
        for arena in ARENAS {
            let regions = std::mem::take(&mut self.lock(arena).all);
            for (address, region) in regions {
                // SAFETY: the region is the arena's, and blocks hold the memory alive: there are none.
                unsafe { self.release(arena, address, region.bytes) };
            }
        }
    }
}

impl Default for Regions {
    fn default() -> Self {
        Self {
            all: BTreeMap::new(),
            used: 0,
            peak: 0,
            budget: usize::MAX,
            beyond: 0,
            told: 0,
        }
    }
}

impl Regions {
    fn held(&self) -> Held {
        Held {
            used: self.used,
            peak: self.peak,
            reserved: self.all.values().map(|r| r.bytes).sum(),
            high_water: self.all.values().map(|r| r.high).sum(),
        }
    }

    fn add(&mut self, address: u64, bytes: usize) {
        let free = BTreeMap::from([(0, bytes)]);
        let region = Region {
            bytes,
            free,
            high: 0,
        };
        self.all.insert(address, region);
    }

    /// Warns that `piece` bytes beyond the plan are allocated for a block of `bytes`: at first, and whenever they have
    /// doubled.
    fn tell_of(&mut self, piece: usize, bytes: usize) {
        self.beyond += piece;
        if self.beyond >= 2 * self.told {
            self.told = self.beyond;
            let (beyond, used, all) = (self.beyond, self.used, self.bytes());
            tracing::warn!(
                "{beyond} bytes of device memory beyond the plan: {used} of {all} are in use, and no free range has \
                 {bytes}"
            );
        }
    }

    /// Bytes of all regions.
    fn bytes(&self) -> usize {
        self.all.values().map(|region| region.bytes).sum()
    }

    /// The lowest free range of any region that is large enough.
    fn take(&mut self, bytes: usize) -> Option<u64> {
        let mut all = self.all.iter_mut();
        all.find_map(|(address, region)| Some(address + region.take(bytes)? as u64))
    }

    /// The lowest free range of this region.
    fn take_at(&mut self, address: u64, bytes: usize) -> Option<u64> {
        Some(address + self.all.get_mut(&address)?.take(bytes)? as u64)
    }

    /// Frees a block. Returns the region's address and size if it is empty now.
    fn give_back(&mut self, address: u64, bytes: usize) -> Option<(u64, usize)> {
        self.used -= bytes;
        let (&base, region) = self.all.range_mut(..=address).next_back()?;
        let (mut offset, mut len) = ((address - base) as usize, bytes);
        if let Some(next) = region.free.remove(&(offset + len)) {
            len += next;
        }
        if let Some((&before, &gap)) = region.free.range(..offset).next_back()
            && before + gap == offset
        {
            region.free.remove(&before);
            (offset, len) = (before, len + gap);
        }
        region.free.insert(offset, len);
        (len == region.bytes).then_some((base, len))
    }
}

/// Memory of one owner, freed on drop.
#[derive(Debug)]
pub(super) struct Block<D: Driver>(Arc<Piece<D>>);

#[derive(Debug)]
struct Piece<D: Driver> {
    memory: Arc<Memory<D>>,
    /// The recording that owns its memory, if any.
    recorded: Option<Arc<Recorded<D>>>,
    arena: Arena,
    address: u64,
    bytes: usize,
}

impl<D: Driver> Block<D> {
    pub fn arena(&self) -> Arena {
        self.0.arena
    }

    pub fn address(&self) -> u64 {
        self.0.address
    }

    pub fn is_of(&self, memory: &Arc<Memory<D>>) -> bool {
        Arc::ptr_eq(&self.0.memory, memory)
    }
}

impl<D: Driver> Drop for Piece<D> {
    fn drop(&mut self) {
        if let Some(recorded) = &self.recorded {
            locked(&recorded.regions).give_back(self.address, self.bytes);
            return;
        }
        let mut regions = self.memory.lock(self.arena);
        let empty = regions.give_back(self.address, self.bytes);
        // Where every buffer has a region of its own the driver wants to know that it is gone.
        if self.memory.driver.region_bytes() == 0
            && let Some((address, bytes)) = empty
        {
            regions.all.remove(&address);
            // SAFETY: the region is the arena's, and this was its only block.
            unsafe { self.memory.release(self.arena, address, bytes) };
        }
    }
}
