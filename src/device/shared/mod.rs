//! Code that several devices share. All devices use the batch of a step's spans, the checks of retrieval's arguments,
//! and norms of queries and keys as calls of their own. Devices with buffers in host memory also share the splitting of
//! q, k, v, moves of rows, the rounding of pools, the selected tokens, and sampling.

pub(super) mod blocks;
pub(super) mod moves;
pub(super) mod pool_bits;
pub(super) mod qkv;
pub(super) mod samplers;
pub(super) mod selection;
pub(super) mod spans;
