//! A simulated GPU: runs the CUDA kernels of `kernels/` on the CPU, one coroutine a thread, under every check.
//!
//! The same `.cu` files are compiled by g++ with `SEGATTN_SIM` defined; `simulator.h` then stands for CUDA and for
//! the instructions. Threads of several resident blocks are interleaved at random, by a seed. With checks on, a
//! launch reports data races on shared and global memory (by happens-before, so whatever the schedule), accesses
//! out of bounds or to memory never written, copies not waited for, diverged collectives and barriers, deadlocks.
//!
//! Global shadow cells cover two bytes: threads that write neighbouring single bytes are reported as a race.

mod checks;
mod host;
mod instructions;
mod machine;
mod memory;
pub mod mutate;

pub use checks::report::{Kind, Party, Report};
pub use host::driver::Driver;
pub use host::gpu::{Checks, Failure, Gpu, SimError};
pub use host::launcher::{Kernels, Stream};
pub use host::module::{CompileError, Kernel, Module, Source};
pub use instructions::context::Stats;
pub use instructions::tensor_map::TensorMap;
pub use machine::limits::Limits;
pub use memory::global::Buffer;
