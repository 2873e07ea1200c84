//! Measured GEMM throughput of this GPU, the reference for a run's utilization.

use std::time::Instant;

use super::Cuda;
use crate::device::gpu::driver::{Driver, Epilogue, Gemm, Operand};
use crate::device::{DeviceError, Kind};

/// Rows, columns and summed index of the GEMM that is timed.
const SIDE: usize = 8192;
const REPEATS: u32 = 10;
/// Bytes of random numbers, repeated to fill the matrices.
const PATTERN: usize = 1 << 20;

/// Device memory until it is dropped.
struct Held<'a>(&'a Cuda, u64, usize);

impl<'a> Held<'a> {
    fn new(cuda: &'a Cuda, bytes: usize) -> Result<Self, DeviceError> {
        Ok(Self(cuda, cuda.allocate(bytes)?, bytes))
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        // SAFETY: allocated in `new`, and nobody uses it after this.
        unsafe { self.0.free(self.1, self.2) };
    }
}

impl Cuda {
    /// Operations a second of a large GEMM in bf16, measured now: 2 m n k over the time of one of ten. Takes 384 MiB
    /// for some 20 ms.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`], or what the driver says.
    pub fn measure_peak(&self) -> Result<f64, DeviceError> {
        let bytes = SIDE * SIDE * 2;
        let [a, b, c] = [
            Held::new(self, bytes)?,
            Held::new(self, bytes)?,
            Held::new(self, bytes)?,
        ];
        let pattern = pattern();
        for at in [a.1, b.1] {
            for start in (0..bytes).step_by(PATTERN) {
                // SAFETY: the range is the matrix's.
                unsafe { self.upload(at + start as u64, &pattern)? };
            }
        }
        let operand = |held: &Held<'_>, transposed| Operand {
            address: held.1,
            stride: SIDE,
            transposed,
        };
        let gemm = Gemm {
            m: SIDE,
            n: SIDE,
            k: SIDE,
            a: operand(&a, false),
            b: operand(&b, true),
            c: c.1,
            c_stride: SIDE,
            c_kind: Kind::Activation,
            epilogue: Epilogue::Store,
        };
        let mut some = [0; 2];
        let mut run = |times: u32| -> Result<f64, DeviceError> {
            let begin = Instant::now();
            for _ in 0..times {
                // SAFETY: three matrices of that size; `c` is not `a` or `b`.
                unsafe { self.gemm(&gemm)? };
            }
            // SAFETY: the GEMM has written it.
            unsafe { self.download(c.1, &mut some)? };
            Ok(begin.elapsed().as_secs_f64())
        };
        // The first chooses the algorithm.
        run(2)?;
        let seconds = run(REPEATS)? / f64::from(REPEATS);
        Ok(2.0 * (SIDE as f64).powi(3) / seconds)
    }
}

/// Random bf16 between -1 and 1, because the time of a GEMM depends on its values.
fn pattern() -> Vec<u8> {
    let mut state = 1u64;
    let next = |_| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        half::bf16::from_f32((state >> 40) as f32 / (1u64 << 23) as f32 - 1.0)
    };
    let numbers: Vec<half::bf16> = (0..PATTERN / 2).map(next).collect();
    bytemuck::cast_slice(&numbers).to_vec()
}
