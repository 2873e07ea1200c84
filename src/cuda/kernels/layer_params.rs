//! The structs of `kernels/layer_params.h`: what a kernel is launched with. Written by bindgen, see
//! `tests/kernel_params.rs`; comments and shapes are in the header.
#![allow(missing_docs)]

#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct SegattnRows {
    pub data: *mut ::core::ffi::c_void,
    pub stride: i64,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of SegattnRows"][::core::mem::size_of::<SegattnRows>() - 16usize];
    ["Alignment of SegattnRows"][::core::mem::align_of::<SegattnRows>() - 8usize];
    ["Offset of field: SegattnRows::data"][::core::mem::offset_of!(SegattnRows, data) - 0usize];
    ["Offset of field: SegattnRows::stride"][::core::mem::offset_of!(SegattnRows, stride) - 8usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct SegattnCopyParams {
    pub src: SegattnRows,
    pub dst: SegattnRows,
    pub rows: i64,
    pub width: i32,
    pub vectors: i32,
    pub add: i32,
    pub factor: f32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of SegattnCopyParams"][::core::mem::size_of::<SegattnCopyParams>() - 56usize];
    ["Alignment of SegattnCopyParams"][::core::mem::align_of::<SegattnCopyParams>() - 8usize];
    ["Offset of field: SegattnCopyParams::src"]
        [::core::mem::offset_of!(SegattnCopyParams, src) - 0usize];
    ["Offset of field: SegattnCopyParams::dst"]
        [::core::mem::offset_of!(SegattnCopyParams, dst) - 16usize];
    ["Offset of field: SegattnCopyParams::rows"]
        [::core::mem::offset_of!(SegattnCopyParams, rows) - 32usize];
    ["Offset of field: SegattnCopyParams::width"]
        [::core::mem::offset_of!(SegattnCopyParams, width) - 40usize];
    ["Offset of field: SegattnCopyParams::vectors"]
        [::core::mem::offset_of!(SegattnCopyParams, vectors) - 44usize];
    ["Offset of field: SegattnCopyParams::add"]
        [::core::mem::offset_of!(SegattnCopyParams, add) - 48usize];
    ["Offset of field: SegattnCopyParams::factor"]
        [::core::mem::offset_of!(SegattnCopyParams, factor) - 52usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct SegattnNormParams {
    pub x: SegattnRows,
    pub residual: SegattnRows,
    pub x_sum: SegattnRows,
    pub weight: *const f32,
    pub y: SegattnRows,
    pub rstd: *mut f32,
    pub d_y: SegattnRows,
    pub d_x: SegattnRows,
    pub d_weight: *mut f32,
    pub sums: *mut f32,
    pub rows: i64,
    pub width: i32,
    pub groups: i32,
    pub add: i32,
    pub eps: f32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of SegattnNormParams"][::core::mem::size_of::<SegattnNormParams>() - 152usize];
    ["Alignment of SegattnNormParams"][::core::mem::align_of::<SegattnNormParams>() - 8usize];
    ["Offset of field: SegattnNormParams::x"]
        [::core::mem::offset_of!(SegattnNormParams, x) - 0usize];
    ["Offset of field: SegattnNormParams::residual"]
        [::core::mem::offset_of!(SegattnNormParams, residual) - 16usize];
    ["Offset of field: SegattnNormParams::x_sum"]
        [::core::mem::offset_of!(SegattnNormParams, x_sum) - 32usize];
    ["Offset of field: SegattnNormParams::weight"]
        [::core::mem::offset_of!(SegattnNormParams, weight) - 48usize];
    ["Offset of field: SegattnNormParams::y"]
        [::core::mem::offset_of!(SegattnNormParams, y) - 56usize];
    ["Offset of field: SegattnNormParams::rstd"]
        [::core::mem::offset_of!(SegattnNormParams, rstd) - 72usize];
    ["Offset of field: SegattnNormParams::d_y"]
        [::core::mem::offset_of!(SegattnNormParams, d_y) - 80usize];
    ["Offset of field: SegattnNormParams::d_x"]
        [::core::mem::offset_of!(SegattnNormParams, d_x) - 96usize];
    ["Offset of field: SegattnNormParams::d_weight"]
        [::core::mem::offset_of!(SegattnNormParams, d_weight) - 112usize];
    ["Offset of field: SegattnNormParams::sums"]
        [::core::mem::offset_of!(SegattnNormParams, sums) - 120usize];
    ["Offset of field: SegattnNormParams::rows"]
        [::core::mem::offset_of!(SegattnNormParams, rows) - 128usize];
    ["Offset of field: SegattnNormParams::width"]
        [::core::mem::offset_of!(SegattnNormParams, width) - 136usize];
    ["Offset of field: SegattnNormParams::groups"]
        [::core::mem::offset_of!(SegattnNormParams, groups) - 140usize];
    ["Offset of field: SegattnNormParams::add"]
        [::core::mem::offset_of!(SegattnNormParams, add) - 144usize];
    ["Offset of field: SegattnNormParams::eps"]
        [::core::mem::offset_of!(SegattnNormParams, eps) - 148usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct SegattnNormsParams {
    pub norms: [SegattnNormParams; 2usize],
    pub blocks: i32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of SegattnNormsParams"][::core::mem::size_of::<SegattnNormsParams>() - 312usize];
    ["Alignment of SegattnNormsParams"][::core::mem::align_of::<SegattnNormsParams>() - 8usize];
    ["Offset of field: SegattnNormsParams::norms"]
        [::core::mem::offset_of!(SegattnNormsParams, norms) - 0usize];
    ["Offset of field: SegattnNormsParams::blocks"]
        [::core::mem::offset_of!(SegattnNormsParams, blocks) - 304usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct SegattnHeadNorms {
    pub q_weight: *const f32,
    pub k_weight: *const f32,
    pub q_rstd: *mut f32,
    pub k_rstd: *mut f32,
    pub eps: f32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of SegattnHeadNorms"][::core::mem::size_of::<SegattnHeadNorms>() - 40usize];
    ["Alignment of SegattnHeadNorms"][::core::mem::align_of::<SegattnHeadNorms>() - 8usize];
    ["Offset of field: SegattnHeadNorms::q_weight"]
        [::core::mem::offset_of!(SegattnHeadNorms, q_weight) - 0usize];
    ["Offset of field: SegattnHeadNorms::k_weight"]
        [::core::mem::offset_of!(SegattnHeadNorms, k_weight) - 8usize];
    ["Offset of field: SegattnHeadNorms::q_rstd"]
        [::core::mem::offset_of!(SegattnHeadNorms, q_rstd) - 16usize];
    ["Offset of field: SegattnHeadNorms::k_rstd"]
        [::core::mem::offset_of!(SegattnHeadNorms, k_rstd) - 24usize];
    ["Offset of field: SegattnHeadNorms::eps"]
        [::core::mem::offset_of!(SegattnHeadNorms, eps) - 32usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct SegattnHeadNormsParams {
    pub d_y: SegattnRows,
    pub x: SegattnRows,
    pub d_x: SegattnRows,
    pub norms: SegattnHeadNorms,
    pub rows: i64,
    pub q_heads: i32,
    pub kv_heads: i32,
    pub head_dim: i32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of SegattnHeadNormsParams"][::core::mem::size_of::<SegattnHeadNormsParams>() - 112usize];
    ["Alignment of SegattnHeadNormsParams"]
        [::core::mem::align_of::<SegattnHeadNormsParams>() - 8usize];
    ["Offset of field: SegattnHeadNormsParams::d_y"]
        [::core::mem::offset_of!(SegattnHeadNormsParams, d_y) - 0usize];
    ["Offset of field: SegattnHeadNormsParams::x"]
        [::core::mem::offset_of!(SegattnHeadNormsParams, x) - 16usize];
    ["Offset of field: SegattnHeadNormsParams::d_x"]
        [::core::mem::offset_of!(SegattnHeadNormsParams, d_x) - 32usize];
    ["Offset of field: SegattnHeadNormsParams::norms"]
        [::core::mem::offset_of!(SegattnHeadNormsParams, norms) - 48usize];
    ["Offset of field: SegattnHeadNormsParams::rows"]
        [::core::mem::offset_of!(SegattnHeadNormsParams, rows) - 88usize];
    ["Offset of field: SegattnHeadNormsParams::q_heads"]
        [::core::mem::offset_of!(SegattnHeadNormsParams, q_heads) - 96usize];
    ["Offset of field: SegattnHeadNormsParams::kv_heads"]
        [::core::mem::offset_of!(SegattnHeadNormsParams, kv_heads) - 100usize];
    ["Offset of field: SegattnHeadNormsParams::head_dim"]
        [::core::mem::offset_of!(SegattnHeadNormsParams, head_dim) - 104usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct SegattnRopeParams {
    pub src: SegattnRows,
    pub dst: SegattnRows,
    pub cos: *const f32,
    pub sin: *const f32,
    pub angles: *const i32,
    pub rows: i64,
    pub first_angle: i32,
    pub heads: i32,
    pub head_dim: i32,
    pub inverse: i32,
    pub add: i32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of SegattnRopeParams"][::core::mem::size_of::<SegattnRopeParams>() - 88usize];
    ["Alignment of SegattnRopeParams"][::core::mem::align_of::<SegattnRopeParams>() - 8usize];
    ["Offset of field: SegattnRopeParams::src"]
        [::core::mem::offset_of!(SegattnRopeParams, src) - 0usize];
    ["Offset of field: SegattnRopeParams::dst"]
        [::core::mem::offset_of!(SegattnRopeParams, dst) - 16usize];
    ["Offset of field: SegattnRopeParams::cos"]
        [::core::mem::offset_of!(SegattnRopeParams, cos) - 32usize];
    ["Offset of field: SegattnRopeParams::sin"]
        [::core::mem::offset_of!(SegattnRopeParams, sin) - 40usize];
    ["Offset of field: SegattnRopeParams::angles"]
        [::core::mem::offset_of!(SegattnRopeParams, angles) - 48usize];
    ["Offset of field: SegattnRopeParams::rows"]
        [::core::mem::offset_of!(SegattnRopeParams, rows) - 56usize];
    ["Offset of field: SegattnRopeParams::first_angle"]
        [::core::mem::offset_of!(SegattnRopeParams, first_angle) - 64usize];
    ["Offset of field: SegattnRopeParams::heads"]
        [::core::mem::offset_of!(SegattnRopeParams, heads) - 68usize];
    ["Offset of field: SegattnRopeParams::head_dim"]
        [::core::mem::offset_of!(SegattnRopeParams, head_dim) - 72usize];
    ["Offset of field: SegattnRopeParams::inverse"]
        [::core::mem::offset_of!(SegattnRopeParams, inverse) - 76usize];
    ["Offset of field: SegattnRopeParams::add"]
        [::core::mem::offset_of!(SegattnRopeParams, add) - 80usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct SegattnMove {
    pub src: SegattnRows,
    pub dst: SegattnRows,
    pub rows: i32,
    pub heads: i32,
    pub first_angle: i32,
    pub first_block: i32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of SegattnMove"][::core::mem::size_of::<SegattnMove>() - 48usize];
    ["Alignment of SegattnMove"][::core::mem::align_of::<SegattnMove>() - 8usize];
    ["Offset of field: SegattnMove::src"][::core::mem::offset_of!(SegattnMove, src) - 0usize];
    ["Offset of field: SegattnMove::dst"][::core::mem::offset_of!(SegattnMove, dst) - 16usize];
    ["Offset of field: SegattnMove::rows"][::core::mem::offset_of!(SegattnMove, rows) - 32usize];
    ["Offset of field: SegattnMove::heads"][::core::mem::offset_of!(SegattnMove, heads) - 36usize];
    ["Offset of field: SegattnMove::first_angle"]
        [::core::mem::offset_of!(SegattnMove, first_angle) - 40usize];
    ["Offset of field: SegattnMove::first_block"]
        [::core::mem::offset_of!(SegattnMove, first_block) - 44usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct SegattnMoveParams {
    pub moves: *const SegattnMove,
    pub cos: *const f32,
    pub sin: *const f32,
    pub count: i32,
    pub head_dim: i32,
    pub inverse: i32,
    pub add: i32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of SegattnMoveParams"][::core::mem::size_of::<SegattnMoveParams>() - 40usize];
    ["Alignment of SegattnMoveParams"][::core::mem::align_of::<SegattnMoveParams>() - 8usize];
    ["Offset of field: SegattnMoveParams::moves"]
        [::core::mem::offset_of!(SegattnMoveParams, moves) - 0usize];
    ["Offset of field: SegattnMoveParams::cos"]
        [::core::mem::offset_of!(SegattnMoveParams, cos) - 8usize];
    ["Offset of field: SegattnMoveParams::sin"]
        [::core::mem::offset_of!(SegattnMoveParams, sin) - 16usize];
    ["Offset of field: SegattnMoveParams::count"]
        [::core::mem::offset_of!(SegattnMoveParams, count) - 24usize];
    ["Offset of field: SegattnMoveParams::head_dim"]
        [::core::mem::offset_of!(SegattnMoveParams, head_dim) - 28usize];
    ["Offset of field: SegattnMoveParams::inverse"]
        [::core::mem::offset_of!(SegattnMoveParams, inverse) - 32usize];
    ["Offset of field: SegattnMoveParams::add"]
        [::core::mem::offset_of!(SegattnMoveParams, add) - 36usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct SegattnQkvParams {
    pub qkv: SegattnRows,
    pub q: SegattnRows,
    pub k: SegattnRows,
    pub raw_k: SegattnRows,
    pub v: SegattnRows,
    pub probes: SegattnRows,
    pub cos: *const f32,
    pub sin: *const f32,
    pub angles: *const i32,
    pub cache_rows: *const i32,
    pub probe_rows: *const i32,
    pub norms: SegattnHeadNorms,
    pub rows: i64,
    pub q_heads: i32,
    pub kv_heads: i32,
    pub head_dim: i32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of SegattnQkvParams"][::core::mem::size_of::<SegattnQkvParams>() - 200usize];
    ["Alignment of SegattnQkvParams"][::core::mem::align_of::<SegattnQkvParams>() - 8usize];
    ["Offset of field: SegattnQkvParams::qkv"]
        [::core::mem::offset_of!(SegattnQkvParams, qkv) - 0usize];
    ["Offset of field: SegattnQkvParams::q"]
        [::core::mem::offset_of!(SegattnQkvParams, q) - 16usize];
    ["Offset of field: SegattnQkvParams::k"]
        [::core::mem::offset_of!(SegattnQkvParams, k) - 32usize];
    ["Offset of field: SegattnQkvParams::raw_k"]
        [::core::mem::offset_of!(SegattnQkvParams, raw_k) - 48usize];
    ["Offset of field: SegattnQkvParams::v"]
        [::core::mem::offset_of!(SegattnQkvParams, v) - 64usize];
    ["Offset of field: SegattnQkvParams::probes"]
        [::core::mem::offset_of!(SegattnQkvParams, probes) - 80usize];
    ["Offset of field: SegattnQkvParams::cos"]
        [::core::mem::offset_of!(SegattnQkvParams, cos) - 96usize];
    ["Offset of field: SegattnQkvParams::sin"]
        [::core::mem::offset_of!(SegattnQkvParams, sin) - 104usize];
    ["Offset of field: SegattnQkvParams::angles"]
        [::core::mem::offset_of!(SegattnQkvParams, angles) - 112usize];
    ["Offset of field: SegattnQkvParams::cache_rows"]
        [::core::mem::offset_of!(SegattnQkvParams, cache_rows) - 120usize];
    ["Offset of field: SegattnQkvParams::probe_rows"]
        [::core::mem::offset_of!(SegattnQkvParams, probe_rows) - 128usize];
    ["Offset of field: SegattnQkvParams::norms"]
        [::core::mem::offset_of!(SegattnQkvParams, norms) - 136usize];
    ["Offset of field: SegattnQkvParams::rows"]
        [::core::mem::offset_of!(SegattnQkvParams, rows) - 176usize];
    ["Offset of field: SegattnQkvParams::q_heads"]
        [::core::mem::offset_of!(SegattnQkvParams, q_heads) - 184usize];
    ["Offset of field: SegattnQkvParams::kv_heads"]
        [::core::mem::offset_of!(SegattnQkvParams, kv_heads) - 188usize];
    ["Offset of field: SegattnQkvParams::head_dim"]
        [::core::mem::offset_of!(SegattnQkvParams, head_dim) - 192usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct SegattnSwigluParams {
    pub gate_up: SegattnRows,
    pub y: SegattnRows,
    pub d_y: SegattnRows,
    pub d_gate_up: SegattnRows,
    pub rows: i64,
    pub inner: i32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of SegattnSwigluParams"][::core::mem::size_of::<SegattnSwigluParams>() - 80usize];
    ["Alignment of SegattnSwigluParams"][::core::mem::align_of::<SegattnSwigluParams>() - 8usize];
    ["Offset of field: SegattnSwigluParams::gate_up"]
        [::core::mem::offset_of!(SegattnSwigluParams, gate_up) - 0usize];
    ["Offset of field: SegattnSwigluParams::y"]
        [::core::mem::offset_of!(SegattnSwigluParams, y) - 16usize];
    ["Offset of field: SegattnSwigluParams::d_y"]
        [::core::mem::offset_of!(SegattnSwigluParams, d_y) - 32usize];
    ["Offset of field: SegattnSwigluParams::d_gate_up"]
        [::core::mem::offset_of!(SegattnSwigluParams, d_gate_up) - 48usize];
    ["Offset of field: SegattnSwigluParams::rows"]
        [::core::mem::offset_of!(SegattnSwigluParams, rows) - 64usize];
    ["Offset of field: SegattnSwigluParams::inner"]
        [::core::mem::offset_of!(SegattnSwigluParams, inner) - 72usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct SegattnSinkParams {
    pub logits: *const f32,
    pub lse: *const f32,
    pub span_start: *const i32,
    pub out: SegattnRows,
    pub y: SegattnRows,
    pub d_y: SegattnRows,
    pub d_out: SegattnRows,
    pub d_lse: *mut f32,
    pub d_logits: *mut f32,
    pub rows: i64,
    pub spans: i32,
    pub q_heads: i32,
    pub head_dim: i32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of SegattnSinkParams"][::core::mem::size_of::<SegattnSinkParams>() - 128usize];
    ["Alignment of SegattnSinkParams"][::core::mem::align_of::<SegattnSinkParams>() - 8usize];
    ["Offset of field: SegattnSinkParams::logits"]
        [::core::mem::offset_of!(SegattnSinkParams, logits) - 0usize];
    ["Offset of field: SegattnSinkParams::lse"]
        [::core::mem::offset_of!(SegattnSinkParams, lse) - 8usize];
    ["Offset of field: SegattnSinkParams::span_start"]
        [::core::mem::offset_of!(SegattnSinkParams, span_start) - 16usize];
    ["Offset of field: SegattnSinkParams::out"]
        [::core::mem::offset_of!(SegattnSinkParams, out) - 24usize];
    ["Offset of field: SegattnSinkParams::y"]
        [::core::mem::offset_of!(SegattnSinkParams, y) - 40usize];
    ["Offset of field: SegattnSinkParams::d_y"]
        [::core::mem::offset_of!(SegattnSinkParams, d_y) - 56usize];
    ["Offset of field: SegattnSinkParams::d_out"]
        [::core::mem::offset_of!(SegattnSinkParams, d_out) - 72usize];
    ["Offset of field: SegattnSinkParams::d_lse"]
        [::core::mem::offset_of!(SegattnSinkParams, d_lse) - 88usize];
    ["Offset of field: SegattnSinkParams::d_logits"]
        [::core::mem::offset_of!(SegattnSinkParams, d_logits) - 96usize];
    ["Offset of field: SegattnSinkParams::rows"]
        [::core::mem::offset_of!(SegattnSinkParams, rows) - 104usize];
    ["Offset of field: SegattnSinkParams::spans"]
        [::core::mem::offset_of!(SegattnSinkParams, spans) - 112usize];
    ["Offset of field: SegattnSinkParams::q_heads"]
        [::core::mem::offset_of!(SegattnSinkParams, q_heads) - 116usize];
    ["Offset of field: SegattnSinkParams::head_dim"]
        [::core::mem::offset_of!(SegattnSinkParams, head_dim) - 120usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct SegattnEmbedParams {
    pub table: SegattnRows,
    pub tokens: *const u32,
    pub y: SegattnRows,
    pub d_table: SegattnRows,
    pub order: *const i32,
    pub run_start: *const i32,
    pub rows: i64,
    pub runs: i32,
    pub width: i32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of SegattnEmbedParams"][::core::mem::size_of::<SegattnEmbedParams>() - 88usize];
    ["Alignment of SegattnEmbedParams"][::core::mem::align_of::<SegattnEmbedParams>() - 8usize];
    ["Offset of field: SegattnEmbedParams::table"]
        [::core::mem::offset_of!(SegattnEmbedParams, table) - 0usize];
    ["Offset of field: SegattnEmbedParams::tokens"]
        [::core::mem::offset_of!(SegattnEmbedParams, tokens) - 16usize];
    ["Offset of field: SegattnEmbedParams::y"]
        [::core::mem::offset_of!(SegattnEmbedParams, y) - 24usize];
    ["Offset of field: SegattnEmbedParams::d_table"]
        [::core::mem::offset_of!(SegattnEmbedParams, d_table) - 40usize];
    ["Offset of field: SegattnEmbedParams::order"]
        [::core::mem::offset_of!(SegattnEmbedParams, order) - 56usize];
    ["Offset of field: SegattnEmbedParams::run_start"]
        [::core::mem::offset_of!(SegattnEmbedParams, run_start) - 64usize];
    ["Offset of field: SegattnEmbedParams::rows"]
        [::core::mem::offset_of!(SegattnEmbedParams, rows) - 72usize];
    ["Offset of field: SegattnEmbedParams::runs"]
        [::core::mem::offset_of!(SegattnEmbedParams, runs) - 80usize];
    ["Offset of field: SegattnEmbedParams::width"]
        [::core::mem::offset_of!(SegattnEmbedParams, width) - 84usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct SegattnLossParams {
    pub logits: SegattnRows,
    pub targets: *const u32,
    pub scales: *const f32,
    pub log_probability: *mut f32,
    pub d_logits: SegattnRows,
    pub rows: i64,
    pub vocab: i32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of SegattnLossParams"][::core::mem::size_of::<SegattnLossParams>() - 72usize];
    ["Alignment of SegattnLossParams"][::core::mem::align_of::<SegattnLossParams>() - 8usize];
    ["Offset of field: SegattnLossParams::logits"]
        [::core::mem::offset_of!(SegattnLossParams, logits) - 0usize];
    ["Offset of field: SegattnLossParams::targets"]
        [::core::mem::offset_of!(SegattnLossParams, targets) - 16usize];
    ["Offset of field: SegattnLossParams::scales"]
        [::core::mem::offset_of!(SegattnLossParams, scales) - 24usize];
    ["Offset of field: SegattnLossParams::log_probability"]
        [::core::mem::offset_of!(SegattnLossParams, log_probability) - 32usize];
    ["Offset of field: SegattnLossParams::d_logits"]
        [::core::mem::offset_of!(SegattnLossParams, d_logits) - 40usize];
    ["Offset of field: SegattnLossParams::rows"]
        [::core::mem::offset_of!(SegattnLossParams, rows) - 56usize];
    ["Offset of field: SegattnLossParams::vocab"]
        [::core::mem::offset_of!(SegattnLossParams, vocab) - 64usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct SegattnDivergenceParams {
    pub logits: SegattnRows,
    pub teacher: SegattnRows,
    pub targets: *const u32,
    pub scales: *const f32,
    pub log_probability: *mut f32,
    pub divergence: *mut f32,
    pub d_logits: SegattnRows,
    pub rows: i64,
    pub vocab: i32,
    pub temperature: f32,
    pub inverse: f32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of SegattnDivergenceParams"]
        [::core::mem::size_of::<SegattnDivergenceParams>() - 104usize];
    ["Alignment of SegattnDivergenceParams"]
        [::core::mem::align_of::<SegattnDivergenceParams>() - 8usize];
    ["Offset of field: SegattnDivergenceParams::logits"]
        [::core::mem::offset_of!(SegattnDivergenceParams, logits) - 0usize];
    ["Offset of field: SegattnDivergenceParams::teacher"]
        [::core::mem::offset_of!(SegattnDivergenceParams, teacher) - 16usize];
    ["Offset of field: SegattnDivergenceParams::targets"]
        [::core::mem::offset_of!(SegattnDivergenceParams, targets) - 32usize];
    ["Offset of field: SegattnDivergenceParams::scales"]
        [::core::mem::offset_of!(SegattnDivergenceParams, scales) - 40usize];
    ["Offset of field: SegattnDivergenceParams::log_probability"]
        [::core::mem::offset_of!(SegattnDivergenceParams, log_probability) - 48usize];
    ["Offset of field: SegattnDivergenceParams::divergence"]
        [::core::mem::offset_of!(SegattnDivergenceParams, divergence) - 56usize];
    ["Offset of field: SegattnDivergenceParams::d_logits"]
        [::core::mem::offset_of!(SegattnDivergenceParams, d_logits) - 64usize];
    ["Offset of field: SegattnDivergenceParams::rows"]
        [::core::mem::offset_of!(SegattnDivergenceParams, rows) - 80usize];
    ["Offset of field: SegattnDivergenceParams::vocab"]
        [::core::mem::offset_of!(SegattnDivergenceParams, vocab) - 88usize];
    ["Offset of field: SegattnDivergenceParams::temperature"]
        [::core::mem::offset_of!(SegattnDivergenceParams, temperature) - 92usize];
    ["Offset of field: SegattnDivergenceParams::inverse"]
        [::core::mem::offset_of!(SegattnDivergenceParams, inverse) - 96usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct SegattnAdamwTensor {
    pub values: *mut f32,
    pub grads: *const f32,
    pub m: *mut f32,
    pub v: *mut f32,
    pub weights: *mut ::core::ffi::c_void,
    pub len: i64,
    pub first_chunk: i64,
    pub step: f32,
    pub keep: f32,
    pub floor: f32,
    pub changes: i32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of SegattnAdamwTensor"][::core::mem::size_of::<SegattnAdamwTensor>() - 72usize];
    ["Alignment of SegattnAdamwTensor"][::core::mem::align_of::<SegattnAdamwTensor>() - 8usize];
    ["Offset of field: SegattnAdamwTensor::values"]
        [::core::mem::offset_of!(SegattnAdamwTensor, values) - 0usize];
    ["Offset of field: SegattnAdamwTensor::grads"]
        [::core::mem::offset_of!(SegattnAdamwTensor, grads) - 8usize];
    ["Offset of field: SegattnAdamwTensor::m"]
        [::core::mem::offset_of!(SegattnAdamwTensor, m) - 16usize];
    ["Offset of field: SegattnAdamwTensor::v"]
        [::core::mem::offset_of!(SegattnAdamwTensor, v) - 24usize];
    ["Offset of field: SegattnAdamwTensor::weights"]
        [::core::mem::offset_of!(SegattnAdamwTensor, weights) - 32usize];
    ["Offset of field: SegattnAdamwTensor::len"]
        [::core::mem::offset_of!(SegattnAdamwTensor, len) - 40usize];
    ["Offset of field: SegattnAdamwTensor::first_chunk"]
        [::core::mem::offset_of!(SegattnAdamwTensor, first_chunk) - 48usize];
    ["Offset of field: SegattnAdamwTensor::step"]
        [::core::mem::offset_of!(SegattnAdamwTensor, step) - 56usize];
    ["Offset of field: SegattnAdamwTensor::keep"]
        [::core::mem::offset_of!(SegattnAdamwTensor, keep) - 60usize];
    ["Offset of field: SegattnAdamwTensor::floor"]
        [::core::mem::offset_of!(SegattnAdamwTensor, floor) - 64usize];
    ["Offset of field: SegattnAdamwTensor::changes"]
        [::core::mem::offset_of!(SegattnAdamwTensor, changes) - 68usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct SegattnAdamwResult {
    pub grad_norm: f64,
    pub clip: f32,
    pub applied: i32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of SegattnAdamwResult"][::core::mem::size_of::<SegattnAdamwResult>() - 16usize];
    ["Alignment of SegattnAdamwResult"][::core::mem::align_of::<SegattnAdamwResult>() - 8usize];
    ["Offset of field: SegattnAdamwResult::grad_norm"]
        [::core::mem::offset_of!(SegattnAdamwResult, grad_norm) - 0usize];
    ["Offset of field: SegattnAdamwResult::clip"]
        [::core::mem::offset_of!(SegattnAdamwResult, clip) - 8usize];
    ["Offset of field: SegattnAdamwResult::applied"]
        [::core::mem::offset_of!(SegattnAdamwResult, applied) - 12usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct SegattnAdamwParams {
    pub tensors: *const SegattnAdamwTensor,
    pub chunk_squares: *mut f64,
    pub result: *mut SegattnAdamwResult,
    pub chunks: i64,
    pub clip_norm: f64,
    pub count: i32,
    pub only_measure: i32,
    pub beta1: f32,
    pub beta2: f32,
    pub rest1: f32,
    pub rest2: f32,
    pub root: f32,
    pub eps: f32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of SegattnAdamwParams"][::core::mem::size_of::<SegattnAdamwParams>() - 72usize];
    ["Alignment of SegattnAdamwParams"][::core::mem::align_of::<SegattnAdamwParams>() - 8usize];
    ["Offset of field: SegattnAdamwParams::tensors"]
        [::core::mem::offset_of!(SegattnAdamwParams, tensors) - 0usize];
    ["Offset of field: SegattnAdamwParams::chunk_squares"]
        [::core::mem::offset_of!(SegattnAdamwParams, chunk_squares) - 8usize];
    ["Offset of field: SegattnAdamwParams::result"]
        [::core::mem::offset_of!(SegattnAdamwParams, result) - 16usize];
    ["Offset of field: SegattnAdamwParams::chunks"]
        [::core::mem::offset_of!(SegattnAdamwParams, chunks) - 24usize];
    ["Offset of field: SegattnAdamwParams::clip_norm"]
        [::core::mem::offset_of!(SegattnAdamwParams, clip_norm) - 32usize];
    ["Offset of field: SegattnAdamwParams::count"]
        [::core::mem::offset_of!(SegattnAdamwParams, count) - 40usize];
    ["Offset of field: SegattnAdamwParams::only_measure"]
        [::core::mem::offset_of!(SegattnAdamwParams, only_measure) - 44usize];
    ["Offset of field: SegattnAdamwParams::beta1"]
        [::core::mem::offset_of!(SegattnAdamwParams, beta1) - 48usize];
    ["Offset of field: SegattnAdamwParams::beta2"]
        [::core::mem::offset_of!(SegattnAdamwParams, beta2) - 52usize];
    ["Offset of field: SegattnAdamwParams::rest1"]
        [::core::mem::offset_of!(SegattnAdamwParams, rest1) - 56usize];
    ["Offset of field: SegattnAdamwParams::rest2"]
        [::core::mem::offset_of!(SegattnAdamwParams, rest2) - 60usize];
    ["Offset of field: SegattnAdamwParams::root"]
        [::core::mem::offset_of!(SegattnAdamwParams, root) - 64usize];
    ["Offset of field: SegattnAdamwParams::eps"]
        [::core::mem::offset_of!(SegattnAdamwParams, eps) - 68usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct SegattnPoolChunk {
    pub k: *mut ::core::ffi::c_void,
    pub v: *mut ::core::ffi::c_void,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of SegattnPoolChunk"][::core::mem::size_of::<SegattnPoolChunk>() - 16usize];
    ["Alignment of SegattnPoolChunk"][::core::mem::align_of::<SegattnPoolChunk>() - 8usize];
    ["Offset of field: SegattnPoolChunk::k"][::core::mem::offset_of!(SegattnPoolChunk, k) - 0usize];
    ["Offset of field: SegattnPoolChunk::v"][::core::mem::offset_of!(SegattnPoolChunk, v) - 8usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct SegattnPoolHead {
    pub kv_head: i32,
    pub eligible_begin: i32,
    pub eligible_end: i32,
    pub end_angle: i32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of SegattnPoolHead"][::core::mem::size_of::<SegattnPoolHead>() - 16usize];
    ["Alignment of SegattnPoolHead"][::core::mem::align_of::<SegattnPoolHead>() - 4usize];
    ["Offset of field: SegattnPoolHead::kv_head"]
        [::core::mem::offset_of!(SegattnPoolHead, kv_head) - 0usize];
    ["Offset of field: SegattnPoolHead::eligible_begin"]
        [::core::mem::offset_of!(SegattnPoolHead, eligible_begin) - 4usize];
    ["Offset of field: SegattnPoolHead::eligible_end"]
        [::core::mem::offset_of!(SegattnPoolHead, eligible_end) - 8usize];
    ["Offset of field: SegattnPoolHead::end_angle"]
        [::core::mem::offset_of!(SegattnPoolHead, end_angle) - 12usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct SegattnBestToken {
    pub key: u32,
    pub token: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of SegattnBestToken"][::core::mem::size_of::<SegattnBestToken>() - 8usize];
    ["Alignment of SegattnBestToken"][::core::mem::align_of::<SegattnBestToken>() - 4usize];
    ["Offset of field: SegattnBestToken::key"]
        [::core::mem::offset_of!(SegattnBestToken, key) - 0usize];
    ["Offset of field: SegattnBestToken::token"]
        [::core::mem::offset_of!(SegattnBestToken, token) - 4usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct SegattnRetrievalParams {
    pub chunks: *const SegattnPoolChunk,
    pub head: *const SegattnPoolHead,
    pub q: SegattnRows,
    pub k: SegattnRows,
    pub v: SegattnRows,
    pub probes: *mut ::core::ffi::c_void,
    pub sums: *mut f32,
    pub lse: *mut f32,
    pub scores: *mut f32,
    pub best: *mut SegattnBestToken,
    pub selected: *mut i32,
    pub selected_count: *mut i32,
    pub unwanted: *mut f32,
    pub kept: *const SegattnPoolChunk,
    pub past_len: *mut i32,
    pub cos: *const f32,
    pub sin: *const f32,
    pub first_token: i64,
    pub chunk_tokens: i64,
    pub token: i64,
    pub rows: i64,
    pub score_pitch: i64,
    pub heads: i32,
    pub head_dim: i32,
    pub group: i32,
    pub windows: i32,
    pub window: i32,
    pub stride: i32,
    pub first_query: i32,
    pub query_capacity: i32,
    pub block_len: i32,
    pub first_block: i32,
    pub blocks: i32,
    pub max_selected: i32,
    pub tiles: i32,
    pub window_len: i32,
    pub window_before: i32,
    pub scale_log2: f32,
    pub bits: i32,
    pub padding: i32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of SegattnRetrievalParams"][::core::mem::size_of::<SegattnRetrievalParams>() - 272usize];
    ["Alignment of SegattnRetrievalParams"]
        [::core::mem::align_of::<SegattnRetrievalParams>() - 8usize];
    ["Offset of field: SegattnRetrievalParams::chunks"]
        [::core::mem::offset_of!(SegattnRetrievalParams, chunks) - 0usize];
    ["Offset of field: SegattnRetrievalParams::head"]
        [::core::mem::offset_of!(SegattnRetrievalParams, head) - 8usize];
    ["Offset of field: SegattnRetrievalParams::q"]
        [::core::mem::offset_of!(SegattnRetrievalParams, q) - 16usize];
    ["Offset of field: SegattnRetrievalParams::k"]
        [::core::mem::offset_of!(SegattnRetrievalParams, k) - 32usize];
    ["Offset of field: SegattnRetrievalParams::v"]
        [::core::mem::offset_of!(SegattnRetrievalParams, v) - 48usize];
    ["Offset of field: SegattnRetrievalParams::probes"]
        [::core::mem::offset_of!(SegattnRetrievalParams, probes) - 64usize];
    ["Offset of field: SegattnRetrievalParams::sums"]
        [::core::mem::offset_of!(SegattnRetrievalParams, sums) - 72usize];
    ["Offset of field: SegattnRetrievalParams::lse"]
        [::core::mem::offset_of!(SegattnRetrievalParams, lse) - 80usize];
    ["Offset of field: SegattnRetrievalParams::scores"]
        [::core::mem::offset_of!(SegattnRetrievalParams, scores) - 88usize];
    ["Offset of field: SegattnRetrievalParams::best"]
        [::core::mem::offset_of!(SegattnRetrievalParams, best) - 96usize];
    ["Offset of field: SegattnRetrievalParams::selected"]
        [::core::mem::offset_of!(SegattnRetrievalParams, selected) - 104usize];
    ["Offset of field: SegattnRetrievalParams::selected_count"]
        [::core::mem::offset_of!(SegattnRetrievalParams, selected_count) - 112usize];
    ["Offset of field: SegattnRetrievalParams::unwanted"]
        [::core::mem::offset_of!(SegattnRetrievalParams, unwanted) - 120usize];
    ["Offset of field: SegattnRetrievalParams::kept"]
        [::core::mem::offset_of!(SegattnRetrievalParams, kept) - 128usize];
    ["Offset of field: SegattnRetrievalParams::past_len"]
        [::core::mem::offset_of!(SegattnRetrievalParams, past_len) - 136usize];
    ["Offset of field: SegattnRetrievalParams::cos"]
        [::core::mem::offset_of!(SegattnRetrievalParams, cos) - 144usize];
    ["Offset of field: SegattnRetrievalParams::sin"]
        [::core::mem::offset_of!(SegattnRetrievalParams, sin) - 152usize];
    ["Offset of field: SegattnRetrievalParams::first_token"]
        [::core::mem::offset_of!(SegattnRetrievalParams, first_token) - 160usize];
    ["Offset of field: SegattnRetrievalParams::chunk_tokens"]
        [::core::mem::offset_of!(SegattnRetrievalParams, chunk_tokens) - 168usize];
    ["Offset of field: SegattnRetrievalParams::token"]
        [::core::mem::offset_of!(SegattnRetrievalParams, token) - 176usize];
    ["Offset of field: SegattnRetrievalParams::rows"]
        [::core::mem::offset_of!(SegattnRetrievalParams, rows) - 184usize];
    ["Offset of field: SegattnRetrievalParams::score_pitch"]
        [::core::mem::offset_of!(SegattnRetrievalParams, score_pitch) - 192usize];
    ["Offset of field: SegattnRetrievalParams::heads"]
        [::core::mem::offset_of!(SegattnRetrievalParams, heads) - 200usize];
    ["Offset of field: SegattnRetrievalParams::head_dim"]
        [::core::mem::offset_of!(SegattnRetrievalParams, head_dim) - 204usize];
    ["Offset of field: SegattnRetrievalParams::group"]
        [::core::mem::offset_of!(SegattnRetrievalParams, group) - 208usize];
    ["Offset of field: SegattnRetrievalParams::windows"]
        [::core::mem::offset_of!(SegattnRetrievalParams, windows) - 212usize];
    ["Offset of field: SegattnRetrievalParams::window"]
        [::core::mem::offset_of!(SegattnRetrievalParams, window) - 216usize];
    ["Offset of field: SegattnRetrievalParams::stride"]
        [::core::mem::offset_of!(SegattnRetrievalParams, stride) - 220usize];
    ["Offset of field: SegattnRetrievalParams::first_query"]
        [::core::mem::offset_of!(SegattnRetrievalParams, first_query) - 224usize];
    ["Offset of field: SegattnRetrievalParams::query_capacity"]
        [::core::mem::offset_of!(SegattnRetrievalParams, query_capacity) - 228usize];
    ["Offset of field: SegattnRetrievalParams::block_len"]
        [::core::mem::offset_of!(SegattnRetrievalParams, block_len) - 232usize];
    ["Offset of field: SegattnRetrievalParams::first_block"]
        [::core::mem::offset_of!(SegattnRetrievalParams, first_block) - 236usize];
    ["Offset of field: SegattnRetrievalParams::blocks"]
        [::core::mem::offset_of!(SegattnRetrievalParams, blocks) - 240usize];
    ["Offset of field: SegattnRetrievalParams::max_selected"]
        [::core::mem::offset_of!(SegattnRetrievalParams, max_selected) - 244usize];
    ["Offset of field: SegattnRetrievalParams::tiles"]
        [::core::mem::offset_of!(SegattnRetrievalParams, tiles) - 248usize];
    ["Offset of field: SegattnRetrievalParams::window_len"]
        [::core::mem::offset_of!(SegattnRetrievalParams, window_len) - 252usize];
    ["Offset of field: SegattnRetrievalParams::window_before"]
        [::core::mem::offset_of!(SegattnRetrievalParams, window_before) - 256usize];
    ["Offset of field: SegattnRetrievalParams::scale_log2"]
        [::core::mem::offset_of!(SegattnRetrievalParams, scale_log2) - 260usize];
    ["Offset of field: SegattnRetrievalParams::bits"]
        [::core::mem::offset_of!(SegattnRetrievalParams, bits) - 264usize];
    ["Offset of field: SegattnRetrievalParams::padding"]
        [::core::mem::offset_of!(SegattnRetrievalParams, padding) - 268usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct SegattnRetrievalCalls {
    pub calls: *const SegattnRetrievalParams,
    pub blocks: i64,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of SegattnRetrievalCalls"][::core::mem::size_of::<SegattnRetrievalCalls>() - 16usize];
    ["Alignment of SegattnRetrievalCalls"]
        [::core::mem::align_of::<SegattnRetrievalCalls>() - 8usize];
    ["Offset of field: SegattnRetrievalCalls::calls"]
        [::core::mem::offset_of!(SegattnRetrievalCalls, calls) - 0usize];
    ["Offset of field: SegattnRetrievalCalls::blocks"]
        [::core::mem::offset_of!(SegattnRetrievalCalls, blocks) - 8usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct SegattnSampler {
    pub seed: u64,
    pub stream: u64,
    pub position: u64,
    pub temperature: f32,
    pub top_p: f32,
    pub min_p: f32,
    pub penalty: f32,
    pub top_k: u32,
    pub failure: i32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of SegattnSampler"][::core::mem::size_of::<SegattnSampler>() - 48usize];
    ["Alignment of SegattnSampler"][::core::mem::align_of::<SegattnSampler>() - 8usize];
    ["Offset of field: SegattnSampler::seed"]
        [::core::mem::offset_of!(SegattnSampler, seed) - 0usize];
    ["Offset of field: SegattnSampler::stream"]
        [::core::mem::offset_of!(SegattnSampler, stream) - 8usize];
    ["Offset of field: SegattnSampler::position"]
        [::core::mem::offset_of!(SegattnSampler, position) - 16usize];
    ["Offset of field: SegattnSampler::temperature"]
        [::core::mem::offset_of!(SegattnSampler, temperature) - 24usize];
    ["Offset of field: SegattnSampler::top_p"]
        [::core::mem::offset_of!(SegattnSampler, top_p) - 28usize];
    ["Offset of field: SegattnSampler::min_p"]
        [::core::mem::offset_of!(SegattnSampler, min_p) - 32usize];
    ["Offset of field: SegattnSampler::penalty"]
        [::core::mem::offset_of!(SegattnSampler, penalty) - 36usize];
    ["Offset of field: SegattnSampler::top_k"]
        [::core::mem::offset_of!(SegattnSampler, top_k) - 40usize];
    ["Offset of field: SegattnSampler::failure"]
        [::core::mem::offset_of!(SegattnSampler, failure) - 44usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct SegattnSampleParams {
    pub logits: SegattnRows,
    pub sampler: *mut SegattnSampler,
    pub seen: *mut u32,
    pub tokens: *mut u32,
    pub log_probability: *mut f32,
    pub indices: *const i32,
    pub seen_pitch: i64,
    pub rows: i64,
    pub vocab: i32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of SegattnSampleParams"][::core::mem::size_of::<SegattnSampleParams>() - 80usize];
    ["Alignment of SegattnSampleParams"][::core::mem::align_of::<SegattnSampleParams>() - 8usize];
    ["Offset of field: SegattnSampleParams::logits"]
        [::core::mem::offset_of!(SegattnSampleParams, logits) - 0usize];
    ["Offset of field: SegattnSampleParams::sampler"]
        [::core::mem::offset_of!(SegattnSampleParams, sampler) - 16usize];
    ["Offset of field: SegattnSampleParams::seen"]
        [::core::mem::offset_of!(SegattnSampleParams, seen) - 24usize];
    ["Offset of field: SegattnSampleParams::tokens"]
        [::core::mem::offset_of!(SegattnSampleParams, tokens) - 32usize];
    ["Offset of field: SegattnSampleParams::log_probability"]
        [::core::mem::offset_of!(SegattnSampleParams, log_probability) - 40usize];
    ["Offset of field: SegattnSampleParams::indices"]
        [::core::mem::offset_of!(SegattnSampleParams, indices) - 48usize];
    ["Offset of field: SegattnSampleParams::seen_pitch"]
        [::core::mem::offset_of!(SegattnSampleParams, seen_pitch) - 56usize];
    ["Offset of field: SegattnSampleParams::rows"]
        [::core::mem::offset_of!(SegattnSampleParams, rows) - 64usize];
    ["Offset of field: SegattnSampleParams::vocab"]
        [::core::mem::offset_of!(SegattnSampleParams, vocab) - 72usize];
};
