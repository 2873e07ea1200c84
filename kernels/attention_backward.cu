// Segment attention, backward, in three kernels:
//   prepare      row_delta = d_out . out - d_lse, row_lse = lse in base 2           (attention_prepare.cuh)
//   query_grad   d_q and d_past_gate, from past, prior and current keys              (query_grad.cuh)
//   key_grad     d_k and d_v of prior and current keys; past keys get none           (key_grad.cuh)
// and a fourth, query_grad_sum, which sums d_q over KV splits (attention_gradients.cuh). Gradients are set, not added
// to; padding rows become 0. Each gradient has one writer and a fixed order of sums; there is no atomic on a float
// (docs/kernels.md).
#include "attention_prepare.cuh"
#include "key_grad.cuh"
#include "layout.cuh"
#include "query_grad.cuh"

// Grids. prepare: batch * q_heads * row_pitch rows. query_grad: a block a work tile. query_grad_sum: 4 rows a block,
// of batch * q_heads * rows, or of one row a head if no tile has several splits. key_grad: a block a key tile,
// batch * kv_heads * (prior tiles, unless read_only_prior, + current tiles).
#define BACKWARD(name, T, kHeadDim)                                                       \
  using QueryGrad_##name = QueryGradConfig<T, kHeadDim>;                                  \
  using KeyGrad_##name = KeyGradConfig<T, kHeadDim>;                                      \
  using Prepare_##name = PrepareRows<T, kHeadDim>;                                        \
  SEGATTN_INFO(attention_prepare_##name, prepare_info<Prepare_##name>())                  \
  SEGATTN_INFO(attention_query_grad_##name, query_grad_info<QueryGrad_##name>())          \
  SEGATTN_INFO(attention_key_grad_##name, key_grad_info<KeyGrad_##name>())                \
  SEGATTN_KERNEL(attention_prepare_##name, PrepareConfig, SegattnBackwardParams) {        \
    attention_prepare<Prepare_##name>(params);                                            \
  }                                                                                       \
  SEGATTN_KERNEL(attention_query_grad_##name, QueryGrad_##name, SegattnBackwardParams) {  \
    attention_query_grad<QueryGrad_##name>(params);                                       \
  }                                                                                       \
  SEGATTN_KERNEL(attention_query_grad_sum_##name, PrepareConfig, SegattnBackwardParams) { \
    attention_query_grad_sum<QueryGrad_##name>(params);                                   \
  }                                                                                       \
  SEGATTN_KERNEL(attention_key_grad_##name, KeyGrad_##name, SegattnBackwardParams) {      \
    attention_key_grad<KeyGrad_##name>(params);                                           \
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
