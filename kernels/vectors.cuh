// Sixteen bytes at a time: how the layers' kernels read and write, and where element i of a row is.
#pragma once
#include "layer_params.h"
#include "ptx.cuh"

constexpr int kVector = 8;  // elements a thread handles at a time

SEGATTN_FN void unpack_vector(float (&x)[kVector], uint4 v) {
  const uint32_t pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    x[2 * i] = widen((uint16_t)pairs[i], Bf16{});
    x[2 * i + 1] = widen((uint16_t)(pairs[i] >> 16), Bf16{});
  }
}
SEGATTN_FN uint4 pack_vector(const float (&x)[kVector]) {
  return make_uint4(pack<Bf16>(x[0], x[1]), pack<Bf16>(x[2], x[3]), pack<Bf16>(x[4], x[5]), pack<Bf16>(x[6], x[7]));
}

SEGATTN_FN void load_vector(float (&x)[kVector], const Bf16* p) { unpack_vector(x, *(const uint4*)p); }
SEGATTN_FN void load_vector(float (&x)[kVector], const float* p) {
  const float4 a = ((const float4*)p)[0], b = ((const float4*)p)[1];
  const float values[kVector] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
  for (int i = 0; i < kVector; i++) x[i] = values[i];
}
SEGATTN_FN void store_vector(Bf16* p, const float (&x)[kVector]) { *(uint4*)p = pack_vector(x); }
SEGATTN_FN void store_vector(float* p, const float (&x)[kVector]) {
  ((float4*)p)[0] = make_float4(x[0], x[1], x[2], x[3]);
  ((float4*)p)[1] = make_float4(x[4], x[5], x[6], x[7]);
}
// What a bf16 in memory makes of a value.
SEGATTN_FN float round_bf16(float x) { return widen((uint16_t)pack<Bf16>(x, 0.f), Bf16{}); }

// One element.
SEGATTN_FN float load_one(const Bf16* p) { return widen(p->bits, Bf16{}); }
SEGATTN_FN float load_one(const float* p) { return *p; }
SEGATTN_FN void store_one(Bf16* p, float x) { p->bits = (uint16_t)pack<Bf16>(x, 0.f); }
SEGATTN_FN void store_one(float* p, float x) { *p = x; }

template <class T>
SEGATTN_FN T* row_of(const SegattnRows& rows, int64_t row) {
  return (T*)rows.data + row * rows.stride;
}

// This thread's number in the grid: 32 bits, because dividing 64 costs more than the rows' memory traffic.
SEGATTN_FN uint32_t thread_index() {
  if (gridDim.x > 0xffffffffu / blockDim.x) __trap();
  return blockIdx.x * blockDim.x + threadIdx.x;
}
