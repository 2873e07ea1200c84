//! cuBLASLt's descriptors, freed when they are dropped, and its errors.

use cudarc::cublaslt::sys;

use super::super::failed;
use crate::cuda::Error;
use crate::device::Kind;
use crate::device::gpu::{Epilogue, Gemm};

/// cuBLASLt's descriptors of a GEMM: `d = a b + c` in its names.
pub(super) struct Call {
    pub gemm: Description,
    pub a: MatrixLayout,
    pub b: MatrixLayout,
    pub c: MatrixLayout,
    pub d: MatrixLayout,
}

impl Call {
    pub fn new(gemm: &Gemm) -> Result<Self, Error> {
        use sys::cublasLtMatmulDescAttributes_t as Attribute;
        let Gemm { m, n, k, a, b, .. } = *gemm;
        let bf16 = sys::cudaDataType_t::CUDA_R_16BF;
        let c_type = match gemm.c_kind {
            Kind::Activation => bf16,
            Kind::Exact => sys::cudaDataType_t::CUDA_R_32F,
        };
        // Rows of ours are columns of theirs.
        let layout = |kind, transposed, rows, columns, stride| {
            let (rows, columns) = if transposed {
                (rows, columns)
            } else {
                (columns, rows)
            };
            MatrixLayout::new(kind, rows, columns, stride)
        };
        let c_stride = added(gemm).map_or(gemm.c_stride, |(_, stride)| stride);
        let description = Description::new()?;
        // CUBLAS_OP_N and CUBLAS_OP_T.
        let operation = |transposed: bool| i32::from(transposed);
        description.set(
            Attribute::CUBLASLT_MATMUL_DESC_TRANSA,
            operation(b.transposed),
        )?;
        description.set(
            Attribute::CUBLASLT_MATMUL_DESC_TRANSB,
            operation(a.transposed),
        )?;
        Ok(Self {
            gemm: description,
            a: layout(bf16, b.transposed, k, n, b.stride)?,
            b: layout(bf16, a.transposed, m, k, a.stride)?,
            c: layout(c_type, false, m, n, c_stride)?,
            d: layout(c_type, false, m, n, gemm.c_stride)?,
        })
    }
}

pub(super) struct Description(pub sys::cublasLtMatmulDesc_t);

impl Description {
    pub fn new() -> Result<Self, Error> {
        let (compute, scale) = (
            sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
            sys::cudaDataType_t::CUDA_R_32F,
        );
        let made = cudarc::cublaslt::result::create_matmul_desc(compute, scale);
        made.map(Self)
            .map_err(|e| said("cublasLtMatmulDescCreate", e.0))
    }

    pub fn set<T>(
        &self,
        attribute: sys::cublasLtMatmulDescAttributes_t,
        value: T,
    ) -> Result<(), Error> {
        let value = std::ptr::from_ref(&value).cast();
        // SAFETY: the description lives, the value has that size.
        let status = unsafe {
            sys::cublasLtMatmulDescSetAttribute(self.0, attribute, value, size_of::<T>())
        };
        check("cublasLtMatmulDescSetAttribute", status)
    }
}

impl Drop for Description {
    fn drop(&mut self) {
        // SAFETY: made in `new`, and gone after this.
        let _ = unsafe { sys::cublasLtMatmulDescDestroy(self.0) };
    }
}

pub(super) struct MatrixLayout(pub sys::cublasLtMatrixLayout_t);

impl MatrixLayout {
    pub fn new(
        kind: sys::cudaDataType_t,
        rows: usize,
        columns: usize,
        stride: usize,
    ) -> Result<Self, Error> {
        let made = cudarc::cublaslt::result::create_matrix_layout(
            kind,
            rows as u64,
            columns as u64,
            stride as i64,
        );
        made.map(Self)
            .map_err(|e| said("cublasLtMatrixLayoutCreate", e.0))
    }
}

impl Drop for MatrixLayout {
    fn drop(&mut self) {
        // SAFETY: made in `new`, and gone after this.
        let _ = unsafe { sys::cublasLtMatrixLayoutDestroy(self.0) };
    }
}

pub(super) struct Preference(pub sys::cublasLtMatmulPreference_t);

impl Preference {
    pub fn new() -> Result<Self, Error> {
        let made = cudarc::cublaslt::result::create_matmul_pref();
        made.map(Self)
            .map_err(|e| said("cublasLtMatmulPreferenceCreate", e.0))
    }

    pub fn set<T>(
        &self,
        attribute: sys::cublasLtMatmulPreferenceAttributes_t,
        value: &T,
    ) -> Result<(), Error> {
        let value = std::ptr::from_ref(value).cast();
        // SAFETY: the preference lives, the value has that size.
        let status = unsafe {
            sys::cublasLtMatmulPreferenceSetAttribute(self.0, attribute, value, size_of::<T>())
        };
        check("cublasLtMatmulPreferenceSetAttribute", status)
    }
}

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: made in `new`, and gone after this.
        let _ = unsafe { sys::cublasLtMatmulPreferenceDestroy(self.0) };
    }
}

/// Address and stride of the matrix that the epilogue adds, if any.
pub(super) fn added(gemm: &Gemm) -> Option<(u64, usize)> {
    match gemm.epilogue {
        Epilogue::Store => None,
        Epilogue::Accumulate => Some((gemm.c, gemm.c_stride)),
        Epilogue::AddRows { address, stride } => Some((address, stride)),
    }
}

pub(super) fn check(call: &str, status: sys::cublasStatus_t) -> Result<(), Error> {
    match status {
        sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS => Ok(()),
        status => Err(said(call, status)),
    }
}

pub(super) fn said(call: &str, status: sys::cublasStatus_t) -> Error {
    failed(call, status as u32, format!("{status:?}"))
}
