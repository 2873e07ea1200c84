//! Addresses of buffers for kernels. Kernels do not check bounds, so every range is checked here.

use std::ffi::c_void;

use super::memory::Block;
use super::{Buffer, Driver, Gpu, bytes_of};
use crate::attention::cuda::DeviceSlice;
use crate::cuda::kernels::layer_params::SegattnRows;
use crate::device::{DeviceError, Kind, Result, Rows, RowsMut};

/// Elements that most kernels load and store at a time.
pub(super) const VECTOR: usize = 8;
/// Size and alignment of a vector of activations, in bytes.
const VECTOR_BYTES: u64 = 16;

/// Rows that a kernel does not use.
pub(super) const NONE: SegattnRows = SegattnRows {
    data: std::ptr::null_mut(),
    stride: 0,
};

pub(super) fn rows_at(address: u64, stride: usize) -> SegattnRows {
    SegattnRows {
        data: address as usize as *mut c_void,
        stride: stride as i64,
    }
}

/// Elements of a block that its owner has just allocated, so that no recorded call uses it.
pub(super) fn pointer<T>(block: &Block<impl Driver>) -> *const T {
    block.address() as usize as *const T
}

impl<D: Driver> Gpu<D> {
    /// Address of a block. A block of another device is an error.
    pub(super) fn at(&self, block: &Block<D>) -> Result<u64> {
        if !block.is_of(&self.memory) {
            let (expected, got) = ("one of this device", "one of another");
            return Err(DeviceError::argument("memory", expected, got));
        }
        self.memory.note_use(block);
        Ok(block.address())
    }

    /// Address of elements `[start, start + len)` of a buffer.
    pub(super) fn range(&self, buffer: &Buffer<D>, start: usize, len: usize) -> Result<u64> {
        let fits = start.checked_add(len).is_some_and(|end| end <= buffer.len);
        if !fits {
            let expected = format!("elements of a buffer of {}", buffer.len);
            let got = format!("{len} from element {start} on");
            return Err(DeviceError::argument("range", expected, got));
        }
        let base = buffer
            .block
            .as_ref()
            .map_or(Ok(0), |block| self.at(block))?;
        Ok(base + (start * bytes_of(buffer.kind)) as u64)
    }

    /// A buffer from an element on.
    pub(super) fn slice(&self, buffer: &Buffer<D>, start: usize) -> Result<DeviceSlice> {
        let len = buffer.len.saturating_sub(start);
        Ok(DeviceSlice::new(self.range(buffer, start, len)?, len))
    }

    /// Address of `rows` rows of `width` elements.
    pub(super) fn rows(&self, x: &Rows<'_, Buffer<D>>, rows: usize, width: usize) -> Result<u64> {
        let end = match rows.checked_sub(1) {
            None => Some(0),
            Some(last) => (last.checked_mul(x.stride))
                .and_then(|at| at.checked_add(width))
                .and_then(|at| at.checked_add(x.start)),
        };
        if end.is_none_or(|end| end > x.buffer.len) {
            let expected = format!("rows within a buffer of {} elements", x.buffer.len);
            let (start, stride) = (x.start, x.stride);
            let got = format!("{rows} of {width}, {stride} apart, from element {start} on");
            return Err(DeviceError::argument("rows", expected, got));
        }
        self.range(x.buffer, x.start.min(x.buffer.len), 0)
    }

    /// `rows` rows of `width` activations that a kernel reads.
    pub(super) fn input(
        &self,
        x: &Rows<'_, Buffer<D>>,
        rows: usize,
        width: usize,
    ) -> Result<SegattnRows> {
        of_kind(x.buffer, Kind::Activation)?;
        let address = self.rows(x, rows, width)?;
        let aligned = address.is_multiple_of(VECTOR_BYTES)
            && (rows <= 1 || x.stride.is_multiple_of(VECTOR))
            && width.is_multiple_of(VECTOR);
        if rows > 0 && !aligned {
            let expected = "start, stride and width that are multiples of 8 elements";
            let got = format!("{}, {} and {width}", x.start, x.stride);
            return Err(DeviceError::argument("rows of activations", expected, got));
        }
        Ok(rows_at(address, x.stride))
    }

    /// `rows` rows of `width` activations that a kernel writes.
    pub(super) fn output(
        &self,
        x: &RowsMut<'_, Buffer<D>>,
        rows: usize,
        width: usize,
    ) -> Result<SegattnRows> {
        if rows > 1 && x.stride < width {
            let expected = format!("rows of {width} elements that do not overlap");
            let got = format!("rows {} apart", x.stride);
            return Err(DeviceError::argument("rows", expected, got));
        }
        self.input(&x.shared(), rows, width)
    }

    /// f32 `[start, start + len)` of a buffer.
    pub(super) fn exact(&self, buffer: &Buffer<D>, start: usize, len: usize) -> Result<*mut f32> {
        of_kind(buffer, Kind::Exact)?;
        Ok(self.range(buffer, start, len)? as usize as *mut f32)
    }

    /// Cosines and sines `[rows, head_dim / 2]` that have a row for every angle up to `last`.
    pub(super) fn angle_tables(
        &self,
        (cos, sin): (&Buffer<D>, &Buffer<D>),
        head_dim: usize,
        last: Option<usize>,
    ) -> Result<[*mut f32; 2]> {
        if head_dim == 0 || !head_dim.is_multiple_of(2 * VECTOR) {
            let expected = "a multiple of 16";
            return Err(DeviceError::argument("head_dim", expected, head_dim));
        }
        let rows = cos.len.min(sin.len) / (head_dim / 2);
        below("angle", last, rows)?;
        Ok([self.exact(cos, 0, cos.len)?, self.exact(sin, 0, sin.len)?])
    }
}

/// Checks the kind of a buffer.
pub(super) fn of_kind<D: Driver>(buffer: &Buffer<D>, kind: Kind) -> Result<()> {
    match buffer.kind == kind {
        true => Ok(()),
        false => {
            let (expected, got) = (format!("{kind:?}"), format!("{:?}", buffer.kind));
            Err(DeviceError::argument("kind of a buffer", expected, got))
        }
    }
}

/// Checks that an index is below `end`.
pub(super) fn below(what: &'static str, index: Option<usize>, end: usize) -> Result<()> {
    match index.filter(|index| *index >= end) {
        None => Ok(()),
        Some(got) => Err(DeviceError::argument(what, format!("one below {end}"), got)),
    }
}

/// Checks that two numbers are equal.
pub(super) fn equal(what: &'static str, expected: usize, got: usize) -> Result<()> {
    match expected == got {
        true => Ok(()),
        false => Err(DeviceError::argument(what, expected.to_string(), got)),
    }
}

/// The product of sizes, checked for overflow.
pub(super) fn product(what: &'static str, sizes: &[usize]) -> Result<usize> {
    let product = sizes.iter().try_fold(1usize, |a, b| a.checked_mul(*b));
    product.ok_or_else(|| {
        let got = format!("{sizes:?}");
        DeviceError::argument(what, "sizes whose product fits in usize", got)
    })
}

/// A number as i32, the type of kernel parameters.
pub(super) fn int(what: &'static str, n: usize) -> Result<i32> {
    let expected = format!("at most {}", i32::MAX);
    i32::try_from(n).map_err(|_| DeviceError::argument(what, expected, n))
}
