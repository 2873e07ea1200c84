//! Tensors as the tests lay them out.

use segattn::attention::{Batch, Layout, View, ViewMut};

/// How a `[batch, rows, heads, head_dim]` tensor lies in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arrangement {
    Packed,
    /// `[batch, heads, rows, head_dim]`.
    HeadsOutside,
    /// `[rows, batch, heads, head_dim]` with unused elements between heads and rows.
    BatchInside,
    /// Batch elements in reverse order at arbitrary offsets.
    Offsets,
    /// As `BatchInside`, but all strides are multiples of 8.
    BatchInside8,
    /// As `Offsets`, but all strides and offsets are multiples of 8.
    Offsets8,
    /// Packed; all heads have the same values, with a stride of 0 between heads.
    SharedValues,
    /// Queries and what is like them without padding, one batch element after another; keys and values packed.
    Ragged,
    /// Current keys and values too.
    RaggedKeys,
}

#[derive(Debug, Clone)]
pub struct Tensor<T> {
    pub data: Vec<T>,
    pub shape: [usize; 4],
    row_stride: usize,
    head_stride: usize,
    batch_stride: usize,
    offsets: Option<Vec<usize>>,
    /// Rows before each batch element and of all, where there is no padding.
    row_offsets: Option<Vec<usize>>,
}

impl<T: Copy> Tensor<T> {
    /// Batch elements of these numbers of rows one after another, and a few elements behind the last.
    pub fn ragged(rows: &[usize], [heads, head_dim]: [usize; 2], fill: T) -> Self {
        let mut offsets = vec![0];
        for rows in rows {
            offsets.push(offsets[offsets.len() - 1] + rows);
        }
        let most = rows.iter().copied().max().unwrap_or(0);
        Tensor {
            data: vec![fill; offsets[rows.len()] * heads * head_dim + 24],
            shape: [rows.len(), most, heads, head_dim],
            row_stride: heads * head_dim,
            head_stride: head_dim,
            batch_stride: 0,
            offsets: None,
            row_offsets: Some(offsets),
        }
    }

    /// The first rows of each batch element, without padding.
    pub fn without_padding(&self, rows: Vec<usize>, fill: T) -> Self {
        let [_, _, heads, head_dim] = self.shape;
        let mut ragged = Tensor::ragged(&rows, [heads, head_dim], fill);
        for (b, rows) in rows.into_iter().enumerate() {
            for (row, head) in (0..rows).flat_map(|row| (0..heads).map(move |head| (row, head))) {
                let from = self.row(b, row, head).to_vec();
                ragged.row_mut(b, row, head).copy_from_slice(&from);
            }
        }
        ragged
    }

    pub fn is_ragged(&self) -> bool {
        self.row_offsets.is_some()
    }

    /// Rows of a batch element.
    pub fn rows_of(&self, batch_index: usize) -> usize {
        self.layout().rows_of(batch_index)
    }

    /// Index of the first row of a head among numbers `[batch, heads, rows]`.
    pub fn first_number(&self, batch_index: usize, head: usize) -> usize {
        let [_, rows, heads, _] = self.shape;
        match &self.row_offsets {
            Some(offsets) => offsets[batch_index] * heads + head * self.rows_of(batch_index),
            None => (batch_index * heads + head) * rows,
        }
    }

    /// How many of them there are.
    pub fn numbers(&self) -> usize {
        let [batch, _, heads, _] = self.shape;
        (0..batch).map(|b| self.rows_of(b) * heads).sum()
    }

