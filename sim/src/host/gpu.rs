//! The simulated GPU as tests use it: buffers and launches.

use std::fmt;
use std::ops::Range;

use bytemuck::Pod;

use crate::checks::report::Report;
use crate::host::module::Kernel;
use crate::instructions::context::Stats;
use crate::machine::current;
use crate::machine::launch::{Launch, Shape};
use crate::machine::limits::Limits;
use crate::memory::global::{Buffer, GlobalMemory};

/// Most threads a block may have.
const MAX_THREADS: u32 = 1024;
/// Most dynamic shared memory a block may have: that of sm_90.
const MAX_SHARED: usize = 227 << 10;

/// What a launch is checked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Checks {
    /// Everything. Memory is only seen in modules that were not compiled plain.
    All,
    /// Only what hangs or traps: for speed.
    None,
}

/// Why a launch failed.
#[derive(Debug, Clone)]
pub struct Failure {
    /// The kernel's name.
    pub kernel: String,
    /// The seed that replays it.
    pub seed: u64,
    /// What was found, in the order it was found.
    pub reports: Vec<Report>,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "kernel {} failed with seed {}:", self.kernel, self.seed)?;
        self.reports
            .iter()
            .try_for_each(|report| write!(f, "\n  {report}"))
    }
}

impl std::error::Error for Failure {}

