//! Device memory: regions asked of the driver, cut into blocks by the lowest address that fits.
//!
//! Work on one stream is in order, so a block that is given back can be handed out at once: whoever gets it uses it
//! after its last user. By the lowest address the same requests lead to the same places in every region that is large
//! enough; so the highest address of a dry run is how large a region has to be, see [`Memory::high_water`].

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::driver::Driver;
use crate::device::Result;

/// Blocks begin at multiples of this: every vector load and tensor map is content with it.
const ALIGNMENT: usize = 256;

/// A driver's memory.
#[derive(Debug)]
pub(super) struct Memory<D: Driver> {
    pub driver: D,
    regions: Mutex<Regions>,
}

#[derive(Debug, Default)]
struct Regions {
    /// By address: bytes, and the free ranges in them by offset.
    all: BTreeMap<u64, Region>,
    used: usize,
    peak: usize,
}

#[derive(Debug)]
struct Region {
    bytes: usize,
    /// Offset and length of what is free; neighbours are merged.
    free: BTreeMap<usize, usize>,
    /// End of the highest block there ever was.
    high: usize,
}

/// What a device's memory holds, bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MemoryUse {
    /// In buffers now.
    pub used: usize,
    /// The most there ever were.
    pub peak: usize,
    /// Taken from the driver.
    pub reserved: usize,
    /// As `peak`, with what lies unused between buffers: the size a single region needs.
    pub high_water: usize,
}

impl<D: Driver> Memory<D> {
    pub fn new(driver: D) -> Self {
        Self {
            driver,
            regions: Mutex::default(),
        }
    }

    /// Takes one region of `bytes` bytes from the driver before any is needed.
    pub fn reserve(&self, bytes: usize) -> Result<()> {
        self.lock().add(&self.driver, bytes).map(|_| ())
    }

    pub fn memory_use(&self) -> MemoryUse {
        let regions = self.lock();
        MemoryUse {
            used: regions.used,
            peak: regions.peak,
            reserved: regions.all.values().map(|r| r.bytes).sum(),
            high_water: regions.all.values().map(|r| r.high).sum(),
        }
    }

    /// A block of at least `bytes` bytes; contents arbitrary.
    pub fn block(self: &Arc<Self>, bytes: usize) -> Result<Block<D>> {
        let bytes = bytes.max(1);
        let bytes = match self.driver.region_bytes() {
            // Ends exactly where the buffer ends, so that a byte too far is seen.
            0 => bytes,
            _ => bytes.next_multiple_of(ALIGNMENT),
        };
        let mut regions = self.lock();
        let address = match regions.take(bytes) {
            Some(address) => address,
            None => {
                regions.add(&self.driver, bytes.max(self.driver.region_bytes()))?;
                regions.take(bytes).expect("a new region has room")
            }
        };
        regions.used += bytes;
        regions.peak = regions.peak.max(regions.used);
        Ok(Block {
            memory: self.clone(),
            address,
            bytes,
        })
    }

    fn lock(&self) -> MutexGuard<'_, Regions> {
        // A panic elsewhere leaves the map as it was: it is changed in one go.
        self.regions.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<D: Driver> Drop for Memory<D> {
    fn drop(&mut self) {
        let regions = std::mem::take(&mut self.lock().all);
        for (address, region) in regions {
            // SAFETY: the region is the driver's, and blocks hold the memory alive: there are none.
            unsafe { self.driver.free(address, region.bytes) };
        }
    }
}

impl Regions {
    fn add(&mut self, driver: &impl Driver, bytes: usize) -> Result<u64> {
        let address = driver.allocate(bytes)?;
        let free = BTreeMap::from([(0, bytes)]);
        let region = Region {
            bytes,
            free,
            high: 0,
        };
        self.all.insert(address, region);
        Ok(address)
    }

    /// The lowest free range of any region that is large enough.
    fn take(&mut self, bytes: usize) -> Option<u64> {
        for (address, region) in &mut self.all {
            let found = region.free.iter().find(|(_, len)| **len >= bytes);
            let Some((&offset, &len)) = found else {
                continue;
            };
            region.free.remove(&offset);
            if len > bytes {
                region.free.insert(offset + bytes, len - bytes);
            }
            region.high = region.high.max(offset + bytes);
            return Some(address + offset as u64);
        }
        None
    }

    /// Takes a block back; the region's address and size if it is empty now.
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

/// Bytes of device memory, given back when dropped.
#[derive(Debug)]
pub(super) struct Block<D: Driver> {
    memory: Arc<Memory<D>>,
    pub address: u64,
    bytes: usize,
}

impl<D: Driver> Drop for Block<D> {
    fn drop(&mut self) {
        let mut regions = self.memory.lock();
        let empty = regions.give_back(self.address, self.bytes);
        // Where every buffer has a region of its own the driver wants to know that it is gone.
        if self.memory.driver.region_bytes() == 0
            && let Some((address, bytes)) = empty
        {
            regions.all.remove(&address);
            // SAFETY: the region is the driver's, and this was its only block.
            unsafe { self.memory.driver.free(address, bytes) };
        }
    }
}
