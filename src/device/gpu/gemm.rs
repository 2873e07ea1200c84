//! GEMMs of matrices in buffers: operands, bounds and alignment.

use super::bounds::product;
use super::{Buffer, Driver, Epilogue, Gemm, Gpu, Matrix, Operand, bytes_of};
use crate::device::{Accumulate, Device, DeviceError, Kind, Result, Rows, RowsMut};

impl<D: Driver> Gpu<D> {
    /// Input of a GEMM: bf16 rows. f32 rows are converted to a temporary buffer, which is returned too.
    pub(super) fn operand(
        &self,
        x: Rows<'_, Buffer<D>>,
        rows: usize,
        width: usize,
    ) -> Result<(Option<Buffer<D>>, Operand)> {
        let operand = |address, stride| Operand {
            address,
            stride,
            transposed: false,
        };
        let address = self.rows(&x, rows, width)?;
        if x.buffer.kind == Kind::Activation {
            return Ok((None, operand(address, x.stride)));
        }
        if x.buffer.half_rows {
            // The gradient of logits lies in the first halves of their rows.
            return Ok((None, operand(address, 2 * x.stride)));
        }
        let len = product("rows to be narrowed", &[rows, width])?;
        let mut narrow = self.empty(Kind::Activation, len)?;
        self.copy(
            x,
            RowsMut::packed(&mut narrow, 0, width),
            rows,
            width,
            Accumulate::No,
        )?;
        let address = self.range(&narrow, 0, len)?;
        Ok((Some(narrow), operand(address, width)))
    }

    /// Enqueues a GEMM. Its addresses come from bounds checks of live buffers.
    pub(super) fn multiply(&self, gemm: &Gemm) -> Result<()> {
        let Gemm { a, b, c, .. } = *gemm;
        check_alignment(a.address, a.stride, bytes_of(Kind::Activation))?;
        check_alignment(b.address, b.stride, bytes_of(Kind::Activation))?;
        check_alignment(c, gemm.c_stride, bytes_of(gemm.c_kind))?;
        if let Epilogue::AddRows { address, stride } = gemm.epilogue {
            check_alignment(address, stride, bytes_of(gemm.c_kind))?;
        }
        if gemm.k == 0 {
            return Err(DeviceError::argument(
                "summed index of a GEMM",
                "1 or more",
                0,
            ));
        }
        // SAFETY: all of them lie in buffers of this device; the result is borrowed mutably, so it is none of the
        // others.
        unsafe { self.driver().gemm(gemm) }.map_err(Into::into)
    }

    /// `y = x b` with this epilogue. `b [inner, out]` may be stored transposed.
    pub(super) fn gemm(
        &self,
        x: Rows<'_, Buffer<D>>,
        b: Operand,
        [rows, out, inner]: [usize; 3],
        y: RowsMut<'_, Buffer<D>>,
        epilogue: Epilogue,
    ) -> Result<()> {
        if rows == 0 || out == 0 {
            return Ok(());
        }
        let (_held, a) = self.operand(x, rows, inner)?;
        let gemm = Gemm {
            m: rows,
            n: out,
            k: inner,
            a,
            b,
            c: self.rows(&y.shared(), rows, out)?,
            c_stride: y.stride,
            c_kind: y.buffer.kind,
            epilogue,
        };
        self.multiply(&gemm)?;
        y.buffer.half_rows = false;
        Ok(())
    }
}

/// Checks that the address of a matrix is aligned as its stride is, up to 16 bytes: algorithms of GEMMs are chosen by
/// strides.
fn check_alignment(address: u64, stride: usize, element: usize) -> Result<()> {
    let bytes = stride.saturating_mul(element);
    let alignment = 1u64 << bytes.trailing_zeros().min(4);
    match address.is_multiple_of(alignment) {
        true => Ok(()),
        false => {
            let expected = format!("a start at a multiple of {alignment} bytes");
            Err(DeviceError::argument(
                "matrix",
                expected,
                format!("{address:#x}"),
            ))
        }
    }
}

pub(super) fn epilogue(accumulate: Accumulate) -> Epilogue {
    match accumulate {
        Accumulate::No => Epilogue::Store,
        Accumulate::Yes => Epilogue::Accumulate,
    }
}

impl<D: Driver> Matrix<D> {
    pub(super) fn operand(&self, gpu: &Gpu<D>, transposed: bool) -> Result<Operand> {
        Ok(Operand {
            address: gpu.at(&self.block)?,
            stride: self.inner,
            transposed,
        })
    }
}
