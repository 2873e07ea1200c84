//! What the tests of the layers' kernels share: strided rows in poisoned buffers, launches, and the rule for errors.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytemuck::Pod;
use half::bf16;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use segattn::cuda::kernels::layer_params::{
    SegattnRetrievalCalls, SegattnRetrievalParams, SegattnRows,
};
use segattn_sim::{Buffer, Checks, Gpu, Module, Source};

/// Names a folder whose kernels are run instead of the real ones: those with a planted bug.
pub const PLANTED: &str = "SEGATTN_PLANTED_KERNELS";

pub fn kernels_folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../kernels")
}

/// A kernel file as the tests run it.
pub fn source(folder: &Path, file: &str, planted: bool) -> Source {
    let source = Source::new(folder.join(file));
    // Hundreds of planted bugs are compiled once each and run for seconds.
    if planted {
        source.optimization(1)
    } else {
        source
    }
}

/// A planted bug is caught when one test fails.
fn end_at_the_first_failure() {
    std::panic::set_hook(Box::new(|_| std::process::exit(101)));
}

pub fn module(file: &str) -> Arc<Module> {
    let source = match std::env::var_os(PLANTED) {
        Some(folder) => {
            end_at_the_first_failure();
            source(Path::new(&folder), file, true)
        }
        None => source(&kernels_folder(), file, false),
    };
    Module::compile(&source).unwrap_or_else(|e| panic!("{e}"))
}

pub fn gpu(seed: u64) -> Gpu {
    Gpu::new(seed, Checks::All)
}

/// Sizes of a launch that a kernel's `_info` constant names.
pub struct Info {
    pub threads: u32,
    pub shared: usize,
}

pub fn info(module: &Arc<Module>, kernel: &str, params: usize) -> Info {
    let values: [i32; 7] = module
        .constant(&format!("{kernel}_info"))
        .unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(values[6] as usize, params, "size of {kernel}'s parameters");
    Info {
        threads: values[0] as u32,
        shared: values[1] as usize,
    }
}

/// Launches with as many threads as the kernel's constant says, or `threads`.
pub fn launch<P: Copy>(
    gpu: &mut Gpu,
    module: &Arc<Module>,
    kernel: &str,
    blocks: usize,
    threads: Option<u32>,
    params: &P,
) {
    let info = info(module, kernel, size_of::<P>());
    let threads = threads.unwrap_or(info.threads);
    let function = module.kernel(kernel).unwrap_or_else(|e| panic!("{e}"));
    if blocks > 0 {
        let grid = [blocks as u32, 1, 1];
        gpu.launch(&function, grid, [threads, 1, 1], info.shared, params)
            .unwrap_or_else(|e| panic!("{e}"));
    }
}

/// Launches a kernel of retrieval for calls, each with two blocks more than the largest one needs.
pub fn retrieve(
    gpu: &mut Gpu,
    module: &Arc<Module>,
    kernel: &str,
    blocks: usize,
    calls: &[SegattnRetrievalParams],
) {
    // SAFETY: the struct has no padding, so every byte is initialised.
    let bytes =
        unsafe { std::slice::from_raw_parts(calls.as_ptr().cast::<u8>(), size_of_val(calls)) };
    let table = gpu.input("calls", bytes).expect("memory");
    let blocks = blocks + 2;
    let params = SegattnRetrievalCalls {
        calls: table.ptr(),
        blocks: blocks as i64,
    };
    launch(gpu, module, kernel, calls.len() * blocks, None, &params);
}

/// Rows in a buffer of their own: those outside, and the columns between two rows, are never to be touched.
#[derive(Clone, Copy)]
pub struct Matrix {
    pub buffer: Buffer,
    pub rows: usize,
    pub width: usize,
    stride: usize,
    start: usize,
    element: usize,
}

impl Matrix {
    /// Rows whose elements are yet to be written, `gap` elements apart and as many behind the buffer's begin.
    pub fn poisoned<T: Pod>(
        gpu: &mut Gpu,
        name: &str,
        [rows, width]: [usize; 2],
        gap: usize,
    ) -> Matrix {
        let stride = width + gap;
        let element = size_of::<T>();
        let buffer = gpu
            .alloc(name, (gap + rows * stride) * element)
            .expect("memory");
        Matrix {
            buffer,
            rows,
            width,
            stride,
            start: gap,
            element,
        }
    }

