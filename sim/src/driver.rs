//! The simulated GPU as a driver of the crate's GPU device: the model's own code runs on it unchanged.
//!
//! Every buffer lies in memory of its own, so whatever reads or writes past one is reported. What is asked is done when
//! the call returns. Matrix products are done on the host: bf16 in, each element one chain of fused multiply-adds in
//! f32 over the summed index ascending.

use std::fmt;
use std::ops::Range;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use half::bf16;
use segattn::attention::cuda::{Error, Launch, Launcher};
use segattn::device::gpu::{self, Operand, Plus, Product};
use segattn::device::{DeviceError, Kind, OutOfMemory};

use crate::gpu::{Checks, Gpu};
use crate::launcher::{Kernels, Stream};
use crate::memory::Buffer;

/// A simulated GPU with the kernels of a folder.
pub struct Driver {
    gpu: Mutex<Memory>,
    kernels: Kernels,
}

/// The GPU, and whether it knows what has been written.
struct Memory {
    gpu: Gpu,
    checks: Checks,
    /// Bytes of device memory that are left.
    left: usize,
}

impl Driver {
    /// A GPU whose launches are scheduled by `seed`, with the kernels in the folder `kernels`.
    pub fn new(kernels: &Path, seed: u64, checks: Checks) -> Self {
        Self {
            gpu: Mutex::new(Memory {
                gpu: Gpu::new(seed, checks),
                checks,
                left: usize::MAX,
            }),
            kernels: Kernels::new(kernels),
        }
    }

    /// From now on `bytes` bytes of device memory are left; at first there is no end of it, as of the host's.
    pub fn leave(&self, bytes: usize) {
        self.lock().left = bytes;
    }

    fn lock(&self) -> MutexGuard<'_, Memory> {
        self.gpu.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Memory {
    fn buffer(&mut self, name: &str, bytes: usize) -> Option<u64> {
        let buffer = self.gpu.alloc(name, bytes).ok()?;
        Some(buffer.address() as u64)
    }

    fn free(&mut self, address: u64, bytes: usize) {
        if let Some((buffer, _)) = self.gpu.locate(address as usize, bytes) {
            self.gpu.free(buffer);
        }
    }
}

impl fmt::Debug for Driver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("simulated GPU")
    }
}

impl gpu::Driver for Driver {
    type Kernels = Kernels;

    fn description(&self) -> String {
        "simulated GPU".into()
    }

    fn kernels(&self) -> &Kernels {
        &self.kernels
    }

    fn region_bytes(&self) -> usize {
        0
    }

    fn allocate(&self, bytes: usize) -> Result<u64, DeviceError> {
        let memory = &mut *self.lock();
        let left = memory.left.checked_sub(bytes);
        let address = left.and_then(|_| memory.buffer("buffer", bytes));
        let address = address.ok_or_else(|| OutOfMemory::device(bytes))?;
        memory.left -= bytes;
        Ok(address)
    }

    unsafe fn free(&self, address: u64, bytes: usize) {
        let memory = &mut *self.lock();
        memory.free(address, bytes);
        memory.left += bytes;
    }

    fn allocate_host(&self, bytes: usize) -> Result<u64, DeviceError> {
        let address = self.lock().buffer("host buffer", bytes);
        address.ok_or_else(|| OutOfMemory::pinned(bytes).into())
    }

    unsafe fn free_host(&self, address: u64, bytes: usize) {
        self.lock().free(address, bytes);
    }

    fn free_memory(&self) -> Result<usize, Error> {
        Ok(self.lock().left)
    }

    unsafe fn upload(&self, to: u64, bytes: &[u8]) -> Result<(), Error> {
        write(&mut self.lock(), "upload", to, bytes)
    }

    unsafe fn download(&self, from: u64, bytes: &mut [u8]) -> Result<(), Error> {
        bytes.copy_from_slice(&read(&mut self.lock(), "download", from, bytes.len())?);
        Ok(())
    }

    unsafe fn zero(&self, at: u64, bytes: usize) -> Result<(), Error> {
        write(&mut self.lock(), "zero", at, &vec![0u8; bytes])
    }

    unsafe fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<(), Error> {
        let mut memory = self.lock();
        let values = read::<u8>(&mut memory, "copy", from, bytes)?;
        write(&mut memory, "copy", to, &values)
    }

    unsafe fn launch<P: Copy>(&self, launch: &Launch, params: &P) -> Result<(), Error> {
        let (gpu, kernels) = (&mut self.lock().gpu, &self.kernels);
        // SAFETY: the caller's promise; the simulator checks it.
        unsafe { Stream { gpu, kernels }.launch(launch, params) }
    }

