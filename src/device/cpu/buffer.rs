//! Cache-line aligned `f32` buffers: one that is owned, and scratch reused from call to call.

use std::cell::RefCell;
use std::ops::{Deref, DerefMut};

use bytemuck::Zeroable;

use super::idle::{self, Line};
use crate::device::{DeviceError, HostMemory, OutOfMemory};

/// A zeroed `f32` buffer aligned to 128 bytes.
#[derive(Clone, Default)]
pub(super) struct Aligned {
    lines: Vec<Line>,
    len: usize,
}

impl Aligned {
    pub(super) fn zeroed(len: usize) -> Aligned {
        Aligned {
            lines: vec![Line::zeroed(); len.div_ceil(32)],
            len,
        }
    }
}

/// Memory of the CPU device. Large buffers reuse freed ones of about their size: a step frees what the next one needs,
/// and new pages from the system are slow.
#[derive(Default)]
pub struct Buffer(Aligned);

impl Buffer {
    /// `len` zeros, or an error if the allocation fails.
    pub(super) fn zeros(len: usize) -> Result<Buffer, DeviceError> {
        let mut buffer = Buffer::empty(len)?;
        buffer.fill(0.0);
        Ok(buffer)
    }

    /// `len` elements with arbitrary contents, or an error if the allocation fails.
    pub(super) fn empty(len: usize) -> Result<Buffer, DeviceError> {
        let count = len.div_ceil(32);
        if let Some(lines) = idle::take(count) {
            return Ok(Buffer(Aligned { lines, len }));
        }
        let bytes = count.saturating_mul(size_of::<Line>());
        let mut lines = Vec::new();
        let room = HostMemory::check(bytes).and_then(|()| {
            let full = |_| OutOfMemory::device(bytes);
            lines.try_reserve_exact(count).map_err(full)
        });
        if let Err(error) = room {
            idle::failed(count);
            return Err(error.into());
        }
        idle::allocated(count);
        lines.resize(count, Line::zeroed());
        Ok(Buffer(Aligned { lines, len }))
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        idle::give(std::mem::take(&mut self.0.lines));
    }
}

impl std::fmt::Debug for Buffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Buffer({} elements)", self.0.len)
    }
}

impl Deref for Buffer {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        &self.0
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.0
    }
}

impl AsRef<[f32]> for Buffer {
    fn as_ref(&self) -> &[f32] {
        self
    }
}

impl AsMut<[f32]> for Buffer {
    fn as_mut(&mut self) -> &mut [f32] {
        self
    }
}

impl Deref for Aligned {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        &bytemuck::cast_slice(&self.lines)[..self.len]
    }
}

impl DerefMut for Aligned {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut bytemuck::cast_slice_mut(&mut self.lines)[..self.len]
    }
}

thread_local! {
    static FREE: RefCell<Vec<Aligned>> = const { RefCell::new(Vec::new()) };
}

/// Buffers a thread keeps for later calls; a thread that waits in rayon may run another product
/// meanwhile, so there can be more than one in use.
const KEPT: usize = 4;

/// Scratch memory from this thread's free list, returned on drop. Contents are arbitrary.
pub(super) struct Scratch(Aligned);

impl Scratch {
    pub(super) fn take(len: usize) -> Scratch {
        let found = FREE.with_borrow_mut(|free| {
            let at = free.iter().position(|b| b.lines.len() * 32 >= len)?;
            Some(free.swap_remove(at))
        });
        let mut buffer = found.unwrap_or_else(|| Aligned::zeroed(len));
        buffer.len = len;
        Scratch(buffer)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let buffer = std::mem::take(&mut self.0);
        // At the end of a thread its list may already be dropped; then the buffer is freed.
        let _ = FREE.try_with(|free| {
            let mut free = free.borrow_mut();
            free.push(buffer);
            if free.len() > KEPT {
                let smallest = (0..free.len()).min_by_key(|&i| free[i].lines.len());
                free.swap_remove(smallest.unwrap_or(0));
            }
        });
    }
}

impl Deref for Scratch {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        &self.0
    }
}

impl DerefMut for Scratch {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.0
    }
}
