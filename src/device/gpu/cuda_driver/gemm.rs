//! GEMMs by cuBLASLt. The bits of a row do not depend on the number of rows.
//!
//! By default cuBLASLt chooses an algorithm by the number of rows too, and may use split-K. Both change bits. Here
//! every shape has a *reference* algorithm without split-K, chosen for [`REFERENCE_ROWS`] rows.
//!
//! With few rows the reference would leave most of the GPU idle. So a range of rows may have an algorithm of its own,
//! if that gives the bits of the reference on random inputs. The comparison runs on the device, once for each shape,
//! before the first use. Algorithms differ in tiles and stages; those that sum over k in the same steps pass.

mod comparison;
mod descriptors;

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::c_void;
use std::sync::{Mutex, PoisonError};

use cudarc::cublaslt::sys::{self, cublasLtMatmulAlgo_t as Algorithm};
use cudarc::driver::sys::CUstream;

use super::super::bytes_of;
use super::super::driver::Gemm;
use crate::cuda::Error;
use crate::device::Kind;
use comparison::{Check, Memory};
use descriptors::{Call, Preference, added, check, said};

/// Rows at which the reference algorithm is chosen.
const REFERENCE_ROWS: usize = 2048;
/// Largest number of rows of each range. Above the last one the reference is used.
const RANGES: [usize; 6] = [16, 64, 128, 256, 512, 1024];
/// Largest number of algorithms tried for a range.
const CANDIDATES: usize = 16;
/// Bytes of workspace for split-K in [`Choice::Free`].
const FREE_WORKSPACE: usize = 32 << 20;

/// How algorithms are chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Choice {
    /// The bits of a row do not depend on the number of rows.
    #[default]
    SameBits,
    /// cuBLASLt's choice for each number of rows. Prefill and decoding may then differ in bits.
    Free,
}

/// Key of the chosen algorithms: a GEMM without its rows and addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Shape {
    n: usize,
    /// The summed index; 0 where `a` is transposed: rows are summed over then, and as many as there are.
    k: usize,
    /// Rows of `c` where `a` is transposed, else 0; in [`Choice::Free`] always.
    m: usize,
    transposed: [bool; 2],
    strides: [usize; 3],
    c_kind: Kind,
    /// Stride of the matrix that the epilogue adds, if any.
    epilogue: Option<usize>,
}

/// The algorithm for up to `rows` rows.
#[derive(Clone, Copy)]
struct Range {
    rows: usize,
    algorithm: Algorithm,
    workspace: usize,
}

/// cuBLASLt, and the algorithms chosen so far.
pub(super) struct CublasLt {
    handle: sys::cublasLtHandle_t,
    choice: Choice,
    chosen: Mutex<HashMap<Shape, Vec<Range>>>,
    /// Of [`FREE_WORKSPACE`] bytes, in [`Choice::Free`].
    workspace: Option<Memory>,
}

// SAFETY: cuBLASLt's handle may be used from several threads.
unsafe impl Send for CublasLt {}
// SAFETY: as above.
unsafe impl Sync for CublasLt {}

impl std::fmt::Debug for CublasLt {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "CublasLt({:?})", self.choice)
    }
}

/// Loads cuBLASLt, which models need beside the driver; the operation alone does not.
///
/// # Errors
/// [`Error::NoLibrary`].
pub fn load_library() -> Result<(), Error> {
    #[cfg(not(feature = "linked-driver"))]
    // SAFETY: loading the library runs its constructors and nothing else.
    if !unsafe { sys::is_culib_present() } {
        return Err(Error::NoLibrary {
            library: "libcublasLt",
        });
    }
    Ok(())
}

