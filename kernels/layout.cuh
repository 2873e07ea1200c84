// Sizes and offsets of params.h as the device's compiler lays them out, in a constant that the host compares with its
// own before the first launch (src/cuda/kernels/layout.rs has the same list).
#ifndef SEGATTN_LAYOUT_CUH
#define SEGATTN_LAYOUT_CUH

#include <stddef.h>

#include "params.h"

#define SEGATTN_LAYOUT(name)                                                                                      \
  extern "C" __device__ const int32_t name##_layout[] = {sizeof(SegattnTensor),                                   \
                                                         offsetof(SegattnTensor, data),                           \
                                                         offsetof(SegattnTensor, batch_offsets),                  \
                                                         offsetof(SegattnTensor, batch_stride),                   \
                                                         offsetof(SegattnTensor, row_stride),                     \
                                                         offsetof(SegattnTensor, head_stride),                    \
                                                         offsetof(SegattnTensor, rows),                           \
                                                         sizeof(SegattnProblem),                                  \
                                                         offsetof(SegattnProblem, q),                             \
                                                         offsetof(SegattnProblem, k),                             \
                                                         offsetof(SegattnProblem, v),                             \
                                                         offsetof(SegattnProblem, prior_k),                       \
                                                         offsetof(SegattnProblem, prior_v),                       \
                                                         offsetof(SegattnProblem, past_k),                        \
                                                         offsetof(SegattnProblem, past_v),                        \
                                                         offsetof(SegattnProblem, segment_len),                   \
                                                         offsetof(SegattnProblem, prior_len),                     \
                                                         offsetof(SegattnProblem, past_len),                      \
                                                         offsetof(SegattnProblem, sink_len),                      \
                                                         offsetof(SegattnProblem, query_start),                   \
                                                         offsetof(SegattnProblem, row_offsets),                   \
                                                         offsetof(SegattnProblem, past_gate),                     \
                                                         offsetof(SegattnProblem, prior_heads),                   \
                                                         offsetof(SegattnProblem, past_len_batch_stride),         \
                                                         offsetof(SegattnProblem, past_len_head_stride),          \
                                                         offsetof(SegattnProblem, sink_len_batch_stride),         \
                                                         offsetof(SegattnProblem, sink_len_head_stride),          \
                                                         offsetof(SegattnProblem, batch),                         \
                                                         offsetof(SegattnProblem, q_heads),                       \
                                                         offsetof(SegattnProblem, kv_heads),                      \
                                                         offsetof(SegattnProblem, scale),                         \
                                                         sizeof(SegattnForwardParams),                            \
                                                         offsetof(SegattnForwardParams, problem),                 \
                                                         offsetof(SegattnForwardParams, out),                     \
                                                         offsetof(SegattnForwardParams, lse),                     \
                                                         offsetof(SegattnForwardParams, partial_out),             \
                                                         offsetof(SegattnForwardParams, partial_state),           \
                                                         offsetof(SegattnForwardParams, chunk_totals),            \
                                                         offsetof(SegattnForwardParams, work_counter),            \
                                                         offsetof(SegattnForwardParams, packed_heads),            \
                                                         offsetof(SegattnForwardParams, tiles),                   \
                                                         offsetof(SegattnForwardParams, max_splits),              \
                                                         sizeof(SegattnTensorMap),                                \
                                                         offsetof(SegattnTensorMap, words),                       \
                                                         sizeof(SegattnHopperForwardParams),                      \
                                                         offsetof(SegattnHopperForwardParams, maps),              \
                                                         offsetof(SegattnHopperForwardParams, forward),           \
                                                         offsetof(SegattnHopperForwardParams, batch_coordinates), \
                                                         offsetof(SegattnHopperForwardParams, mapped),            \
                                                         sizeof(SegattnBackwardParams),                           \
                                                         offsetof(SegattnBackwardParams, problem),                \
                                                         offsetof(SegattnBackwardParams, out),                    \
                                                         offsetof(SegattnBackwardParams, d_out),                  \
                                                         offsetof(SegattnBackwardParams, lse),                    \
                                                         offsetof(SegattnBackwardParams, d_lse),                  \
                                                         offsetof(SegattnBackwardParams, d_q),                    \
                                                         offsetof(SegattnBackwardParams, d_k),                    \
                                                         offsetof(SegattnBackwardParams, d_v),                    \
                                                         offsetof(SegattnBackwardParams, d_prior_k),              \
                                                         offsetof(SegattnBackwardParams, d_prior_v),              \
                                                         offsetof(SegattnBackwardParams, d_past_gate),            \
                                                         offsetof(SegattnBackwardParams, row_lse),                \
                                                         offsetof(SegattnBackwardParams, row_delta),              \
                                                         offsetof(SegattnBackwardParams, partial_d_q),            \
                                                         offsetof(SegattnBackwardParams, partial_gate),           \
                                                         offsetof(SegattnBackwardParams, work_counter),           \
                                                         offsetof(SegattnBackwardParams, ds),                     \
                                                         offsetof(SegattnBackwardParams, row_pitch),              \
                                                         offsetof(SegattnBackwardParams, tiles),                  \
                                                         offsetof(SegattnBackwardParams, max_splits),             \
                                                         offsetof(SegattnBackwardParams, first_group),            \
                                                         offsetof(SegattnBackwardParams, groups),                 \
                                                         sizeof(SegattnKernelInfo),                               \
                                                         offsetof(SegattnKernelInfo, threads),                    \
                                                         offsetof(SegattnKernelInfo, shared_bytes),               \
                                                         offsetof(SegattnKernelInfo, blocks_per_multiprocessor),  \
                                                         offsetof(SegattnKernelInfo, tile_rows),                  \
                                                         offsetof(SegattnKernelInfo, key_rows),                   \
                                                         offsetof(SegattnKernelInfo, split_keys),                 \
                                                         offsetof(SegattnKernelInfo, params_bytes)};

#endif
