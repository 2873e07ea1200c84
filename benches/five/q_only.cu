#include "query_grad_hopper.cuh"
#include "layout.cuh"
#define Q(name, T, kHeadDim) using QueryGrad_##name = QueryGradConfig<T, kHeadDim>; SEGATTN_INFO(attention_query_grad_hopper_##name, query_grad_info<QueryGrad_##name>()) SEGATTN_KERNEL(attention_query_grad_hopper_##name, QueryGrad_##name, SegattnBackwardParams) { attention_query_grad<QueryGrad_##name>(params); }
Q(bf16_d64, Bf16, 64)
Q(bf16_d128, Bf16, 128)
