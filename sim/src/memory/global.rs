//! Global memory: named buffers with exact bounds, poison, and a shadow cell for every two bytes.
//!
//! Buffers are sparse mappings, so one of 2^34 elements costs only the pages that are touched.

use std::collections::VecDeque;
use std::ops::Range;

use bytemuck::Pod;

use crate::checks::shadow::{Cell, GRANULE, INITIALIZED};
use crate::memory::mapping::Mapping;

/// Buffers up to this size are filled with NaN bytes when allocated; larger ones read as zeros where poisoned
/// (every such read is reported either way).
const FILL_LIMIT: usize = 64 << 20;

/// Addresses kept free behind every buffer, so that an address a little past the end is nobody else's.
pub(crate) const GUARD: usize = 1 << 20;

/// Freed buffers whose addresses are kept from others for a while.
const FREED_LIMIT: usize = 64;

/// A buffer in simulated global memory, as the owner of [`crate::Gpu`] sees it. The handle is plain data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    index: usize,
    /// How many buffers had its index before.
    generation: u32,
    base: usize,
    len: usize,
}

impl Buffer {
    /// The address kernels use.
    pub fn address(&self) -> usize {
        self.base
    }

    /// The address as a pointer to `T`, for a kernel's parameter.
    pub fn ptr<T>(&self) -> *mut T {
        self.base as *mut T
    }

    /// Size in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the buffer has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

/// One buffer's storage.
pub(crate) struct Region {
    pub name: String,
    pub base: usize,
    pub len: usize,
    pub read_only: bool,
    /// Every byte holds a value: reads of a read-only region then need no shadow.
    pub filled: bool,
    data: Mapping,
    shadow: Mapping,
}

impl Region {
    pub fn new(name: &str, len: usize, read_only: bool) -> std::io::Result<Region> {
        let data = Mapping::new(len + GUARD)?;
        let shadow = Mapping::new(len.div_ceil(GRANULE) * size_of::<Cell>())?;
        let base = data.base() as usize;
        Ok(Region {
            name: name.to_string(),
            base,
            len,
            read_only,
            filled: false,
            data,
            shadow,
        })
    }

    /// Whether `[address, address + len)` lies inside.
    #[inline]
    pub fn contains(&self, address: usize, len: usize) -> bool {
        address >= self.base && address.saturating_add(len) <= self.base + self.len
    }

    /// Where an address at or after the region's begin lies.
    pub fn describe(&self, address: usize) -> String {
        let offset = address - self.base;
        if offset < self.len {
            format!("byte {offset} of {}", self.name)
        } else if offset < self.len + GUARD {
            format!(
                "{} bytes past the end of {} ({} bytes)",
                offset - self.len,
                self.name,
                self.len
            )
        } else {
            format!("address {address:#x}, in no buffer")
        }
    }

    /// Fills every byte with a NaN pattern.
    pub fn fill_with_nan(&mut self) {
        self.bytes(0, self.len).fill(0xff);
    }

    /// Shadow cells of the bytes `[address, address + len)`, which lie inside the region.
    pub fn cells(&mut self, address: usize, len: usize) -> &mut [Cell] {
        let (first, last) = granules(address - self.base, len);
        // SAFETY: the shadow mapping holds one zero-initialised Cell (a valid value) for every granule of
        // the region, and `&mut self` makes this the only reference to it.
        unsafe {
            std::slice::from_raw_parts_mut(
                self.shadow.base().cast::<Cell>().add(first),
                last - first,
            )
        }
    }

    /// The bytes `[start, start + len)` of the region.
    fn bytes(&mut self, start: usize, len: usize) -> &mut [u8] {
        assert!(
            start.checked_add(len).is_some_and(|end| end <= self.len),
            "range outside buffer {}",
            self.name
        );
        // SAFETY: inside the mapping (checked above), which this value owns.
        unsafe { std::slice::from_raw_parts_mut(self.data.base().add(start), len) }
    }
}

/// First and past-the-last granule of `len` bytes at `offset`.
pub(crate) fn granules(offset: usize, len: usize) -> (usize, usize) {
    (offset / GRANULE, (offset + len).div_ceil(GRANULE))
}

/// A place for a buffer.
#[derive(Default)]
struct Slot {
    region: Option<Region>,
    generation: u32,
}

/// All buffers, found by address.
#[derive(Default)]
pub(crate) struct GlobalMemory {
    slots: Vec<Slot>,
    /// Slots without a buffer.
    vacant: Vec<usize>,
    /// Begin and slot of every buffer, in order of address.
    by_address: Vec<(usize, usize)>,
    last_hit: usize,
    /// The buffers that were freed last. Their addresses are nobody else's yet, so that reports know them by name.
    freed: VecDeque<Region>,
}

impl GlobalMemory {
    pub fn allocate(&mut self, name: &str, len: usize, read_only: bool) -> std::io::Result<Buffer> {
        let mut region = Region::new(name, len, read_only)?;
        if len <= FILL_LIMIT {
            region.fill_with_nan();
        }
        let base = region.base;
        let index = self.vacant.pop().unwrap_or_else(|| {
            self.slots.push(Slot::default());
            self.slots.len() - 1
        });
        let slot = &mut self.slots[index];
        slot.region = Some(region);
        let next = self.by_address.partition_point(|&(begin, _)| begin < base);
        self.by_address.insert(next, (base, index));
        Ok(Buffer {
            index,
            generation: slot.generation,
            base,
            len,
        })
    }

