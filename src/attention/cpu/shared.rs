//! Output tensors that several threads write, in disjoint rows.

use std::marker::PhantomData;

use crate::attention::layout::{Layout, ViewMut};

/// A slice that threads access in disjoint parts.
pub(super) struct SharedSlice<'a, T> {
    start: *mut T,
    len: usize,
    borrow: PhantomData<&'a mut [T]>,
}

// SAFETY: it hands out disjoint parts only, the contract of `part`.
unsafe impl<T: Send> Send for SharedSlice<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for SharedSlice<'_, T> {}

impl<'a, T> SharedSlice<'a, T> {
    pub(super) fn new(slice: &'a mut [T]) -> Self {
        SharedSlice {
            start: slice.as_mut_ptr(),
            len: slice.len(),
            borrow: PhantomData,
        }
    }

    /// Elements `[start, start + len)`.
    ///
    /// # Safety
    /// No other live part shares an element with it.
    #[allow(clippy::mut_from_ref)]
    pub(super) unsafe fn part(&self, start: usize, len: usize) -> &mut [T] {
        assert!(len <= self.len && start <= self.len - len);
        // SAFETY: within the slice by the assertion, exclusive by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(start), len) }
    }
}

/// An output view that threads access in disjoint rows.
pub(super) struct SharedRows<'a> {
    data: SharedSlice<'a, f32>,
    layout: Layout<'a>,
}

impl<'a> SharedRows<'a> {
    /// The view has passed validation: its rows do not overlap.
    pub(super) fn new(view: ViewMut<'a, f32>) -> Self {
        SharedRows {
            data: SharedSlice::new(view.data),
            layout: view.layout,
        }
    }

    pub(super) fn layout(&self) -> &Layout<'a> {
        &self.layout
    }

    pub(super) fn row_stride(&self) -> usize {
        self.layout.row_stride
    }

    /// Offset of a row; `count` rows from it on are in bounds.
    pub(super) fn pointer(&self, [batch_index, row, head]: [usize; 3], count: usize) -> *mut f32 {
        assert!(row + count <= self.layout.rows_of(batch_index));
        let start = self.layout.offset(batch_index, row, head);
        assert!(
            count == 0
                || start + (count - 1) * self.row_stride() + self.layout.head_dim <= self.data.len
        );
        // SAFETY: within the slice by the assertion.
        unsafe { self.data.start.add(start) }
    }

    /// One row.
    ///
    /// # Safety
    /// There is no other live reference to the row.
    #[allow(clippy::mut_from_ref)]
    pub(super) unsafe fn row(&self, [batch_index, row, head]: [usize; 3]) -> &mut [f32] {
        let start = self.layout.offset(batch_index, row, head);
        // SAFETY: rows are disjoint by validation, and this one is the caller's.
        unsafe { self.data.part(start, self.layout.head_dim) }
    }
}
