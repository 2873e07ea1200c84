//! The structs of `kernels/params.h`: what a kernel is launched with. Written by bindgen, see
//! `tests/kernel_params.rs`; comments and shapes are in the header.
#![allow(missing_docs)]

#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct SegattnTensor {
    pub data: *mut ::core::ffi::c_void,
    pub batch_offsets: *const i64,
    pub batch_stride: i64,
    pub row_stride: i64,
    pub head_stride: i64,
    pub rows: i64,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of SegattnTensor"][::core::mem::size_of::<SegattnTensor>() - 48usize];
    ["Alignment of SegattnTensor"][::core::mem::align_of::<SegattnTensor>() - 8usize];
    ["Offset of field: SegattnTensor::data"][::core::mem::offset_of!(SegattnTensor, data) - 0usize];
    ["Offset of field: SegattnTensor::batch_offsets"]
        [::core::mem::offset_of!(SegattnTensor, batch_offsets) - 8usize];
    ["Offset of field: SegattnTensor::batch_stride"]
        [::core::mem::offset_of!(SegattnTensor, batch_stride) - 16usize];
    ["Offset of field: SegattnTensor::row_stride"]
        [::core::mem::offset_of!(SegattnTensor, row_stride) - 24usize];
    ["Offset of field: SegattnTensor::head_stride"]
        [::core::mem::offset_of!(SegattnTensor, head_stride) - 32usize];
    ["Offset of field: SegattnTensor::rows"]
        [::core::mem::offset_of!(SegattnTensor, rows) - 40usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct SegattnProblem {
    pub q: SegattnTensor,
    pub k: SegattnTensor,
    pub v: SegattnTensor,
    pub prior_k: SegattnTensor,
    pub prior_v: SegattnTensor,
    pub past_k: SegattnTensor,
    pub past_v: SegattnTensor,
    pub segment_len: *const i32,
    pub prior_len: *const i32,
    pub past_len: *const i32,
    pub sink_len: *const i32,
    pub query_start: *const i32,
    pub row_offsets: *const i32,
    pub past_gate: *const f32,
    pub prior_heads: *const u8,
    pub past_len_batch_stride: i32,
    pub past_len_head_stride: i32,
    pub sink_len_batch_stride: i32,
    pub sink_len_head_stride: i32,
    pub batch: i32,
    pub q_heads: i32,
    pub kv_heads: i32,
    pub scale: f32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of SegattnProblem"][::core::mem::size_of::<SegattnProblem>() - 432usize];
    ["Alignment of SegattnProblem"][::core::mem::align_of::<SegattnProblem>() - 8usize];
    ["Offset of field: SegattnProblem::q"][::core::mem::offset_of!(SegattnProblem, q) - 0usize];
    ["Offset of field: SegattnProblem::k"][::core::mem::offset_of!(SegattnProblem, k) - 48usize];
    ["Offset of field: SegattnProblem::v"][::core::mem::offset_of!(SegattnProblem, v) - 96usize];
    ["Offset of field: SegattnProblem::prior_k"]
        [::core::mem::offset_of!(SegattnProblem, prior_k) - 144usize];
    ["Offset of field: SegattnProblem::prior_v"]
        [::core::mem::offset_of!(SegattnProblem, prior_v) - 192usize];
    ["Offset of field: SegattnProblem::past_k"]
        [::core::mem::offset_of!(SegattnProblem, past_k) - 240usize];
    ["Offset of field: SegattnProblem::past_v"]
        [::core::mem::offset_of!(SegattnProblem, past_v) - 288usize];
    ["Offset of field: SegattnProblem::segment_len"]
        [::core::mem::offset_of!(SegattnProblem, segment_len) - 336usize];
    ["Offset of field: SegattnProblem::prior_len"]
        [::core::mem::offset_of!(SegattnProblem, prior_len) - 344usize];
    ["Offset of field: SegattnProblem::past_len"]
        [::core::mem::offset_of!(SegattnProblem, past_len) - 352usize];
    ["Offset of field: SegattnProblem::sink_len"]
        [::core::mem::offset_of!(SegattnProblem, sink_len) - 360usize];
    ["Offset of field: SegattnProblem::query_start"]
        [::core::mem::offset_of!(SegattnProblem, query_start) - 368usize];
    ["Offset of field: SegattnProblem::row_offsets"]
        [::core::mem::offset_of!(SegattnProblem, row_offsets) - 376usize];
    ["Offset of field: SegattnProblem::past_gate"]
        [::core::mem::offset_of!(SegattnProblem, past_gate) - 384usize];
    ["Offset of field: SegattnProblem::prior_heads"]
        [::core::mem::offset_of!(SegattnProblem, prior_heads) - 392usize];
    ["Offset of field: SegattnProblem::past_len_batch_stride"]
        [::core::mem::offset_of!(SegattnProblem, past_len_batch_stride) - 400usize];
    ["Offset of field: SegattnProblem::past_len_head_stride"]
        [::core::mem::offset_of!(SegattnProblem, past_len_head_stride) - 404usize];
    ["Offset of field: SegattnProblem::sink_len_batch_stride"]
        [::core::mem::offset_of!(SegattnProblem, sink_len_batch_stride) - 408usize];
    ["Offset of field: SegattnProblem::sink_len_head_stride"]
        [::core::mem::offset_of!(SegattnProblem, sink_len_head_stride) - 412usize];
    ["Offset of field: SegattnProblem::batch"]
        [::core::mem::offset_of!(SegattnProblem, batch) - 416usize];
    ["Offset of field: SegattnProblem::q_heads"]
        [::core::mem::offset_of!(SegattnProblem, q_heads) - 420usize];
    ["Offset of field: SegattnProblem::kv_heads"]
        [::core::mem::offset_of!(SegattnProblem, kv_heads) - 424usize];
    ["Offset of field: SegattnProblem::scale"]
        [::core::mem::offset_of!(SegattnProblem, scale) - 428usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct SegattnForwardParams {
    pub problem: SegattnProblem,
    pub out: SegattnTensor,
    pub lse: *mut f32,
    pub partial_out: *mut f32,
    pub partial_state: *mut f32,
    pub chunk_totals: *mut f32,
    pub work_counter: *mut u32,
    pub packed_heads: i32,
    pub tiles: i32,
    pub max_splits: i32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of SegattnForwardParams"][::core::mem::size_of::<SegattnForwardParams>() - 536usize];
    ["Alignment of SegattnForwardParams"][::core::mem::align_of::<SegattnForwardParams>() - 8usize];
    ["Offset of field: SegattnForwardParams::problem"]
        [::core::mem::offset_of!(SegattnForwardParams, problem) - 0usize];
    ["Offset of field: SegattnForwardParams::out"]
        [::core::mem::offset_of!(SegattnForwardParams, out) - 432usize];
    ["Offset of field: SegattnForwardParams::lse"]
        [::core::mem::offset_of!(SegattnForwardParams, lse) - 480usize];
    ["Offset of field: SegattnForwardParams::partial_out"]
        [::core::mem::offset_of!(SegattnForwardParams, partial_out) - 488usize];
    ["Offset of field: SegattnForwardParams::partial_state"]
        [::core::mem::offset_of!(SegattnForwardParams, partial_state) - 496usize];
    ["Offset of field: SegattnForwardParams::chunk_totals"]
        [::core::mem::offset_of!(SegattnForwardParams, chunk_totals) - 504usize];
    ["Offset of field: SegattnForwardParams::work_counter"]
        [::core::mem::offset_of!(SegattnForwardParams, work_counter) - 512usize];
    ["Offset of field: SegattnForwardParams::packed_heads"]
        [::core::mem::offset_of!(SegattnForwardParams, packed_heads) - 520usize];
    ["Offset of field: SegattnForwardParams::tiles"]
        [::core::mem::offset_of!(SegattnForwardParams, tiles) - 524usize];
    ["Offset of field: SegattnForwardParams::max_splits"]
        [::core::mem::offset_of!(SegattnForwardParams, max_splits) - 528usize];
};
#[repr(C)]
#[repr(align(64))]
#[derive(Debug, Copy, Clone)]
pub struct SegattnTensorMap {
    pub words: [u64; 16usize],
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of SegattnTensorMap"][::core::mem::size_of::<SegattnTensorMap>() - 128usize];
    ["Alignment of SegattnTensorMap"][::core::mem::align_of::<SegattnTensorMap>() - 64usize];
    ["Offset of field: SegattnTensorMap::words"]
        [::core::mem::offset_of!(SegattnTensorMap, words) - 0usize];
};
#[repr(C)]
#[repr(align(64))]
#[derive(Debug, Copy, Clone)]
pub struct SegattnHopperForwardParams {
    pub maps: [SegattnTensorMap; 7usize],
    pub forward: SegattnForwardParams,
    pub batch_coordinates: *const i32,
    pub mapped: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of SegattnHopperForwardParams"]
        [::core::mem::size_of::<SegattnHopperForwardParams>() - 1472usize];
    ["Alignment of SegattnHopperForwardParams"]
        [::core::mem::align_of::<SegattnHopperForwardParams>() - 64usize];
    ["Offset of field: SegattnHopperForwardParams::maps"]
        [::core::mem::offset_of!(SegattnHopperForwardParams, maps) - 0usize];
    ["Offset of field: SegattnHopperForwardParams::forward"]
        [::core::mem::offset_of!(SegattnHopperForwardParams, forward) - 896usize];
    ["Offset of field: SegattnHopperForwardParams::batch_coordinates"]
        [::core::mem::offset_of!(SegattnHopperForwardParams, batch_coordinates) - 1432usize];
    ["Offset of field: SegattnHopperForwardParams::mapped"]
        [::core::mem::offset_of!(SegattnHopperForwardParams, mapped) - 1440usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct SegattnBackwardParams {
    pub problem: SegattnProblem,
    pub out: SegattnTensor,
    pub d_out: SegattnTensor,
    pub lse: *const f32,
    pub d_lse: *const f32,
    pub d_q: SegattnTensor,
    pub d_k: SegattnTensor,
    pub d_v: SegattnTensor,
    pub d_prior_k: SegattnTensor,
    pub d_prior_v: SegattnTensor,
    pub d_past_gate: *mut f32,
    pub row_lse: *mut f32,
    pub row_delta: *mut f32,
    pub partial_d_q: *mut f32,
    pub partial_gate: *mut f32,
    pub work_counter: *mut u32,
    pub ds: *mut u32,
    pub row_pitch: i32,
    pub tiles: i32,
    pub max_splits: i32,
    pub first_group: i32,
    pub groups: i32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of SegattnBackwardParams"][::core::mem::size_of::<SegattnBackwardParams>() - 864usize];
    ["Alignment of SegattnBackwardParams"]
        [::core::mem::align_of::<SegattnBackwardParams>() - 8usize];
    ["Offset of field: SegattnBackwardParams::problem"]
        [::core::mem::offset_of!(SegattnBackwardParams, problem) - 0usize];
    ["Offset of field: SegattnBackwardParams::out"]
        [::core::mem::offset_of!(SegattnBackwardParams, out) - 432usize];
    ["Offset of field: SegattnBackwardParams::d_out"]
        [::core::mem::offset_of!(SegattnBackwardParams, d_out) - 480usize];
    ["Offset of field: SegattnBackwardParams::lse"]
        [::core::mem::offset_of!(SegattnBackwardParams, lse) - 528usize];
    ["Offset of field: SegattnBackwardParams::d_lse"]
        [::core::mem::offset_of!(SegattnBackwardParams, d_lse) - 536usize];
    ["Offset of field: SegattnBackwardParams::d_q"]
        [::core::mem::offset_of!(SegattnBackwardParams, d_q) - 544usize];
    ["Offset of field: SegattnBackwardParams::d_k"]
        [::core::mem::offset_of!(SegattnBackwardParams, d_k) - 592usize];
    ["Offset of field: SegattnBackwardParams::d_v"]
        [::core::mem::offset_of!(SegattnBackwardParams, d_v) - 640usize];
    ["Offset of field: SegattnBackwardParams::d_prior_k"]
        [::core::mem::offset_of!(SegattnBackwardParams, d_prior_k) - 688usize];
    ["Offset of field: SegattnBackwardParams::d_prior_v"]
        [::core::mem::offset_of!(SegattnBackwardParams, d_prior_v) - 736usize];
    ["Offset of field: SegattnBackwardParams::d_past_gate"]
        [::core::mem::offset_of!(SegattnBackwardParams, d_past_gate) - 784usize];
    ["Offset of field: SegattnBackwardParams::row_lse"]
        [::core::mem::offset_of!(SegattnBackwardParams, row_lse) - 792usize];
    ["Offset of field: SegattnBackwardParams::row_delta"]
        [::core::mem::offset_of!(SegattnBackwardParams, row_delta) - 800usize];
    ["Offset of field: SegattnBackwardParams::partial_d_q"]
        [::core::mem::offset_of!(SegattnBackwardParams, partial_d_q) - 808usize];
    ["Offset of field: SegattnBackwardParams::partial_gate"]
        [::core::mem::offset_of!(SegattnBackwardParams, partial_gate) - 816usize];
    ["Offset of field: SegattnBackwardParams::work_counter"]
        [::core::mem::offset_of!(SegattnBackwardParams, work_counter) - 824usize];
    ["Offset of field: SegattnBackwardParams::ds"]
        [::core::mem::offset_of!(SegattnBackwardParams, ds) - 832usize];
    ["Offset of field: SegattnBackwardParams::row_pitch"]
        [::core::mem::offset_of!(SegattnBackwardParams, row_pitch) - 840usize];
    ["Offset of field: SegattnBackwardParams::tiles"]
        [::core::mem::offset_of!(SegattnBackwardParams, tiles) - 844usize];
    ["Offset of field: SegattnBackwardParams::max_splits"]
        [::core::mem::offset_of!(SegattnBackwardParams, max_splits) - 848usize];
    ["Offset of field: SegattnBackwardParams::first_group"]
        [::core::mem::offset_of!(SegattnBackwardParams, first_group) - 852usize];
    ["Offset of field: SegattnBackwardParams::groups"]
        [::core::mem::offset_of!(SegattnBackwardParams, groups) - 856usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct SegattnKernelInfo {
    pub threads: i32,
    pub shared_bytes: i32,
    pub blocks_per_multiprocessor: i32,
    pub tile_rows: i32,
    pub key_rows: i32,
    pub split_keys: i32,
    pub params_bytes: i32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of SegattnKernelInfo"][::core::mem::size_of::<SegattnKernelInfo>() - 28usize];
    ["Alignment of SegattnKernelInfo"][::core::mem::align_of::<SegattnKernelInfo>() - 4usize];
    ["Offset of field: SegattnKernelInfo::threads"]
        [::core::mem::offset_of!(SegattnKernelInfo, threads) - 0usize];
    ["Offset of field: SegattnKernelInfo::shared_bytes"]
        [::core::mem::offset_of!(SegattnKernelInfo, shared_bytes) - 4usize];
    ["Offset of field: SegattnKernelInfo::blocks_per_multiprocessor"]
        [::core::mem::offset_of!(SegattnKernelInfo, blocks_per_multiprocessor) - 8usize];
    ["Offset of field: SegattnKernelInfo::tile_rows"]
        [::core::mem::offset_of!(SegattnKernelInfo, tile_rows) - 12usize];
    ["Offset of field: SegattnKernelInfo::key_rows"]
        [::core::mem::offset_of!(SegattnKernelInfo, key_rows) - 16usize];
    ["Offset of field: SegattnKernelInfo::split_keys"]
        [::core::mem::offset_of!(SegattnKernelInfo, split_keys) - 20usize];
    ["Offset of field: SegattnKernelInfo::params_bytes"]
        [::core::mem::offset_of!(SegattnKernelInfo, params_bytes) - 24usize];
};