    unsafe fn product(&self, product: &Product) -> Result<(), Error> {
        let memory = &mut *self.lock();
        let Product { m, n, k, .. } = *product;
        let (a, b) = (
            matrix(memory, &product.a, m, k)?,
            matrix(memory, &product.b, k, n)?,
        );
        for row in 0..m {
            let sums: Vec<f32> = (0..n)
                .map(|column| {
                    let terms = (0..k).map(|i| (a[row * k + i], b[i * n + column]));
                    terms.fold(0.0, |sum, (a, b)| a.mul_add(b, sum))
                })
                .collect();
            store(memory, product, row, sums)?;
        }
        Ok(())
    }
}

/// `[rows, columns]`, widened.
fn matrix(
    memory: &mut Memory,
    operand: &Operand,
    rows: usize,
    columns: usize,
) -> Result<Vec<f32>, Error> {
    let (lines, width) = match operand.transposed {
        false => (rows, columns),
        true => (columns, rows),
    };
    let all = Span::find(
        memory,
        "product",
        operand.address,
        2 * ((lines - 1) * operand.stride + width),
    )?;
    let mut values = vec![0.0; rows * columns];
    for line in 0..lines {
        for (i, x) in all
            .read::<bf16>(memory, 2 * line * operand.stride, width)?
            .into_iter()
            .enumerate()
        {
            let to = match operand.transposed {
                false => line * columns + i,
                true => i * columns + line,
            };
            values[to] = x.to_f32();
        }
    }
    Ok(values)
}

/// One row of a product's result.
fn store(
    memory: &mut Memory,
    product: &Product,
    row: usize,
    mut sums: Vec<f32>,
) -> Result<(), Error> {
    let bytes = match product.c_kind {
        Kind::Exact => 4,
        Kind::Activation => 2,
    };
    let at = |address: u64, stride: usize| address + (row * stride * bytes) as u64;
    let to = at(product.c, product.c_stride);
    let added = match product.plus {
        Plus::Nothing => None,
        Plus::Itself => Some(to),
        Plus::Rows { address, stride } => Some(at(address, stride)),
    };
    if let Some(from) = added {
        let old: Vec<f32> = match product.c_kind {
            Kind::Exact => read(memory, "product", from, product.n)?,
            Kind::Activation => read::<bf16>(memory, "product", from, product.n)?
                .into_iter()
                .map(bf16::to_f32)
                .collect(),
        };
        sums.iter_mut().zip(old).for_each(|(sum, old)| *sum += old);
    }
    match product.c_kind {
        Kind::Exact => write(memory, "product", to, &sums),
        Kind::Activation => {
            let narrow: Vec<bf16> = sums.into_iter().map(bf16::from_f32).collect();
            write(memory, "product", to, &narrow)
        }
    }
}

/// Bytes of a buffer, and what of it nobody has written.
struct Span<'a> {
    what: &'a str,
    buffer: Buffer,
    offset: usize,
    unwritten: Vec<Range<usize>>,
}

impl<'a> Span<'a> {
    fn find(memory: &mut Memory, what: &'a str, from: u64, bytes: usize) -> Result<Self, Error> {
        let Some((buffer, offset)) = memory.gpu.locate(from as usize, bytes) else {
            return Err(failed(
                what,
                format!("{from:#x}: no buffer holds {bytes} bytes from there"),
            ));
        };
        let unwritten = match memory.checks {
            Checks::All => memory.gpu.unwritten(buffer),
            Checks::None => Vec::new(),
        };
        Ok(Self {
            what,
            buffer,
            offset,
            unwritten,
        })
    }

    /// `count` values from byte `first` of the span on.
    fn read<T: bytemuck::Pod>(
        &self,
        memory: &mut Memory,
        first: usize,
        count: usize,
    ) -> Result<Vec<T>, Error> {
        let start = self.offset + first;
        let end = start + count * size_of::<T>();
        match self
            .unwritten
            .iter()
            .find(|r| r.start < end && r.end > start)
        {
            Some(range) => Err(failed(
                self.what,
                format!("reads bytes {range:?} of a buffer, which nobody has written"),
            )),
            None => Ok(memory.gpu.download_range(self.buffer, start, count)),
        }
    }
}

/// `count` values that have been written before.
fn read<T: bytemuck::Pod>(
    memory: &mut Memory,
    what: &str,
    from: u64,
    count: usize,
) -> Result<Vec<T>, Error> {
    Span::find(memory, what, from, count * size_of::<T>())?.read(memory, 0, count)
}

fn write<T: bytemuck::Pod>(
    memory: &mut Memory,
    what: &str,
    to: u64,
    values: &[T],
) -> Result<(), Error> {
    let bytes = size_of_val(values);
    let Some((buffer, offset)) = memory.gpu.locate(to as usize, bytes) else {
        return Err(failed(
            what,
            format!("{to:#x}: no buffer holds {bytes} bytes from there"),
        ));
    };
    memory.gpu.write(buffer, offset, values);
    Ok(())
}

fn failed(what: &str, message: String) -> Error {
    Error::Launcher {
        entry: what.into(),
        source: message.into(),
    }
}
