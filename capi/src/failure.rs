//! What a call can end with: a status, and the text of the thread's last failure.

use std::cell::RefCell;
use std::ffi::{CString, c_char};
use std::panic::{AssertUnwindSafe, catch_unwind};

use segattn::attention::{self, cuda};
use segattn::cuda::{Error as CudaError, kernels};

/// What a call ended with. `segattn_last_error` has the text: the argument, what was expected and what came.
#[repr(i32)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// It is done, or on a stream: enqueued.
    Ok = 0,
    /// A pointer that must not be NULL is.
    Null = 1,
    /// A shape, stride, length, gate or other value does not fit. Nothing was written.
    Argument = 2,
    /// An address or a stride is not aligned. Nothing was written.
    Alignment = 3,
    /// Nothing computes this: an element type, a head size. Nothing was written.
    Unsupported = 4,
    /// The workspace is too small or not aligned to 256 bytes. Nothing was written.
    Workspace = 5,
    /// There is no driver, no GPU or none of this number, or the library was built without CUDA.
    NoGpu = 6,
    /// The driver is too old for the kernels, or there is no image for the GPU.
    Driver = 7,
    /// Too little free memory on the device.
    OutOfMemory = 8,
    /// The driver failed. The text says whether later calls can succeed.
    Failed = 9,
    /// A bug of this library, stopped at the border. What the call writes is undefined.
    Panic = 10,
}

/// Why a call did nothing.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    #[error("{argument}: expected {expected}, got NULL")]
    Null {
        argument: &'static str,
        expected: &'static str,
    },
    #[error("{argument}: expected {expected}, got {got}")]
    Argument {
        argument: &'static str,
        expected: String,
        got: String,
    },
    #[error("{argument}: expected an address that is a multiple of {expected} bytes, got {got:#x}")]
    Alignment {
        argument: &'static str,
        expected: usize,
        got: usize,
    },
    #[error("dtype: supported are {expected}, got {got}")]
    Dtype { expected: &'static str, got: i32 },
    #[cfg(not(feature = "cuda"))]
    #[error("this library was built without CUDA: build segattn-capi with the feature `cuda`")]
    NoCuda,
    #[error(transparent)]
    Call(#[from] cuda::Error),
}

impl From<attention::Error> for Failure {
    fn from(error: attention::Error) -> Self {
        Failure::Call(error.into())
    }
}

impl From<CudaError> for Failure {
    fn from(error: CudaError) -> Self {
        Failure::Call(error.into())
    }
}

impl From<kernels::Error> for Failure {
    fn from(error: kernels::Error) -> Self {
        Failure::Call(error.into())
    }
}

impl Failure {
    fn status(&self) -> Status {
        match self {
            Failure::Null { .. } => Status::Null,
            Failure::Argument { .. } => Status::Argument,
            Failure::Alignment { .. } => Status::Alignment,
            Failure::Dtype { .. } => Status::Unsupported,
            #[cfg(not(feature = "cuda"))]
            Failure::NoCuda => Status::NoGpu,
            Failure::Call(error) => status(error),
        }
    }
}

fn status(error: &cuda::Error) -> Status {
    match error {
        cuda::Error::Argument(attention::Error::Unsupported { .. }) => Status::Unsupported,
        cuda::Error::Argument(_) => Status::Argument,
        cuda::Error::Alignment { .. } => Status::Alignment,
        cuda::Error::Workspace { .. } => Status::Workspace,
        cuda::Error::Kernels(kernels::Error::NoKernel { .. }) => Status::Unsupported,
        cuda::Error::Kernels(kernels::Error::TooLarge { .. }) => Status::Argument,
        cuda::Error::Kernels(kernels::Error::Driver(error)) => match error {
            CudaError::NoDriver | CudaError::NoDevice { .. } | CudaError::Ordinal { .. } => {
                Status::NoGpu
            }
            CudaError::DriverTooOld { .. } | CudaError::NoKernelImage { .. } => Status::Driver,
            CudaError::OutOfMemory { .. } => Status::OutOfMemory,
            _ => Status::Failed,
        },
        _ => Status::Failed,
    }
}

thread_local! {
    static LAST: RefCell<CString> = RefCell::default();
}

fn remember(text: &str) {
    let text: Vec<u8> = text.bytes().filter(|&byte| byte != 0).collect();
    let text = CString::new(text).unwrap_or_default();
    // A thread that is ending has no last error.
    let _ = LAST.try_with(|last| last.replace(text));
}

/// The text of the thread's last failure.
pub(crate) fn last() -> *const c_char {
    LAST.try_with(|last| last.borrow().as_ptr())
        .unwrap_or(c"".as_ptr())
}

/// Runs a call: its failure becomes a status and a text, and so does a panic, which must not cross the border.
pub(crate) fn guarded(call: impl FnOnce() -> Result<(), Failure>) -> Status {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(Ok(())) => Status::Ok,
        Ok(Err(failure)) => {
            remember(&failure.to_string());
            failure.status()
        }
        Err(panic) => {
            let said = panic.downcast_ref::<String>().map(String::as_str);
            let said = said.or_else(|| panic.downcast_ref::<&str>().copied());
            remember(&format!(
                "a bug of segattn: {}",
                said.unwrap_or("a panic without text")
            ));
            // The payload's own destructor may panic too.
            std::mem::forget(panic);
            Status::Panic
        }
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::CStr;

    use super::*;

    #[test]
    fn a_panic_becomes_a_status() {
        assert_eq!(guarded(|| panic!("row {}", 7)), Status::Panic);
        // SAFETY: the text of this thread, which has not failed since.
        let said = unsafe { CStr::from_ptr(last()) };
        assert_eq!(said, c"a bug of segattn: row 7");
        assert_eq!(guarded(|| Ok(())), Status::Ok);
    }

    #[test]
    fn a_text_with_a_zero_byte_is_kept() {
        let failure = Failure::Argument {
            argument: "k",
            expected: "a\0b".into(),
            got: String::new(),
        };
        assert_eq!(guarded(|| Err(failure)), Status::Argument);
        // SAFETY: as above.
        assert_eq!(unsafe { CStr::from_ptr(last()) }, c"k: expected ab, got ");
    }
}
