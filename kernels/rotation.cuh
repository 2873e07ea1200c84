// Rotation of a head, "rotate half": elements i and i + half are a pair. A thread rotates eight pairs.
#pragma once
#include "vectors.cuh"

struct Pairs {
  float lo[kVector], hi[kVector];
};

SEGATTN_FN Pairs load_pairs(const Bf16* g_head, int pair, int half) {
  Pairs x;
  load_vector(x.lo, g_head + pair);
  load_vector(x.hi, g_head + half + pair);
  return x;
}
SEGATTN_FN void store_pairs(Bf16* g_head, int pair, int half, const Pairs& x) {
  store_vector(g_head + pair, x.lo);
  store_vector(g_head + half + pair, x.hi);
}

SEGATTN_FN Pairs turned(const Pairs& x, const float* g_cos, const float* g_sin, int64_t at, float direction) {
  float r_cos[kVector], r_sin[kVector];
  load_vector(r_cos, g_cos + at);
  load_vector(r_sin, g_sin + at);
  Pairs y;
#pragma unroll
  for (int e = 0; e < kVector; e++) {
    const float sin = direction * r_sin[e];
    y.lo[e] = fma_rn(x.lo[e], r_cos[e], -mul_rn(x.hi[e], sin));
    y.hi[e] = fma_rn(x.hi[e], r_cos[e], mul_rn(x.lo[e], sin));
  }
  return y;
}