    pub fn new(shape: [usize; 4], arrangement: Arrangement, fill: T) -> Self {
        let [batch, rows, heads, head_dim] = shape;
        use Arrangement::{BatchInside8, Offsets8};
        let unit = match arrangement {
            BatchInside8 | Offsets8 => 8,
            _ => 1,
        };
        let (row_stride, head_stride, batch_stride) = match arrangement {
            Arrangement::Packed
            | Arrangement::SharedValues
            | Arrangement::Ragged
            | Arrangement::RaggedKeys => (heads * head_dim, head_dim, rows * heads * head_dim),
            Arrangement::HeadsOutside => (head_dim, rows * head_dim, rows * heads * head_dim),
            Arrangement::BatchInside | BatchInside8 => {
                let head = head_dim + 3 * unit;
                (batch * heads * head + 5 * unit, head, heads * head)
            }
            Arrangement::Offsets | Offsets8 => (
                heads * head_dim + unit,
                head_dim,
                rows * (heads * head_dim + unit),
            ),
        };
        let offsets = matches!(arrangement, Arrangement::Offsets | Offsets8).then(|| {
            (0..batch)
                .map(|b| (batch - 1 - b) * (batch_stride + 7 * unit) + 2 * unit)
                .collect()
        });
        let len = (rows + 1) * row_stride.max(1)
            + (batch + 1) * (batch_stride + 9 * unit)
            + heads * head_stride;
        Tensor {
            data: vec![fill; len],
            shape,
            row_stride,
            head_stride,
            batch_stride,
            offsets,
            row_offsets: None,
        }
    }

    /// Gives all heads the rows of the first.
    pub fn share_heads(&mut self) {
        self.head_stride = 0;
    }

    pub fn layout(&self) -> Layout<'_> {
        let [len, rows, heads, head_dim] = self.shape;
        Layout {
            rows,
            heads,
            head_dim,
            row_stride: self.row_stride,
            head_stride: self.head_stride,
            batch: match (&self.row_offsets, &self.offsets) {
                (Some(offsets), _) => Batch::Packed(offsets),
                (None, Some(offsets)) => Batch::Offsets(offsets),
                (None, None) => Batch::Stride {
                    len,
                    stride: self.batch_stride,
                },
            },
        }
    }

    pub fn view(&self) -> View<'_, T> {
        View {
            data: &self.data,
            layout: self.layout(),
        }
    }

    pub fn view_mut(&mut self) -> ViewMut<'_, T> {
        let Tensor {
            data,
            shape: [len, rows, heads, head_dim],
            row_stride,
            head_stride,
            batch_stride,
            offsets,
            row_offsets,
        } = self;
        let batch = match (row_offsets, offsets) {
            (Some(offsets), _) => Batch::Packed(offsets),
            (None, Some(offsets)) => Batch::Offsets(offsets),
            (None, None) => Batch::Stride {
                len: *len,
                stride: *batch_stride,
            },
        };
        let layout = Layout {
            rows: *rows,
            heads: *heads,
            head_dim: *head_dim,
            row_stride: *row_stride,
            head_stride: *head_stride,
            batch,
        };
        ViewMut { data, layout }
    }

    pub fn start(&self, batch_index: usize, row: usize, head: usize) -> usize {
        self.layout().offset(batch_index, row, head)
    }

    pub fn row(&self, batch_index: usize, row: usize, head: usize) -> &[T] {
        let start = self.start(batch_index, row, head);
        &self.data[start..start + self.shape[3]]
    }

    pub fn row_mut(&mut self, batch_index: usize, row: usize, head: usize) -> &mut [T] {
        let start = self.start(batch_index, row, head);
        &mut self.data[start..start + self.shape[3]]
    }

    /// Every element of every row, in row-major order whatever the arrangement.
    pub fn elements(&self) -> Vec<T> {
        let [batch, _, heads, _] = self.shape;
        let mut elements = Vec::new();
        for batch_index in 0..batch {
            for row in 0..self.rows_of(batch_index) {
                for head in 0..heads {
                    elements.extend_from_slice(self.row(batch_index, row, head));
                }
            }
        }
        elements
    }

    pub fn map<U: Copy>(&self, f: impl Fn(T) -> U) -> Tensor<U> {
        Tensor {
            data: self.data.iter().map(|&x| f(x)).collect(),
            shape: self.shape,
            row_stride: self.row_stride,
            head_stride: self.head_stride,
            batch_stride: self.batch_stride,
            offsets: self.offsets.clone(),
            row_offsets: self.row_offsets.clone(),
        }
    }
}
