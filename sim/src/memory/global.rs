//! Global memory: named buffers, found by address, with exact bounds.

use std::collections::VecDeque;
use std::ops::Range;

use bytemuck::Pod;

use super::image::image_base;
use super::region::Region;
use crate::checks::shadow::Cell;

/// Buffers up to this size are filled with NaN bytes when allocated; larger ones read as zeros where poisoned
/// (every such read is reported either way).
const FILL_LIMIT: usize = 64 << 20;

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

/// A place for a buffer.
#[derive(Default)]
struct Slot {
    region: Option<Region>,
    generation: u32,
}

/// Why a kernel's access cannot be carried out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Refusal {
    /// A write to a buffer that the launch may only read.
    ReadOnly,
    /// An access that no buffer wholly contains.
    OutOfBounds,
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
    /// Load address of the kernel that is running, whose constants can be read.
    pub image: usize,
}

impl GlobalMemory {
    /// A buffer that nothing has written.
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
            region.discard();
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
        self.region(buffer)
            .write(offset, bytemuck::cast_slice(values));
    }

    /// Makes the bytes unreadable: any kernel that reads one is reported.
    pub fn poison(&mut self, buffer: Buffer, range: Range<usize>) {
        self.region(buffer).poison(range);
    }

    /// `count` values at byte `offset`.
    pub fn read<T: Pod>(&mut self, buffer: Buffer, offset: usize, count: usize) -> Vec<T> {
        let bytes = self.region(buffer).bytes(offset, count * size_of::<T>());
        bytemuck::allocation::pod_collect_to_vec(bytes)
    }

    /// Byte ranges of the buffer that nothing has ever written.
    pub fn unwritten(&mut self, buffer: Buffer) -> Vec<Range<usize>> {
        self.region(buffer).unwritten()
    }

    /// The slot of the buffer that begins last at or before an address.
    fn before(&self, address: usize) -> Option<usize> {
        let next = self
            .by_address
            .partition_point(|&(begin, _)| begin <= address);
        Some(self.by_address[next.checked_sub(1)?].1)
    }

    /// The shadow cells of an access by a kernel, none where there is nothing to check.
    #[inline]
    pub fn cells(
        &mut self,
        address: usize,
        len: usize,
        write: bool,
    ) -> Result<&mut [Cell], Refusal> {
        let constants = self.image;
        match self.find(address, len) {
            Some(region) if region.read_only && write => Err(Refusal::ReadOnly),
            Some(region) if region.read_only && region.filled => Ok(&mut []),
            Some(region) => Ok(region.cells(address, len)),
            // A constant that the compiler keeps in the kernel's image.
            None if !write && image_base(address) == Some(constants) => Ok(&mut []),
            None => Err(Refusal::OutOfBounds),
        }
    }

    /// The region that wholly contains `[address, address + len)`.
    #[inline]
    fn find(&mut self, address: usize, len: usize) -> Option<&mut Region> {
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
