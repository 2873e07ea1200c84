//! Strided `[batch, rows, heads, head_dim]` tensors whose last dimension is contiguous.

use super::error::Error;

/// Where each batch element of a tensor begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Batch<'a> {
    /// `len` batch elements; that of index `b` begins at element `b * stride`.
    Stride {
        /// Number of batch elements.
        len: usize,
        /// Elements from one batch element to the next.
        stride: usize,
    },
    /// That of index `b` begins at element `offsets[b]`: caches that lie anywhere in one buffer.
    Offsets(&'a [usize]),
    /// `[batch + 1]`, from 0 on: that of index `b` has the rows `[offsets[b], offsets[b + 1])` of the data and no
    /// padding. So sequences of unequal length lie one after another.
    Packed(&'a [usize]),
}

impl Batch<'_> {
    /// Number of batch elements.
    pub fn len(&self) -> usize {
        match self {
            Batch::Stride { len, .. } => *len,
            Batch::Offsets(offsets) => offsets.len(),
            Batch::Packed(offsets) => offsets.len().saturating_sub(1),
        }
    }

    /// Whether there is no batch element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Shape and strides of a `[batch, rows, heads, head_dim]` tensor, in elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout<'a> {
    /// Rows of each batch element, valid and padding together; of packed ones the most that one has.
    pub rows: usize,
    /// Heads of each row.
    pub heads: usize,
    /// Elements of a head's row, which lie side by side.
    pub head_dim: usize,
    /// Elements from one row to the next.
    pub row_stride: usize,
    /// Elements from one head to the next.
    pub head_stride: usize,
    /// Where the batch elements begin.
    pub batch: Batch<'a>,
}

impl<'a> Layout<'a> {
    /// The layout of contiguous `[rows, heads, head_dim]`, the rows of all batch elements one after another, without
    /// padding. Element `b` has the rows `[offsets[b], offsets[b + 1])`.
    pub fn ragged(offsets: &'a [usize], [heads, head_dim]: [usize; 2]) -> Self {
        let rows = |pair: &[usize]| pair[1].saturating_sub(pair[0]);
        Layout {
            rows: offsets.windows(2).map(rows).max().unwrap_or(0),
            heads,
            head_dim,
            row_stride: heads.saturating_mul(head_dim),
            head_stride: head_dim,
            batch: Batch::Packed(offsets),
        }
    }
}

impl Layout<'_> {
    /// The layout of a contiguous `[batch, rows, heads, head_dim]` tensor.
    pub fn packed(shape: [usize; 4]) -> Self {
        let [_, rows, heads, head_dim] = shape;
        let row_stride = heads.saturating_mul(head_dim);
        Layout::strided(
            shape,
            [rows.saturating_mul(row_stride), row_stride, head_dim],
        )
    }

    /// The layout of a `[batch, rows, heads, head_dim]` tensor of another library: its shape, and the strides of all
    /// dimensions but the last, in elements.
    pub fn strided(
        [batch, rows, heads, head_dim]: [usize; 4],
        [batch_stride, row_stride, head_stride]: [usize; 3],
    ) -> Self {
        Layout {
            rows,
            heads,
            head_dim,
            row_stride,
            head_stride,
            batch: Batch::Stride {
                len: batch,
                stride: batch_stride,
            },
        }
    }

    /// Elements from the first of the data to the end of its last row, padding rows included: what the data must have
    /// at least. `None` if that overflows.
    ///
    /// ```
    /// use segattn::attention::Layout;
    ///
    /// // Keys that lie beside values, in `[batch, rows, 2, heads, head_dim]`.
    /// let keys = Layout::strided([3, 5, 2, 8], [5 * 32, 32, 8]);
    /// assert_eq!(keys.extent(), Some(3 * 5 * 32 - 2 * 8));
    /// ```
    pub fn extent(&self) -> Option<usize> {
        if self.heads == 0 || self.head_dim == 0 {
            return Some(0);
        }
        let end = |batch_index| match self.rows_of(batch_index) {
            0 => Some(0),
            rows => self.end(batch_index, rows - 1, self.heads - 1),
        };
        match self.batch {
            Batch::Stride { len: 0, .. } => Some(0),
            Batch::Stride { len, .. } => end(len - 1),
            Batch::Offsets(_) | Batch::Packed(_) => (0..self.batch.len())
                .map(end)
                .try_fold(0, |extent, end| Some(extent.max(end?))),
        }
    }

    /// Rows of a batch element, valid and padding together.
    pub fn rows_of(&self, batch_index: usize) -> usize {
        match self.batch {
            Batch::Packed(offsets) => offsets[batch_index + 1].saturating_sub(offsets[batch_index]),
            Batch::Stride { .. } | Batch::Offsets(_) => self.rows,
        }
    }

    /// Whether batch elements have no padding.
    pub(super) fn is_packed(&self) -> bool {
        matches!(self.batch, Batch::Packed(_))
    }

    /// The element at which a batch element begins; `None` if that overflows.
    pub(super) fn start(&self, batch_index: usize) -> Option<usize> {
        match self.batch {
            Batch::Stride { stride, .. } => batch_index.checked_mul(stride),
            Batch::Offsets(offsets) => Some(offsets[batch_index]),
            Batch::Packed(offsets) => offsets[batch_index].checked_mul(self.row_stride),
        }
    }

    /// Element offset of a row. Only meaningful for rows that passed validation.
    pub fn offset(&self, batch_index: usize, row: usize, head: usize) -> usize {
        let start = match self.batch {
            Batch::Stride { stride, .. } => batch_index * stride,
            Batch::Offsets(offsets) => offsets[batch_index],
            Batch::Packed(offsets) => offsets[batch_index] * self.row_stride,
        };
        start + row * self.row_stride + head * self.head_stride
    }

    /// One past the last element of a row; `None` if that overflows.
    fn end(&self, batch_index: usize, row: usize, head: usize) -> Option<usize> {
        let row = row.checked_mul(self.row_stride)?;
        let head = head.checked_mul(self.head_stride)?;
        self.start(batch_index)?
            .checked_add(row)?
            .checked_add(head)?
            .checked_add(self.head_dim)
    }

    /// Checks that rows `[0, rows)` of one head of one batch element lie within `len` elements.
    pub(super) fn check_rows(
        &self,
        argument: &'static str,
        len: usize,
        [batch_index, rows, head]: [usize; 3],
    ) -> Result<(), Error> {
        if rows == 0 {
            return Ok(());
        }
        match self.end(batch_index, rows - 1, head) {
            Some(end) if end <= len => Ok(()),
            end => Err(Error::OutOfBounds {
                argument,
                batch_index,
                expected: end,
                got: len,
            }),
        }
    }

    /// Whether two of the rows of all heads and batch elements share an element. All rows lie within `len`.
    pub(super) fn overlaps(&self, len: usize) -> bool {
        let (heads, head_dim) = (self.heads, self.head_dim);
        let rows =
            (0..self.batch.len()).try_fold(0usize, |rows, b| rows.checked_add(self.rows_of(b)));
        let count = [heads, head_dim]
            .iter()
            .try_fold(rows.unwrap_or(usize::MAX), |product, &n| {
                product.checked_mul(n)
            });
        match count {
            Some(0) => return false,
            // More elements than the data has.
            None => return true,
            Some(count) if count > len => return true,
            Some(_) => {}
        }
        if self.nests() {
            return false;
        }
        let mut starts: Vec<usize> = (0..self.batch.len())
            .flat_map(|batch_index| {
                (0..self.rows_of(batch_index)).map(move |row| (batch_index, row))
            })
            .flat_map(|(batch_index, row)| {
                (0..heads).map(move |head| self.offset(batch_index, row, head))
            })
            .collect();
        starts.sort_unstable();
        starts.windows(2).any(|pair| pair[1] - pair[0] < head_dim)
    }

    /// A cheap sufficient condition for no overlap: the stride of each dimension is at least the extent inside it.
    fn nests(&self) -> bool {
        let mut dims = vec![(self.row_stride, self.rows), (self.head_stride, self.heads)];
        match self.batch {
            Batch::Stride { len, stride } => dims.push((stride, len)),
            Batch::Offsets(offsets) if offsets.len() > 1 => return false,
            // The rows of all batch elements are one dimension.
            Batch::Packed(offsets) => dims[0].1 = offsets.last().map_or(0, |rows| *rows),
            Batch::Offsets(_) => {}
        }
        dims.retain(|&(_, size)| size > 1);
        dims.sort_unstable();
        let mut extent = self.head_dim;
        dims.iter().all(|&(stride, size)| {
            let nested = stride >= extent;
            extent = extent.saturating_add(stride.saturating_mul(size - 1));
            nested
        })
    }
}

