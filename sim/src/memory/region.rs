//! The storage of one buffer: its bytes, and a shadow cell for every two of them.
//!
//! Both are sparse mappings, so a buffer of 2^34 elements costs only the pages that are touched.

use std::ops::Range;

use super::mapping::Mapping;
use crate::checks::shadow::{Cell, GRANULE, INITIALIZED};

/// Addresses kept free behind every buffer, so that an address a little past the end is nobody else's.
pub(crate) const GUARD: usize = 1 << 20;

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
    /// Zeroed storage of `len` bytes that nothing has written.
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

    /// Gives the memory back and keeps the addresses.
    pub fn discard(&mut self) {
        self.data.discard();
        self.shadow.discard();
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
    #[inline]
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

    /// Writes host data at byte `offset`; the bytes count as initialised.
    pub fn write(&mut self, offset: usize, source: &[u8]) {
        self.bytes(offset, source.len()).copy_from_slice(source);
        self.filled |= source.len() == self.len;
        if !(self.read_only && self.filled) {
            for cell in self.cells(self.base + offset, source.len()) {
                *cell = Cell::default();
                cell.write.flags = INITIALIZED;
            }
        }
    }

    /// Makes a range of bytes unreadable for kernels.
    pub fn poison(&mut self, range: Range<usize>) {
        self.bytes(range.start, range.len()).fill(0xff);
        if std::mem::take(&mut self.filled) {
            let all = self.cells(self.base, self.len);
            all.iter_mut()
                .for_each(|cell| cell.write.flags = INITIALIZED);
        }
        self.cells(self.base + range.start, range.len())
            .fill(Cell::default());
    }

    /// Byte ranges that nothing has ever written.
    pub fn unwritten(&mut self) -> Vec<Range<usize>> {
        let mut ranges: Vec<Range<usize>> = Vec::new();
        if self.filled {
            return ranges;
        }
        for (i, cell) in self.cells(self.base, self.len).iter().enumerate() {
            let start = i * GRANULE;
            match ranges.last_mut() {
                _ if cell.write.flags & INITIALIZED != 0 => {}
                Some(last) if last.end == start => last.end = start + GRANULE,
                _ => ranges.push(start..start + GRANULE),
            }
        }
        ranges
    }

    /// The bytes `[start, start + len)` of the region. Panics outside it.
    pub fn bytes(&mut self, start: usize, len: usize) -> &mut [u8] {
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
fn granules(offset: usize, len: usize) -> (usize, usize) {
    (offset / GRANULE, (offset + len).div_ceil(GRANULE))
}
