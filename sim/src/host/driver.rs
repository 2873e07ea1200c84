//! The simulated GPU as a driver of the crate's GPU device: the model's own code runs on it unchanged.
//!
//! Every buffer lies in memory of its own, so whatever reads or writes past one is reported. What is asked is done when
//! the call returns. GEMMs are done on the host: bf16 in, each element one chain of fused multiply-adds in
//! f32 over the summed index ascending.

use std::fmt;
use std::ops::Range;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use half::bf16;
use segattn::cuda::kernels::{Error, Launch, Launcher};
use segattn::device::gpu::{self, Epilogue, Gemm, Operand};
use segattn::device::{DeviceError, Kind, OutOfMemory};

use crate::host::gpu::{Checks, Gpu};
use crate::host::launcher::{Kernels, Stream};
use crate::memory::global::Buffer;

/// A simulated GPU with the kernels of a folder.
pub struct Driver {
    gpu: Mutex<Memory>,
    kernels: Kernels,
}

/// The GPU, whether it knows what has been written, and the calls that are being recorded.
struct Memory {
    gpu: Gpu,
    checks: Checks,
    /// Bytes of device memory that are left.
    left: usize,
    recording: Option<Vec<Call>>,
    replays: usize,
}

/// Part of a params struct, with the alignment of the largest one's: of a tensor map.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Line {
    _bytes: [u8; 64],
}

/// A call of a graph.
enum Call {
    Zero(u64, usize),
    Copy(u64, u64, usize),
    Gemm(Gemm),
    Launch {
        launch: Launch,
        /// The params struct, in lines so that it is aligned, and the call that knows its type.
        params: Vec<Line>,
        run: unsafe fn(&mut Gpu, &Kernels, &Launch, *const Line) -> Result<(), Error>,
    },
}

/// Recorded calls.
pub struct Graph(Vec<Call>);

impl fmt::Debug for Graph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Graph({} calls)", self.0.len())
    }
}

impl Graph {
    /// Number of calls.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl Memory {
    /// Refuses what cannot be recorded.
    fn at_once(&self, call: &'static str) -> Result<(), Error> {
        match self.recording {
            None => Ok(()),
            Some(_) => Err(Error::Recording { call }),
        }
    }
}

