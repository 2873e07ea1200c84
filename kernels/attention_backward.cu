// Segment attention, backward, in three steps, each written once and in a fixed order:
//   prepare:  delta = d_out . out - d_lse, lse in base 2
//   d_q:      query-stationary, over past, prior and current keys: ds = p (d_out v^T - delta), d_q = scale ds k,
//             and d_past_gate = (sum over past keys of ds) / gate
//   d_kv:     key-stationary, over prior and current keys: d_k = scale ds^T q, d_v = p^T d_out, summed over the query
//             heads of the group
// All gradients are set (=), padding rows to 0. Past keys get none. No atomics on floats; the d_q of a tile
// with several work tiles is the sum of their parts, in order (docs/kernels.md).
#include "attention_prepare.cuh"
#include "key_grad.cuh"
#include "layout.cuh"
#include "query_grad.cuh"

// prepare: over batch * q_heads * row_pitch rows. query_grad: a block a work tile. query_grad_sum: 4 rows a block, over batch *
// q_heads * rows, or one row a head where no tile has several work tiles.
// key_grad: a block a key tile, batch * kv_heads * (prior tiles, unless read_only_prior, + current tiles).
#define BACKWARD(name, T, kHeadDim)                                                                            \
  using QueryGrad_##name = QueryGradConfig<T, kHeadDim>;                                                       \
  using KeyGrad_##name = KeyGradConfig<T, kHeadDim>;                                                           \
  using Prepare_##name = PrepareRows<T, kHeadDim>;                                                             \
  SEGATTN_INFO(attention_prepare_##name, prepare_info<Prepare_##name>())                                       \
  SEGATTN_INFO(attention_query_grad_##name, query_grad_info<QueryGrad_##name>())                               \
  SEGATTN_INFO(attention_key_grad_##name, key_grad_info<KeyGrad_##name>())                                     \
  SEGATTN_KERNEL(attention_prepare_##name, PrepareConfig, SegattnBackwardParams) {                             \
    attention_prepare<Prepare_##name>(params);                                                                 \
  }                                                                                                            \
  SEGATTN_KERNEL(attention_query_grad_##name, QueryGrad_##name, SegattnBackwardParams) {                       \
    attention_query_grad<QueryGrad_##name>(params);                                                            \
  }                                                                                                            \
  SEGATTN_KERNEL(attention_query_grad_sum_##name, PrepareConfig, SegattnBackwardParams) {                      \
    attention_query_grad_sum<QueryGrad_##name>(params);                                                        \
  }                                                                                                            \
  SEGATTN_KERNEL(attention_key_grad_##name, KeyGrad_##name, SegattnBackwardParams) {                           \
    attention_key_grad<KeyGrad_##name>(params);                                                                \
  }

BACKWARD(bf16_d32, Bf16, 32)
BACKWARD(bf16_d64, Bf16, 64)
BACKWARD(bf16_d96, Bf16, 96)
BACKWARD(bf16_d128, Bf16, 128)
BACKWARD(bf16_d256, Bf16, 256)
BACKWARD(f16_d32, F16, 32)
BACKWARD(f16_d64, F16, 64)
BACKWARD(f16_d96, F16, 96)
BACKWARD(f16_d128, F16, 128)
BACKWARD(f16_d256, F16, 256)

SEGATTN_LAYOUT(attention_backward)