/// Why nothing was launched or allocated.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SimError {
    /// The kernel ran and broke a rule.
    #[error(transparent)]
    Failed(#[from] Failure),
    /// A launch dimension no GPU has.
    #[error("{what}: expected {expected}, got {got}")]
    Launch {
        /// What is wrong.
        what: &'static str,
        /// What would be right.
        expected: &'static str,
        /// What was asked for.
        got: String,
    },
    /// No address space or stack could be had.
    #[error("memory: {0}")]
    Memory(#[from] std::io::Error),
}

impl SimError {
    /// The reports, if the kernel ran.
    pub fn reports(&self) -> &[Report] {
        match self {
            SimError::Failed(failure) => &failure.reports,
            _ => &[],
        }
    }
}

/// A simulated GPU: global memory, and a seed that decides every schedule. It may move between threads; a launch runs
/// on the thread that asks for it.
pub struct Gpu {
    memory: GlobalMemory,
    seed: u64,
    launches: u64,
    checks: Checks,
    resident: usize,
    limits: Limits,
    next_block: u32,
}

impl Gpu {
    /// A GPU whose launches are scheduled by `seed`.
    pub fn new(seed: u64, checks: Checks) -> Gpu {
        Gpu {
            memory: GlobalMemory::default(),
            seed,
            launches: 0,
            checks,
            resident: 3,
            limits: Limits::default(),
            next_block: 1,
        }
    }

    /// How many blocks run interleaved; 3 unless told.
    pub fn resident_blocks(mut self, count: usize) -> Gpu {
        self.resident = count.max(1);
        self
    }

    /// After how much a launch is ended as one that never ends.
    pub fn limits(mut self, limits: Limits) -> Gpu {
        self.limits = limits;
        self
    }

    /// A buffer of `bytes` bytes that must be written before it is read. Costs only the pages touched.
    ///
    /// # Errors
    /// If the address space is exhausted.
    pub fn alloc(&mut self, name: &str, bytes: usize) -> Result<Buffer, SimError> {
        Ok(self.memory.allocate(name, bytes, false)?)
    }

    /// A buffer that holds `values`.
    ///
    /// # Errors
    /// If the address space is exhausted.
    pub fn upload<T: Pod>(&mut self, name: &str, values: &[T]) -> Result<Buffer, SimError> {
        let buffer = self.memory.allocate(name, size_of_val(values), false)?;
        self.memory.write(buffer, 0, values);
        Ok(buffer)
    }

    /// A buffer that holds `values` and that kernels may only read.
    ///
    /// # Errors
    /// If the address space is exhausted.
    pub fn input<T: Pod>(&mut self, name: &str, values: &[T]) -> Result<Buffer, SimError> {
        let buffer = self.memory.allocate(name, size_of_val(values), true)?;
        self.memory.write(buffer, 0, values);
        Ok(buffer)
    }

    /// Gives a buffer back. A kernel that touches it later is reported; so is, by a panic, a use of the handle.
    pub fn free(&mut self, buffer: Buffer) {
        self.memory.free(buffer);
    }

    /// Writes `values` at byte `offset`. Panics outside the buffer.
    pub fn write<T: Pod>(&mut self, buffer: Buffer, offset: usize, values: &[T]) {
        self.memory.write(buffer, offset, values);
    }

    /// The buffer that holds `[address, address + len)`, and the byte of it at `address`.
    pub fn locate(&mut self, address: usize, len: usize) -> Option<(Buffer, usize)> {
        self.memory.locate(address, len)
    }

    /// Makes a range of bytes unreadable for kernels until they are written. Panics outside the buffer.
    pub fn poison(&mut self, buffer: Buffer, bytes: Range<usize>) {
        self.memory.poison(buffer, bytes);
    }

    /// The whole buffer as values of `T`.
    pub fn download<T: Pod>(&mut self, buffer: Buffer) -> Vec<T> {
        self.memory.read(buffer, 0, buffer.len() / size_of::<T>())
    }

    /// `count` values at byte `offset`. Panics outside the buffer.
    pub fn download_range<T: Pod>(
        &mut self,
        buffer: Buffer,
        offset: usize,
        count: usize,
    ) -> Vec<T> {
        self.memory.read(buffer, offset, count)
    }

    /// Byte ranges of the buffer that nothing has ever written; for small buffers, every cell is looked at.
    pub fn unwritten(&mut self, buffer: Buffer) -> Vec<Range<usize>> {
        self.memory.unwritten(buffer)
    }

    /// Runs a kernel over a grid to its end.
    ///
    /// `P` must be `#[repr(C)]` and have the layout of the kernel's one parameter, a struct passed by value.
    ///
    /// # Errors
    /// Every report of the launch; dimensions that no GPU has; no memory for stacks.
    pub fn launch<P: Copy>(
        &mut self,
        kernel: &Kernel,
        grid: [u32; 3],
        block: [u32; 3],
        dynamic_shared_bytes: usize,
        params: &P,
    ) -> Result<Stats, SimError> {
        check_dimensions(grid, block, dynamic_shared_bytes)?;
        let seed = self
            .seed
            .wrapping_add(self.launches.wrapping_mul(0x9e37_79b9));
        self.launches += 1;
        let shape = Shape {
            grid,
            block,
            shared_bytes: dynamic_shared_bytes,
            resident: self.resident,
            limits: self.limits,
        };
        let (checks, module) = (self.checks == Checks::All, &kernel.module);
        let mut memory = std::mem::take(&mut self.memory);
        memory.image = module.base();
        let mut launch = Launch::new(shape, checks, seed, memory, self.next_block);
        // SAFETY: a kernel is an extern "C" function of one struct by value, and P is that struct: the caller's word.
        let function = unsafe {
            std::mem::transmute::<*const std::ffi::c_void, extern "C" fn(P)>(kernel.function)
        };
        let result = current::run(&mut launch, &|| function(*params));
        self.next_block = launch.blocks_started();
        let Launch {
            memory,
            checker,
            stats,
            ..
        } = launch;
        self.memory = memory;
        result?;
        let reports = checker.finish(&kernel.name, module.path());
        if reports.is_empty() {
            return Ok(stats);
        }
        Err(Failure {
            kernel: kernel.name.clone(),
            seed: self.seed,
            reports,
        }
        .into())
    }
}

fn check_dimensions(grid: [u32; 3], block: [u32; 3], shared_bytes: usize) -> Result<(), SimError> {
    let refuse = |what, expected, got| {
        Err(SimError::Launch {
            what,
            expected,
            got,
        })
    };
    let threads = block.iter().map(|&n| u64::from(n)).product::<u64>();
    if threads == 0 || threads > u64::from(MAX_THREADS) {
        return refuse("threads of a block", "1 to 1024", format!("{block:?}"));
    }
    let [x, y, z] = grid;
    if x == 0 || y == 0 || z == 0 || y > 65535 || z > 65535 || x > i32::MAX as u32 {
        return refuse(
            "grid",
            "x below 2^31, y and z below 65536, none 0",
            format!("{grid:?}"),
        );
    }
    if grid.iter().map(|&n| u64::from(n)).product::<u64>() > 1 << 31 {
        return refuse(
            "grid",
            "at most 2^31 blocks in simulation",
            format!("{grid:?}"),
        );
    }
    if shared_bytes > MAX_SHARED {
        return refuse(
            "dynamic shared memory",
            "at most 227 KiB",
            format!("{shared_bytes} bytes"),
        );
    }
    Ok(())
}