impl Driver {
    /// A GPU whose launches are scheduled by `seed`, with the kernels in the folder `kernels`.
    pub fn new(kernels: &Path, seed: u64, checks: Checks) -> Self {
        Self {
            gpu: Mutex::new(Memory {
                gpu: Gpu::new(seed, checks),
                checks,
                left: usize::MAX,
                recording: None,
                replays: 0,
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

    /// How often recorded calls have been replayed.
    pub fn replays(&self) -> usize {
        self.lock().replays
    }

    /// Does a call, or notes it down where calls are recorded.
    ///
    /// # Safety
    /// As for the call.
    unsafe fn call(&self, call: Call) -> Result<(), Error> {
        let memory = &mut *self.lock();
        match &mut memory.recording {
            Some(calls) => {
                calls.push(call);
                Ok(())
            }
            // SAFETY: the caller's promise.
            None => unsafe { call.run(memory, &self.kernels) },
        }
    }
}

impl Call {
    /// # Safety
    /// As for the call.
    unsafe fn run(&self, memory: &mut Memory, kernels: &Kernels) -> Result<(), Error> {
        match self {
            Call::Zero(at, bytes) => write(memory, "zero", *at, &vec![0u8; *bytes]),
            Call::Copy(from, to, bytes) => {
                let values = read::<u8>(memory, "copy", *from, *bytes)?;
                write(memory, "copy", *to, &values)
            }
            Call::Gemm(gemm) => multiply(memory, gemm),
            Call::Launch {
                launch,
                params,
                run,
            } => {
                // SAFETY: the params are those that `run` was made for.
                unsafe { run(&mut memory.gpu, kernels, launch, params.as_ptr()) }
            }
        }
    }
}

/// # Safety
/// `params` points to a `P`, the entry's struct.
unsafe fn launch_as<P: Copy>(
    gpu: &mut Gpu,
    kernels: &Kernels,
    launch: &Launch,
    params: *const Line,
) -> Result<(), Error> {
    // SAFETY: the caller's promise; the simulator checks what the kernel does.
    unsafe { Stream { gpu, kernels }.launch(launch, &*params.cast::<P>()) }
}

fn multiply(memory: &mut Memory, gemm: &Gemm) -> Result<(), Error> {
    let Gemm { m, n, k, .. } = *gemm;
    let (a, b) = (
        matrix(memory, &gemm.a, m, k)?,
        matrix(memory, &gemm.b, k, n)?,
    );
    for row in 0..m {
        let sums: Vec<f32> = (0..n)
            .map(|column| {
                let terms = (0..k).map(|i| (a[row * k + i], b[i * n + column]));
                terms.fold(0.0, |sum, (a, b)| a.mul_add(b, sum))
            })
            .collect();
        store(memory, gemm, row, sums)?;
    }
    Ok(())
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
    type Graph = Graph;

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
        let mut memory = self.lock();
        memory.at_once("upload")?;
        write(&mut memory, "upload", to, bytes)
    }

    unsafe fn download(&self, from: u64, bytes: &mut [u8]) -> Result<(), Error> {
        let mut memory = self.lock();
        memory.at_once("download")?;
        bytes.copy_from_slice(&read(&mut memory, "download", from, bytes.len())?);
        Ok(())
    }

    unsafe fn zero(&self, at: u64, bytes: usize) -> Result<(), Error> {
        // SAFETY: the caller's promise, here and below.
        unsafe { self.call(Call::Zero(at, bytes)) }
    }

    unsafe fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<(), Error> {
        // SAFETY: as above.
        unsafe { self.call(Call::Copy(from, to, bytes)) }
    }

    unsafe fn launch<P: Copy>(&self, launch: &Launch, params: &P) -> Result<(), Error> {
        const { assert!(align_of::<P>() <= align_of::<Line>()) };
        let empty = Line { _bytes: [0; 64] };
        let mut lines = vec![empty; size_of::<P>().div_ceil(size_of::<Line>())];
        // SAFETY: there is room for a `P`, which is plain data; the rest is the caller's promise.
        unsafe {
            lines.as_mut_ptr().cast::<P>().write(*params);
            self.call(Call::Launch {
                launch: *launch,
                params: lines,
                run: launch_as::<P>,
            })
        }
    }

    unsafe fn gemm(&self, gemm: &Gemm) -> Result<(), Error> {
        // SAFETY: as above.
        unsafe { self.call(Call::Gemm(*gemm)) }
    }

    fn record(&self) -> Result<(), Error> {
        let mut memory = self.lock();
        memory.at_once("record")?;
        memory.recording = Some(Vec::new());
        Ok(())
    }

    fn recorded(&self) -> Result<Graph, Error> {
        Ok(Graph(self.lock().recording.take().unwrap_or_default()))
    }

    unsafe fn replay(&self, graph: &Graph) -> Result<(), Error> {
        let memory = &mut *self.lock();
        memory.at_once("replay")?;
        memory.replays += 1;
        for call in &graph.0 {
            // SAFETY: the caller's promise.
            unsafe { call.run(memory, &self.kernels)? };
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
        "gemm",
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

/// One row of a GEMM's result.
fn store(memory: &mut Memory, gemm: &Gemm, row: usize, mut sums: Vec<f32>) -> Result<(), Error> {
    let bytes = match gemm.c_kind {
        Kind::Exact => 4,
        Kind::Activation => 2,
    };
    let at = |address: u64, stride: usize| address + (row * stride * bytes) as u64;
    let to = at(gemm.c, gemm.c_stride);
    let added = match gemm.epilogue {
        Epilogue::Store => None,
        Epilogue::Accumulate => Some(to),
        Epilogue::AddRows { address, stride } => Some(at(address, stride)),
    };
    if let Some(from) = added {
        let old: Vec<f32> = match gemm.c_kind {
            Kind::Exact => read(memory, "gemm", from, gemm.n)?,
            Kind::Activation => read::<bf16>(memory, "gemm", from, gemm.n)?
                .into_iter()
                .map(bf16::to_f32)
                .collect(),
        };
        sums.iter_mut().zip(old).for_each(|(sum, old)| *sum += old);
    }
    match gemm.c_kind {
        Kind::Exact => write(memory, "gemm", to, &sums),
        Kind::Activation => {
            let narrow: Vec<bf16> = sums.into_iter().map(bf16::from_f32).collect();
            write(memory, "gemm", to, &narrow)
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
