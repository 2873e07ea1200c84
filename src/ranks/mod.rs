//! Several processes that compute one run: who they are, how they meet, and how they exchange messages and buffers.
//!
//! A process is a *rank*. [`Place`] says which one, as a launcher of processes has put it into the environment.
//! [`Mesh::connect`] brings the ranks together: each holds a TCP connection to each other one. An [`Engine`] exchanges
//! parts of device buffers. [`Mesh`] is one for every device, by way of host memory; other engines use it to meet.
//!
//! Every exchange has a time limit. A rank that is lost or too slow ends the exchange with an error that names it, and
//! the rank that has seen it first tells the others, so none of them waits for ever.
//!
//! This floor adds nothing up and knows no order of sums: that is the caller's (docs/contract.md, section 4).

mod agreement;
mod engine;
mod error;
mod link;
mod mesh;
#[cfg(feature = "cuda")]
mod nccl;
mod outbox;
mod place;

pub use agreement::Agreement;
pub use engine::{Engine, ON_THEIR_WAY, Piece, Ranks};
pub use error::{RankError, Result};
pub use mesh::Mesh;
#[cfg(feature = "cuda")]
pub use nccl::Nccl;
pub use place::{DEFAULT_PORT, Place};