/// Numbers in host or device memory.
pub trait Elements {
    /// How many there are.
    fn elements(&self) -> usize;
}

/// A `[batch, rows, heads, head_dim]` tensor in host or device memory.
pub trait Strided: Elements {
    /// Its shape and strides.
    fn layout(&self) -> Layout<'_>;
}

impl<T> Elements for &[T] {
    fn elements(&self) -> usize {
        self.len()
    }
}

impl<T> Elements for &mut [T] {
    fn elements(&self) -> usize {
        self.len()
    }
}

/// A tensor that is read.
#[derive(Debug, Clone, Copy)]
pub struct View<'a, T> {
    /// The elements; only valid rows are read.
    pub data: &'a [T],
    /// Where the rows are.
    pub layout: Layout<'a>,
}

impl<'a, T> View<'a, T> {
    /// A contiguous `[batch, rows, heads, head_dim]` tensor.
    pub fn packed(data: &'a [T], shape: [usize; 4]) -> Self {
        View {
            data,
            layout: Layout::packed(shape),
        }
    }

    /// The `head_dim` elements of one row.
    pub(super) fn row(&self, [batch_index, row, head]: [usize; 3]) -> &'a [T] {
        let start = self.layout.offset(batch_index, row, head);
        &self.data[start..start + self.layout.head_dim]
    }
}

/// A tensor that is written: every row, padding included.
#[derive(Debug)]
pub struct ViewMut<'a, T> {
    /// The elements.
    pub data: &'a mut [T],
    /// Where the rows are; rows must not overlap.
    pub layout: Layout<'a>,
}

impl<'a, T> ViewMut<'a, T> {
    /// A contiguous `[batch, rows, heads, head_dim]` tensor.
    pub fn packed(data: &'a mut [T], shape: [usize; 4]) -> Self {
        ViewMut {
            data,
            layout: Layout::packed(shape),
        }
    }

    /// The `head_dim` elements of one row.
    pub(super) fn row(&mut self, [batch_index, row, head]: [usize; 3]) -> &mut [T] {
        let start = self.layout.offset(batch_index, row, head);
        &mut self.data[start..start + self.layout.head_dim]
    }
}

impl<T> Elements for View<'_, T> {
    fn elements(&self) -> usize {
        self.data.len()
    }
}

impl<T> Strided for View<'_, T> {
    fn layout(&self) -> Layout<'_> {
        self.layout
    }
}

impl<T> Elements for ViewMut<'_, T> {
    fn elements(&self) -> usize {
        self.data.len()
    }
}

impl<T> Strided for ViewMut<'_, T> {
    fn layout(&self) -> Layout<'_> {
        self.layout
    }
}
