#include "key_grad_hopper.cuh"
#define K(name, T, kHeadDim) using KeyGrad_##name = KeyGradConfig<T, kHeadDim>; SEGATTN_INFO(attention_key_grad_hopper_##name, key_grad_info<KeyGrad_##name>()) SEGATTN_KERNEL(attention_key_grad_hopper_##name, KeyGrad_##name, SegattnBackwardParams) { attention_key_grad<KeyGrad_##name>(params); }
K(bf16_d64, Bf16, 64)
K(bf16_d128, Bf16, 128)
