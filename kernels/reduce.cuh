// Sums, maxima and the like over a block, in an order that depends only on its number of threads: a tree over the lanes
// of a warp, then the warps in order. Every thread gets the result.
#pragma once
#include "ptx.cuh"

constexpr int kMaxWarps = 32;

struct SumOf {
  SEGATTN_FN float join(float a, float b) { return a + b; }
};
struct MaxOf {
  SEGATTN_FN float join(float a, float b) { return max_f32(a, b); }
};

template <class Op, class T>
SEGATTN_FN T warp_reduce(T x) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) x = Op::join(x, shuffle_xor(x, mask));
  return x;
}

// s_warps: one value a warp. The caller may reuse it only after the next barrier.
template <class Op, class T>
SEGATTN_FN T block_reduce(T x, T (&s_warps)[kMaxWarps]) {
  x = warp_reduce<Op>(x);
  if (blockDim.x == 32) return x;
  if ((threadIdx.x & 31) == 0) s_warps[threadIdx.x >> 5] = x;
  __syncthreads();
  x = s_warps[0];
  for (int warp = 1; warp < (int)blockDim.x / 32; warp++) x = Op::join(x, s_warps[warp]);
  return x;
}

// The same for sums in f64.
struct Halves {
  uint32_t low, high;
};
SEGATTN_FN Halves halves_of(double x) {
  Halves halves;
  memcpy(&halves, &x, sizeof(x));
  return halves;
}
SEGATTN_FN double joined(Halves halves) {
  double x;
  memcpy(&x, &halves, sizeof(x));
  return x;
}
SEGATTN_FN double shuffle_xor(double x, int mask) {
  const Halves own = halves_of(x);
  return joined({__shfl_xor_sync(0xffffffffu, own.low, mask), __shfl_xor_sync(0xffffffffu, own.high, mask)});
}
SEGATTN_FN double shuffle_up(double x, int delta) {
  const Halves own = halves_of(x);
  return joined({__shfl_up_sync(0xffffffffu, own.low, delta), __shfl_up_sync(0xffffffffu, own.high, delta)});
}
SEGATTN_FN double block_sum(double x, double (&s_warps)[kMaxWarps]) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  if ((threadIdx.x & 31) == 0) s_warps[threadIdx.x >> 5] = x;
  __syncthreads();
  x = s_warps[0];
  for (int warp = 1; warp < (int)blockDim.x / 32; warp++) x += s_warps[warp];
  return x;
}
