//! What each instruction does to registers, memory and clocks.

pub mod access;
pub mod atomics;
pub mod barrier;
pub mod bulk;
pub mod cp_async;
pub mod mbarrier;
pub mod mma;
pub mod registers;
pub mod tensor_map;
pub mod warp;
pub mod wgmma;
