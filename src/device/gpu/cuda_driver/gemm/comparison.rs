//! Whether an algorithm gives the bits of the reference, tried on random inputs.

use cudarc::driver::result as driver;
use cudarc::driver::sys::CUstream;

use crate::cuda::{Error, driver_error};
use crate::device::gpu::{Epilogue, Gemm, Operand, bytes_of};

/// Rows and columns of the comparison.
const CHECKED: [usize; 2] = [8, 1024];

/// Random inputs for the k of a GEMM, and the reference's result on them.
///
/// `multiply` enqueues the GEMM that it is given, whose addresses lie in memory of the check, on the check's stream.
pub(super) struct Check {
    stream: CUstream,
    gemm: Gemm,
    /// a, b, c.
    memory: [Memory; 3],
    expected: Vec<u8>,
}

impl Check {
    /// The check for a GEMM, with the result of the reference.
    pub fn new(
        stream: CUstream,
        gemm: &Gemm,
        multiply: impl FnOnce(&Gemm) -> Result<(), Error>,
    ) -> Result<Self, Error> {
        let (m, n) = (CHECKED[0], gemm.n.min(CHECKED[1]));
        let (b_rows, b_columns) = if gemm.b.transposed {
            (n, gemm.k)
        } else {
            (gemm.k, n)
        };
        let memory = [
            Memory::random(m * gemm.k, 1)?,
            Memory::random(b_rows * b_columns, 2)?,
            Memory::new(m * n * bytes_of(gemm.c_kind))?,
        ];
        let operand = |i: usize, stride| Operand {
            address: memory[i].address(),
            stride,
            transposed: false,
        };
        let gemm = Gemm {
            m,
            n,
            a: operand(0, gemm.k),
            b: Operand {
                transposed: gemm.b.transposed,
                ..operand(1, b_columns)
            },
            c: memory[2].address(),
            c_stride: n,
            epilogue: match gemm.epilogue {
                Epilogue::Store => Epilogue::Store,
                Epilogue::Accumulate | Epilogue::AddRows { .. } => Epilogue::Accumulate,
            },
            ..*gemm
        };
        let mut check = Self {
            stream,
            gemm,
            memory,
            expected: Vec::new(),
        };
        check.expected = check.run(multiply)?;
        Ok(check)
    }

    /// Whether the result has the bits of the reference's.
    pub fn same_bits(
        &self,
        multiply: impl FnOnce(&Gemm) -> Result<(), Error>,
    ) -> Result<bool, Error> {
        Ok(self.run(multiply)? == self.expected)
    }

    fn run(&self, multiply: impl FnOnce(&Gemm) -> Result<(), Error>) -> Result<Vec<u8>, Error> {
        let mut bytes = vec![0; self.gemm.m * self.gemm.n * bytes_of(self.gemm.c_kind)];
        let (at, stream) = (self.memory[2].address(), self.stream);
        // SAFETY: the memory is this check's, of these sizes; the stream is waited for.
        unsafe {
            driver::memset_d8_async(at, 0, bytes.len(), stream)
                .map_err(|e| driver_error("clearing memory", e))?;
            multiply(&self.gemm)?;
            driver::memcpy_dtoh_async(&mut bytes, at, stream)
                .map_err(|e| driver_error("reading back", e))?;
            driver::stream::synchronize(stream)
                .map_err(|e| driver_error("waiting for a GEMM", e))?;
        }
        Ok(bytes)
    }
}

/// Device memory that is freed when dropped, after whatever runs.
pub(super) struct Memory(u64);

impl Memory {
    /// Uninitialized memory of at least one byte.
    pub fn new(bytes: usize) -> Result<Self, Error> {
        // SAFETY: it is written before it is read.
        unsafe { driver::malloc_sync(bytes.max(1)) }
            .map(Self)
            .map_err(|e| driver_error("allocating memory for GEMMs", e))
    }

    /// Where it begins.
    pub fn address(&self) -> u64 {
        self.0
    }

    /// So many bf16 between -1 and 1.
    fn random(len: usize, seed: u64) -> Result<Self, Error> {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let next = |_| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            half::bf16::from_f32((state >> 40) as f32 / (1u64 << 23) as f32 - 1.0)
        };
        let values: Vec<half::bf16> = (0..len).map(next).collect();
        let memory = Self::new(len * 2)?;
        // SAFETY: the memory has that size.
        unsafe { driver::memcpy_htod_sync(memory.0, &values) }
            .map_err(|e| driver_error("writing", e))?;
        Ok(memory)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: allocated in `new`; freeing waits for the device.
        let _ = unsafe { driver::free_sync(self.0) };
    }
}