    pub fn of<T: Pod>(gpu: &mut Gpu, name: &str, values: &[T], width: usize, gap: usize) -> Matrix {
        let rows = values.len() / width.max(1);
        let matrix = Matrix::poisoned::<T>(gpu, name, [rows, width], gap);
        for (r, row) in values.chunks(width.max(1)).enumerate() {
            matrix.write(gpu, r, row);
        }
        matrix
    }

    /// Writes one of the rows.
    pub fn write<T: Pod>(&self, gpu: &mut Gpu, row: usize, values: &[T]) {
        gpu.write(self.buffer, self.byte(row), values);
    }

    fn byte(&self, row: usize) -> usize {
        (self.start + row * self.stride) * self.element
    }

    pub fn view(&self) -> SegattnRows {
        SegattnRows {
            data: (self.buffer.address() + self.start * self.element) as *mut _,
            stride: self.stride as i64,
        }
    }

    pub fn read<T: Pod>(&self, gpu: &mut Gpu) -> Vec<T> {
        (0..self.rows)
            .flat_map(|r| self.row(gpu, r))
            .collect::<Vec<T>>()
    }

    pub fn row<T: Pod>(&self, gpu: &mut Gpu, row: usize) -> Vec<T> {
        gpu.download_range(self.buffer, self.byte(row), self.width)
    }

    /// Every element has been written, and nothing between the rows has.
    pub fn assert_only_rows_written(&self, gpu: &mut Gpu, name: &str) {
        let unwritten: usize = gpu
            .unwritten(self.buffer)
            .iter()
            .map(|range| range.len())
            .sum();
        let expected = self.buffer.len() - self.rows * self.width * self.element;
        assert_eq!(unwritten, expected, "unwritten bytes of {name}");
    }
}

pub const NO_ROWS: SegattnRows = SegattnRows {
    data: std::ptr::null_mut(),
    stride: 0,
};

/// Values with a mean off zero and now and then a large one, the same for the same salt.
pub fn values(count: usize, salt: u64) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(salt);
    (0..count)
        .map(|_| {
            let x = rng.random_range(-1.0f32..1.2);
            if rng.random_range(0..50) == 0 {
                x * 20.0
            } else {
                x
            }
        })
        .collect()
}

pub fn bf16_values(count: usize, salt: u64) -> Vec<bf16> {
    values(count, salt)
        .into_iter()
        .map(bf16::from_f32)
        .collect()
}

pub fn wide(values: &[bf16]) -> Vec<f64> {
    values.iter().map(|x| x.to_f64()).collect()
}

/// Norm of the difference over the norm of what is exact.
pub fn error(got: &[f64], exact: &[f64]) -> f64 {
    assert_eq!(got.len(), exact.len());
    let square = |x: f64| x * x;
    let difference: f64 = got.iter().zip(exact).map(|(g, e)| square(g - e)).sum();
    let norm: f64 = exact.iter().map(|e| square(*e)).sum();
    assert!(!difference.is_nan(), "NaN");
    if difference == 0.0 {
        0.0
    } else {
        (difference / norm).sqrt()
    }
}

/// The rule of the field, made stricter: at most 1.5 times the error of the same formula in plain low precision.
pub fn assert_close(name: &str, got: &[f64], plain: &[f64], exact: &[f64]) {
    let (ours, allowed) = (error(got, exact), 1.5 * error(plain, exact));
    assert!(
        ours <= allowed,
        "{name}: error {ours:.3e}, allowed {allowed:.3e}"
    );
}

/// Bits that must be equal.
pub fn bits(values: &[bf16]) -> Vec<u16> {
    values.iter().map(|x| x.to_bits()).collect()
}

/// A number rounded to bf16.
pub fn low(x: f64) -> f64 {
    bf16::from_f64(x).to_f64()
}
