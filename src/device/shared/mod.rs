//! What several devices share: how spans are grouped into attention calls, and for devices whose
//! buffers lie in host memory q, k, v row by row, blocks selected by retrieval, and sampling.

pub(super) mod blocks;
pub(super) mod qkv;
pub(super) mod samplers;
pub(super) mod spans;
