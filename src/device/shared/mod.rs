//! What several devices share: how spans are grouped into attention calls, checks of what retrieval is asked for, and
//! for devices whose buffers lie in host memory q, k, v row by row, blocks selected by retrieval, and sampling.

pub(super) mod blocks;
pub(super) mod qkv;
pub(super) mod samplers;
pub(super) mod selection;
pub(super) mod spans;
