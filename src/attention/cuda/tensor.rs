//! Tensors and numbers in device memory, and the checks that only device memory needs: element type and alignment.

use super::error::Error;
use super::instances::Dtype;
use crate::attention::layout::{Batch, Elements, Layout, Strided};
use crate::attention::{Error as ArgumentError, Problem};

/// A `[batch, rows, heads, head_dim]` tensor in device memory. Rows are aligned to 16 bytes: the address is a multiple
/// of 16, strides and offsets are multiples of 8 elements.
#[derive(Debug, Clone, Copy)]
pub struct Tensor<'a> {
    /// Device address (`CUdeviceptr`) of the first element.
    pub data: u64,
    /// Elements that may be touched, counted from `data`.
    pub len: usize,
    /// Their type.
    pub dtype: Dtype,
    /// Its shape, and where its rows are.
    pub layout: Layout<'a>,
}

impl Tensor<'_> {
    /// A contiguous tensor.
    pub fn packed(data: u64, dtype: Dtype, shape: [usize; 4]) -> Self {
        Tensor {
            data,
            len: shape.iter().fold(1, |len: usize, &n| len.saturating_mul(n)),
            dtype,
            layout: Layout::packed(shape),
        }
    }

    /// Checks the element type, and that rows can be copied 16 bytes at a time.
    pub(super) fn check(&self, argument: &'static str, dtype: Dtype) -> Result<(), Error> {
        if self.dtype != dtype {
            return Err(Error::Argument(ArgumentError::Shape {
                argument,
                expected: format!("{dtype} like q"),
                got: self.dtype.to_string(),
            }));
        }
        let layout = &self.layout;
        let wrong = |expected, got: u64| {
            Err(Error::Alignment {
                argument,
                expected,
                got,
            })
        };
        if layout.rows == 0 || layout.batch.is_empty() {
            return Ok(());
        }
        if self.data == 0 || !self.data.is_multiple_of(16) {
            return wrong(
                "an address that is a positive multiple of 16 bytes",
                self.data,
            );
        }
        let batch: &[usize] = match &layout.batch {
            Batch::Stride { stride, .. } => std::slice::from_ref(stride),
            Batch::Offsets(offsets) => offsets,
            Batch::Packed(_) => &[],
        };
        let strides = [layout.row_stride, layout.head_stride];
        match batch.iter().chain(&strides).find(|x| !x.is_multiple_of(8)) {
            Some(&x) => wrong(
                "strides and offsets that are multiples of 8 elements",
                x as u64,
            ),
            None => Ok(()),
        }
    }
}

impl Elements for Tensor<'_> {
    fn elements(&self) -> usize {
        self.len
    }
}

impl Strided for Tensor<'_> {
    fn layout(&self) -> Layout<'_> {
        self.layout
    }
}

/// `len` numbers in device memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceSlice {
    /// Device address of the first.
    pub data: u64,
    /// How many there are.
    pub len: usize,
}

impl DeviceSlice {
    /// The slice at an address.
    pub fn new(data: u64, len: usize) -> Self {
        DeviceSlice { data, len }
    }

    /// f32 lie at multiples of 4 bytes.
    pub(super) fn check_alignment(&self, argument: &'static str) -> Result<(), Error> {
        if self.len == 0 || (self.data != 0 && self.data.is_multiple_of(4)) {
            return Ok(());
        }
        Err(Error::Alignment {
            argument,
            expected: "an address that is a positive multiple of 4 bytes",
            got: self.data,
        })
    }
}

impl Elements for DeviceSlice {
    fn elements(&self) -> usize {
        self.len
    }
}

/// Checks the tensors of a problem, and further ones of the same call.
pub(super) fn check_tensors<'a>(
    problem: &'a Problem<'a, Tensor<'a>>,
    others: impl IntoIterator<Item = (&'static str, Option<&'a Tensor<'a>>)>,
) -> Result<(), Error> {
    let dtype = problem.q.dtype;
    let mut tensors = problem.tensors().into_iter().chain(others);
    tensors.try_for_each(|(name, tensor)| tensor.map_or(Ok(()), |x| x.check(name, dtype)))
}
