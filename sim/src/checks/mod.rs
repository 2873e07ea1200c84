//! What a launch is checked for, and how findings are reported.
//!
//! [`checker::Checker`] is the face of this room: it is told of every memory access, atomic and fence, and of what the
//! instructions find themselves. It knows shadow cells and clocks, but neither threads nor buffers.

pub mod access;
pub mod actors;
pub mod checker;
pub mod clock;
pub mod happens_before;
pub mod report;
pub mod shadow;
pub mod symbols;
