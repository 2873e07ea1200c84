//! Code that several devices share. All devices use the grouping of spans into attention calls and the checks of
//! retrieval's arguments. Devices with buffers in host memory also share the splitting of q, k, v, the selected tokens,
//! and sampling.

pub(super) mod blocks;
pub(super) mod qkv;
pub(super) mod samplers;
pub(super) mod selection;
pub(super) mod spans;