impl CublasLt {
    /// Loads cuBLASLt in the current context.
    pub fn new(choice: Choice) -> Result<Self, Error> {
        load_library()?;
        let handle =
            cudarc::cublaslt::result::create_handle().map_err(|e| said("cublasLtCreate", e.0))?;
        // From here on the handle is destroyed on every path.
        let mut cublas = Self {
            handle,
            choice,
            chosen: Mutex::default(),
            workspace: None,
        };
        if choice == Choice::Free {
            cublas.workspace = Some(Memory::new(FREE_WORKSPACE)?);
        }
        Ok(cublas)
    }

    /// Enqueues a GEMM on a stream of the current context.
    ///
    /// # Safety
    /// As [`Driver::gemm`](super::super::Driver::gemm).
    pub unsafe fn run(&self, stream: CUstream, gemm: &Gemm) -> Result<(), Error> {
        let range = self.range(stream, gemm)?;
        // SAFETY: the caller's promise.
        unsafe { self.multiply(stream, gemm, &range) }
    }

    fn range(&self, stream: CUstream, gemm: &Gemm) -> Result<Range, Error> {
        let by_rows = self.choice == Choice::SameBits && !gemm.a.transposed;
        let free = self.choice == Choice::Free;
        let shape = Shape {
            n: gemm.n,
            k: if gemm.a.transposed && !free {
                0
            } else {
                gemm.k
            },
            m: if by_rows { 0 } else { gemm.m },
            transposed: [gemm.a.transposed, gemm.b.transposed],
            strides: [gemm.a.stride, gemm.b.stride, gemm.c_stride],
            c_kind: gemm.c_kind,
            epilogue: added(gemm).map(|(_, stride)| stride),
        };
        let mut chosen = self.chosen.lock().unwrap_or_else(PoisonError::into_inner);
        let ranges = match chosen.entry(shape) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(unknown) => unknown.insert(match (self.choice, by_rows) {
                (Choice::Free, _) => vec![self.first(gemm)?],
                (_, true) => self.by_rows(stream, gemm)?,
                (_, false) => vec![self.first(&Gemm {
                    k: REFERENCE_ROWS,
                    ..*gemm
                })?],
            }),
        };
        let of_rows = ranges.iter().find(|r| gemm.m <= r.rows);
        Ok(*of_rows.unwrap_or(&ranges[ranges.len() - 1]))
    }

    /// The first algorithm of cuBLASLt's heuristic.
    fn first(&self, gemm: &Gemm) -> Result<Range, Error> {
        self.candidates(gemm)?.first().copied().ok_or_else(|| {
            said(
                "cublasLtMatmulAlgoGetHeuristic",
                sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED,
            )
        })
    }

    /// An algorithm for each range of rows, all of equal bits.
    fn by_rows(&self, stream: CUstream, gemm: &Gemm) -> Result<Vec<Range>, Error> {
        let reference = self.first(&Gemm {
            m: REFERENCE_ROWS,
            ..*gemm
        })?;
        // SAFETY: of all calls: the addresses are in memory of the check, which waits for the stream.
        let multiply = |gemm: &Gemm, range: &Range| unsafe { self.multiply(stream, gemm, range) };
        let check = Check::new(stream, gemm, |gemm| multiply(gemm, &reference))?;
        let mut ranges = Vec::with_capacity(RANGES.len() + 1);
        for rows in RANGES {
            let mut algorithm = reference.algorithm;
            for candidate in self.candidates(&Gemm { m: rows, ..*gemm })? {
                if candidate.algorithm == reference.algorithm
                    || check.same_bits(|gemm| multiply(gemm, &candidate))?
                {
                    algorithm = candidate.algorithm;
                    break;
                }
            }
            ranges.push(Range {
                rows,
                algorithm,
                workspace: 0,
            });
        }
        ranges.push(Range {
            rows: usize::MAX,
            ..reference
        });
        Ok(ranges)
    }

    /// Algorithms for a GEMM, best first by cuBLASLt's estimate.
    fn candidates(&self, gemm: &Gemm) -> Result<Vec<Range>, Error> {
        use sys::cublasLtMatmulPreferenceAttributes_t as Attribute;
        let call = Call::new(gemm)?;
        let preference = Preference::new()?;
        let (workspace, reductions) = match self.choice {
            Choice::SameBits => (
                0u64,
                sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_NONE,
            ),
            Choice::Free => (
                FREE_WORKSPACE as u64,
                sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_MASK,
            ),
        };
        preference.set(
            Attribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
            &workspace,
        )?;
        preference.set(
            Attribute::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
            &(reductions as u32),
        )?;
        for (attribute, alignment) in [
            (
                Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
                alignment(2, gemm.b.stride),
            ),
            (
                Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
                alignment(2, gemm.a.stride),
            ),
            (
                Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
                alignment(
                    bytes_of(gemm.c_kind),
                    added(gemm).map_or(gemm.c_stride, |(_, stride)| stride),
                ),
            ),
            (
                Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
                alignment(bytes_of(gemm.c_kind), gemm.c_stride),
            ),
        ] {
            preference.set(attribute, &alignment)?;
        }
        let mut found = vec![std::mem::MaybeUninit::uninit(); CANDIDATES];
        let mut count = 0;
        // SAFETY: the descriptors live, and `found` has room for so many.
        let status = unsafe {
            sys::cublasLtMatmulAlgoGetHeuristic(
                self.handle,
                call.gemm.0,
                call.a.0,
                call.b.0,
                call.c.0,
                call.d.0,
                preference.0,
                CANDIDATES as i32,
                found.as_mut_ptr().cast(),
                &mut count,
            )
        };
        check("cublasLtMatmulAlgoGetHeuristic", status)?;
        // SAFETY: so many have been written.
        let found = found[..count as usize]
            .iter()
            .map(|x| unsafe { x.assume_init() });
        let usable = found.filter(|x: &sys::cublasLtMatmulHeuristicResult_t| {
            x.state == sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS
                && x.workspaceSize <= workspace as usize
        });
        let range = |x: sys::cublasLtMatmulHeuristicResult_t| Range {
            rows: usize::MAX,
            algorithm: x.algo,
            workspace: x.workspaceSize,
        };
        Ok(usable.map(range).collect())
    }

    /// # Safety
    /// As [`CublasLt::run`].
    unsafe fn multiply(&self, stream: CUstream, gemm: &Gemm, range: &Range) -> Result<(), Error> {
        let call = Call::new(gemm)?;
        let epilogue = added(gemm);
        let (alpha, beta) = (1f32, f32::from(u8::from(epilogue.is_some())));
        let d = gemm.c as *mut c_void;
        let c = epilogue.map_or(d, |(address, _)| address as *mut c_void);
        // SAFETY: the caller's promise; row-major matrices are column-major ones transposed, so b comes first.
        let status = unsafe {
            sys::cublasLtMatmul(
                self.handle,
                call.gemm.0,
                std::ptr::from_ref(&alpha).cast(),
                gemm.b.address as *const c_void,
                call.a.0,
                gemm.a.address as *const c_void,
                call.b.0,
                std::ptr::from_ref(&beta).cast(),
                c.cast_const(),
                call.c.0,
                d,
                call.d.0,
                &range.algorithm,
                self.workspace.as_ref().map_or(0, Memory::address) as *mut c_void,
                range.workspace,
                stream.cast(),
            )
        };
        check("cublasLtMatmul", status)
    }
}

impl Drop for CublasLt {
    fn drop(&mut self) {
        // SAFETY: the handle is valid and used by nobody any more; cuBLASLt waits for nothing of its own.
        let _ = unsafe { cudarc::cublaslt::result::destroy_handle(self.handle) };
    }
}

/// What every address of a matrix is a multiple of: its rows begin anywhere.
fn alignment(element: usize, stride: usize) -> u32 {
    let bytes = element * stride;
    (1u32 << bytes.trailing_zeros().min(4)).max(element as u32)
}
