//! What each instruction does to registers, memory and clocks.
//!
//! [`units::Units`] is the face of this room: the state that the instructions of a block keep, each in a file that
//! knows only its own. [`context::Context`] is all they see of the machine.

pub mod atomics;
mod barrier;
pub mod bulk;
pub mod collective;
pub mod context;
pub mod cp_async;
mod lanes;
pub mod mbarrier;
mod mma;
mod registers;
pub mod tensor_map;
pub mod units;
mod wgmma;
