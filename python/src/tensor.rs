//! Tensors by address, shape and strides, as numpy and PyTorch describe them.

use pyo3::prelude::*;
use segattn::attention::{Error, Layout, View, ViewMut};

/// A tensor `[batch, rows, heads, head_dim]`: address of its first element, shape, and strides in elements.
#[derive(Debug, Clone, Copy, FromPyObject)]
pub struct Tensor(u64, [usize; 4], [i64; 4]);

/// Contiguous numbers: address of the first, and how many.
#[derive(Debug, Clone, Copy, FromPyObject)]
pub struct Numbers(pub u64, pub usize);

impl Tensor {
    /// Where the rows are.
    pub fn layout(&self, argument: &'static str) -> Result<Layout<'static>, Error> {
        let Tensor(_, shape, given) = *self;
        let refused = |expected: &str| Error::Shape {
            argument,
            expected: expected.into(),
            got: format!("strides of {given:?} elements"),
        };
        let row = shape[2].saturating_mul(shape[3]);
        let mut strides = [shape[1].saturating_mul(row), row, shape[3], 1];
        for (dim, stride) in strides.iter_mut().enumerate() {
            // A stride that is never taken has no meaning; every device takes that of a contiguous tensor.
            if shape[dim] > 1 && !shape.contains(&0) {
                *stride =
                    usize::try_from(given[dim]).map_err(|_| refused("strides of at least 0"))?;
            }
        }
        let [batch, rows, heads, last] = strides;
        match last {
            1 => Ok(Layout::strided(shape, [batch, rows, heads])),
            _ => Err(refused("a contiguous last dimension")),
        }
    }

    /// Layout, and elements from the first to the last.
    fn extent(&self, argument: &'static str) -> Result<(Layout<'static>, usize), Error> {
        let layout = self.layout(argument)?;
        let extent = layout.extent().filter(|extent| *extent < 1 << 60);
        let extent = extent.ok_or_else(|| Error::Shape {
            argument,
            expected: "fewer than 2^60 elements".into(),
            got: format!("shape {:?}, strides {:?}", self.1, self.2),
        })?;
        Ok((layout, extent))
    }

    /// The tensor in host memory, to be read.
    ///
    /// # Safety
    /// The memory that shape and strides reach is there, and nobody writes it while the view lives.
    pub unsafe fn view<'a, T>(&self, argument: &'static str) -> Result<View<'a, T>, Error> {
        let (layout, len) = self.extent(argument)?;
        let data = pointer(argument, self.0, len)?;
        // SAFETY: the caller's promise.
        let data = unsafe { std::slice::from_raw_parts(data, len) };
        Ok(View { data, layout })
    }

    /// The tensor in host memory, to be written.
    ///
    /// # Safety
    /// As [`view`](Self::view), and nobody else uses the memory.
    pub unsafe fn view_mut<'a, T>(&self, argument: &'static str) -> Result<ViewMut<'a, T>, Error> {
        let (layout, len) = self.extent(argument)?;
        let data = pointer(argument, self.0, len)?;
        // SAFETY: the caller's promise.
        let data = unsafe { std::slice::from_raw_parts_mut(data, len) };
        Ok(ViewMut { data, layout })
    }

    /// The tensor in device memory.
    #[cfg(feature = "cuda")]
    pub fn on_device(
        &self,
        argument: &'static str,
        dtype: segattn::attention::cuda::Dtype,
    ) -> Result<segattn::attention::cuda::Tensor<'static>, Error> {
        let (layout, len) = self.extent(argument)?;
        let data = self.0;
        Ok(segattn::attention::cuda::Tensor {
            data,
            len,
            dtype,
            layout,
        })
    }
}

impl Numbers {
    /// The numbers in host memory, to be read.
    ///
    /// # Safety
    /// As [`Tensor::view`].
    pub unsafe fn slice<'a, T>(&self, argument: &'static str) -> Result<&'a [T], Error> {
        let data = pointer(argument, self.0, self.1)?;
        // SAFETY: the caller's promise.
        Ok(unsafe { std::slice::from_raw_parts(data, self.1) })
    }

    /// The numbers in host memory, to be written.
    ///
    /// # Safety
    /// As [`Tensor::view_mut`].
    pub unsafe fn slice_mut<'a, T>(&self, argument: &'static str) -> Result<&'a mut [T], Error> {
        let data = pointer(argument, self.0, self.1)?;
        // SAFETY: the caller's promise.
        Ok(unsafe { std::slice::from_raw_parts_mut(data, self.1) })
    }
}

/// The address of `len` elements in host memory; any where there are none.
fn pointer<T>(argument: &'static str, address: u64, len: usize) -> Result<*mut T, Error> {
    if len == 0 {
        return Ok(std::ptr::dangling_mut());
    }
    match usize::try_from(address) {
        Ok(at) if at != 0 && at.is_multiple_of(align_of::<T>()) => {
            Ok(std::ptr::with_exposed_provenance_mut(at))
        }
        _ => Err(Error::Shape {
            argument,
            expected: format!("an address that is a multiple of {}", align_of::<T>()),
            got: format!("{address:#x}"),
        }),
    }
}