    /// Gives a buffer back: from now on it is nobody's memory.
    pub fn free(&mut self, buffer: Buffer) {
        self.region(buffer);
        let slot = &mut self.slots[buffer.index];
        slot.generation += 1;
        let region = slot.region.take();
        self.vacant.push(buffer.index);
        self.by_address.retain(|&(_, index)| index != buffer.index);
        self.freed.truncate(FREED_LIMIT - 1);
        if let Some(mut region) = region {
            region.data.discard();
            region.shadow.discard();
            self.freed.push_front(region);
        }
    }

    /// A buffer's region. Panics if it was freed.
    fn region(&mut self, buffer: Buffer) -> &mut Region {
        let slot = &mut self.slots[buffer.index];
        match &mut slot.region {
            Some(region) if slot.generation == buffer.generation => region,
            _ => panic!("buffer at {:#x} was freed", buffer.base),
        }
    }

    /// Writes host data at byte `offset`; the bytes count as initialised.
    pub fn write<T: Pod>(&mut self, buffer: Buffer, offset: usize, values: &[T]) {
        let source: &[u8] = bytemuck::cast_slice(values);
        let region = self.region(buffer);
        region.bytes(offset, source.len()).copy_from_slice(source);
        region.filled |= source.len() == region.len;
        if !(region.read_only && region.filled) {
            let base = region.base;
            for cell in region.cells(base + offset, source.len()) {
                *cell = Cell::default();
                cell.write.flags = INITIALIZED;
            }
        }
    }

    /// Makes the bytes unreadable: any kernel that reads one is reported.
    pub fn poison(&mut self, buffer: Buffer, range: Range<usize>) {
        let region = self.region(buffer);
        region.bytes(range.start, range.len()).fill(0xff);
        let base = region.base;
        if std::mem::take(&mut region.filled) {
            region
                .cells(base, buffer.len)
                .iter_mut()
                .for_each(|cell| cell.write.flags = INITIALIZED);
        }
        region
            .cells(base + range.start, range.len())
            .fill(Cell::default());
    }

    pub fn read<T: Pod>(&mut self, buffer: Buffer, offset: usize, count: usize) -> Vec<T> {
        let bytes = self.region(buffer).bytes(offset, count * size_of::<T>());
        bytemuck::allocation::pod_collect_to_vec(bytes)
    }

    /// Byte ranges of the buffer that nothing has ever written.
    pub fn unwritten(&mut self, buffer: Buffer) -> Vec<Range<usize>> {
        let region = self.region(buffer);
        let mut ranges: Vec<Range<usize>> = Vec::new();
        if region.filled {
            return ranges;
        }
        let base = region.base;
        for (i, cell) in region.cells(base, buffer.len).iter().enumerate() {
            let start = i * GRANULE;
            match ranges.last_mut() {
                _ if cell.write.flags & INITIALIZED != 0 => {}
                Some(last) if last.end == start => last.end = start + GRANULE,
                _ => ranges.push(start..start + GRANULE),
            }
        }
        ranges
    }

    /// The slot of the buffer that begins last at or before an address.
    fn before(&self, address: usize) -> Option<usize> {
        let next = self
            .by_address
            .partition_point(|&(begin, _)| begin <= address);
        Some(self.by_address[next.checked_sub(1)?].1)
    }

    /// The region that wholly contains `[address, address + len)`.
    #[inline]
    pub fn find(&mut self, address: usize, len: usize) -> Option<&mut Region> {
        let inside = |slot: &Slot| {
            slot.region
                .as_ref()
                .is_some_and(|r| r.contains(address, len))
        };
        if !self.slots.get(self.last_hit).is_some_and(inside) {
            let candidate = self.before(address)?;
            if !inside(&self.slots[candidate]) {
                return None;
            }
            self.last_hit = candidate;
        }
        self.slots[self.last_hit].region.as_mut()
    }

    /// The buffer that wholly contains `[address, address + len)`, and the byte of it at `address`.
    pub fn locate(&mut self, address: usize, len: usize) -> Option<(Buffer, usize)> {
        let (base, region_len) = self.find(address, len).map(|r| (r.base, r.len))?;
        let buffer = Buffer {
            index: self.last_hit,
            generation: self.slots[self.last_hit].generation,
            base,
            len: region_len,
        };
        Some((buffer, address - base))
    }

    /// Where an address lies, in words: "byte 12 of q", "4 bytes past the end of out (96 bytes)".
    pub fn describe(&self, address: usize) -> String {
        let before = self.before(address);
        let region = before.and_then(|index| self.slots[index].region.as_ref());
        let freed = self.freed.iter().find(|region| region.contains(address, 1));
        match (region, freed) {
            (Some(region), _) if region.contains(address, 1) => region.describe(address),
            (_, Some(freed)) => format!("{}, which was freed", freed.describe(address)),
            (Some(region), None) => region.describe(address),
            (None, None) => format!("address {address:#x}, in no buffer"),
        }
    }
}
