// Segment attention, backward, for Hopper: d_q, and d_k with d_v, of attention_backward.cu on wgmma. Sums are in the
// order of those kernels, and so are the bits, except for d_q in KV splits and gates, whose key tiles differ at D
// 128.
//
// One block a multiprocessor takes work tiles until none is left. A producer warpgroup copies, two or three consumer
// warpgroups have 64 rows each: queries against tiles of keys (query_grad_hopper.cuh), keys against tiles of queries
// (key_grad_hopper.cuh). A warpgroup's softmax overlaps with its own product in flight and with the other warpgroups'
// products.
//
// Two passes compute seven products for a pair of tiles. With the entry points named "stored" they are five: the d_k
// pass comes first and stores dS, for the groups of a launch (stored_ds.cuh), and the d_q pass reads it.
#include "key_grad_hopper.cuh"
#include "layout.cuh"
#include "query_grad_hopper.cuh"

// Grids. query_grad, key_grad: as many blocks as run at once; they take q_heads * batch * tiles * max_splits work
// tiles, and key tiles as in attention_backward.cu. query_grad_sum: as there.
#define BACKWARD(name, T, kHeadDim)                                                              \
  using QueryGrad_##name = QueryGradConfig<T, kHeadDim>;                                         \
  using KeyGrad_##name = KeyGradConfig<T, kHeadDim>;                                             \
  SEGATTN_INFO(attention_query_grad_hopper_##name, query_grad_info<QueryGrad_##name>())          \
  SEGATTN_INFO(attention_key_grad_hopper_##name, key_grad_info<KeyGrad_##name>())                \
  SEGATTN_KERNEL(attention_query_grad_hopper_##name, QueryGrad_##name, SegattnBackwardParams) {  \
    attention_query_grad<QueryGrad_##name>(params);                                              \
  }                                                                                              \
  SEGATTN_KERNEL(attention_query_grad_sum_hopper_##name, PrepareConfig, SegattnBackwardParams) { \
    attention_query_grad_sum<QueryGrad_##name>(params);                                          \
  }                                                                                              \
  SEGATTN_KERNEL(attention_key_grad_hopper_##name, KeyGrad_##name, SegattnBackwardParams) {      \
    attention_key_grad<KeyGrad_##name>(params);                                                  \
  }

BACKWARD(bf16_d64, Bf16, 64)
BACKWARD(bf16_d128, Bf16, 128)
BACKWARD(f16_d64, F16, 64)
BACKWARD(f16_d128, F16, 128)

#define STORED(name, T, kHeadDim)                                                                       \
  using QueryGradStored_##name = QueryGradConfig<T, kHeadDim, true>;                                    \
  using KeyGradStored_##name = KeyGradConfig<T, kHeadDim, true>;                                        \
  SEGATTN_INFO(attention_query_grad_stored_hopper_##name, query_grad_info<QueryGradStored_##name>())    \
  SEGATTN_INFO(attention_key_grad_stored_hopper_##name, key_grad_info<KeyGradStored_##name>())          \
  SEGATTN_KERNEL(attention_query_grad_stored_hopper_##name, QueryGradStored_##name,                     \
                 SegattnBackwardParams) {                                                               \
    attention_query_grad<QueryGradStored_##name>(params);                                               \
  }                                                                                                     \
  SEGATTN_KERNEL(attention_key_grad_stored_hopper_##name, KeyGradStored_##name, SegattnBackwardParams) { \
    attention_key_grad<KeyGradStored_##name>(params);                                                   \
  }

STORED(bf16_d128, Bf16, 128)
STORED(f16_d128, F16, 128)

SEGATTN_LAYOUT(attention_backward_hopper)
