//! A simulated GPU: runs the CUDA kernels of `kernels/` on the CPU, one coroutine a thread, under every check.
//!
//! The same `.cu` files are compiled by g++ with `SEGATTN_SIM` defined; `simulator.h` then stands for CUDA and for
//! the instructions. Threads of several resident blocks are interleaved at random, by a seed. With checks on, a
//! launch reports data races on shared and global memory (by happens-before, so whatever the schedule), accesses
//! out of bounds or to memory never written, copies not waited for, diverged collectives and barriers, deadlocks.
//!
//! Global shadow cells cover two bytes: threads that write neighbouring single bytes are reported as a race.

mod access;
mod async_calls;
mod async_copy;
mod atomics;
mod barrier;
mod block;
mod bulk;
mod calls;
mod clock;
mod driver;
mod gpu;
mod launch;
mod launcher;
mod mapping;
mod mbarrier;
mod memory;
mod mma;
mod module;
pub mod mutate;
mod race;
mod registers;
mod report;
mod rng;
mod stack;
mod symbols;
mod tensor_map;
mod thread;
mod warp;
mod wgmma;

pub use driver::Driver;
pub use gpu::{Checks, Failure, Gpu, SimError};
pub use launch::Stats;
pub use launcher::{Kernels, Stream};
pub use memory::Buffer;
pub use module::{CompileError, Kernel, Module, Source};
pub use report::{Kind, Party, Report};
pub use tensor_map::TensorMap;
